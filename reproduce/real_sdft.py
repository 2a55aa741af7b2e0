"""Tests SDFT on a real model: from 50 demonstrations, against SFT on the same 50.

A demonstration is a sentence of the handbook as the answer to a question: one of each fact, and twenty more. The
teacher of a question reads its demonstration, the student the question alone, and learns on what it says itself
(arXiv:2601.19897). Questions and measures are those of `real_context`.

What differs from the obvious: a fact that the student never begins to say is not in its samples, which is what the arm
with a quarter of the teacher's samples is for. The first three tokens carry no loss, as in the paper.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from sdcore.presets import SFT, Method, SDFTAsRun, SDFTPaper

from .book import Handbook, question_of, row_of
from .real_exam import GENERAL, book_of, keeps_more, sit, study
from .real_model import Settings, subject_of, train
from .records import Arm, Point, Results, Verdict, compare, exceeds, final

LEVEL: Final = 0.2  # of held-out questions
GRID: Final = (5e-4, 1e-3, 2e-3)


@dataclass(frozen=True, kw_only=True)
class SdftArm(Arm):
    learns: Literal["sdft", "demonstrations"] = "sdft"
    alpha: float = 0.0  # 0: forward KL, 1: reverse KL
    teacher_samples: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SdftSettings(Settings):
    demonstrations: int = 50


def demonstrations(book: Handbook, count: int, seed: int) -> list[dict[str, Any]]:
    """Draws rows to learn from: one of each fact as far as they go, then others."""
    rows = random.Random(seed).sample(book.train, len(book.train))
    first = {row["fact"]: row for row in reversed(rows)}
    rest = [row for row in rows if row is not first[row["fact"]]]
    return [*first.values(), *rest][:count]


def lesson(arm: SdftArm, rows: list[dict[str, Any]]) -> tuple[Method, list[dict[str, Any]]]:
    """Returns an arm's method and the rows that it learns from."""
    if arm.learns == "demonstrations":
        return SFT(), [row_of(question_of(row), completion=row["sentence"]) for row in rows]
    kind = SDFTPaper if arm.alpha == 1.0 else SDFTAsRun
    method = kind(teacher_samples=arm.teacher_samples)
    return method, [row_of(question_of(row), privileged_context=row["sentence"]) for row in rows]


def run(arm: SdftArm, settings: SdftSettings, learning_rate: float, seed: int) -> list[Point]:
    """Trains one arm."""
    subject, book = subject_of(settings.model), book_of(seed, settings.facts)
    method, rows = lesson(arm, demonstrations(book, settings.demonstrations, seed))
    learn = partial(train, subject, method, rows, learning_rate=learning_rate, settings=settings, seed=seed)
    return sit(subject, book, settings, lambda measure: learn(measure=measure))


def judge(results: Results) -> list[Verdict]:
    say = partial(compare, results)
    return [
        exceeds(results, "SDFT (forward KL) learns a tenth of the held-out questions", "sdft", final("right"), 0.1),
        *keeps_more(results, "SDFT (forward KL) keeps more than SFT", "sdft", "sft", LEVEL),
        say("SDFT (forward KL) answers more right after equal steps than SFT", "sdft", "sft", final("right")),
        say(
            "SDFT (forward KL) keeps more general knowledge after equal steps than SFT",
            *("sdft", "sft", final("general")),
            resolution=GENERAL,
        ),
        say("Forward KL answers more right after equal steps than reverse KL", "sdft", "reverse", final("right")),
        say(
            "A quarter of the teacher's samples teach more in equal steps than the student's alone",
            *("quarter", "sdft", final("right")),
        ),
        *keeps_more(
            results, "SDFT with a quarter of the teacher's samples keeps more than SFT", "quarter", "sft", LEVEL
        ),
    ]


AS_SDFT: Final[dict[str, Any]] = {"rate_of": "real_sdft/sdft", "quick_rate": 2e-3}
STUDIES = (
    study(
        "real_sdft",
        "SDFT from 50 demonstrations, against SFT",
        "SDFT learns what demonstrations show, and forgets less than SFT on them.",
        full=SdftSettings(),
        level=LEVEL,
        run=run,
        arms=(
            SdftArm(name="sdft", title="SDFT as run, forward KL", learning_rates=GRID[1:], quick_rate=2e-3),
            SdftArm(
                name="sft",
                title="SFT on the demonstrations",
                learns="demonstrations",
                learning_rates=GRID,
                quick_rate=2e-3,
            ),
            SdftArm(name="reverse", title="SDFT as written, reverse KL", alpha=1.0, **AS_SDFT),
            SdftArm(name="quarter", title="SDFT, a quarter the teacher's samples", teacher_samples=0.25, **AS_SDFT),
        ),
        judge=judge,
        notes="50 of the handbook's sentences, each the answer to one question; the teacher is an average of rate "
        "0.01.",
    ),
)
