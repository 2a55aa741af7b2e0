"""Tests context distillation on real models: an invented company's handbook is learned from a teacher that reads it.

Four studies have their runs in common where their arms are the same:

    real_context   the teacher's distributions on its answers, and SFT on the handbook's sentences; both with anchors
    real_teachers  who teaches (frozen, average, live), who samples, and which way the KL goes; its answers alone
    real_controls  a wrong handbook, another question's section, no content, and a fixed advantage of -1
    real_gemma     distillation and SFT on Gemma 3 270M, a base model

Before training each fact has a prediction: by how much the context raises the log-probability of its right answer.
What was learned of the fact is compared with it (`prediction`).

What differs from the obvious: arms are compared where they know equally much, on the line between checkpoints, since
what learns faster has forgotten more after equal steps. The fixed advantage and the teacher without content are the
controls that issue 16 names after arXiv:2609.20612, 2608.31046 and 2608.09228, whose texts could not be read here: they
are our own reading of the names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal

from sdcore.presets import GRPO, SFT, ContextDistillation, Method

from .book import Handbook, question_of, row_of
from .prediction import fact_table, predicted
from .real_exam import GENERAL, LEVEL, PROSE, Shown, book_of, keeps_more, shown_to, sit, study, taught, way
from .real_model import FixedAdvantage, Settings, Subject, base_answers, subject_of, train
from .records import Arm, Point, Results, Verdict, compare, exceeds, final


@dataclass(frozen=True, kw_only=True)
class ContextArm(Arm):
    learns: Literal["distributions", "answers", "sentences", "fixed advantage"] = "distributions"
    writer: Literal["teacher", "student"] = "teacher"  # of what is learned from; the student has a quarter from it
    alpha: float = 0.0  # 0: forward KL, 1: reverse KL
    teacher: Literal["frozen", "ema", "live"] = "frozen"
    shown: Shown = "right"  # to the teacher
    anchored: bool = False  # a quarter of the questions is about anything else, answered as the model did before


def lesson(subject: Subject, book: Handbook, arm: ContextArm) -> tuple[Method, list[dict[str, Any]]]:
    """Returns an arm's method and the rows that it learns from."""
    # A quarter of all rows.
    anchors = answered(subject, book.anchors[: len(book.train) // 3]) if arm.anchored else []
    if arm.learns == "fixed advantage":
        return GRPO(num_generations=2), [row_of(question_of(row)) for row in book.train]
    if arm.learns == "sentences":
        return SFT(), [row_of(question_of(row), completion=row["sentence"]) for row in book.train] + anchors
    rows = [shown_to(book, row, arm.shown) for row in book.train]
    changes: dict[str, Any] = {"anchor": True} if arm.anchored else {}
    if arm.writer == "student":
        changes["teacher_samples"] = 0.25
    else:
        changes["samples"] = "dataset"
        texts = taught(subject, book, arm.shown)
        rows = [row | {"completion": texts[question_of(row)][0]} for row in rows]
        rows = [row for row in rows if row["completion"].strip()] + anchors  # a base model may say nothing
    if arm.learns == "answers":
        return SFT(), [row_of(question_of(row), completion=row["completion"]) for row in rows]
    return ContextDistillation(template=book.template, alpha=arm.alpha, teacher=arm.teacher, **changes), rows


def answered(subject: Subject, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns questions with what the model before training answers."""
    texts = base_answers(subject, rows)[0]
    return [row | {"completion": text} for row, text in zip(rows, texts, strict=True) if text.strip()]


def run(arm: ContextArm, settings: Settings, learning_rate: float, seed: int) -> list[Point]:
    """Trains one arm."""
    subject, book = subject_of(settings.model), book_of(seed, settings.facts)
    method, rows = lesson(subject, book, arm)
    is_fixed = arm.learns == "fixed advantage"
    learn = partial(train, subject, method, rows, learning_rate=learning_rate, settings=settings, seed=seed)
    if is_fixed:
        learn = partial(learn, reward_funcs=[no_reward], kind=FixedAdvantage)
    return sit(subject, book, settings, lambda measure: learn(measure=measure))


def no_reward(completion: str) -> float:
    """Judges nothing: completions have to be judged to carry a loss."""
    return 0.0


def judge_context(results: Results, level: float = LEVEL) -> list[Verdict]:
    return [
        exceeds(
            results,
            "Distillation comes more than half of the way from before to what is answered with the handbook in view",
            *("forward", way, 0.5),
        ),
        *keeps_more(results, "Distillation keeps more than SFT on the handbook's sentences", "forward", "sft", level),
        compare(
            results,
            "Distillation answers more right after equal steps than SFT on the handbook's sentences",
            *("forward", "sft", final("right")),
        ),
        predicted(results, "forward"),
    ]


def judge_arms(results: Results) -> list[Verdict]:
    keeps = partial(keeps_more, results)
    return [
        *judge_context(results),
        *keeps("Distillation with anchors keeps more than without", "anchored", "forward"),
        *keeps("SFT with anchors keeps more than without", "sft-anchored", "sft"),
        *keeps("Distillation with anchors keeps more than SFT with anchors", "anchored", "sft-anchored"),
        *keeps("Distillation without anchors keeps more than SFT with anchors", "forward", "sft-anchored"),
        compare(
            results,
            "Distillation with anchors answers more right after equal steps than SFT with anchors",
            *("anchored", "sft-anchored", final("right")),
        ),
    ]


def judge_teachers(results: Results) -> list[Verdict]:
    say = partial(compare, results)
    general = partial(say, resolution=GENERAL)
    distributions = "The teacher's distributions keep more than its answers alone"
    return [
        *keeps_more(results, distributions, "forward", "imitation"),
        *keeps_more(results, "Reverse KL keeps more than forward KL", "reverse", "forward"),
        *keeps_more(results, "The student's samples keep more than the teacher's answers", "student", "forward"),
        say(
            "The student's samples, a quarter the teacher's, teach more in equal steps than the teacher's answers",
            *("student", "forward", final("right")),
        ),
        say("A frozen teacher teaches more than a live one in equal steps", "forward", "live", final("right")),
        general("A frozen teacher keeps more general knowledge than a live one", "forward", "live", final("general")),
        say("An average as the teacher teaches more than a frozen one", "ema", "forward", final("right")),
        general("An average as the teacher keeps more than a frozen one", "ema", "forward", final("general")),
    ]


def judge_controls(results: Results) -> list[Verdict]:
    say = partial(compare, results)
    taught = partial(say, quantity=final("right"), margin=0.1)
    return [
        *(
            taught(f"The right handbook teaches the facts, {what} does not", "forward", arm)
            for arm, what in (
                ("wrong", "a wrong one"),
                ("other", "another question's section"),
                ("none", "a section without entries"),
                ("fixed", "an advantage of -1 for all that is sampled"),
            )
        ),
        say(
            "A wrong handbook's facts are learned as another question's section does not teach them",
            *("wrong", "other", final("wrong")),
        ),
        say(
            "A teacher whose section has no entries leaves more general knowledge than the right one, after equal "
            "steps",
            *("none", "forward", final("general")),
            resolution=GENERAL,
        ),
        say(
            "An advantage of -1 raises the perplexity of prose more than the right handbook's teacher",
            *("fixed", "forward", final("perplexity")),
            resolution=PROSE,
            digits=1,
        ),
    ]


FORWARD: Final = ContextArm(
    name="forward", title="teacher's answers, forward KL", learning_rates=(1e-3, 2e-3, 4e-3), quick_rate=2e-3
)
SENTENCES: Final = ContextArm(
    name="sft",
    title="SFT on the handbook's sentences",
    learns="sentences",
    learning_rates=(5e-4, 1e-3, 2e-3),
    quick_rate=2e-3,
)
SHARED: Final = replace(FORWARD, runs_of="real_context")
AS_FORWARD: Final[dict[str, Any]] = {"rate_of": "real_context/forward", "quick_rate": 2e-3}
GEMMA_LEVEL: Final = 0.3
TWO: Final = (1e-3, 2e-3)
STUDIES = (
    study(
        "real_context",
        "A handbook by context distillation, against SFT",
        "A model learns what its teacher reads in a handbook, and forgets less than by SFT on the handbook's sentences "
        "where both know equally much.",
        full=Settings(),
        run=run,
        arms=(
            FORWARD,
            SENTENCES,
            replace(
                FORWARD,
                name="anchored",
                title="teacher's answers, forward KL, anchors",
                anchored=True,
                learning_rates=(2e-3, 4e-3),
            ),
            replace(
                SENTENCES,
                name="sft-anchored",
                title="SFT on the sentences, anchors",
                anchored=True,
                learning_rates=(1e-3, 2e-3),
            ),
        ),
        judge=judge_arms,
        more=partial(fact_table, arm="forward"),
        notes="All arms read the same questions, 8 in a step. The teacher's answers are its likeliest ones, right or "
        "wrong. Anchors are a quarter of the rows: questions about anything else, with what the model before training "
        "answers to them, as a distribution or as a target.",
    ),
    study(
        "real_teachers",
        "Who teaches, who samples, and which way the KL goes",
        "Reverse KL and the student's own samples keep more; a frozen teacher is better than one that moves.",
        full=Settings(),
        run=run,
        arms=(
            SHARED,
            ContextArm(name="imitation", title="SFT on the teacher's answers", learns="answers", **AS_FORWARD),
            replace(FORWARD, name="reverse", title="teacher's answers, reverse KL", alpha=1.0, learning_rates=TWO),
            replace(
                FORWARD,
                name="student",
                title="own samples, a quarter the teacher's",
                writer="student",
                learning_rates=TWO,
            ),
            ContextArm(name="ema", title="teacher's answers, EMA teacher", teacher="ema", **AS_FORWARD),
            ContextArm(name="live", title="teacher's answers, live teacher", teacher="live", **AS_FORWARD),
        ),
        judge=judge_teachers,
        notes="Arms with a moving teacher have the frozen one's rate. All learn by forward KL unless the row says "
        "otherwise; the moving teachers' answers are those of the model before training too.",
    ),
    study(
        "real_controls",
        "Controls: what teaches without the facts",
        "What is learned is the context's content.",
        full=Settings(),
        run=run,
        arms=(
            SHARED,
            ContextArm(name="wrong", title="a wrong handbook", shown="wrong", **AS_FORWARD),
            ContextArm(name="other", title="another question's section", shown="other", **AS_FORWARD),
            ContextArm(name="none", title="a section without entries", shown="none", **AS_FORWARD),
            ContextArm(name="fixed", title="advantage -1 on own samples", learns="fixed advantage", **AS_FORWARD),
        ),
        judge=judge_controls,
        notes="The wrong handbook has each fact's value swapped for another's of its kind, or an invented one: *wrong* "
        "is the share of answers that have it. The last two rows are our reading of a reference-free teacher and of a "
        "fixed negative advantage (arXiv:2609.20612, 2608.31046, 2608.09228), whose texts could not be read here.",
    ),
    study(
        "real_gemma",
        "The same on Gemma 3 270M",
        "A base model without a chat template learns the handbook too.",
        full=Settings(model="gemma3"),
        level=GEMMA_LEVEL,
        run=run,
        arms=(
            replace(FORWARD, learning_rates=TWO),
            replace(SENTENCES, learning_rates=(1e-3, 2e-3)),
        ),
        judge=partial(judge_context, level=GEMMA_LEVEL),
        more=partial(fact_table, arm="forward"),
        notes="Questions are lines of plain text, “Question: …” and “Answer:”, and an answer ends with its line.",
    ),
)
