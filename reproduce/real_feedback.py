"""Tests SDPO on a real model: a verifier's feedback says what was wrong, against GRPO with as many samples.

The task is a sum of two numbers up to twelve, to be written as an equation, `7 + 5 = 12`, which the question does not
say. The verifier's feedback says that an equation is missing, or that the sum is another one, and which. The question
is in no distribution of anybody's: SmolLM2 writes the right equation in some of its samples, and explains, counts or
talks about something else in the others.

Controls: feedback about *another* question, in the same words; and GRPO, which has the same judgements as numbers.

What differs from the obvious: an arm's samples are drawn at temperature 0.6, and its loss is of the distributions at
that temperature, since at 1 this model hardly ever answers at all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from sdcore.data import read_examples
from sdcore.presets import GRPO, SDPO, Method, SDPOCode
from sdcore.training.evaluation import evaluate

from .book import answers, perplexity, row_of
from .real_exam import GENERAL, PROSE, book_of, with_kept
from .real_model import Settings, Subject, kept, subject_of, train
from .records import Arm, Column, Panel, Point, Results, Study, Verdict, compare, crossing, fastest, final, matched

MOST: Final = 12  # of a number
GROUP: Final = 4
LEVEL: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class FeedbackArm(Arm):
    learns: Literal["sdpo", "sdpo_code", "grpo"] = "sdpo"
    other: bool = False  # the feedback is about another question


@dataclass(frozen=True, kw_only=True)
class FeedbackSettings(Settings):
    steps: int = 30
    batch: int = 16
    checkpoints: tuple[int, ...] = (10, 20)
    room: int = 12
    temperature: float = 0.6
    episodes: int = 48  # questions that are held out


def sums(seed: int, held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns questions to learn from and such as are held out; each knows another one, for feedback about it."""
    pairs = [(a, b) for a in range(1, MOST + 1) for b in range(1, MOST + 1)]
    random.Random(seed).shuffle(pairs)
    rows = [
        row_of(f"What is {a} + {b}?", pair=[a, b], another=list(other))
        for (a, b), other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
    ]
    return rows[held_out:], rows[:held_out]


def verified(completion: str, pair: Sequence[int]) -> tuple[float, str | None]:
    """Judges an answer: 1 where it begins with the right equation; else 0 and what is wrong with it."""
    a, b = pair
    equation = re.match(rf"\s*{a} \+ {b} = (\d+)", completion)
    if equation is None:
        return 0.0, f"The answer must be an equation and nothing else. It begins with: {a} + {b} ="
    if int(equation[1]) != a + b:
        return 0.0, f"The form is right, but {a} + {b} is {a + b} and not {equation[1]}."
    return 1.0, None


def about_it(completion: str, pair: Sequence[int]) -> tuple[float, str | None]:
    """Rewards a right answer, and says what is wrong with another."""
    return verified(completion, pair)


def about_another(completion: str, pair: Sequence[int], another: Sequence[int]) -> tuple[float, str | None]:
    """Rewards a right answer, and says of a wrong one what would be wrong with it for another question."""
    reward, feedback = verified(completion, pair)
    return reward, feedback and verified(completion, another)[1]


def right_sum(completion: str, pair: Sequence[int]) -> float:
    """Rewards a right answer and says nothing."""
    return verified(completion, pair)[0]


def method_of(arm: FeedbackArm, settings: FeedbackSettings) -> Method:
    if arm.learns == "grpo":
        return GRPO(num_generations=GROUP)
    kind = SDPO if arm.learns == "sdpo" else SDPOCode
    return kind(num_generations=GROUP, temperature=settings.temperature)


def measure(subject: Subject, held_out: list[dict[str, Any]], settings: FeedbackSettings, model: Any) -> Point:
    """Returns the share of right sums, likeliest answers and samples, and what is kept of the rest."""
    options: dict[str, Any] = {"max_completion_length": settings.room, "stop_token_ids": subject.stops}
    examples, book = read_examples(held_out), book_of(0, settings.facts)
    likeliest = evaluate(model, subject.tokenizer, examples, [right_sum], temperature=0.0, **options)
    drawn = evaluate(model, subject.tokenizer, examples, [right_sum], temperature=settings.temperature, **options)
    known = answers(model, subject.tokenizer, book.general[: settings.general], stop_token_ids=subject.stops)[1]
    return {
        "right": likeliest.metrics["reward_mean"],
        "sampled": drawn.metrics["reward_mean"],
        "general": sum(known) / len(known),
        "perplexity": perplexity(model, subject.tokenizer, book.prose),
    }


