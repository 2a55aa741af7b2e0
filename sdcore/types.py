"""Defines what flows along the arrows of a training step: a row of data, a sampled completion, a prompt's group.

    Example (data) → Group of Rollouts (sampling, rewards) → Conditioned (contexts) → Plan (prefix) → StepOutput (step)

Each is frozen: whoever has more to say makes a new one. Ids and log-probabilities are on the CPU; the plan moves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

Message: TypeAlias = Mapping[str, Any]  # {"role": ..., "content": ...}
Prompt: TypeAlias = str | tuple[Message, ...]  # plain text, or a conversation whose last turn is the user's


@dataclass(frozen=True, kw_only=True)
class Example:
    """Is a row of data."""

    prompt: Prompt
    privileged_context: str | None = None  # what only the teacher sees; None: from the rollouts, or nothing
    columns: Mapping[str, Any] = field(default_factory=dict)  # every other column, for reward functions and templates
    source: str = ""  # where it stands, for errors: "train.jsonl:12"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """Is a completion of an example's prompt, and what is known of it."""

    completion_ids: Tensor  # (R,) int64, R may be 0; ends with an end-of-sequence id if it is finished
    logprobs: Tensor | None  # (R,) float32, of the distribution drawn from; None for completions from data
    text: str  # decoded, without special tokens, but for tags that open and close, such as <think> and </think>
    finished: bool  # False: cut at the length limit
    reward: float | None = None  # None: not judged; NaN is refused where rewards come in
    feedback: str | None = None  # the environment's words about this very completion
    raw_text: str | None = None  # decoded, with all special tokens; None: nobody did
    by_teacher: bool = False  # the teacher drew it, after its own prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Is an example with the completions that were sampled for it."""

    example: Example
    prompt_ids: Tensor  # (P,) int64: the student's prompt, as it was sampled from
    rollouts: tuple[Rollout, ...]  # G >= 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioned:
    """Holds what the teacher of a group reads, made by a context builder."""

    teacher_prompts: tuple[Tensor, ...]  # G of (T_i,) int64; equal ones are shared by `prefix.plan`'s caller
    active: tuple[bool, ...]  # G; False: there was nothing privileged to say, and the completion carries no loss
    counts: Mapping[str, int] = field(default_factory=dict)  # for the log, such as {"context/overflow": 1}


__all__ = ["Conditioned", "Example", "Group", "Message", "Prompt", "Rollout"]
