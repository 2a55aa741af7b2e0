"""SDFT: learn a task from demonstrations without learning to write like them.

    python examples/sdft.py            # half a minute on one core

Each row has a prompt and, as its privileged context, an expert's demonstration in a foreign style. The model answers
without it; the teacher, an average of the same model's weights, reads the same answer with the demonstration in view.
Your own data has the same two columns: `prompt` (or `messages`) and `privileged_context`.
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
    torch.set_num_threads(1)  # fastest for a model this small
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
        # The paper's first three tokens without a loss are a third of this world's answers.
        method=preset("sdft_as_run", template=TEMPLATES["sdft"], skip_first_tokens=0),
        train_dataset=rows("sdft", task="luma", count=2_000, seed=0),
        eval_dataset=rows("sdft", task="luma", count=200, seed=0, split="eval"),
        reward_funcs=[exact],  # judges the evaluation; SDFT learns without rewards
    )
    before = trainer.evaluate()["eval_reward_mean"]
    trainer.train()
    after = trainer.evaluate()["eval_reward_mean"]
    trainer.log({"before": before, "after": after})
    return after


if __name__ == "__main__":
    main()
