"""Tests that a teacher for every turn of a conversation learns more from the same trajectories than one at its end.

The world's quiz asks four questions about a new task, and says after each answer what was wrong in it, so that the
model gets better within an episode; what is to be learned is to answer the first question, too. A teacher of a turn
reads what was said about this very turn, at the end of its question. Its rivals draw as many trajectories:

    end          one teacher of the whole trajectory, with all that was said, or with one that succeeded, in its prompt
    last         the same, where a verifier speaks only at the end, as of single answers
    reward       GRPO on the rewards of the same turns
    wrong        a teacher for every turn, who is told another map's pairs; the student is told the right ones

What differs from the obvious: all of it is the product's own trainer. An episode is solved where every answer is right.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Final, Literal

from sdcore.data import read_examples
from sdcore.demo.experiment import Exam, load_base
from sdcore.presets import GRPO, SDPO, Method, TurnHindsight
from sdcore.rollouts.environments import Agent, Reply
from sdcore.training.config import SelfDistillationConfig
from sdcore.training.evaluation import evaluate
from sdcore.training.trainer import SelfDistillationTrainer
from sdcore.types import Example, Message
from sdcore.world import TALKS
from sdcore.world.data import QUESTIONS, ROOM, TEMPLATES, rows
from sdcore.world.language import LETTERS
from sdcore.world.talks import Quiz

from .book import MEASURED, OnTheWay
from .experiment import GAP, draw_tasks
from .records import (
    Arm,
    Column,
    Panel,
    Point,
    Results,
    Study,
    Verdict,
    at_step,
    compare,
    exceeds,
    fastest,
    final,
    matched,
    needed,
)

LEVEL: Final = 0.5  # of held-out episodes
EARLY: Final = 20  # steps
GROUP: Final = 8
# Every pair that was said, once, whether in an answer or about one.
ALL: Final = (
    "{{ prompt }}{% for pair in ((attempt or '') ~ ' ' ~ (feedback or '')).split()|unique if pair[1:].isdigit() %}"
    " H {{ pair }}{% endfor %}"
)


class Late(Quiz):
    """Says nothing about a turn but the last one to whoever teaches."""

    def step(self, message: Message) -> Reply:
        reply = super().step(message)
        return reply if reply.done else reply._replace(feedback=None)


class Wrong(Quiz):
    """Tells whoever teaches the pairs of a row's map `wrong`."""

    def reset(self, example: Example) -> None:
        super().reset(example)
        self._wrong = example.columns["wrong"]

    def step(self, message: Message) -> Reply:
        reply = super().step(message)
        words = (reply.feedback or "").split()
        told = [word[0] + self._wrong[LETTERS.index(word[0])] if word[1:] else word for word in words]
        return reply._replace(feedback=" ".join(told) or None)


@dataclass(frozen=True, kw_only=True)
class TurnsArm(Arm):
    learns: Literal["turn_feedback", "hindsight", "end", "reward"] = "turn_feedback"
    quiz: type[Quiz] = Quiz


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 40
    batch: int = 32  # trajectories in a step
    checkpoints: tuple[int, ...] = (5, 10, 15, 20, 25, 30, 35)  # and the end
    rows: int = 400
    episodes: int = 100  # that are held out, and questions of each kind that was known before


@lru_cache(maxsize=1)
def base() -> Any:
    return load_base(TALKS)


def method_of(arm: TurnsArm) -> Method:
    if arm.learns == "reward":
        return GRPO(num_generations=GROUP)
    if arm.learns == "end":
        return SDPO(num_generations=GROUP, template=ALL, success_threshold=0.999)
    return TurnHindsight(num_generations=GROUP, context=arm.learns, template=TEMPLATES["quiz"])


def run(arm: TurnsArm, settings: Settings, learning_rate: float, seed: int) -> list[Point]:
    """Trains one arm."""
    (task,) = draw_tasks(rng := random.Random(seed), 1)
    exam = Exam(base(), [task], rng, seed=seed, episodes=settings.episodes)

    def quizzes(count: int, split: Any) -> list[dict[str, Any]]:
        drawn = rows("quiz", task=task.name, count=count, seed=seed, split=split)
        return [row | {"digits": task.digits, "wrong": task.wrong} for row in drawn]

    held_out = read_examples(quizzes(settings.episodes, "eval"))
    agent = Agent(environment_factory=Quiz, max_turns=QUESTIONS)
    student = base().fresh()
    points: list[Point] = []

    def add(model: Any, step: int) -> None:
        options: dict[str, Any] = {"max_completion_length": ROOM, "success_threshold": 0.999, "agent": agent}
        asked = evaluate(model, base().tokenizer, held_out, [], seed=seed, **options)
        groups = [group.rollouts[0].own for group in asked.groups]
        skills = exam.skills(model)
        tokens = 0 if step == 0 else trainer._seen["tokens"]
        points.append(
            {"step": float(step), "samples": float(step * settings.batch), "tokens": float(tokens)}
            | {"solved": asked.metrics["success_rate"], "pairs": asked.metrics["reward_mean"]}
            | {f"turn {t}": _mean([own[t].reward for own in groups if len(own) > t]) for t in range(QUESTIONS)}
            | {
                "alone": skills["new"].strict,
                "prior": skills["prior"].strict,
                "in_context": skills["in_context"].strict,
            }
        )

    add(student, 0)
    folder = tempfile.mkdtemp(prefix="reproduce-")
    try:
        args = SelfDistillationConfig(
            output_dir=folder,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch // GROUP,
            max_completion_length=ROOM,
            max_turns=QUESTIONS,
            seed=seed,
            **MEASURED,
        )
        trainer = SelfDistillationTrainer(
            student,
            args,
            method=method_of(arm),
            train_dataset=quizzes(settings.rows, "train"),
            processing_class=base().tokenizer,
            environment_factory=arm.quiz,
            callbacks=[OnTheWay({*settings.checkpoints, settings.steps}, add)],
        )
        trainer.train()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return points


