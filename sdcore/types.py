"""Defines what flows along the arrows of a training step: a row of data, a trajectory, a prompt's group of them.

    Example (data) → Group of trajectories (rollouts) → Conditioned (contexts) → Plan (prefix) → StepOutput (step)

Each is frozen: whoever has more to say makes a new one. Ids and log-probabilities are on the CPU; the plan moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Message: TypeAlias = Mapping[str, Any]  # {"role": ..., "content": ...}
Prompt: TypeAlias = str | tuple[Message, ...]  # plain text, or a conversation whose last turn is the user's
# How a trajectory ended: the student or the environment was done; or a turn was cut at its length limit, there was no
# room for another turn, for its tokens or in time; or the environment failed.
Outcome: TypeAlias = Literal["answered", "cut", "turns", "tokens", "time", "failed"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """Is a row of data."""

    prompt: Prompt
    privileged_context: str | None = None  # what only the teacher sees; None: from the rollouts, or nothing
    columns: Mapping[str, Any] = field(default_factory=dict)  # every other column, for reward functions and templates
    source: str = ""  # where it stands, for errors: "train.jsonl:12"


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """Is what one side says until the other speaks: the student, whose tokens carry loss, a tool, an environment."""

    ids: Tensor  # (L,) int64, L may be 0; the student's end with an end-of-sequence id if the turn is finished
    text: str  # decoded, without special tokens, but for tags that open and close, such as <think> and </think>
    logprobs: Tensor | None = None  # (L,) float32, of the distribution drawn from; None for what nobody drew
    finished: bool = True  # False: cut at the length limit
    raw_text: str | None = None  # with all special tokens; of others, what the template adds; None: nobody decoded it
    is_own: bool = True  # False: somebody else's, without loss
    restarts: bool = False  # these ids are all that is read from here on: the template has rewritten what came before
    messages: tuple[Message, ...] = ()  # the same as a conversation has it; () where there is none
    reward: float | None = None  # the environment's, for this turn
    feedback: str | None = None  # the environment's words about this very turn


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """Is what came after an example's prompt, and what is known of it: an answer, or turns with others' in between."""

    turns: tuple[Turn, ...]  # the first is the student's, and so is every other one; the last may be anyone's
    outcome: Outcome = "answered"
    reward: float | None = None  # None: not judged; NaN is refused where rewards come in
    feedback: str | None = None  # the environment's words about this very trajectory
    by_teacher: bool = False  # the teacher drew it, after its own prompt
    opening: str = ""  # what the environment said at the end of the prompt, before the first turn
    counts: Mapping[str, int] = field(default_factory=dict)  # for the log, such as {"tools/raised": 1}

    @classmethod
    def answer(
        cls,
        *,
        completion_ids: Tensor,
        logprobs: Tensor | None,
        text: str,
        finished: bool,
        raw_text: str | None = None,
        reward: float | None = None,
        feedback: str | None = None,
    ) -> Trajectory:
        """Makes the trajectory of one turn. The turn's fields are `Turn`'s."""
        turn = Turn(ids=completion_ids, logprobs=logprobs, text=text, finished=finished, raw_text=raw_text)
        outcome: Outcome = "answered" if finished else "cut"
        return cls(turns=(turn,), outcome=outcome, reward=reward, feedback=feedback)

    @property
    def own(self) -> tuple[Turn, ...]:
        """Are the student's turns."""
        return tuple(turn for turn in self.turns if turn.is_own)

    @property
    def finished(self) -> bool:
        """False where a limit cut it, or the environment failed."""
        return self.outcome == "answered"

    @property
    def completion_ids(self) -> Tensor:
        """Are all ids after the prompt, (R,)."""
        return self.turns[0].ids if len(self.turns) == 1 else torch.cat([turn.ids for turn in self.turns])

    @property
    def logprobs(self) -> Tensor | None:
        """Are those of the student's tokens; None where nobody drew them."""
        logprobs = [turn.logprobs for turn in self.own if turn.logprobs is not None]
        return torch.cat(logprobs) if len(logprobs) == len(self.own) else None

    @property
    def text(self) -> str:
        """Is what the student said last."""
        return self.own[-1].text

    @property
    def raw_text(self) -> str | None:
        """Is all that was said, with special tokens."""
        texts = [turn.raw_text for turn in self.turns if turn.raw_text is not None]
        return "".join(texts) if len(texts) == len(self.turns) else None

    def transcript(self, edit: Callable[[str], str] = str.strip) -> str:
        """Returns all that was said, for others to read, with who said what of a conversation; `edit` is of answers."""
        if len(self.turns) == 1:
            return edit(self.text)
        said = [
            ("assistant", edit(turn.text)) if turn.is_own else (message["role"], message["content"])
            for turn in self.turns
            for message in turn.messages[: 1 if turn.is_own else None]
        ]
        return "\n\n".join(f"{role}: {content}" for role, content in said)

    def sequences(self, prompt_ids: Tensor) -> list[tuple[Tensor, list[int]]]:
        """Returns what the student reads, and where in it each of its turns begins: one, unless a turn restarts."""
        parts: list[list[Tensor]] = [[prompt_ids]]
        starts: list[list[int]] = [[]]
        for turn in self.turns:
            if turn.restarts:
                parts.append([])
                starts.append([])
            elif turn.is_own:
                starts[-1].append(sum(map(len, parts[-1])))
            parts[-1].append(turn.ids)
        return [(torch.cat(ids), begins) for ids, begins in zip(parts, starts, strict=True)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Is an example with what was sampled for it."""

    example: Example
    prompt_ids: Tensor  # (P,) int64: the student's prompt, as it was sampled from
    rollouts: tuple[Trajectory, ...]  # G >= 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioned:
    """Holds what the teacher of a group reads, made by a context builder."""

    teacher_prompts: tuple[Tensor, ...]  # G of (T_i,) int64; equal ones are shared by `prefix.plan`'s caller
    active: tuple[bool, ...]  # G; False: there was nothing privileged to say, and the completion carries no loss
    counts: Mapping[str, int] = field(default_factory=dict)  # for the log, such as {"context/overflow": 1}
    # G, and of each of the student's turns: what the teacher reads before it, None where there is nothing to say of it.
    # None: it reads its prompt before the first turn, and goes on as the student does.
    turns: tuple[tuple[Tensor | None, ...], ...] | None = None


__all__ = ["Conditioned", "Example", "Group", "Message", "Outcome", "Prompt", "Trajectory", "Turn"]
