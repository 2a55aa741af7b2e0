"""Gives the claims what they share beyond `sdcore.demo.experiment`: wrong maps, teachers, costs, and curves.

Every arm of a seed starts from the same weights, meets the same new task and is measured on the same questions. What an
arm does in a step is its claim's own business: a function that leaves gradients behind and says what it cost.

What differs from the obvious: *tokens* counts everything that a model read or wrote in training, that is sampling, the
student's pass and the teacher's pass, so that a method with a teacher pays for it on this axis; *samples* counts the
completions that were learned from. Measuring costs neither.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from transformers import PreTrainedModel

from sdcore.demo.experiment import Base, Exam, Task, learn, load_base, nothing
from sdcore.prefix import generate
from sdcore.teachers import EMA, Frozen, Live, Teacher, TrustRegion
from sdcore.world.episodes import random_digits
from sdcore.world.language import OPEN_NAMES

from .records import Point

TeacherKind = Literal["live", "frozen", "ema", "trust_region"]
BATCH = 32  # completions in a step
GAP = 5 * BATCH  # samples between the closest checkpoints: how well a time can be known
# Dense where things happen; a run stops at its own number of steps.
CHECKPOINTS = (5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 120, 160, 200, 280, 360, 480)


@lru_cache(maxsize=1)
def base() -> Base:
    """Loads the small world's checkpoint once per process."""
    return load_base()


def sample(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, count: int = 1, room: int = 11
) -> list[list[list[int]]]:
    """Draws `count` completions of each prompt at temperature 1, with torch's global generator.

    `room` for new tokens suffices for a decorated answer.
    """
    tokenizer = base().tokenizer
    drawn = generate(
        model,
        prompts,
        num_completions=count,
        max_new_tokens=room,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [[ids.tolist() for ids in group] for group in drawn.completions]


def text_of(completion: Sequence[int]) -> str:
    return str(base().tokenizer.decode(completion))


def draw_tasks(rng: random.Random, count: int) -> list[Task]:
    """Draws tasks with different names; a task's wrong map differs from its map at every letter."""
    tasks = []
    for name in rng.sample(OPEN_NAMES, k=count):
        digits = random_digits(rng)
        wrong = "".join(str((int(digit) + rng.randint(1, 9)) % 10) for digit in digits)
        tasks.append(Task(name, digits, wrong))
    return tasks


def exam_of(seed: int, *, episodes: int, tasks: int = 1) -> Exam:
    """Draws the tasks and the questions of a seed, `episodes` of each kind."""
    rng = random.Random(seed)
    return Exam(base(), draw_tasks(rng, tasks), rng, seed=seed, episodes=episodes)


def measure(exam: Exam, model: PreTrainedModel) -> Point:
    """Returns the exam's skills by name; lenient, `_strict` for the native style.

    "kept" is the mean of prior and in-context ability: what training has not destroyed.
    """
    skills = exam.skills(model)
    return {
        "new": skills["new"].lenient,
        "new_strict": skills["new"].strict,
        "prior": skills["prior"].lenient,
        "in_context": skills["in_context"].lenient,
        "in_context_strict": skills["in_context"].strict,
        "kept": (skills["prior"].lenient + skills["in_context"].lenient) / 2,
    }


class Cost(NamedTuple):
    """Counts what a step took: completions that were learned from, and tokens through any model."""

    samples: int
    tokens: int


class Teaching(NamedTuple):
    """Says whose weights the teacher has, and what happens to them after each optimizer step."""

    teacher: Teacher | TrustRegion
    after: Callable[[], None]


def teaching(kind: TeacherKind, student: PreTrainedModel, *, update_rate: float = 0.05) -> Teaching:
    """Makes a teacher for a student that is about to be trained; frozen means as the student is now."""
    if kind == "live":
        return Teaching(Live(), nothing)
    if kind == "ema":
        average = EMA(student, update_rate=update_rate)
        return Teaching(average, lambda: average.update(student, 0))
    frozen = Frozen(copy.deepcopy(student).requires_grad_(False))
    return Teaching(frozen if kind == "frozen" else TrustRegion(frozen, share=0.5), nothing)


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
    after: Callable[[], None] = nothing,
    stop: Callable[[Point], bool] = lambda point: False,
) -> list[Point]:
    """Trains as `sdcore.demo.experiment.learn` does; returns points at the start, at each checkpoint, and at the end.

    `stop` ends the run at a checkpoint.
    """
    samples = tokens = 0
    points = [{"step": 0.0, "samples": 0.0, "tokens": 0.0} | measure(student)]
    costs = learn(student, step, learning_rate=learning_rate, steps=steps, seed=seed, decay=decay, after=after)
    for number, cost in enumerate(costs, start=1):
        samples, tokens = samples + cost.samples, tokens + cost.tokens
        if number in CHECKPOINTS or number == steps:
            where = {"step": float(number), "samples": float(samples), "tokens": float(tokens)}
            points.append(where | measure(student))
            if stop(points[-1]):
                break
    return points
