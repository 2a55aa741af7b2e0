"""How the statistics of parts of the vocabulary are merged: sums of exponentials, expected logits, top-k.

A part is the columns that one rank holds. Everything arrives as (R, C, …) float64, for R parts and C rows, in the order
of the parts, so that whoever merges the same numbers gets the same result to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Normaliser(NamedTuple):
    """One side of C rows over the whole vocabulary, (C,) float64 each; `log_sum` is relative to `shift`."""

    shift: Tensor
    log_sum: Tensor
    entropy: Tensor  # nats

    @property
    def level(self) -> Tensor:
        """Log of the sum of exponentials of the logits as they were."""
        return self.shift + self.log_sum


def merge_exponentials(shift: Tensor, total: Tensor, weighted: Tensor) -> Normaliser:
    """Of `Σ e^(z - shift)` and `Σ e^(z - shift) (z - shift)` of each part, (R, C)."""
    top = shift.amax(0)
    scales = (shift - top).exp()
    whole = (scales * total).sum(0)
    mean = (scales * (weighted + total * (shift - top))).sum(0) / whole
    log_sum = whole.log()
    return Normaliser(top, log_sum, log_sum - mean)


def merge_topk(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (R, C, M): their ids (C, k), largest value first, and their places in R · M.

    Of equal values the lower id comes first.
    """
    values, ids = by_row(values), by_row(ids)
    order = ids.argsort(dim=-1)
    best = values.gather(1, order).argsort(dim=-1, descending=True, stable=True)[:, :k]
    places = order.gather(1, best)
    return ids.gather(1, places).to(torch.int64), places


def by_row(tensor: Tensor) -> Tensor:
    """(R, C, M) to (C, R · M)."""
    return tensor.transpose(0, 1).reshape(tensor.shape[1], -1)
