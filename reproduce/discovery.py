"""Tests claim (d): on one hard question, training at test time finds an answer that sampling does not.

Test-time discovery (arXiv:2601.20802, section 5): a question that the model answers rightly about once in a hundred
thousand attempts, a verifier, and a budget of attempts. Self-distillation trains on the question itself: each attempt's
teacher sees what the verifier said about it. Two studies: the verifier confirms the pairs that are right and says
nothing else; or it also puts the first wrong pair right, as a test run shows its first failure.

Arms. *Best of k* samples the same model. *Multi-turn* puts what was said into the context and trains nothing: about the
last attempt only, as where a context holds one turn, or about all attempts of the conversation, of which there are as
many side by side as attempts in a group, or few. *GRPO* trains on the share of right pairs, the same information as a
number where the verifier only confirms. *Wrong feedback* names another map's pairs.

A run is the mean over several questions, each with a task of its own; the search stops at the first right answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from sdcore.losses import FusedLinearDivergence
from sdcore.losses.policy_gradient import PolicyTerm, group_advantages
from sdcore.losses.token_weighting import spread
from sdcore.prefix import plan
from sdcore.step import distill_step, policy_gradient_step
from sdcore.world.episodes import Episode

from .experiment import TeacherKind, Teaching, base, exam_of, measure, sample, teaching, text_of, total_length
from .records import Arm, Column, Panel, Point, Results, Study, Verdict, compare, final
from .sdpo import Attempt, attempt, feedback


@dataclass(frozen=True, kw_only=True)
class DiscoveryArm(Arm):
    does: Literal["sample", "multi-turn", "distill", "reward"]
    width: int = 16  # attempts in a round: a group, or conversations side by side
    memory: Literal["last", "all"] = (
        "last"  # "multi-turn": whose pairs are in the context, the last attempt's or all attempts'
    )
    teacher: TeacherKind = "ema"
    alpha: float = 0.5
    wrong: bool = False  # the verifier's pairs are of another map


@dataclass(frozen=True, kw_only=True)
class Settings:
    corrections: int  # wrong pairs of an attempt that the verifier puts right
    budget: int = 640  # attempts at a question
    questions: int = 3
    episodes: int = 100  # questions of a measurement, after the search


class Search(NamedTuple):
    """Says how a search ended."""

    attempts: int | None  # until the first right answer; None: not within the budget
    tokens: int
    kept: float  # prior tasks and in-context ability of the model afterwards, mean


def search(arm: DiscoveryArm, settings: Settings, learning_rate: float, seed: int) -> Search:
    """Makes rounds of attempts at the first question of the seed's exam until one is right or the budget is spent."""
    exam = exam_of(seed, episodes=settings.episodes)
    question = exam.new[0][0]
    trains = arm.does in {"distill", "reward"}
    student = base().fresh() if trains else base().model
    taught = teaching(arm.teacher, student) if trains else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0) if trains else None
    torch.manual_seed(seed)
    known: list[tuple[str, ...]] = [()] * arm.width  # of each conversation
    tokens, attempts = 0, None
    for made in range(0, settings.budget, arm.width):
        prompts = base().prompts([replace(question, hints=seen) for seen in known])
        completions = [group[0] for group in sample(student, prompts)]
        tokens += total_length(prompts, completions)
        tried = [attempt(text_of(ids), question) for ids in completions]
        attempts = next((made + i for i, each in enumerate(tried, start=1) if each.exact), None)
        if attempts is not None:
            break
        digits = exam.task.wrong if arm.wrong else None
        said = [feedback(question, each, corrections=settings.corrections, digits=digits) for each in tried]
        if arm.does == "multi-turn":
            known = [remember(question, old, new, arm) for old, new in zip(known, said, strict=True)]
        if optimizer is not None and taught is not None:
            tokens += learn(student, arm, question, prompts[0], completions, tried, said, taught)
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            taught.after()
    return Search(attempts, tokens, measure(exam, student)["kept"])


def remember(question: Episode, old: tuple[str, ...], new: tuple[str, ...], arm: DiscoveryArm) -> tuple[str, ...]:
    """Returns the pairs in the next turn's context, in the question's order."""
    if arm.memory == "last":
        return new
    return tuple(pair for pair in question.answer if pair in {*old, *new})


def learn(
    student: PreTrainedModel,
    arm: DiscoveryArm,
    question: Episode,
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    tried: Sequence[Attempt],
    said: Sequence[tuple[str, ...]],
    taught: Teaching,
) -> int:
    """Leaves the gradients of one round; returns the tokens that it took."""
    lengths = [len(ids) for ids in completions]
    read = total_length([prompt] * len(completions), completions)
    if arm.does == "reward":
        advantages = group_advantages(torch.tensor([each.share for each in tried]), [len(tried)])
        policy_gradient_step(student, plan([prompt], [completions]), PolicyTerm(advantages=spread(advantages, lengths)))
        return read
    contexts = base().prompts([replace(question, hints=seen) for seen in said])
    active = torch.tensor([float(bool(seen)) for seen in said])
    if active.any():
        distill_step(
            student,
            plan([prompt], [completions], [contexts]),
            loss=FusedLinearDivergence(alpha=arm.alpha),
            teacher=taught.teacher,
            token_weights=spread(active, lengths),
        )
    return read + total_length(contexts, completions)


