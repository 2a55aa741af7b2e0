"""What the claims share: the small world's model, the task of a seed, what is measured, and the training loop.

Every arm of a seed starts from the same weights, meets the same new task (an open name with a random letter→digit map)
and is measured on the same questions. What an arm does in a step is its claim's own business: a function that leaves
gradients behind and says what it cost.

What differs from the obvious: *tokens* counts everything that a model read or wrote in training, that is sampling, the
student's pass and the teacher's pass, so that a method with a teacher pays for it on this axis; *samples* counts the
completions that were learned from. Measuring costs neither.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import world
from ..prefix import generate
from ..teachers import EMA, Frozen, Live, Teacher, TrustRegion
from ..world.episodes import Episode, hinted, mapped, prior, random_digits
from ..world.language import OPEN_NAMES
from ..world.verifier import accuracy, answer_ids, prompt_ids
from .records import Point

CHECKPOINT = Path(world.__file__).parent / "checkpoint"
TeacherKind = Literal["live", "frozen", "ema", "trust_region"]
BATCH = 32  # completions in a step
GAP = 5 * BATCH  # samples between the closest checkpoints: how well a time can be known
# Dense where things happen; a run stops at its own number of steps.
CHECKPOINTS = (5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 120, 160, 200, 280, 360, 480)


class Task(NamedTuple):
    """An open name with a map that is nowhere in the weights, and another map that is wrong everywhere."""

    name: str
    digits: str
    wrong: str


class Base(NamedTuple):
    """The small world's checkpoint. Nobody trains it: `fresh` gives copies."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def fresh(self) -> PreTrainedModel:
        return copy.deepcopy(self.model).requires_grad_(True)

    def prompts(self, episodes: Sequence[Episode]) -> list[list[int]]:
        return [prompt_ids(self.tokenizer, episode) for episode in episodes]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        return [answer_ids(self.tokenizer, text) for text in texts]

    def sample(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, count: int = 1, room: int = 11
    ) -> tuple[list[list[list[int]]], torch.Tensor]:
        """`count` completions of each prompt at temperature 1, and the log-probabilities (N,) they were drawn with.

        `room` for new tokens suffices for a decorated answer. Uses torch's global generator.
        """
        out = generate(
            model,
            prompts,
            num_completions=count,
            max_new_tokens=room,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return [[ids.tolist() for ids in group] for group in out.completions], out.logprobs

    def text(self, completion: Sequence[int]) -> str:
        return str(self.tokenizer.decode(completion))


@lru_cache(maxsize=1)
def base() -> Base:
    """Loaded once per process."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return Base(model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(CHECKPOINT))


def draw_tasks(rng: random.Random, count: int) -> list[Task]:
    """Tasks with different names; a task's wrong map differs from its map at every letter."""
    tasks = []
    for name in rng.sample(OPEN_NAMES, k=count):
        digits = random_digits(rng)
        wrong = "".join(str((int(digit) + rng.randint(1, 9)) % 10) for digit in digits)
        tasks.append(Task(name, digits, wrong))
    return tasks


class Exam:
    """The questions of a seed: the new tasks, prior tasks, and hints about names that are not being learned."""

    def __init__(self, seed: int, *, episodes: int, tasks: int = 1) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.tasks = draw_tasks(rng, tasks)
        others = [name for name in OPEN_NAMES if name not in {task.name for task in self.tasks}]
        self.new = [[mapped(task.name, task.digits, rng) for _ in range(episodes)] for task in self.tasks]
        self.prior = [prior(rng) for _ in range(episodes)]
        self.in_context = [hinted(rng, names=others) for _ in range(episodes)]

    @property
    def task(self) -> Task:
        return self.tasks[0]

    def batch(self, rng: random.Random, count: int = BATCH, task: int = 0) -> list[Episode]:
        """Questions to learn from."""
        name, digits, _ = self.tasks[task]
        return [mapped(name, digits, rng) for _ in range(count)]

    def right(self, model: PreTrainedModel, episodes: list[Episode]) -> tuple[float, float]:
        """Shares of sampled answers that are right, lenient and strict. Leaves the random state as it was."""
        found = accuracy(model, base().tokenizer, episodes, seed=self.seed)
        return found.lenient, found.strict

    def measure(self, model: PreTrainedModel) -> Point:
        """New task (mean over tasks), prior tasks and learning in context; lenient, `_strict` for the native style.

        "kept" is the mean of prior and in-context ability: what training has not destroyed.
        """
        new = [self.right(model, questions) for questions in self.new]
        old, in_context = self.right(model, self.prior)[0], self.right(model, self.in_context)
        return {
            "new": sum(lenient for lenient, _ in new) / len(new),
            "new_strict": sum(strict for _, strict in new) / len(new),
            "prior": old,
            "in_context": in_context[0],
            "in_context_strict": in_context[1],
            "kept": (old + in_context[0]) / 2,
        }


class Cost(NamedTuple):
    """What a step took: completions that were learned from, and tokens through any model."""

    samples: int
    tokens: int


class Teaching(NamedTuple):
    """Whose weights the teacher has, and what happens to them after each optimizer step."""

    teacher: Teacher | TrustRegion
    after: Callable[[], None]


def teaching(kind: TeacherKind, student: PreTrainedModel, *, update_rate: float = 0.05) -> Teaching:
    """A teacher for a student that is about to be trained; frozen means as the student is now."""
    if kind == "live":
        return Teaching(Live(), _nothing)
    if kind == "ema":
        average = EMA(student, update_rate=update_rate)
        return Teaching(average, lambda: average.update(student, 0))
    frozen = Frozen(copy.deepcopy(student).requires_grad_(False))
    return Teaching(frozen if kind == "frozen" else TrustRegion(frozen, share=0.5), _nothing)


def _nothing() -> None:
    """What most teachers do after a step."""


def total_length(*lists: Sequence[Sequence[int]]) -> int:
    return sum(len(ids) for sequences in lists for ids in sequences)


def train(
    student: PreTrainedModel,
    step: Callable[[random.Random], Cost],
    measure: Callable[[PreTrainedModel], Point],
    *,
    learning_rate: float,
    steps: int,
    seed: int,
    decay: bool = False,
    after: Callable[[], None] = _nothing,
    stop: Callable[[Point], bool] = lambda point: False,
) -> list[Point]:
    """AdamW at a constant rate, gradient norm at most 1; a point at the start, at each checkpoint, and at the end.

    `step` draws questions from the generator it is given and leaves gradients in the student; with `decay` the rate
    falls linearly to zero; `after` follows the optimizer (an EMA teacher's update); `stop` ends the run at a
    checkpoint. The same seed gives the same run.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps if decay else 1.0)
    rng = random.Random(seed + 1)
    torch.manual_seed(seed + 1)
    samples = tokens = 0
    points = [{"step": 0.0, "samples": 0.0, "tokens": 0.0} | measure(student)]
    for number in range(1, steps + 1):
        cost = step(rng)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after()
        samples, tokens = samples + cost.samples, tokens + cost.tokens
        if number in CHECKPOINTS or number == steps:
            where = {"step": float(number), "samples": float(samples), "tokens": float(tokens)}
            points.append(where | measure(student))
            if stop(points[-1]):
                break
    return points


__all__ = [
    "BATCH",
    "GAP",
    "Base",
    "Cost",
    "Exam",
    "Task",
    "TeacherKind",
    "Teaching",
    "base",
    "draw_tasks",
    "teaching",
    "total_length",
    "train",
]
