"""Tests claim (e): a long instruction can be distilled into the weights, and the prompt does without it afterwards.

Context distillation (arXiv:2209.15189) and its on-policy form: the instruction is the whole map of a new task as ten
hints, in a random order each time. The teacher reads it before every question, the student never does.

Arms differ in whose answers are learned from and how: the student's own with the teacher's distributions (reverse or
forward KL), the teacher's own with its distributions (the way of 2209.15189), or the teacher's own as plain targets.
Controls: a *wrong* instruction, another map of the same form; and a *live* teacher, which moves with what it teaches.

What differs from the SDFT study: the instruction does not depend on the question, and it says more than the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from transformers import PreTrainedModel

from sdcore.demo.experiment import Exam
from sdcore.losses import FusedLinearDivergence
from sdcore.prefix import plan
from sdcore.step import distill_step, imitate_step
from sdcore.world.episodes import Episode
from sdcore.world.language import LETTERS

from .experiment import (
    BATCH,
    Cost,
    TeacherKind,
    Teaching,
    base,
    exam_of,
    measure,
    sample,
    teaching,
    total_length,
    train,
)
from .records import Arm, Column, Panel, Point, Results, Study, Verdict, compare, final, matched, sparing

LEVEL = 0.9  # of the new task, without the instruction


@dataclass(frozen=True, kw_only=True)
class ContextArm(Arm):
    answers: Literal["student", "teacher"] = "student"  # who writes what is learned from
    alpha: float | None = 1.0  # 1: reverse KL, 0: forward KL, None: the answers themselves are the targets
    teacher: TeacherKind = "frozen"
    wrong: bool = False  # the instruction is of another map


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 100
    episodes: int = 150  # questions of a measurement


def instructed(episode: Episode, digits: str, rng: random.Random) -> Episode:
    """Puts the question after the whole map, in random order."""
    return replace(episode, hints=tuple(letter + digits[LETTERS.index(letter)] for letter in rng.sample(LETTERS, 10)))


def step(student: PreTrainedModel, arm: ContextArm, exam: Exam, taught: Teaching, rng: random.Random) -> Cost:
    """Leaves the gradients of one batch."""
    episodes = exam.batch(rng, BATCH)
    prompts = base().prompts(episodes)
    digits = exam.task.wrong if arm.wrong else exam.task.digits
    contexts = base().prompts([instructed(episode, digits, rng) for episode in episodes])
    by_student = arm.answers == "student"
    # The teacher that writes is the frozen one: it is the checkpoint itself.
    writer, read = (student, prompts) if by_student else (base().model, contexts)
    completions = sample(writer, read)
    answers = [completion for group in completions for completion in group]
    cost = total_length(read, answers) + total_length(prompts, answers)
    if arm.alpha is None:
        imitate_step(student, plan(prompts, [[answer] for answer in answers]))
        return Cost(BATCH, cost)
    loss = FusedLinearDivergence(alpha=arm.alpha)
    distill_step(student, plan(prompts, completions, contexts), loss=loss, teacher=taught.teacher)
    return Cost(BATCH, cost + total_length(contexts, answers))


def run(arm: ContextArm, settings: Settings, learning_rate: float, seed: int) -> list[Point]:
    """Trains one arm; its points have the ceiling too: "taught" is the base model with the instruction in view."""
    exam = exam_of(seed, episodes=settings.episodes)
    student = base().fresh()
    taught = teaching(arm.teacher, student)
    rng = random.Random(seed)
    ceiling = exam.right(base().model, [instructed(each, exam.task.digits, rng) for each in exam.new[0]]).strict
    return train(
        student,
        partial(step, student, arm, exam, taught),
        lambda model: measure(exam, model) | {"taught": ceiling},
        learning_rate=learning_rate,
        steps=settings.steps,
        seed=seed,
        after=taught.after,
    )


def short_of_teacher(points: Sequence[Point]) -> float:
    """Returns how far the student without the instruction ends below the teacher with it; strict."""
    return points[-1]["taught"] - points[-1]["new_strict"]


def judge(results: Results) -> list[Verdict]:
    say = partial(compare, results)
    kept = matched("kept", "new", LEVEL)
    gap = results.estimate("reverse", short_of_teacher)
    verdicts = []
    if gap is not None:
        error = max(gap.error, results.resolution)
        close = gap.mean <= 0.05 and gap.mean - 0.05 <= error
        verdicts.append(
            Verdict(
                "reproduced" if close else "not reproduced",
                "Without the instruction the student (reverse KL) is within 0.05 of the teacher that reads it: "
                f"{gap.mean:+.3f} ± {error:.3f} below.",
            )
        )
    return [
        *verdicts,
        say(
            "A right instruction teaches the task, a wrong one of the same form does not",
            *("reverse", "wrong", final("new")),
            margin=0.5,
        ),
        say(
            "The student's own answers keep more than the teacher's, at matched accuracy (forward KL)",
            *("forward", "forward-teacher", kept),
        ),
        say(
            "The teacher's distributions keep more than its answers alone, at matched accuracy",
            *("forward-teacher", "imitation", kept),
        ),
        say("Reverse KL keeps more than forward KL at matched accuracy", "reverse", "forward", kept),
        say("A frozen teacher keeps more than a live one after equal steps", "reverse", "live", final("kept")),
    ]


STUDIES = (
    Study(
        name="context",
        claim="context",
        title="Context distillation of a long instruction",
        claimed="A model learns what an instruction in its context makes it do, and does it without the instruction.",
        arms=(
            ContextArm(name="reverse", title="own answers, reverse KL", quick_rate=3e-4),
            ContextArm(name="forward", title="own answers, forward KL", alpha=0.0),
            ContextArm(name="live", title="own answers, reverse KL, live teacher", teacher="live"),
            ContextArm(name="forward-teacher", title="teacher's answers, forward KL", answers="teacher", alpha=0.0),
            ContextArm(name="imitation", title="teacher's answers, cross-entropy", answers="teacher", alpha=None),
            ContextArm(
                name="wrong",
                title="own answers, reverse KL, wrong instruction",
                wrong=True,
                rate_of="context/reverse",
                quick_rate=3e-4,
            ),
        ),
        full=Settings(),
        quick=Settings(steps=30, episodes=60),
        run=run,
        rule="the rate that keeps most (mean of prior tasks and in-context ability) at the first checkpoint where the "
        f"new task is at {LEVEL:g} or above; of rates within 0.01 of the best, the one that needs fewest samples",
        choose=sparing("new", LEVEL, ("prior", "in_context")),
        columns=(
            Column(f"samples to {LEVEL:g}", matched("samples", "new", LEVEL), 0),
            Column("prior, matched", matched("prior", "new", LEVEL)),
            Column("in-context, matched", matched("in_context", "new", LEVEL)),
            Column("teacher, strict", final("taught")),
            Column("new strict, end", final("new_strict")),
            Column("prior, end", final("prior")),
            Column("in-context, end", final("in_context")),
        ),
        panels=(
            Panel("new task without instruction", "new"),
            Panel("prior tasks", "prior"),
            Panel("in-context, other names", "in_context"),
            Panel("new task without instruction", "new", x="tokens"),
        ),
        judge=judge,
        notes="The instruction costs 20 tokens in front of each question; the distilled model reads none of them.",
    ),
)
