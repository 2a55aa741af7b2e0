"""Picks the sampled completions that a report shows, and gives each token the shade of its divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, NamedTuple

from .series import is_number

# Steps that are shown, evenly over the run with the first and the last, and completions of each.
MOST_STEPS: Final = 6
MOST_OF_A_STEP: Final = 4
MOST_TOKENS: Final = 1500
MOST_CHARACTERS: Final = 12_000  # of a prompt or a context
SHADES: Final = 10
# The divergence that gets the darkest shade is the one that this share of all shown tokens stays below.
DARKEST_SHARE: Final = 0.97


class Token(NamedTuple):
    """Says how dark a token of a completion stands there."""

    text: str
    divergence: float | None  # None: not known, or not finite
    shade: int  # 0: none ... SHADES; -1: not finite


class Part(NamedTuple):
    """Holds what one side says until the other speaks; an answer has one part."""

    whose: str  # "turn 1" of the student, "reply" of others; "" of an answer
    text: str
    tokens: tuple[Token, ...]  # () where there is nothing per token

    @property
    def mean(self) -> float | None:
        """Returns the mean divergence of its tokens that carried a loss; None where none did."""
        known = [token.divergence for token in self.tokens if token.divergence]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Holds a completion as it is shown; texts are raw, and whoever writes them somewhere escapes them."""

    run: str
    step: int
    prompt: str
    privileged_context: str
    feedback: str
    completion: str
    parts: tuple[Part, ...]
    omitted: int  # tokens that are not shown
    reward: float | None
    active: bool | None

    @property
    def tokens(self) -> list[Token]:
        """Returns those of all parts."""
        return [token for part in self.parts for token in part.tokens]

    @property
    def highest(self) -> list[Token]:
        """Picks the tokens that the teacher would change most, at most 5 of them."""
        known = [token for token in self.tokens if token.divergence]
        return sorted(known, key=lambda token: -(token.divergence or 0.0))[:5]


class Shown(NamedTuple):
    """Holds the completions of a report and their one scale of shades."""

    samples: list[Sample]
    darkest: float  # nats of the darkest shade; 0 where no token has a divergence
    total: int  # in the log


def samples_of(runs: Sequence[tuple[str, Any]]) -> Shown:
    """Selects from every run's samples, with one scale of shades for all."""
    chosen: list[tuple[str, dict[str, Any]]] = []
    for label, run in runs:
        by_step: dict[int, list[dict[str, Any]]] = {}
        for row in run.samples:
            by_step.setdefault(row["step"], []).append(row)
        for step in _spread(sorted(by_step), MOST_STEPS if len(runs) == 1 else 1):
            chosen += [(label, row) for row in by_step[step][:MOST_OF_A_STEP]]
    values = sorted(value for _, row in chosen for value in _divergences(row) if value is not None and value > 0)
    darkest = values[min(len(values) - 1, int(len(values) * DARKEST_SHARE))] if values else 0.0
    total = sum(len(run.samples) for _, run in runs)
    return Shown([_sample(label, row, darkest) for label, row in chosen], darkest, total)


def spaced(tokens: Sequence[str], completion: str) -> list[str]:
    """Gives the tokens' texts the white space that the completion has before them.

    A token that is decoded alone often loses it. Tokens that the completion does not have at their place, such as the
    end of the sequence, stay as they are; where more than half do not fit, all stay, a space between them.
    """
    if "".join(tokens) == completion:
        return list(tokens)
    texts, at, misses = [], 0, 0
    for token in tokens:
        start = at
        while start < len(completion) and completion[start].isspace():
            start += 1
        bare = token.strip()
        if bare and completion.startswith(bare, start):
            texts.append(completion[at : start + len(bare)])
            at = start + len(bare)
        elif not bare and at < start:
            texts.append(completion[at:start])
            at = start
        else:
            misses += 1
            texts.append(token)
    if misses > max(1, len(tokens) // 2):
        return [token if i == 0 else f" {token.strip() or token}" for i, token in enumerate(tokens)]
    return texts


def _sample(label: str, row: dict[str, Any], darkest: float) -> Sample:
    completion = _text(row.get("completion"))
    texts = [_text(token) for token in row["tokens"]] if isinstance(row.get("tokens"), list) else []
    values = _divergences(row)
    pairs = list(zip(texts, values, strict=True)) if len(texts) == len(values) else []
    turns = _turns(row) or [("", 0, completion)]
    reward, active = row.get("reward"), row.get("active")
    return Sample(
        run=label,
        step=row["step"],
        prompt=_text(row.get("prompt")),
        privileged_context=_text(row.get("privileged_context")),
        feedback=_text(row.get("feedback")),
        completion=_cut(completion),
        parts=tuple(
            _part(whose, text, pairs[start : min(end, MOST_TOKENS)], darkest)
            for (whose, start, text), end in zip(turns, [*(turn[1] for turn in turns[1:]), len(pairs)], strict=True)
        ),
        omitted=max(0, len(pairs) - MOST_TOKENS),
        reward=float(reward) if is_number(reward) else None,  # type: ignore[arg-type]
        active=active if isinstance(active, bool) else None,
    )


def _part(whose: str, text: str, pairs: Sequence[tuple[str, float | None]], darkest: float) -> Part:
    texts = spaced([token for token, _ in pairs], text)
    tokens = (Token(shown, value, _shade(value, darkest)) for shown, (_, value) in zip(texts, pairs, strict=True))
    return Part(whose, text, tuple(tokens))


def _turns(row: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Returns whose turns they are, where they begin and what they say; [] for an answer."""
    turns, number = row.get("turns"), count(1)
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("start"), int) for t in turns):
        return []
    named = [f"turn {next(number)}" if turn.get("own") else "reply" for turn in turns]
    return [(name, turn["start"], _text(turn.get("text"))) for name, turn in zip(named, turns, strict=True)]


def _divergences(row: dict[str, Any]) -> list[float | None]:
    values = row.get("per_token")
    if not isinstance(values, list):
        return []
    return [float(value) if is_number(value) else None for value in values]


def _shade(value: float | None, darkest: float) -> int:
    if value is None:
        return -1
    if value <= 0 or darkest <= 0:
        return 0
    # A square root: most divergences are small, and a faint one should still be seen.
    return min(SHADES, math.ceil(SHADES * math.sqrt(value / darkest) - 0.5))


def _spread(steps: Sequence[int], most: int) -> list[int]:
    if len(steps) <= most:
        return list(steps)
    if most == 1:
        return [steps[-1]]
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _text(value: Any) -> str:
    """Writes a field of a sample as text; a prompt may be a conversation."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return _cut("\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in value))
    return _cut(value if isinstance(value, str) else str(value))


def _cut(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    return text[:MOST_CHARACTERS] + f" … {len(text) - MOST_CHARACTERS:,} more characters"
