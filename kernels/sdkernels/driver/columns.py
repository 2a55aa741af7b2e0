"""Forms a head's gradients from those columns of a tile that matter, to within a tolerance that is kept.

On trained models most of the vocabulary carries next to nothing of a tile G (C, V). The columns with the largest norms
are multiplied as they are. What is dropped is small, but not its product with the head W: rows of W share a few
directions, in which small entries of one sign add up. So its hidden gradient goes through these, `(G U) Qᵀ` with
`U = W Q`, and its head gradient is left out.

What is missing then is known: of the hidden gradient `G (W - U Qᵀ) ω` for random ω, of the head's `ζᵀ G X` for random
signs ζ, X the hidden rows, and their squares have the right mean whatever G is. U, and both kinds of probes, are one
thin right factor (V, 32) that the tile is multiplied by; the kept columns' part of that is taken off. Where the
estimate is above the tolerance more columns are added, in the end all.

What differs from the obvious: nothing is kept from one call to the next. The directions come from rows all over
the head, some thousand of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tile.head import Head
from ..types import in_float64
from .chunks import HeadGradients, HeadWalk

RANK, PROBES = 8, 12  # directions of the head, and probes of either gradient
THIN = RANK + 2 * PROBES
SAMPLED_ROWS, TURNS = 1024, 3  # of the head, to find its directions by
BLOCK = 4096  # columns that are gathered at a time
LEAST_ROWS = 32  # of a chunk; the estimate for fewer says little
MOST_KEPT = 0.7  # of the columns; above it the whole product is faster
ABOVE = 3.0  # standard errors of the probes' mean, that has to keep the tolerance with them
TRIES = 3
BINS = 20  # bits of a float32 that a histogram of squares does not look at: eight bins to each power of two
SMALLEST = 1e-25  # sum of squares, below which single ones may have been rounded to 0


def scratch_bytes(vocab: int, width: int, itemsize: int) -> tuple[int, int]:
    """Returns the bytes needed beside a tile in a dtype of so many bytes: once, and per row of it."""
    once = itemsize * (vocab * THIN + 2 * BLOCK * width) + 24 * vocab
    return once, itemsize * (BLOCK + 4 * THIN + width)


class ColumnGradients(HeadGradients):
    """Is `HeadGradients` to within a relative error of `tolerance`, by Frobenius norm, of hidden states and of head."""

    def __init__(
        self,
        walk: HeadWalk,
        wanted: str,
        tolerance: float,
        held: bool = False,
        bounds: Sequence[Tensor | None] = (),
    ) -> None:
        super().__init__(walk, wanted, held, bounds)
        self.tolerance, self.dropped = tolerance, tolerance / 2  # share of a tile's norm
        self.in_full = 0  # chunks, one after the other, that had to be
        head = walk.student_head
        generator = torch.Generator(head.weight.device).manual_seed(0)
        thin, self.basis = _thin_factor(head.weight[: walk.vocab], head.dtype, head.factor_dtype, generator)
        self.thin_head = head.of(thin.to(head.factor_dtype))
        self.thin_head.cast, self.thin_head.tile = False, None
        self.first = False
        vocab, width = head.weight.shape
        block = min(BLOCK, vocab + vocab % 2)
        self.tile = self.thin_head.weight.new_empty((walk.chunk_rows, block), dtype=head.factor_dtype)
        self.picked = head.weight.new_empty((block, width))
        self.product = self.chunk.new_empty((walk.chunk_rows, width))
        self.sums = self.chunk.new_empty((block, width))
        zero = in_float64(self.chunk.new_zeros(()))
        self.missed, self.norm = zero, zero  # of the hidden gradient, squared
        nothing = self.chunk.new_zeros((PROBES, width))
        self.head_missed = nothing  # of the head's
        self.head_norm: Tensor | None = nothing  # the same of all of it; None where some chunk was done in full

    def _sums(self, weight: Tensor) -> Tensor:
        return weight.new_zeros(weight.shape, dtype=self.walk.dtype)  # no chunk writes all of it

    @property
    def error(self) -> Tensor:
        """Is the estimated relative error of the gradients of hidden states and head, (2,)."""
        hidden = (self.missed / self.norm.clamp(min=1e-300)).sqrt()
        head = torch.zeros_like(hidden)
        if self.weight is not None:
            whole = self.weight if self.head_norm is None else self.head_norm
            norm = in_float64(torch.dot(whole.view(-1), whole.view(-1)))
            head = (_squares(self.head_missed).sum() / norm.clamp(min=1e-300)).sqrt()
        return torch.stack([hidden, head]).to(self.chunk)

    def _multiply(
        self, gradient: Tensor, chunk: Tensor | None, hidden: Tensor | None, of_row: Tensor | None, scale: float
    ) -> None:
        if not self._by_columns(gradient, chunk, hidden, of_row, scale):
            self.in_full += 1
            self.head_norm = None
            super()._multiply(gradient, chunk, hidden, of_row, scale)
        else:
            self.in_full = 0
        if chunk is not None:
            self.norm = self.norm + _squares(chunk, of_row).sum()

    def _by_columns(
        self, gradient: Tensor, chunk: Tensor | None, hidden: Tensor | None, of_row: Tensor | None, scale: float
    ) -> bool:
        """Returns False where the chunk is to be done in full; nothing is done then."""
        rows, vocab = gradient.shape
        # Products that are rounded may cancel in the whole and do not in its parts.
        if rows < LEAST_ROWS or self.in_full > 1 or self.walk.student_head.rounds:
            return False
        weights = gradient.new_ones(rows, dtype=torch.float32) if of_row is None else of_row.float().square()
        squares = self.walk.backend.column_squares(gradient, weights)
        total = float(squares.sum())
        if not SMALLEST < total < torch.inf:
            return False
        least = _least_kept(squares, self.dropped**2 * total)
        kept = squares >= least
        columns = kept.nonzero()[:, 0]
        if len(columns) > MOST_KEPT * vocab:
            return False
        whole = _thin_product(self.thin_head, gradient)
        left = whole.clone()
        if chunk is not None:
            chunk.zero_()
        for attempt in range(TRIES):
            self._add_columns(columns, gradient, chunk, hidden, left, scale)
            missed, of_head, errors = self._errors(whole, left, chunk, hidden, of_row)
            worst = float(errors)
            if attempt == 0 and worst:
                ratio = 0.95 * self.tolerance / worst
                self.dropped = min(max(self.dropped * min(ratio, 2.0), self.tolerance / 64), self.tolerance)
            if worst <= self.tolerance or attempt == TRIES - 1:
                break
            more = ~kept
            if attempt < TRIES - 2:
                least = _least_kept(squares, (self.dropped * 0.9) ** 2 * total)
                more &= squares >= least
            kept |= more
            columns = more.nonzero()[:, 0]
        self.missed = self.missed + missed
        if hidden is not None:
            self.head_missed = self.head_missed + of_head[0] * scale
            if self.head_norm is not None:
                self.head_norm = self.head_norm + of_head[1] * scale
        if chunk is not None:
            chunk += left[:, :RANK] @ self.basis.t()
        return True

    def _add_columns(
        self,
        columns: Tensor,
        gradient: Tensor,
        chunk: Tensor | None,
        hidden: Tensor | None,
        left: Tensor,
        scale: float,
    ) -> None:
        """Adds the products of some columns of the tile, and takes them off what is `left` (C, THIN)."""
        head, rows = self.walk.student_head, gradient.shape[0]
        for part in columns.split(BLOCK):
            # Of an even number: processors multiply pairs of 16 bits.
            count, width = len(part), len(part) + len(part) % 2
            tile = self.tile.view(-1)[: rows * width].view(rows, width)
            # index_select along rows is many times slower in 16 bits on a CPU.
            torch.gather(gradient, 1, part.expand(rows, -1), out=tile[:, :count])
            tile[:, count:] = 0.0
            thin = self.thin_head.weight.new_zeros((width, THIN))
            torch.index_select(self.thin_head.weight, 0, part, out=thin[:count])
            left -= _thin_product(self.thin_head.of(thin), tile)
            if chunk is not None:
                torch.index_select(head.weight, 0, part, out=self.picked[:count])
                self.picked[count:width] = 0.0
                head.of(self.picked[:width]).hidden_gradient(tile, self.product[:rows])
                chunk += self.product[:rows]
            if hidden is not None and self.weight is not None:
                head.weight_gradient(tile[:, :count], hidden, self.sums[:count], scale, True)
                self.weight.index_add_(0, part, self.sums[:count])

    def _errors(
        self, whole: Tensor, left: Tensor, chunk: Tensor | None, hidden: Tensor | None, of_row: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Returns what is missing of the hidden gradient, squared; (PROBES, H) of the head's, what is missing and all.

        And the larger of both relative errors, as large as it may well be: where what is missing has few directions,
        what one probe says is far from what the next does.
        """
        probes, signs = slice(RANK, RANK + PROBES), slice(RANK + PROBES, None)
        missed = in_float64(whole.new_zeros(()))
        errors, of_head = [], []
        if chunk is not None:
            by_probe = _squares(left[:, probes], of_row)
            missed = by_probe.sum()
            norm = _squares(chunk + left[:, :RANK] @ self.basis.t(), of_row).sum()
            errors.append((missed + _spread(by_probe)) / norm.clamp(min=1e-300))
        if hidden is not None:
            given = hidden.to(self.walk.dtype)
            of_head = [part[:, signs].t() @ given for part in (left, whole)]
            missing, norm = _squares(of_head[0].t()), _squares(of_head[1]).sum()
            errors.append((missing.sum() + _spread(missing)) / norm.clamp(min=1e-300))
        return missed, of_head, torch.stack(errors).amax().sqrt() if errors else missed


