"""Sets up learning on the small world: the model, a new task, the questions it is measured on, and the training loop.

Every learner of a seed starts from the same weights, meets the same new task (an open name with a letter→digit map that
is nowhere in the weights) and is measured on the same questions. What a learner does in a step is the caller's own
business: a function that leaves gradients behind. The demo stands on this module, and so do the studies of
`reproduce/`, a folder of the repository.

What differs from the obvious: measuring leaves the random state as it was, so how often one measures changes no run.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sdcore.world import CHECKPOINT
from sdcore.world.episodes import Episode, hinted, mapped, prior
from sdcore.world.language import OPEN_NAMES
from sdcore.world.verifier import Accuracy, accuracy, answer_ids, prompt_ids

Skill = Literal["new", "prior", "in_context"]
Outcome = TypeVar("Outcome")  # of a training step


class Task(NamedTuple):
    """A task to learn is an open name with a map that is nowhere in the weights."""

    name: str
    digits: str
    wrong: str = ""  # another map, wrong at every letter, for studies with a control that has it


class Base(NamedTuple):
    """The model before training, with its tokenizer. Nobody trains it: `fresh` gives copies."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def fresh(self) -> PreTrainedModel:
        return copy.deepcopy(self.model).requires_grad_(True)

    def prompts(self, episodes: Sequence[Episode]) -> list[list[int]]:
        return [prompt_ids(self.tokenizer, episode) for episode in episodes]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        return [answer_ids(self.tokenizer, text) for text in texts]


def load_base(model: str | Path = CHECKPOINT, *, device: str = "cpu") -> Base:
    """Loads a causal model in float32, without dropout in it or in any copy."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return Base(loaded.to(device).eval().requires_grad_(False), tokenizer)


class Exam:
    """The questions of a seed: the new tasks, prior tasks, and hints about names that are not being learned."""

    def __init__(self, base: Base, tasks: Sequence[Task], rng: random.Random, *, seed: int, episodes: int) -> None:
        self.base = base
        self.seed = seed  # of every sampled answer
        self.tasks = list(tasks)
        others = [name for name in OPEN_NAMES if name not in {task.name for task in tasks}]
        self.new = [[mapped(task.name, task.digits, rng) for _ in range(episodes)] for task in tasks]
        self.prior = [prior(rng) for _ in range(episodes)]
        self.in_context = [hinted(rng, names=others) for _ in range(episodes)]

    @property
    def task(self) -> Task:
        return self.tasks[0]

    def batch(self, rng: random.Random, count: int, task: int = 0) -> list[Episode]:
        """Draws questions to learn from."""
        name, digits, _ = self.tasks[task]
        return [mapped(name, digits, rng) for _ in range(count)]

    def right(self, model: PreTrainedModel, episodes: Sequence[Episode]) -> Accuracy:
        """Measures the shares of sampled answers that are right. Leaves the random state as it was."""
        return accuracy(model, self.base.tokenizer, episodes, seed=self.seed)

    def skills(self, model: PreTrainedModel) -> dict[Skill, Accuracy]:
        """Measures what a model can do: the new task (mean over tasks), prior tasks, and learning in context."""
        new = [self.right(model, questions) for questions in self.new]
        return {
            "new": Accuracy(
                lenient=sum(each.lenient for each in new) / len(new),
                strict=sum(each.strict for each in new) / len(new),
                answers=sum(each.answers for each in new),
            ),
            "prior": self.right(model, self.prior),
            "in_context": self.right(model, self.in_context),
        }


def nothing() -> None:
    """Does what most teachers do after a step."""


def learn(
    student: PreTrainedModel,
    step: Callable[[random.Random], Outcome],
    *,
    learning_rate: float,
    steps: int,
    seed: int,
    decay: bool = False,
    after: Callable[[], None] = nothing,
) -> Iterator[Outcome]:
    """Trains with AdamW at a constant rate, gradient norm at most 1; yields what `step` returned, after each update.

    `step` draws questions from the generator it is given and leaves gradients in the student; with `decay` the rate
    falls linearly to zero; `after` follows the optimizer (an EMA teacher's update). The same seed gives the same run,
    as long as whoever iterates leaves torch's random state alone.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps if decay else 1.0)
    rng = random.Random(seed + 1)
    torch.manual_seed(seed + 1)
    for _ in range(steps):
        outcome = step(rng)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after()
        yield outcome
