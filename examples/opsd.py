"""OPSD: learn from reference solutions, on one's own attempts.

    python examples/opsd.py            # half a minute on one core

The teacher is the model before training with the reference solution in its prompt. Rows have a `solution` column, which
is read as the privileged context; the divergence is Jensen-Shannon over the full vocabulary, whose logits never exist.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import sdcore.world
from sdcore import SelfDistillationConfig, SelfDistillationTrainer
from sdcore.presets import preset
from sdcore.world.data import TEMPLATES, exact, rows

CHECKPOINT = Path(sdcore.world.__file__).parent / "checkpoint"


def main(steps: int = 40, output: str | None = None) -> float:
    """Returns the share of right answers afterwards."""
    torch.set_num_threads(1)
    trainer = SelfDistillationTrainer(
        str(CHECKPOINT),
        SelfDistillationConfig(
            output_dir=output or tempfile.mkdtemp(),
            learning_rate=3e-4,
            max_steps=steps,
            per_device_train_batch_size=32,
            max_completion_length=12,
            logging_steps=10,
            save_strategy="no",
        ),
        method=preset("opsd", template=TEMPLATES["opsd"]),
        train_dataset=rows("opsd", task="mira", count=2_000, seed=0),
        eval_dataset=rows("opsd", task="mira", count=200, seed=0, split="eval"),
        reward_funcs=[exact],
    )
    trainer.train()
    return trainer.evaluate()["eval_reward_mean"]


if __name__ == "__main__":
    main()
