"""Builds contexts of turns: what a teacher reads before each turn of a trajectory, beside what the student read.

    conditioned = OfTurn().condition(group, tokenizer)          # conditioned.turns[i][t]: ids before turn t, or None

What is shown stands at the end of what was said last before the turn, the prompt or a reply. So the teacher of a turn
reads the trajectory as it was, without the hints of other turns, and costs the hint and the turn once more.

    "feedback"       what the environment said of this very turn, for the teacher alone (`Reply.feedback`)
    "next_reply"     what the environment or the tools replied to the turn: hindsight
    "all_replies"    all that they said afterwards, and what was said of the whole trajectory

A template that reads `attempt` shows a successful trajectory of the group, one that reads `privileged_context` the
row's text. Not covered: a teacher that first reflects on the trajectory in words of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError, ContextError
from ..types import Conditioned, Group, Turn
from . import templates
from .conversation import added_ids, end_of
from .overflow import Shown, split_feedback
from .teacher_prompts import COUNTS, InTemplate, count_fitted, successes

Shows: TypeAlias = Literal["feedback", "next_reply", "all_replies"]
VARIABLES = {"attempt", "feedback", "privileged_context"}


@dataclass(frozen=True, kw_only=True)
class OfTurn(InTemplate):
    """Shows what came of each turn to the teacher of that turn. Raises `ArgumentError`."""

    template: str | None = None  # Jinja, with `feedback`, `attempt` and `privileged_context`; None: `own_text`
    shows: Shows = "feedback"
    success_threshold: float = 0.5  # reward from which a trajectory is a successful attempt

    own_text: ClassVar[str] = templates.TURN
    given_as: ClassVar[str] = "template"
    must_show: ClassVar[tuple[str, ...]] = ()
    shows_feedback: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.shows not in get_args(Shows):
            raise ArgumentError(f"shows must be one of {', '.join(get_args(Shows))}, got {self.shows!r}")
        super().__post_init__()
        if not VARIABLES & templates.variables_of(self._text):
            raise ArgumentError(f"template must show {', '.join(sorted(VARIABLES))} or some of them, got none")

    def condition(self, group: Group, tokenizer: Any) -> Conditioned:
        """Returns what the teacher reads before each turn; a trajectory is active where any turn has something."""
        counts = Counter(dict.fromkeys(COUNTS, 0))
        turns_G = [tuple(self._before(group, i, tokenizer, counts)) for i in range(len(group.rollouts))]
        firsts = tuple(group.prompt_ids if turns[0] is None else turns[0] for turns in turns_G)
        active = tuple(any(ids is not None for ids in turns) for turns in turns_G)
        return Conditioned(teacher_prompts=firsts, active=active, counts=dict(counts), turns=tuple(turns_G))

    def _before(self, group: Group, index: int, tokenizer: Any, counts: Counter[str]) -> Iterator[Tensor | None]:
        """Yields what the teacher reads before each turn of the student."""
        rollout, read = group.rollouts[index], [group.prompt_ids]
        for j, turn in enumerate(rollout.turns):
            if turn.is_own:
                shown = self._shown(group, index, j)
                counts["context/missing"] += not shown
                before, student = rollout.turns[max(0, j - 2) : j], torch.cat(read)
                if shown:
                    render = partial(self._read, group, before, read[:-1], tokenizer)
                    fitted = self._fit(group.example, tokenizer, shown, student, render)
                    count_fitted(counts, fitted, student)
                yield fitted.ids if shown else None
            read = [turn.ids] if turn.restarts else [*read, turn.ids]

    def _shown(self, group: Group, index: int, j: int) -> Shown:
        variables, rollout = templates.variables_of(self._text), group.rollouts[index]
        won = [text for i, text in successes(group, self.success_threshold).items() if i != index]
        said = split_feedback(rollout.turns[j].feedback)
        if self.shows != "feedback":
            replies = [turn.text for turn in rollout.turns[j + 1 :] if not turn.is_own and turn.text.strip()]
            said = (*replies, *split_feedback(rollout.feedback)) if self.shows == "all_replies" else tuple(replies[:1])
        return Shown(
            privileged_context=group.example.privileged_context if "privileged_context" in variables else None,
            attempt=won[0] if won and "attempt" in variables else None,
            feedback=said if "feedback" in variables else (),
        )

    def _read(self, group: Group, before: tuple[Turn, ...], read: list[Tensor], tokenizer: Any, shown: Shown) -> Tensor:
        """Returns the ids of what was read, with this at the end of what was said last."""
        example = group.example
        if not before:
            return self._prompt(example, tokenizer, shown)
        own, others = before
        said = str(others.messages[-1]["content"]).strip()
        start, found, rest = (others.raw_text or "").rpartition(said)
        if not (said and found):
            raise ContextError(
                f"{example.source}: the chat template must show a reply as it was said, to have a context behind it, "
                f"got {others.raw_text!r:.80} of {said!r:.60}"
            )
        end = None if others.restarts else end_of(own, tokenizer)
        return torch.cat([*read, added_ids(start + self._place(example, shown, said) + rest, end, tokenizer)])