def _mean(shares: Sequence[float | None]) -> float:
    """Returns the mean share of right pairs in a turn."""
    return QUESTIONS * sum(share or 0.0 for share in shares) / max(1, len(shares))


def judge(results: Results) -> list[Verdict]:
    early = partial(compare, results, quantity=at_step("solved", EARLY))
    samples, prior = needed("solved", LEVEL), matched("prior", "solved", LEVEL)
    sooner = partial(compare, results, second="turns", quantity=samples, digits=0, resolution=GAP)
    kept = partial(compare, results, first="turns", quantity=prior)
    per_turn, whole, last = (
        "A teacher for every turn",
        "one teacher with all that was said",
        "one who hears the end alone",
    )
    return [
        exceeds(results, f"{per_turn} comes to most held-out episodes", "turns", final("solved"), LEVEL),
        early(f"{per_turn} solves more than {whole}, after {EARLY} steps", "turns", "end"),
        early(f"{per_turn} solves more than {last}, after {EARLY} steps", "turns", "last"),
        early(f"{per_turn} solves more than GRPO, after {EARLY} steps", "turns", "reward"),
        sooner(f"{per_turn} needs fewer trajectories than {whole}", "end"),
        sooner(f"{per_turn} needs fewer trajectories than {last}", "last"),
        sooner(f"{per_turn} needs fewer trajectories than GRPO", "reward"),
        sooner(f"{per_turn} who knows the right answer needs fewer than one who reads the reply", "hindsight"),
        compare(
            results,
            "Right feedback on turns teaches the task, wrong feedback does not",
            *("turns", "wrong", final("pairs")),
            margin=0.3,
        ),
        kept(f"{per_turn} keeps more prior tasks than {whole}, at {LEVEL:.0%} solved", second="end"),
        kept(f"{per_turn} keeps more prior tasks than {last}, at {LEVEL:.0%} solved", second="last"),
        kept(f"{per_turn} keeps more prior tasks than GRPO, at {LEVEL:.0%} solved", second="reward"),
    ]


RATES: Final = (1e-4, 3e-4, 1e-3)
TURNS: Final = TurnsArm(
    name="turns", title="a teacher for every turn, its feedback", learning_rates=RATES, quick_rate=3e-4
)
OTHER: Final = replace(TURNS, quick_rate=None)
STUDIES = (
    Study(
        name="turns",
        claim="turns",
        title="Conversations: a teacher for every turn",
        claimed="From as many trajectories, a teacher for every turn teaches more than one teacher at the end.",
        arms=(
            TURNS,
            replace(OTHER, name="hindsight", title="a teacher for every turn, the reply", learns="hindsight"),
            replace(OTHER, name="end", title="one teacher, all that was said (SDPO)", learns="end"),
            replace(OTHER, name="last", title="one teacher, the last word alone (SDPO)", learns="end", quiz=Late),
            replace(TURNS, name="reward", title="GRPO", learns="reward"),
            replace(
                OTHER, name="wrong", title="a teacher for every turn, wrong feedback", quiz=Wrong, rate_of="turns/turns"
            ),
        ),
        full=Settings(),
        quick=Settings(steps=2, checkpoints=(1,), rows=8, episodes=6, batch=16),
        run=run,
        rule=f"the rate that first solves {LEVEL:.0%} of the held-out episodes; else, the most at the end",
        choose=fastest("solved", LEVEL),
        columns=(
            Column(f"trajectories to {LEVEL:g}", matched("samples", "solved", LEVEL), 0),
            Column("solved, end", final("solved")),
            Column("pairs, end", final("pairs")),
            Column("pairs of the first turn, end", final("turn 0")),
            Column("prior, matched", matched("prior", "solved", LEVEL)),
            Column("in-context, matched", matched("in_context", "solved", LEVEL)),
            Column("prior, end", final("prior")),
        ),
        panels=(
            Panel("held-out episodes solved", "solved"),
            Panel("pairs right", "pairs"),
            Panel("prior tasks", "prior"),
            Panel("in-context, other names", "in_context"),
        ),
        judge=judge,
        notes=f"A step has {Settings.batch} trajectories of {QUESTIONS} turns. *Solved* are episodes of which every "
        "answer is right, *pairs* the share of right pairs. The model is the one of `sdcore.world.talks`.",
    ),
)
