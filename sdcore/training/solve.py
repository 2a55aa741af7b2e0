"""Solves one question at test time: a model learns from its failures until a verifier accepts an answer.

    verify = command_verifier("python check.py")          # reads a completion, exits with 0 if it solves the question
    solved = solve(model, tokenizer, "Write a sorting network for 9 wires.", verify, preset("sdpo"))
    solved.answer, solved.samples

Sample a group of completions, verify each, show the teacher what came back, distil it into the student, sample again.
Nothing is known of the answer but the verifier's word, so what is counted is how many completions it took
(arXiv:2601.20802, test-time self-distillation). With `update=False` the same loop is best-of-k, from the same weights
and with the same first group: the baseline to compare with at equal samples or equal tokens.

What differs from the obvious: **the model is changed**, for this question; load it anew for the next one. Its weights
are all trained unless it has an adapter. A completion that was verified before is not verified again, but counted.

Not covered: several questions at once (that is training), a verifier's state from one attempt to the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from ..contexts import join_feedback
from ..contexts.overflow import plain_feedback
from ..contexts.teacher_prompts import columns_of
from ..errors import ArgumentError, require_positive
from ..models import find_body
from ..presets.method import Method
from ..rollouts.environments import Agent
from ..rollouts.samplers import ModelSampler, Sampler, seed_of, stop_ids
from ..rollouts.sandbox import run_limited
from ..teachers import Snapshot
from ..types import Example, Prompt, Trajectory
from .collect import Collector, kwargs_of
from .prepare import check_tools, within_model
from .update import Batch, update


class Verdict(NamedTuple):
    """Holds what a verifier says of a completion."""

    solved: bool
    reward: float = 0.0
    feedback: str | None = None


Verifier: TypeAlias = Callable[[str], Verdict]


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """Raises `ArgumentError`, which names the field."""

    max_samples: int = 256  # completions, in all
    max_completion_length: int = 256  # tokens
    learning_rate: float = 1e-5  # of AdamW
    temperature: float = 1.0  # of sampling
    top_p: float | None = None
    top_k: int | None = None
    stop_token_ids: Sequence[int] | None = None  # None: what `stop_ids` finds
    chat_template_kwargs: Mapping[str, Any] | None = None
    max_grad_norm: float = 1.0
    update: bool = True  # False: best-of-k
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(max_samples=self.max_samples, max_completion_length=self.max_completion_length)
        for name in ("learning_rate", "temperature", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ArgumentError(f"{name} must be positive and finite, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Round:
    """Holds one group, and what was learned from it."""

    number: int  # from 1
    samples: int  # completions so far
    best_reward: float  # of this group
    attempt: str  # the group's best completion
    feedback: str | None  # about it
    loss: float | None  # None: nothing was learned from this group
    active: int  # completions that carried a loss


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Says how the search ended."""

    solved: bool
    answer: str | None  # the first completion that the verifier accepted
    samples: int  # completions up to and with that one, or all of them
    sampled_tokens: int  # of these completions; a group is sampled whole, what came after the answer is not counted
    trained_tokens: int  # through the student's and the teacher's passes
    seconds: float
    rounds: tuple[Round, ...]


