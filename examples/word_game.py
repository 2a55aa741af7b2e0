"""A conversation is learned turn by turn: each turn's teacher knows what the environment says about it.

    python examples/word_game.py            # half a minute on one core

The game asks four questions, and says after each answer which pairs were wrong. A model that is told can use it in the
same game; one that has learned needs no telling. The teacher of a turn reads the trajectory up to there, and what is
said about this very turn at the end of the question: what it reads beyond the student's tokens is all that it costs.
"""

from __future__ import annotations

import tempfile

import torch

from sdcore import SelfDistillationConfig, SelfDistillationTrainer
from sdcore.presets import preset
from sdcore.rollouts.environments import Reply
from sdcore.types import Example, Message
from sdcore.world import TALKS
from sdcore.world.data import rows


class Game:
    """Asks a row's questions. An object plays one game at a time."""

    def reset(self, example: Example) -> None:
        self.digits, self.left = example.columns["digits"], list(example.columns["questions"])

    def step(self, message: Message) -> Reply:
        letters, said = self.left.pop(0).split()[1:], message["content"].split()
        right = [letter + self.digits["abcdefghij".index(letter)] for letter in letters]
        wrong = [pair for place, pair in enumerate(right) if said[place : place + 1] != [pair]]
        return Reply(
            " ".join([*(f"H {pair}" for pair in wrong), *self.left[:1]]) or None,  # to the student, before it goes on
            done=not self.left,
            reward=(len(right) - len(wrong)) / 20,
            feedback=" ".join(f"H {pair}" for pair in right) if wrong else None,  # to the teacher of this turn
        )


def main(steps: int = 25, output: str | None = None) -> tuple[float, float]:
    """Returns the share of pairs that are right in new games, before and after."""
    torch.set_num_threads(1)
    trainer = SelfDistillationTrainer(
        str(TALKS),
        SelfDistillationConfig(
            output_dir=output or tempfile.mkdtemp(),
            learning_rate=1e-3,
            max_steps=steps,
            per_device_train_batch_size=4,  # rows, each with eight games
            max_completion_length=11,
            save_strategy="no",
        ),
        method=preset("turn_hindsight", context="turn_feedback", template="{{ prompt }} {{ feedback }}"),
        train_dataset=rows("quiz", task="tiko", count=500, seed=0),
        eval_dataset=rows("quiz", task="tiko", count=50, seed=0, split="eval"),
        environment_factory=Game,
    )
    before = trainer.evaluate()["eval_reward_mean"]
    trainer.train()
    after = trainer.evaluate()["eval_reward_mean"]
    trainer.log({"before": before, "after": after})
    return before, after


if __name__ == "__main__":
    main()
