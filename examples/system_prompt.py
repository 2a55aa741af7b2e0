"""Context distillation: put a long instruction into the weights, and leave it out of the prompt from then on.

    python examples/system_prompt.py            # half a minute on one core

The instruction is the same for every row. The teacher reads it before it judges the model's answer, and the model
learns to answer as if it had read it. In this world the instruction is a task's whole table; in yours, a system prompt
or a document.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import sdcore.world
from sdcore import SelfDistillationConfig, SelfDistillationTrainer
from sdcore.presets import preset
from sdcore.world.data import exact, rows

CHECKPOINT = Path(sdcore.world.__file__).parent / "checkpoint"


def main(steps: int = 40, output: str | None = None) -> float:
    """Returns the share of right answers without the instruction, afterwards."""
    torch.set_num_threads(1)
    data = rows("context_distillation", task="runa", count=2_000, seed=0)
    instruction = data[0]["privileged_context"]
    questions = [{"messages": row["messages"], "answer": row["answer"]} for row in data]
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
        # Rows need no context of their own: the template holds the instruction.
        method=preset("context_distillation", template="{{ prompt }} " + instruction),
        train_dataset=questions[200:],
        eval_dataset=questions[:200],
        reward_funcs=[exact],
    )
    trainer.train()
    return trainer.evaluate()["eval_reward_mean"]


if __name__ == "__main__":
    main()
