"""What a fused trainer adds where TRL builds its teacher's prompts: a text per completion, and a count of cut prompts.

    def verify(prompts, completions, **columns):
        return [(0.0, "test 3 failed: expected 4, got 5"), (1.0, None), None, 0.5]

A reward function may return, for each completion, a number, None (not judged), or a pair of a number and a text about
this completion. TRL's trainer can only show the teacher one text per prompt, a column of the data
(`privileged_context`).

What differs from the obvious: a completion's own text takes the place of its prompt's, which it does not join. An empty
text, or None in its place, is none. Texts of several reward functions are put below each other.

Not covered: texts from reward models, which return numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from ...errors import ArgumentError

TRUNCATED = "self_distillation/teacher_prompt_truncated_fraction"


class TextCollector:
    """Reward functions that return what TRL expects, while their texts are kept here."""

    def __init__(self, count: int) -> None:
        self.texts_B: list[list[str]] = [[] for _ in range(count)]

    def wrap(self, function: Any, name: str) -> Any:
        """A reward model as it is; a function with its texts taken out."""
        if isinstance(function, nn.Module):
            return function

        def numbers_only(*args: Any, **kwargs: Any) -> list[Any]:
            return [self._take(row, one, name) for row, one in enumerate(function(*args, **kwargs))]

        return numbers_only

    def feedback(self) -> list[str | None]:
        """Of each completion what all functions said; None where none did."""
        return ["\n".join(texts) if texts else None for texts in self.texts_B]

    def _take(self, row: int, value: Any, name: str) -> Any:
        if not isinstance(value, tuple):
            return value
        number, text = value if len(value) == 2 else (value, value)
        is_number = number is None or isinstance(number, Real | torch.Tensor)
        if not is_number or not (text is None or isinstance(text, str)):
            raise ArgumentError(
                f"reward function {name} must return numbers, None, or pairs of a number and a text, got {value!r} for "
                f"completion {row}"
            )
        if text is not None and text.strip() and row < len(self.texts_B):
            self.texts_B[row].append(text)
        return number


def merged(own: Sequence[str | None], given: Sequence[Any] | None) -> list[Any]:
    """The completion's own text, or else its prompt's."""
    given = [None] * len(own) if given is None else given
    return [other if text is None else text for text, other in zip(own, given, strict=True)]


class PromptLengths:
    """How long the prompts of the last call were, before they were cut."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._warned = False

    def seen(self, ids_B: Sequence[Sequence[int]]) -> None:
        self.lengths = [len(ids) for ids in ids_B]

    def truncated(self, limit: int | None, argument: str) -> list[float]:
        """1.0 for each of them that was cut; the first time there is one, a warning."""
        cut = [float(limit is not None and length > limit) for length in self.lengths]
        if any(cut) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{int(sum(cut))} of {len(cut)} teacher prompts were longer than {argument}={limit} and lost their "
                f"beginning, which is where the question stands; {TRUNCATED} counts them",
                stacklevel=2,
            )
        return cut


def log_truncated(trainer: Any, cut: Sequence[float]) -> None:
    """Into TRL's metrics, over all ranks."""
    mode = "train" if trainer.model.training else "eval"
    counts = torch.tensor(cut, device=trainer.accelerator.device)
    trainer._metrics[mode][TRUNCATED].append(trainer.accelerator.gather(counts).mean().item())


__all__ = ["TRUNCATED", "PromptLengths", "TextCollector", "log_truncated", "merged"]
