"""Reinforcement learning as distillation: the teacher is the reference model, tilted by the reward.

    python examples/rl_tilt.py            # a minute on one core

There is no context and no critic. Of the distribution `p* ∝ p_ref·exp(inv_temperature·reward)` over whole responses,
eight samples of each prompt estimate the gradient of the reverse KL to it. `inv_temperature` says how far the model may
go from the reference for a reward.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import sdcore.world
from sdcore import SelfDistillationConfig, SelfDistillationTrainer
from sdcore.presets import preset
from sdcore.world.data import fraction, rows

CHECKPOINT = Path(sdcore.world.__file__).parent / "checkpoint"


def main(steps: int = 60, output: str | None = None) -> float:
    """Returns the mean reward afterwards: the share of an answer's pairs that are right."""
    torch.set_num_threads(1)
    trainer = SelfDistillationTrainer(
        str(CHECKPOINT),
        SelfDistillationConfig(
            output_dir=output or tempfile.mkdtemp(),
            learning_rate=3e-4,
            max_steps=steps,
            per_device_train_batch_size=8,  # prompts, each with eight completions
            max_completion_length=8,
            logging_steps=10,
            save_strategy="no",
        ),
        method=preset("rl_tilt", inv_temperature=20.0, logz="group_var"),
        train_dataset=rows("rl", task="sefa", count=2_000, seed=0),
        eval_dataset=rows("rl", task="sefa", count=200, seed=0, split="eval"),
        reward_funcs=[fraction],
    )
    before = trainer.evaluate()["eval_reward_mean"]
    trainer.train()
    after = trainer.evaluate()["eval_reward_mean"]
    trainer.log({"before": before, "after": after})
    return after


if __name__ == "__main__":
    main()
