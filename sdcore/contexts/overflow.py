"""Leaves out what makes a teacher's prompt too long, and counts it: never silently.

Only what is privileged may be left out. The question, the other turns, the template's own words and the generation
prompt are the same at any length. Three policies:

    error                 too long is a `ContextError` that names the row and both lengths
    drop_oldest_feedback  entries of the feedback go, the oldest first; if the attempt does not fit even alone, it goes
                          and as much feedback as fits comes back
    truncate_context      feedback loses its beginning, then the attempt or the privileged context its end, token by
                          token, until the prompt that is rendered anew fits

Feedback is one text or several entries, oldest first, that `join_feedback` put together: with the ASCII record
separator between them, which no message contains by chance. The teacher reads them with a blank line in between.

What differs from the obvious: a prompt is always rendered and tokenized again after a cut, so the limit holds whatever
the tokenizer merges. Where nothing privileged fits, the completion has no context left and carries no loss; that is
counted as `context/dropped`.

Not covered: prompts that are too long without any context, which are the data's business and an error under every
policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias, get_args

from torch import Tensor

from ..errors import ArgumentError, ContextError

Overflow: TypeAlias = Literal["error", "drop_oldest_feedback", "truncate_context"]

FEEDBACK_SEPARATOR: Final = "\x1e"
BETWEEN_ENTRIES: Final = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Holds what is privileged in a prompt, as far as it may be left out."""

    privileged_context: str | None = None
    attempt: str | None = None
    feedback: tuple[str, ...] = ()  # oldest first

    def __bool__(self) -> bool:
        return bool(self.privileged_context or self.attempt or self.feedback)

    @property
    def variables(self) -> dict[str, str | None]:
        """Are the texts by the names that templates have for them; in the order in which they are cut."""
        feedback = BETWEEN_ENTRIES.join(self.feedback) or None
        return {"feedback": feedback, "attempt": self.attempt, "privileged_context": self.privileged_context}


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """Holds a prompt that fits."""

    ids: Tensor | None  # (T,) int64; None: nothing privileged fits
    shown: Shown
    overflow: bool = False  # it did not fit as it was
    truncated_tokens: int = 0  # that the prompt lost
    dropped_feedback: int = 0  # entries that the prompt lost


def join_feedback(entries: Sequence[str]) -> str:
    """Joins several messages about one completion, oldest first, to one `Trajectory.feedback`."""
    return FEEDBACK_SEPARATOR.join(entries)


def split_feedback(feedback: str | None) -> tuple[str, ...]:
    """Returns the entries of a feedback, without those that say nothing."""
    return tuple(entry for entry in (feedback or "").split(FEEDBACK_SEPARATOR) if entry.strip())


def plain_feedback(feedback: str | None) -> str | None:
    """Returns a feedback as it is shown to people."""
    return "\n\n".join(split_feedback(feedback)) or None


def check_overflow(overflow: Overflow, limit: int | None, *, shows_feedback: bool) -> None:
    """Raises `ArgumentError`."""
    if overflow not in get_args(Overflow):
        raise ArgumentError(f"overflow must be one of {', '.join(get_args(Overflow))}, got {overflow!r}")
    if overflow == "drop_oldest_feedback" and not shows_feedback:
        raise ArgumentError("overflow 'drop_oldest_feedback' needs a context that shows feedback, got one without")
    if limit is not None and limit < 1:
        raise ArgumentError(f"max_teacher_prompt_length must be at least 1, or None for no limit, got {limit}")


def fit(
    shown: Shown,
    render: Callable[[Shown], Tensor],
    tokenizer: Any,
    *,
    overflow: Overflow,
    limit: int | None,
    student_length: int,
    source: str,
) -> Fitted:
    """Returns the prompt that `render` makes of as much as may be shown in at most `limit` tokens.

    `student_length` is the number of tokens without any context. Raises `ContextError`.
    """
    ids = render(shown)
    length = len(ids)
    if limit is None or length <= limit:
        return Fitted(ids=ids, shown=shown)
    if student_length > limit:
        raise ContextError(
            f"{source}: the prompt must have at most max_teacher_prompt_length={limit} tokens, got {student_length} "
            "without any context, and the question is never cut"
        )
    if overflow == "error" or not shown:
        way_out = "choose another overflow than 'error'" if shown else "shorten the template, which shows no context"
        raise ContextError(
            f"{source}: the teacher's prompt must have at most max_teacher_prompt_length={limit} tokens, got {length}, "
            f"{length - student_length} more than the student's; raise the limit, or {way_out}"
        )
    candidates = _shorter(shown) if overflow == "drop_oldest_feedback" else _cut(shown, render, tokenizer, limit)
    for candidate in candidates:
        ids = render(candidate)
        if len(ids) <= limit:
            dropped = len(shown.feedback) - len(candidate.feedback)
            lost = length - len(ids)
            return Fitted(ids=ids, shown=candidate, overflow=True, truncated_tokens=lost, dropped_feedback=dropped)
    return Fitted(
        ids=None,
        shown=Shown(),
        overflow=True,
        truncated_tokens=length - student_length,
        dropped_feedback=len(shown.feedback),
    )


def _shorter(shown: Shown) -> Iterator[Shown]:
    """Yields the attempt with ever less feedback, then the same without the attempt; never nothing."""
    for attempt in dict.fromkeys((shown.attempt, None)):
        for first in range(len(shown.feedback) + 1):
            candidate = replace(shown, attempt=attempt, feedback=shown.feedback[first:])
            if candidate and candidate != shown:
                yield candidate


def _cut(shown: Shown, render: Callable[[Shown], Tensor], tokenizer: Any, limit: int) -> Iterator[Shown]:
    """Yields ever shorter ones, by as many tokens as the last one was too long by; never nothing."""
    for name, text in shown.variables.items():
        if text is None:
            continue
        edges = _edges(text, tokenizer)
        kept = len(edges)
        while kept:
            # A cut may merge or split the tokens beside it, so what was cut is not always what the prompt lost.
            kept = max(0, kept - (len(render(shown)) - limit))
            if name == "feedback":
                characters = len(text) - edges[len(edges) - kept][0] if kept else 0
                shown = replace(shown, feedback=_latest(shown.feedback, characters))
            else:
                left = text[: edges[kept - 1][1]] if kept else ""
                shown = replace(shown, **{name: left if left.strip() else None})  # type: ignore[arg-type]
            if not shown:
                return
            yield shown


def _latest(entries: tuple[str, ...], characters: int) -> tuple[str, ...]:
    """Returns the last characters of the entries, counted with what stands between them."""
    kept: list[str] = []
    for entry in reversed(entries):
        if characters <= 0:
            break
        kept.insert(0, entry[-characters:])
        characters -= len(entry) + len(BETWEEN_ENTRIES)
    return tuple(entry for entry in kept if entry.strip())


def _edges(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Returns where each token of a text begins and ends in it, in characters."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [(int(start), int(end)) for start, end in offsets]
    # A tokenizer in Python does not say. Its pieces' lengths do, up to what it normalised away.
    edges, start = [], 0
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        end = min(len(text), start + max(1, len(tokenizer.decode([token]))))
        edges.append((min(start, len(text)), end))
        start = end
    return edges
