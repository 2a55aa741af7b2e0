"""Tests claim (b): SDPO turns feedback into a dense signal and learns from fewer samples than GRPO learns from rewards.

Self-distillation policy optimisation (arXiv:2601.20802): eight attempts at each question; the teacher of an attempt is
the same model with a successful attempt of the same group in view, or, where there is none, with what the environment
said about this very attempt; the student learns, token by token, what the teacher says about the attempt.

The environment speaks like a test run that shows its first failures: the pairs that are right, and the right pairs for
the first two wrong ones, as `H a3 H c7`. An attempt that is right gets no feedback. Two studies: from the base model,
which knows nothing of the task, and from a half-learned start, which was trained on six of the ten letters.

Controls. *GRPO* sees only rewards: the share of right pairs, or whether all are right; with and without a KL anchor to
where it started. Two arms have *the same information* as the feedback without a teacher: a policy gradient with an
advantage of its own for each pair, and cross-entropy on the corrected attempt, on the pairs that the feedback names.
*Wrong feedback* names another map's pairs. Shuffled feedback would be no control: all questions share one map, so what
was said about another question is true of this one.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from sdcore.demo.experiment import Exam
from sdcore.losses import FusedLinearDivergence
from sdcore.losses.policy_gradient import PolicyTerm, group_advantages
from sdcore.losses.token_weighting import spread
from sdcore.prefix import plan
from sdcore.step import distill_step, imitate_step, policy_gradient_step
from sdcore.teachers import Frozen
from sdcore.world.episodes import QUESTION_LETTERS, Episode, mapped
from sdcore.world.language import EOS, HINT, LETTERS

from .experiment import (
    BATCH,
    GAP,
    Cost,
    TeacherKind,
    Teaching,
    base,
    exam_of,
    measure,
    sample,
    teaching,
    text_of,
    total_length,
    train,
)
from .records import Arm, Column, Panel, Point, Results, Study, Verdict, compare, fastest, final, matched, needed

LEVEL = 0.9  # of the new task, lenient
GROUP = 8  # attempts at a question
KNOWN = LETTERS[:6]  # of the half-learned start


@dataclass(frozen=True, kw_only=True)
class SdpoArm(Arm):
    learns: Literal["distill", "reward", "each pair", "correction"] = "distill"
    teacher: TeacherKind = "ema"
    alpha: float = 0.5
    feedback: bool = True
    solution: bool = True  # a successful attempt of the group, which goes before feedback
    corrections: int = 2  # wrong pairs of an attempt that the feedback puts right
    wrong: bool = False  # feedback of another map
    exact: bool = False  # "reward": 1 for a right answer, else 0; False: the share of right pairs
    kl_anchor: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    half_learned: bool
    steps: int = 60
    start_steps: int = 60  # of cross-entropy on six letters
    start_rate: float = 1e-4
    update_rate: float = 0.05  # of the EMA teacher, the paper's
    episodes: int = 150  # questions of a measurement


class Attempt(NamedTuple):
    """Reads a completion pair by pair."""

    pairs: tuple[str, ...]  # without decoration
    right: tuple[bool, ...]  # of each of the five places
    ended: bool

    @property
    def exact(self) -> bool:
        return self.ended and all(self.right) and len(self.pairs) == QUESTION_LETTERS

    @property
    def share(self) -> float:
        return sum(self.right) / QUESTION_LETTERS if self.ended else 0.0


def attempt(text: str, episode: Episode) -> Attempt:
    answer, end, _ = text.partition(EOS)
    pairs = tuple(word for word in answer.split() if word != HINT)
    right = tuple(i < len(pairs) and pairs[i] == pair for i, pair in enumerate(episode.answer))
    return Attempt(pairs, right, bool(end))


def feedback(episode: Episode, tried: Attempt, *, corrections: int, digits: str | None = None) -> tuple[str, ...]:
    """Returns the pairs that the environment names: the right ones, and the first wrong ones put right.

    `digits` is another map to speak by: as many pairs for the same letters. Nothing for an attempt that is right.
    """
    if tried.exact:
        return ()
    named, left = [], corrections
    for pair, right in zip(episode.answer, tried.right, strict=True):
        if right or left:
            left -= not right
            named.append(pair if digits is None else pair[0] + digits[LETTERS.index(pair[0])])
    return tuple(named)


def shown(
    arm: SdpoArm, episode: Episode, group: Sequence[Attempt], index: int, *, wrong_digits: str
) -> tuple[str, ...]:
    """Returns what an attempt's teacher sees beyond the question; nothing: the attempt carries no loss."""
    solved = any(other.exact for i, other in enumerate(group) if i != index)
    if arm.solution and solved:
        return episode.answer  # the question's only right answer, whoever gave it
    if not arm.feedback:
        return ()
    digits = wrong_digits if arm.wrong else None
    return feedback(episode, group[index], corrections=arm.corrections, digits=digits)