def run(arm: DiscoveryArm, settings: Settings, learning_rate: float, seed: int) -> list[Point]:
    """Returns the share of questions solved after so many attempts; the last point has the means of the searches."""
    rng = random.Random(seed)
    seeds = [rng.randrange(10**6) for _ in range(settings.questions)]
    searches = [search(arm, settings, learning_rate, question) for question in seeds]
    ends = [settings.budget if each.attempts is None else each.attempts for each in searches]
    means = {
        "attempts": sum(ends) / len(ends),
        "thousand tokens": sum(each.tokens for each in searches) / len(searches) / 1000,
        "kept": sum(each.kept for each in searches) / len(searches),
    }
    marks = [mark for mark in (1, 2, 5, 10, 20, 40, 80, 160, 320, 640) if mark <= settings.budget]
    points: list[Point] = []
    for mark in marks:
        solved = sum(each.attempts is not None and each.attempts <= mark for each in searches) / len(searches)
        points.append({"step": float(mark), "samples": float(mark), "tokens": 0.0, "solved": solved})
    points[-1] |= means
    return points


def quickest(runs: Mapping[float, Sequence[Point]]) -> float:
    return min(runs, key=lambda rate: runs[rate][-1]["attempts"])


def judge(results: Results) -> list[Verdict]:
    fewer = partial(compare, results, quantity=final("attempts"), digits=0, resolution=16.0)
    solves = partial(compare, results, quantity=final("solved"))
    return [
        solves("Self-distillation on the question solves more questions than best of k", "distill", "best"),
        solves("Right feedback solves questions that wrong feedback does not", "distill", "wrong"),
        fewer("Self-distillation needs fewer attempts than GRPO on the question", "reward", "distill"),
        fewer("Self-distillation needs fewer attempts than multi-turn with the last feedback", "turns-last", "distill"),
        fewer("Self-distillation needs fewer attempts than multi-turn with all feedback", "turns-all", "distill"),
        fewer(
            "Self-distillation needs fewer attempts than few conversations with all feedback", "turns-few", "distill"
        ),
    ]


RATES = (1e-4, 3e-4, 1e-3)
NONE = (0.0,)  # nothing is trained


def arms(study: str) -> tuple[DiscoveryArm, ...]:
    """Lists the arms, which are the same in both studies."""
    distills = partial(DiscoveryArm, does="distill", learning_rates=RATES)
    talks = partial(DiscoveryArm, does="multi-turn", learning_rates=NONE)
    return (
        distills(name="distill", title="self-distillation"),
        distills(name="forward", title="self-distillation, forward KL", alpha=0.0, quick_rate=1e-3),
        distills(name="wrong", title="self-distillation, wrong feedback", wrong=True, rate_of=f"{study}/distill"),
        DiscoveryArm(name="reward", title="GRPO, share of right pairs", does="reward", learning_rates=RATES),
        DiscoveryArm(name="best", title="best of k", does="sample", learning_rates=NONE, quick_rate=0.0),
        talks(name="turns-last", title="16 conversations, last feedback"),
        talks(name="turns-all", title="16 conversations, all feedback", memory="all"),
        talks(name="turns-few", title="4 conversations, all feedback", memory="all", width=4),
    )


def study(name: str, title: str, claimed: str, *, corrections: int) -> Study:
    return Study(
        name=name,
        claim="discovery",
        title=title,
        claimed=claimed,
        arms=arms(name) if corrections else tuple(replace(arm, quick_rate=None) for arm in arms(name)),
        full=Settings(corrections=corrections),
        quick=Settings(corrections=corrections, budget=320, questions=2, episodes=20),
        run=run,
        rule="the rate with the fewest attempts",
        choose=quickest,
        columns=(
            Column("solved", final("solved")),
            Column("attempts", final("attempts"), 0),
            Column("thousand tokens", final("thousand tokens"), 1),
            Column("prior and in-context, after", final("kept")),
        ),
        panels=(Panel("questions solved", "solved", x="samples", log_x=True),),
        judge=judge,
        notes=f"A question that is not solved counts as {Settings.budget} attempts, the budget. At rate 0 nothing is "
        "trained.",
    )


STUDIES = (
    study(
        "discovery",
        "Test-time discovery, the verifier corrects one pair",
        "Training on one question with feedback finds what sampling and conversations do not.",
        corrections=1,
    ),
    study(
        "discovery_confirm",
        "Test-time discovery, the verifier only confirms",
        "The same where feedback never says what would be right.",
        corrections=0,
    ),
)
