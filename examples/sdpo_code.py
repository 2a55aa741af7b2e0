"""SDPO with a verifier that runs code: what it prints is the feedback that the teacher reads.

    python examples/sdpo_code.py            # two minutes on two cores

A completion becomes a Python program, which a sandboxed subprocess runs with limits on time and memory. The last line
of its error goes into the teacher's prompt, after the question. `sdcore.rollouts.sandbox.code_reward` does the same for
completions that are programs with a column `tests`; it is no security boundary, see there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import sdcore.world
from sdcore import SelfDistillationConfig, SelfDistillationTrainer
from sdcore.presets import preset
from sdcore.rollouts.sandbox import run_limited
from sdcore.world.data import TEMPLATES, rows

CHECKPOINT = Path(sdcore.world.__file__).parent / "checkpoint"
PROGRAM = """
said, right = {completion!r}.split(), {answer!r}.split()
wrong = [pair for place, pair in enumerate(right) if said[place : place + 1] != [pair]]
assert not wrong and len(said) == len(right), " ".join("H " + pair for pair in wrong or right)
"""


def verify(*, prompt: object, completion: str, answer: str, **columns: Any) -> tuple[float, str | None]:
    """1 where the program ends well, else 0 and what its last line says: the right pairs, in this world's words."""
    program = PROGRAM.format(completion=completion, answer=answer)
    result = run_limited(python=program, wall_seconds=5, cpu_seconds=2, memory_mb=256)
    if result.ok:
        return 1.0, None
    last = result.stderr.strip().rpartition("\n")[2]
    return 0.0, last.partition("AssertionError: ")[2] or None


def main(steps: int = 16, output: str | None = None) -> float:
    """Returns the share of right answers afterwards."""
    torch.set_num_threads(1)
    trainer = SelfDistillationTrainer(
        str(CHECKPOINT),
        SelfDistillationConfig(
            output_dir=output or tempfile.mkdtemp(),
            learning_rate=1e-3,
            max_steps=steps,
            per_device_train_batch_size=16,
            max_completion_length=12,
            save_strategy="no",
            reward_workers=4,  # sandboxed programs at a time
        ),
        method=preset("sdpo", template=TEMPLATES["sdpo"], topk=None, num_generations=4),
        train_dataset=rows("sdpo", task="tiko", count=2_000, seed=0),
        eval_dataset=rows("sdpo", task="tiko", count=50, seed=0, split="eval"),
        reward_funcs=[verify],
    )
    trainer.train()
    return trainer.evaluate()["eval_reward_mean"]


if __name__ == "__main__":
    main()