def run(arm: FeedbackArm, settings: FeedbackSettings, learning_rate: float, seed: int) -> list[Point]:
    """Trains one arm."""
    subject = subject_of(settings.model)
    rows, held_out = sums(seed, settings.episodes)
    asked = ["feedback", subject.name, settings.room, settings.temperature, settings.general, held_out]
    start = kept(asked, lambda: measure(subject, held_out, settings, subject.base))
    if arm.learns == "grpo":
        reward: Any = right_sum
    else:
        reward = about_another if arm.other else about_it
    points = train(
        subject,
        method_of(arm, settings),
        rows,
        learning_rate=learning_rate,
        settings=settings,
        seed=seed,
        measure=lambda model: with_kept(start, measure(subject, held_out, settings, model)),
        reward_funcs=[reward],
    )
    return [{"step": 0.0, "samples": 0.0, "tokens": 0.0} | with_kept(start, start), *points]


def judge(results: Results) -> list[Verdict]:
    say = partial(compare, results)
    level = partial(matched, by="right", level=LEVEL, at=crossing)
    return [
        say("SDPO answers more right than GRPO after as many samples", "sdpo", "grpo", final("right")),
        say("SDPO's samples are right more often than GRPO's after as many", "sdpo", "grpo", final("sampled")),
        say("SDPO with reverse KL answers more right than GRPO after as many samples", "code", "grpo", final("right")),
        say(
            "Feedback about the question teaches more than feedback about another one",
            *("sdpo", "other", final("right")),
            margin=0.1,
        ),
        say(
            f"SDPO keeps more general knowledge than GRPO, at {LEVEL:.0%} right",
            *("sdpo", "grpo", level("general")),
            resolution=GENERAL,
        ),
        say(
            f"SDPO keeps more than GRPO: perplexity of prose, that of GRPO is higher, at {LEVEL:.0%} right",
            *("grpo", "sdpo", level("perplexity")),
            resolution=PROSE,
            digits=1,
        ),
    ]


GRID: Final = (3e-4, 1e-3, 3e-3)
AS_SDPO: Final[dict[str, Any]] = {"rate_of": "real_feedback/sdpo", "quick_rate": 1e-3}
STUDIES = (
    Study(
        name="real_feedback",
        claim="real_feedback",
        title="SDPO with a verifier that says what was wrong, against GRPO",
        claimed="Feedback, distilled, teaches more than rewards from as many samples.",
        arms=(
            FeedbackArm(name="sdpo", title="SDPO", learning_rates=GRID, quick_rate=1e-3),
            FeedbackArm(name="grpo", title="GRPO", learns="grpo", learning_rates=GRID, quick_rate=1e-3),
            FeedbackArm(name="code", title="SDPO, reverse KL, slower teacher", learns="sdpo_code", **AS_SDPO),
            FeedbackArm(name="other", title="SDPO, feedback about another question", other=True, **AS_SDPO),
        ),
        full=FeedbackSettings(),
        quick=FeedbackSettings(steps=2, checkpoints=(1,), facts=3, general=3, episodes=6, batch=4, rank=4, room=3),
        run=run,
        rule=f"the rate that first has {LEVEL:.0%} of the held-out sums right; else, the most right at the end",
        choose=fastest("right", LEVEL),
        columns=(
            Column("right before", lambda points: points[0]["right"]),
            Column("samples right before", lambda points: points[0]["sampled"]),
            Column("right, end", final("right")),
            Column("samples right, end", final("sampled")),
            Column("general, end", final("general")),
            Column("perplexity, end", final("perplexity"), 1),
            Column("kept, end", final("kept")),
        ),
        panels=(
            Panel("held-out sums", "right"),
            Panel("held-out sums, sampled", "sampled"),
            Panel("general knowledge", "general"),
            Panel("perplexity of prose", "perplexity", log_y=True),
        ),
        judge=judge,
        group="real",
        notes=f"A step is {FeedbackSettings.batch // GROUP} questions with {GROUP} samples each, for all arms. Right "
        "is an answer that begins with the right equation, such as 7 + 5 = 12; the question is “What is 7 + 5?”.",
    ),
)
