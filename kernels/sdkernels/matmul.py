"""The four matrix products, with full accumulation whatever the dtype of the head.

Logits must not be rounded to 16 bits before the difference of two sides is taken, so a 16-bit head is multiplied into
float32 outputs: by cuBLAS's mixed-precision products on a GPU, and elsewhere by casting a tile of the head at a time,
which costs a few percent of the products themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def compute_dtype_of(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any operand has it, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


class Head:
    """One (V, H) weight and how rows are multiplied by it.

    `dtype` is that of the logits; `operand_dtype` that in which hidden rows and gradient tiles enter the products.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype
        self.mixed = weight.device.type == "cuda" and weight.element_size() == 2 and dtype == torch.float32
        self.cast = not self.mixed and weight.dtype != dtype
        self.operand_dtype = weight.dtype if self.mixed else dtype
        self.tile: Tensor | None = None

    def reserve(self, columns: int) -> None:
        """Allocate the tile that casts go through; `columns` of the vocabulary at a time."""
        if self.cast:
            self.tile = self.weight.new_empty((columns, self.weight.shape[1]), dtype=self.dtype)

    def project(self, sides: list[Tensor], outs: list[Tensor]) -> None:
        """Each `out` (R, V) = its side's hidden rows (R, H) · weightᵀ; a cast tile serves all sides."""
        if self.mixed:
            for hidden, out in zip(sides, outs, strict=True):
                torch.mm(hidden, self.weight.t(), out_dtype=self.dtype, out=out)
            return
        for columns, tile in self._tiles():
            for hidden, out in zip(sides, outs, strict=True):
                torch.mm(hidden, tile.t(), out=out[:, columns])

    def hidden_gradient(self, gradient: Tensor, out: Tensor) -> None:
        """`out` (R, H) = gradient (R, V) · weight."""
        if self.mixed:
            torch.mm(gradient, self.weight, out_dtype=self.dtype, out=out)
            return
        for columns, tile in self._tiles():
            if columns.start == 0:
                torch.mm(gradient[:, columns], tile, out=out)
            else:
                out.addmm_(gradient[:, columns], tile)

    def weight_gradient(self, gradient: Tensor, hidden: Tensor, out: Tensor, scale: float, first: bool) -> None:
        """`out` (V, H) += scale · gradientᵀ (V, R) · hidden (R, H), or = where it is the `first` chunk."""
        if self.mixed:
            torch.addmm(
                out, gradient.t(), hidden, out_dtype=self.dtype, beta=0.0 if first else 1.0, alpha=scale, out=out
            )
        else:
            out.addmm_(gradient.t(), hidden, beta=0.0 if first else 1.0, alpha=scale)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, that part of the weight in the operand dtype); each cast tile overwrites the one before."""
        vocab = self.weight.shape[0]
        if self.tile is None:
            yield slice(0, vocab), self.weight
            return
        for start in range(0, vocab, self.tile.shape[0]):
            columns = slice(start, min(start + self.tile.shape[0], vocab))
            yield columns, self.tile[: columns.stop - start].copy_(self.weight[columns])
