"""Takes the statistics of a part of the vocabulary and merges those of all: sums of exponentials, top-k.

A part is the columns that one rank holds. What is merged arrives as (R, C, …) float64, for R parts and C rows, in the
order of the parts, so that whoever merges the same numbers gets the same result to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..tile.elementwise import Scratch, Sums, exponential_sums, growth_sums


class Normaliser(NamedTuple):
    """Normalises one side of C rows over the whole vocabulary, (C,) float64; `log_sum` is relative to `shift`."""

    shift: Tensor
    log_sum: Tensor
    entropy: Tensor  # nats

    @property
    def level(self) -> Tensor:
        """Is the log of the sum of exponentials of the logits as they were."""
        return self.shift + self.log_sum


def side_sums(
    z: Tensor, other: Tensor | None, teacher_is_gap: bool, close: bool, scratch: Scratch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the sums of both sides over a block of one part, in float64; lowers final logits where it must."""

    def named(side: str, shift: Tensor | float, sums: Sums) -> dict[str, Tensor]:
        total, weighted = sums.total.double(), sums.weighted.double()
        lowered = torch.zeros_like(total) if sums.shift is None else sums.shift.double()
        return {f"{side}_shift": shift + lowered, f"{side}_total": total, f"{side}_weighted": weighted}

    student = named("student", 0.0, exponential_sums(z, scratch.neg_p, scratch.a))
    if other is None:
        return student, {}
    if not teacher_is_gap:
        return student, named("teacher", 0.0, exponential_sums(other, scratch.a, scratch.b))
    shift, total = student["student_shift"], student["student_total"]
    if close:
        growth, weighted = growth_sums(z, other, scratch.neg_p, scratch.a, scratch.b)
        # In float64 the sum keeps every digit of the growth, however small.
        return student, named("teacher", shift, Sums(total + growth.double(), weighted, None))
    sums = exponential_sums(torch.add(z, other, out=scratch.u), scratch.a, scratch.b)
    return student, named("teacher", shift, sums)


def lower_(z: Tensor, by: Tensor) -> None:
    """Subtracts (rows, 1), which is 0 for all rows but in extreme cases."""
    if bool(by.any()):
        z.sub_(by.to(z.dtype))


def merge_exponentials(shift: Tensor, total: Tensor, weighted: Tensor) -> Normaliser:
    """Normalises by `Σ e^(z - shift)` and `Σ e^(z - shift) (z - shift)` of each part, (R, C)."""
    top = shift.amax(0)
    scales = (shift - top).exp()
    whole = (scales * total).sum(0)
    mean = (scales * (weighted + total * (shift - top))).sum(0) / whole
    log_sum = whole.log()
    return Normaliser(top, log_sum, log_sum - mean)


def merge_topk(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the ids (C, k) of the k largest of each row of (R, C, M), largest first, and their places in R · M.

    Of equal values the lower id comes first.
    """
    values, ids = by_row(values), by_row(ids)
    order = ids.argsort(dim=-1)
    best = values.gather(1, order).argsort(dim=-1, descending=True, stable=True)[:, :k]
    places = order.gather(1, best)
    return ids.gather(1, places).to(torch.int64), places


def by_row(tensor: Tensor) -> Tensor:
    """Turns (R, C, M) into (C, R · M)."""
    return tensor.transpose(0, 1).reshape(tensor.shape[1], -1)