def solve(
    model: nn.Module,
    tokenizer: Any,
    question: Prompt | Example,
    verify: Verifier,
    method: Method,
    config: SolveConfig | None = None,
    *,
    sampler: Sampler | None = None,
    agent: Agent | None = None,
    on_round: Callable[[Round], object] = lambda _: None,
) -> Solved:
    """Samples, verifies and learns until the verifier accepts a completion or `max_samples` are spent.

    `method` says what the teacher sees, whose weights it has and what is minimised: "feedback" as context and a
    divergence as target; a group is its `num_generations`. `on_round` hears of each group. Where an `agent` answers, a
    sample is a trajectory and its last turn is verified. Raises `ArgumentError` for a method that learns from something
    else, and what the verifier and the agent raise.
    """
    config = config or SolveConfig()
    if method.context != "feedback" or method.target != "divergence" or method.distillation_weight < 1:
        raise ArgumentError(
            f"method must have context 'feedback' and target 'divergence' alone, got {method.context!r} and "
            f"{method.target!r}: a verifier gives feedback"
        )
    example = question if isinstance(question, Example) else Example(prompt=question, source="the question")
    template_kwargs = kwargs_of(config.chat_template_kwargs, agent)
    builder = method.build_context(chat_template_kwargs=template_kwargs)
    check_tools(tokenizer, agent)
    builder = within_model(builder, find_body(model).max_positions, config.max_completion_length)
    collector = Collector(
        tokenizer=tokenizer,
        sampler=sampler or ModelSampler(),
        stop_ids=config.stop_token_ids or stop_ids(model, tokenizer),
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        chat_template_kwargs=template_kwargs,
        read_elsewhere=columns_of(builder),
        agent=agent,
    )
    collector.prompt(example)  # refused before the teacher is built
    teacher = method.build_teacher(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    verdicts: dict[str, Verdict] = {}
    rounds: list[Round] = []
    samples = sampled_tokens = trained_tokens = 0
    answer: str | None = None
    began = time.monotonic()

    while answer is None and samples < config.max_samples:
        size = min(method.num_generations, config.max_samples - samples)
        drawing = replace(collector, num_generations=size)
        (group,) = drawing.draw(model, [example], seed_of(config.seed, len(rounds)))
        judged: list[Trajectory] = []
        for rollout in group.rollouts:
            if rollout.text not in verdicts:
                verdicts[rollout.text] = verdict = verify(rollout.text)
                if not isinstance(verdict, Verdict) or not math.isfinite(verdict.reward):
                    raise ArgumentError(f"verify must return a Verdict of a finite reward, got {verdict!r:.80}")
            solved, reward, feedback = verdicts[rollout.text]
            feedback = join_feedback([said for said in (rollout.feedback, feedback) if said]) or None
            judged.append(replace(rollout, reward=reward, feedback=feedback))
            samples, sampled_tokens = samples + 1, sampled_tokens + sum(len(turn.ids) for turn in rollout.own)
            if solved:
                answer = rollout.text
                break
        loss, active = None, 0
        if config.update and answer is None and samples < config.max_samples:
            group = replace(group, rollouts=tuple(judged))
            batch = Batch.of([group], [builder.condition(group, tokenizer)], method, device=find_body(model).device)
            active = len(judged) - batch.counts["completions/without_loss"]
            if active:
                output = update(model, batch, method, teacher=teacher)
                loss = float(output.loss)
                trained_tokens += sum(report.tokens for report in (output.report.student, *output.report.teachers))
                torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                if isinstance(teacher, Snapshot):
                    teacher.update(model, len(rounds) + 1)
        best = max(judged, key=lambda rollout: rollout.reward or 0.0) if answer is None else judged[-1]
        rounds.append(
            Round(
                number=len(rounds) + 1,
                samples=samples,
                best_reward=best.reward or 0.0,
                attempt=best.text,
                feedback=plain_feedback(best.feedback),
                loss=loss,
                active=active,
            )
        )
        on_round(rounds[-1])
    return Solved(
        solved=answer is not None,
        answer=answer,
        samples=samples,
        sampled_tokens=sampled_tokens,
        trained_tokens=trained_tokens,
        seconds=time.monotonic() - began,
        rounds=tuple(rounds),
    )


def command_verifier(
    command: str | Sequence[str], *, wall_seconds: float = 30.0, memory_mb: float = 2048.0, max_feedback: int = 4_000
) -> Verifier:
    """Makes a verifier of a command, which reads the completion from its input and says what it thinks.

    Exit code 0: solved. What it prints is the feedback; where that begins with a line that is a number, the number is
    the reward (else 1 if it is solved, 0 if not). Where it prints nothing, its error output is the feedback. It runs in
    `rollouts.sandbox.run_limited`, from an empty directory: give paths that are absolute. One that runs out of time has
    not accepted, and says so. A shell that does not find its program (exit code 126 or 127) is an `ArgumentError`.
    """

    def verify(completion: str) -> Verdict:
        result = run_limited(
            command, stdin=completion, wall_seconds=wall_seconds, cpu_seconds=wall_seconds, memory_mb=memory_mb
        )
        if result.exit_code in (126, 127):
            raise ArgumentError(f"the verifier could not be run, {result.outcome}: {result.stderr.strip()}")
        first, _, rest = result.stdout.partition("\n")
        reward, text = _number(first), rest
        if reward is None:
            reward, text = float(result.ok), result.stdout
        text = text.strip() or result.stderr.strip()
        if result.exit_code is None:
            text = f"{text}\nThe check was stopped: {result.outcome}".strip()
        return Verdict(result.ok, reward, text[:max_feedback] or None)

    return verify


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
