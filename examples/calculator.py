"""An agent with a tool and a checker: SDPO over trajectories, where tools are plain functions.

    python examples/calculator.py Qwen/Qwen3-0.6B            # a GPU, or patience

The student may call the calculator as often as it has turns. What it calls is read from its own tokens, what the tool
returns is added as the chat template has it, and carries no loss. The checker sees the last answer. What it says is
shown to the teacher, or a trajectory of the same question that was right.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
from typing import Any

from sdcore import SelfDistillationConfig, SelfDistillationTrainer
from sdcore.presets import preset


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def check(*, prompt: object, completion: str, product: int, **columns: Any) -> tuple[float, str | None]:
    """1 where the last number of the last answer is the product, else 0 and what is wrong."""
    numbers = re.findall(r"\d+", completion)
    if numbers and int(numbers[-1]) == product:
        return 1.0, None
    return 0.0, "That is not the product. Call multiply, and answer with what it returns."


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    pairs = [(rng.randint(11, 99), rng.randint(11, 99)) for _ in range(count)]
    asked = "What is {} times {}? Use the tool, and answer with the number."
    return [{"messages": [{"role": "user", "content": asked.format(a, b)}], "product": a * b} for a, b in pairs]


def main(model: Any, steps: int = 50, output: str | None = None, **more: Any) -> dict[str, float]:
    """Returns the metrics of held-out questions afterwards."""
    trainer = SelfDistillationTrainer(
        model,
        SelfDistillationConfig(
            output_dir=output or tempfile.mkdtemp(),
            learning_rate=1e-5,
            max_steps=steps,
            per_device_train_batch_size=2,
            max_completion_length=64,  # of a turn
            max_turns=3,
            chat_template_kwargs={"enable_thinking": False},
            history="as_rendered",  # Qwen3's template takes thinking out of earlier turns
            save_strategy="no",
        ),
        method=preset("sdpo", num_generations=4),
        train_dataset=rows(200, seed=0),
        eval_dataset=rows(8, seed=1),
        tools=[multiply],
        reward_funcs=[check],
        **more,
    )
    trainer.train()
    return trainer.evaluate()  # in the log, too


if __name__ == "__main__":
    main(sys.argv[1])