def step(
    student: PreTrainedModel, arm: SdpoArm, exam: Exam, taught: Teaching, start: Frozen, rng: random.Random
) -> Cost:
    """Samples four groups and leaves the gradients of the arm's loss."""
    episodes = exam.batch(rng, BATCH // GROUP)
    prompts = base().prompts(episodes)
    completions = sample(student, prompts, count=GROUP)
    tried = [
        [attempt(text_of(ids), episode) for ids in group] for group, episode in zip(completions, episodes, strict=True)
    ]
    flat = [ids for group in completions for ids in group]
    passed = total_length([prompt for prompt in prompts for _ in range(GROUP)], flat)
    if arm.learns == "distill":
        hints = [
            [shown(arm, episode, group, i, wrong_digits=exam.task.wrong) for i in range(GROUP)]
            for episode, group in zip(episodes, tried, strict=True)
        ]
        contexts = [
            base().prompts([replace(episode, hints=seen) for seen in group])
            for episode, group in zip(episodes, hints, strict=True)
        ]
        active = torch.tensor([float(bool(seen)) for group in hints for seen in group])
        if active.any():
            distill_step(
                student,
                plan(prompts, completions, contexts),
                loss=FusedLinearDivergence(alpha=arm.alpha),
                teacher=taught.teacher,
                token_weights=spread(active, [len(ids) for ids in flat]),
            )
        return Cost(BATCH, 2 * passed + total_length(*contexts, flat))
    if arm.learns == "correction":
        return Cost(BATCH, passed + corrected(student, arm, prompts, episodes, tried))
    rewards = torch.tensor([float(a.exact) if arm.exact else a.share for group in tried for a in group])
    if arm.learns == "each pair":
        advantages = pairwise_advantages(completions, tried)
    else:
        advantages = spread(group_advantages(rewards, [GROUP] * len(tried)), [len(ids) for ids in flat])
    policy_gradient_step(
        student,
        plan(prompts, completions),
        PolicyTerm(advantages=advantages, kl_anchor=arm.kl_anchor),
        reference=start if arm.kl_anchor else None,
        kl_estimator="exact",
    )
    return Cost(BATCH, (3 if arm.kl_anchor else 2) * passed)


def pairwise_advantages(
    completions: Sequence[Sequence[Sequence[int]]], tried: Sequence[Sequence[Attempt]]
) -> torch.Tensor:
    """Returns (N,) by how much a pair is better than those at its place in the group; 0 for other tokens."""
    rows = []
    for group, attempts in zip(completions, tried, strict=True):
        right = torch.tensor([[float(x) for x in each.right] for each in attempts])  # (G, places)
        better = torch.stack([group_advantages(place, [len(group)]) for place in right.T], 1)
        for ids, advantages in zip(group, better, strict=True):
            # In a decorated answer places are not tokens; such an attempt has no credit to give to single tokens.
            plain = len(ids) == QUESTION_LETTERS + 1
            rows.append(torch.cat([advantages, advantages.new_zeros(1)]) if plain else advantages.new_zeros(len(ids)))
    return torch.cat(rows)


def corrected(
    student: PreTrainedModel,
    arm: SdpoArm,
    prompts: Sequence[Sequence[int]],
    episodes: Sequence[Episode],
    tried: Sequence[Sequence[Attempt]],
) -> int:
    """Leaves the gradients of cross-entropy on the attempts as the feedback corrects them, on the pairs that it names.

    Returns the tokens that it took.
    """
    answers, named = [], []
    for episode, group in zip(episodes, tried, strict=True):
        known = [set(feedback(episode, each, corrections=arm.corrections)) for each in group]
        filled = [each.pairs + episode.answer[len(each.pairs) :] for each in group]
        texts = [
            " ".join(right if right in told else guess for right, guess in zip(episode.answer, guesses, strict=False))
            for guesses, told in zip(filled, known, strict=True)
        ]
        answers.append(base().answers(texts))
        named += [[float(pair in told) for pair in episode.answer] + [0.0] for told in known]
    weights = torch.tensor(named).flatten()
    if weights.any():
        # The policy gradient of an advantage of 1 is that of the log-likelihood.
        policy_gradient_step(student, plan(prompts, answers), PolicyTerm(advantages=weights, token_weights=weights))
    return total_length([prompt for prompt in prompts for _ in range(GROUP)], *answers)


@lru_cache(maxsize=8)
def half_learned(seed: int, steps: int, learning_rate: float) -> PreTrainedModel:
    """Trains the base model with some cross-entropy on questions about six of the ten letters."""
    task = exam_of(seed, episodes=1).task
    student = base().fresh()

    def imitate(rng: random.Random) -> Cost:
        episodes = [mapped(task.name, task.digits, rng, KNOWN) for _ in range(BATCH)]
        answers = base().answers([episode.native_answer for episode in episodes])
        imitate_step(student, plan(base().prompts(episodes), [[answer] for answer in answers]))
        return Cost(0, 0)

    train(student, imitate, lambda model: {}, learning_rate=learning_rate, steps=steps, seed=seed + 5_000)
    return student.requires_grad_(False)


def run(arm: SdpoArm, settings: Settings, learning_rate: float, seed: int) -> list[Point]:
    """Trains one arm; a frozen teacher, and the anchor, are the student as it starts."""
    exam = exam_of(seed, episodes=settings.episodes)
    student = base().fresh()
    if settings.half_learned:
        student.load_state_dict(half_learned(seed, settings.start_steps, settings.start_rate).state_dict())
    taught = teaching(arm.teacher, student, update_rate=settings.update_rate)
    start = Frozen(copy.deepcopy(student).requires_grad_(False))
    return train(
        student,
        partial(step, student, arm, exam, taught, start),
        partial(measure, exam),
        learning_rate=learning_rate,
        steps=settings.steps,
        seed=seed,
        after=taught.after,
    )


# Of the arm that needs most; with `GAP`, how well a number of tokens can be known.
TOKENS_PER_SAMPLE = 52


def judge(results: Results) -> list[Verdict]:
    say = partial(compare, results)
    kept, samples = matched("kept", "new", LEVEL), needed("new", LEVEL)
    sooner = partial(say, digits=0, resolution=GAP)
    taught = partial(say, margin=0.5)
    return [
        sooner("SDPO needs fewer samples than GRPO on the share of right pairs", "grpo", "ema", samples),
        sooner("SDPO needs fewer samples than GRPO on right answers only", "grpo-exact", "ema", samples),
        say(
            "SDPO needs fewer thousand tokens than GRPO on the share of right pairs",
            "grpo",
            "ema",
            _tokens,
            digits=0,
            resolution=GAP * TOKENS_PER_SAMPLE / 1000,
        ),
        sooner("SDPO needs fewer samples than a policy gradient on each pair", "each-pair", "ema", samples),
        sooner("SDPO needs fewer samples than cross-entropy on corrected attempts", "correction", "ema", samples),
        sooner("SDPO needs fewer samples than GRPO with one correction in the feedback", "grpo", "one", samples),
        say("SDPO keeps more than GRPO at matched accuracy", "ema", "grpo", kept),
        say("SDPO keeps more than GRPO with a KL anchor at matched accuracy", "ema", "grpo-anchor", kept),
        say("SDPO keeps more than cross-entropy on corrected attempts at matched accuracy", "ema", "correction", kept),
        say("A KL anchor makes GRPO keep more at matched accuracy", "grpo-anchor", "grpo", kept),
        say("An EMA teacher keeps more than a live one after equal steps", "ema", "live", final("kept")),
        say("An EMA teacher keeps more than a frozen one after equal steps", "ema", "frozen", final("kept")),
        say("A trust region keeps more than a live teacher after equal steps", "trust", "live", final("kept")),
        sooner("An EMA teacher needs fewer samples than a live one", "live", "ema", samples),
        sooner("An EMA teacher needs fewer samples than a frozen one", "frozen", "ema", samples),
        sooner("Forward KL needs fewer samples than Jensen-Shannon", "ema", "forward", samples),
        sooner("Both need fewer samples than feedback alone", "feedback", "ema", samples),
        sooner("Both need fewer samples than a successful attempt alone", "sibling", "ema", samples),
        taught("Right feedback teaches the task, wrong feedback does not", "feedback", "wrong", final("new")),
    ]


def _tokens(points: Sequence[Point]) -> float | None:
    """Returns the thousands of tokens to the level, or all that were spent."""
    spent = needed("new", LEVEL, cost="tokens")(points)
    return None if spent is None else spent / 1000


def arms(study: str) -> tuple[SdpoArm, ...]:
    """Lists the arms, which are the same in both studies."""
    make = SdpoArm
    return (
        make(name="ema", title="SDPO, EMA teacher", quick_rate=3e-4),
        make(name="live", title="SDPO, live teacher", teacher="live"),
        make(name="frozen", title="SDPO, frozen teacher", teacher="frozen"),
        make(name="trust", title="SDPO, trust region", teacher="trust_region"),
        make(name="forward", title="SDPO, EMA, forward KL", alpha=0.0),
        make(name="feedback", title="SDPO, EMA, feedback only", solution=False),
        make(name="sibling", title="SDPO, EMA, successful attempt only", feedback=False),
        make(name="one", title="SDPO, EMA, feedback with one correction", corrections=1),
        make(
            name="wrong",
            title="SDPO, EMA, wrong feedback only",
            solution=False,
            wrong=True,
            rate_of=f"{study}/feedback",
            quick_rate=3e-4,
        ),
        make(name="grpo", title="GRPO, share of right pairs", learns="reward", quick_rate=3e-4),
        make(name="grpo-anchor", title="GRPO, share, KL anchor 0.05", learns="reward", kl_anchor=0.05),
        make(name="grpo-exact", title="GRPO, right answers only", learns="reward", exact=True),
        make(name="each-pair", title="policy gradient on each pair", learns="each pair"),
        make(name="correction", title="cross-entropy on corrected attempts", learns="correction"),
    )


def study(name: str, title: str, claimed: str, *, half_learned: bool) -> Study:
    return Study(
        name=name,
        claim="sdpo",
        title=title,
        claimed=claimed,
        arms=arms(name) if half_learned else tuple(replace(arm, quick_rate=None) for arm in arms(name)),
        full=Settings(half_learned=half_learned),
        quick=Settings(half_learned=half_learned, steps=30, episodes=60),
        run=run,
        rule=f"the rate that first has the new task at {LEVEL:g} or above; else, the highest new task at the end",
        choose=fastest("new", LEVEL),
        columns=(
            Column(f"samples to {LEVEL:g}", matched("samples", "new", LEVEL), 0),
            Column(f"thousand tokens to {LEVEL:g}", _matched_tokens, 0),
            Column("prior, matched", matched("prior", "new", LEVEL)),
            Column("in-context, matched", matched("in_context", "new", LEVEL)),
            Column("new, end", final("new")),
            Column("prior, end", final("prior")),
            Column("in-context, end", final("in_context")),
        ),
        panels=(
            Panel("new task, lenient", "new"),
            Panel("prior tasks", "prior"),
            Panel("in-context, other names", "in_context"),
            Panel("new task, lenient", "new", x="tokens"),
        ),
        judge=judge,
        notes=f"The end is after {Settings.steps} steps of {BATCH // GROUP} questions with {GROUP} attempts each. SDPO "
        "is Jensen-Shannon (0.5) with both kinds of context and two corrections, unless the row says otherwise. A "
        "run that never reaches the level counts as its whole budget where samples or tokens are compared.",
    )


def _matched_tokens(points: Sequence[Point]) -> float | None:
    tokens = matched("tokens", "new", LEVEL)(points)
    return None if tokens is None else tokens / 1000


STUDIES = (
    study(
        "sdpo_half",
        "SDPO against GRPO, from a half-learned start",
        "Feedback and successful attempts, distilled, need fewer samples than rewards.",
        half_learned=True,
    ),
    study(
        "sdpo_base",
        "SDPO against GRPO, from the base model",
        "The same where no attempt succeeds at first.",
        half_learned=False,
    ),
)