def _thin_factor(
    weight: Tensor, dtype: torch.dtype, narrow: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns [U | probes of the rest | signs] (V, THIN), to be rounded to `narrow`, and Q (H, RANK).

    The probes are of what is left of the head when U has been rounded.
    """
    vocab, width = weight.shape

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=weight.device, dtype=dtype)

    sample = weight[:: max(1, vocab // SAMPLED_ROWS)].to(dtype)
    basis = normal(width, min(RANK, width))
    for _ in range(TURNS):
        basis = torch.linalg.qr(sample.t() @ (sample @ basis)).Q
    basis = torch.nn.functional.pad(basis, (0, RANK - basis.shape[1]))
    directions = normal(width, PROBES) / PROBES**0.5
    cross = basis.t() @ directions
    thin = weight.new_empty((vocab, THIN), dtype=dtype)
    right = torch.cat([basis, directions - basis @ cross], dim=1)
    for block in range(0, vocab, BLOCK):
        rows = slice(block, block + BLOCK)
        part = torch.mm(weight[rows].to(dtype), right, out=thin[rows, : RANK + PROBES])
        if narrow != dtype:
            exact, rounded = part[:, :RANK].clone(), part[:, :RANK].to(narrow)
            part[:, :RANK] = rounded
            part[:, RANK:] += (exact - rounded) @ cross
    bits = torch.randint(1 << PROBES, (vocab, 1), generator=generator, device=weight.device)
    signs = bits >> torch.arange(PROBES, device=weight.device) & 1
    thin[:, RANK + PROBES :] = (signs * 2 - 1) / PROBES**0.5
    return thin, basis


def _thin_product(head: Head, tile: Tensor) -> Tensor:
    """Returns a tile (C, K) times a thin factor (K, THIN), summed in the compute dtype."""
    out = tile.new_empty((tile.shape[0], THIN), dtype=head.dtype)
    head.hidden_gradient(tile, out)
    return out


def _least_kept(squares: Tensor, budget: float) -> float:
    """Returns the least value such that all smaller ones add up to at most `budget`; to an eighth of a power of two."""
    if squares.device.type == "cpu":
        masses = torch.bincount(squares.view(torch.int32) >> BINS, weights=squares.double(), minlength=2)
        first = int((masses.cumsum(0) <= budget).sum())
        return float(torch.tensor(first << BINS, dtype=torch.int32).view(torch.float32))
    ordered = squares.sort().values  # a weighted count would depend on the order of a GPU's additions
    return float(ordered[(in_float64(ordered).cumsum(0) <= budget).sum().clamp(max=len(ordered) - 1)])


def _squares(x: Tensor, by_row: Tensor | None = None) -> Tensor:
    """Returns the sum of squares of each column, in float64; row i times `by_row[i]`."""
    wide = in_float64(x)
    return (wide if by_row is None else wide * in_float64(by_row)[:, None]).square().sum(0)


def _spread(by_probe: Tensor) -> Tensor:
    """Returns how far the sum of so many probes may well be off."""
    return ABOVE * by_probe.std() * PROBES**0.5
