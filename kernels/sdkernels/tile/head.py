"""Does the four matrix products, with full accumulation whatever the dtype of the head.

Logits must not be rounded to 16 bits before the difference of two sides is taken, so a 16-bit head is multiplied into
float32 outputs: by cuBLAS's mixed-precision products on a GPU. On a CPU PyTorch has no such product, so a tile of the
head at a time is widened to float32, which costs a few percent of the products themselves; `native_backend.products`
does better. The two gradient products take a gradient tile rounded to 16 bits (0.2 % of it), on a GPU and on a CPU
whose 16-bit products are the faster ones. float16 has too small a range for the tile as it is: the driver brings it
there by a power of two (`narrow`).

float32 products on a CPU go to oneDNN where that computes them exactly and is faster than what `torch.mm` picks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .trials import fastest

Product = Literal["projection", "gradient"]

FASTER_IN_ONEDNN: dict[str, frozenset[Product]] = {
    "AuthenticAMD": frozenset({"projection", "gradient"}),
    "GenuineIntel": frozenset({"projection"}),
}


@cache
def prefers_bfloat16() -> bool:
    """True where a bfloat16 product on this CPU is faster than one in float32, and not a hundred times slower.

    Of two CPUs with AVX-512's bfloat16 instructions and without AMX, an AMD EPYC has it 2.3 times as fast, an Intel
    Emerald Rapids in 1.5 times the time: so it is tried.
    """
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return False

    def way(dtype: torch.dtype) -> Callable[[], object]:
        left, right = torch.ones(128, 512, dtype=dtype), torch.ones(512, 2048, dtype=dtype)
        return lambda: left @ right

    ways = {"float32": partial(way, torch.float32), "bfloat16": partial(way, torch.bfloat16)}
    return fastest("torch's products", ways) == "bfloat16"


@cache
def left_to_onednn() -> frozenset[Product]:
    """Says which float32 products oneDNN does faster than MKL here: with AVX-512 on an AMD CPU all, by 27 %.

    On an Intel CPU the projections, where MKL is up to 1.4 times slower for some numbers of rows.
    PyTorch hands them over only under the precision "bf16", which allows rounding the factors. oneDNN rounds them where
    the CPU has tile instructions (AMX) and nowhere else; that is asked for, and then tried.
    """
    faster = FASTER_IN_ONEDNN.get(cpu_vendor())
    supported = torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported()
    if faster is None or not (supported and torch.backends.mkldnn.is_available()):
        return frozenset()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator) for _ in range(2))
    with _float32_precision("bf16"):
        product = a @ b
    exact = a.double() @ b.double()
    return faster if bool((product - exact).norm() < 1e-6 * exact.norm()) else frozenset()


def has_mixed_products(weight: Tensor) -> bool:
    """True where products of 16-bit factors have float32 results."""
    return weight.device.type == "cuda" and weight.element_size() == 2


def cpu_vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), "")


_precision_lock = threading.Lock()
_precision_users = 0
_precision_before = "none"


@contextmanager
def _float32_precision(precision: str) -> Iterator[None]:
    """Sets what PyTorch lets oneDNN do to float32 products, process-wide: the last to leave puts it back."""
    global _precision_users, _precision_before
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # a property that is set at run time
    with _precision_lock:
        if _precision_users == 0:
            _precision_before = settings.fp32_precision
            settings.fp32_precision = precision
        _precision_users += 1
    try:
        yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            if _precision_users == 0:
                settings.fp32_precision = _precision_before


@contextmanager
def fast_products(device: torch.device, product: Product) -> Iterator[None]:
    """Gives those inside the fastest exact float32 products that this device has."""
    if device.type == "cpu" and product in left_to_onednn():
        with _float32_precision("bf16"):
            yield
    else:
        yield


class Head:
    """Multiplies rows by one (V, H) weight.

    `dtype` is that of the logits, `operand_dtype` that in which hidden rows are projected, `hidden_dtype` that in which
    they come. `factor_dtype` is that of tile and hidden rows in the gradient products; `narrow`: the tile comes in
    `dtype`, to be rounded to it.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, hidden_dtype: torch.dtype | None = None) -> None:
        self.weight = weight
        self.dtype = dtype
        self.mixed = has_mixed_products(weight) and dtype == torch.float32
        self.cast = not self.mixed and weight.dtype != dtype
        # Of float32 rows a 16-bit head sees two parts, or they would be rounded like it.
        self.operand_dtype = weight.dtype if self.mixed and hidden_dtype != torch.float32 else dtype
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and prefers_bfloat16()
        self.narrow = (on_cpu and dtype == torch.float32) or (self.mixed and weight.dtype == torch.float16)
        self.tile: Tensor | None = None

    @property
    def factor_dtype(self) -> torch.dtype:
        return self.weight.dtype if self.mixed or self.narrow else self.operand_dtype

    @property
    def rounds(self) -> bool:
        """True where the gradient products round what they return to 16 bits."""
        return self.narrow and not self.mixed

    def of(self, weight: Tensor) -> Head:
        """Returns what does the same products with another weight (K, H) of the same dtype."""
        other = copy(self)
        other.weight = weight
        return other

    def reserve(self, columns: int) -> None:
        """Allocates the tile that casts go through; `columns` of the vocabulary at a time."""
        if self.cast:
            self.tile = self.weight.new_empty((columns, self.weight.shape[1]), dtype=self.dtype)

    def scratch_bytes(self) -> tuple[int, int]:
        """Returns the bytes that a product needs beside its factors and the tile: once, and per row."""
        # A float16 tile is made beside the one that it is rounded from.
        return 0, self.weight.element_size() * self.weight.shape[0] if self.mixed and self.narrow else 0

    def project(self, sides: list[Tensor], outs: list[Tensor]) -> None:
        """Writes hidden rows (R, H) · weightᵀ into each side's `out` (R, V); a cast tile serves all sides."""
        if self.mixed:
            for hidden, out in zip(sides, outs, strict=True):
                high, weight = hidden.to(self.weight.dtype), self.weight.t()
                torch.mm(high, weight, out_dtype=self.dtype, out=out)
                if hidden.dtype != high.dtype:
                    low = (hidden - high).to(high.dtype)
                    torch.addmm(out, low, weight, out_dtype=self.dtype, beta=1.0, alpha=1.0, out=out)
            return
        for columns, tile in self._tiles():
            for hidden, out in zip(sides, outs, strict=True):
                torch.mm(hidden, tile.t(), out=out[:, columns])

    def hidden_gradient(self, gradient: Tensor, out: Tensor) -> None:
        """Writes gradient (R, V) · weight into `out` (R, H)."""
        if self.mixed:
            torch.mm(gradient, self.weight, out_dtype=self.dtype, out=out)
            return
        if self.narrow:
            out.copy_(torch.mm(gradient, self.weight))
            return
        for columns, tile in self._tiles():
            if columns.start == 0:
                torch.mm(gradient[:, columns], tile, out=out)
            else:
                out.addmm_(gradient[:, columns], tile)

    def weight_gradient(self, gradient: Tensor, hidden: Tensor, out: Tensor, scale: float, first: bool) -> None:
        """Adds scale · gradientᵀ (V, R) · hidden (R, H) to `out` (V, H), or writes it where it is the `first` chunk."""
        if self.mixed:
            torch.addmm(
                out, gradient.t(), hidden, out_dtype=self.dtype, beta=0.0 if first else 1.0, alpha=scale, out=out
            )
        elif self.narrow and self.tile is not None:
            # A 16-bit product rounds its output, so it goes through the tile and is added up in float32.
            buffer = self.tile.view(-1).view(self.weight.dtype).view(-1, self.tile.shape[1])
            for columns in _slices(self.weight.shape[0], buffer.shape[0]):
                product = torch.mm(gradient[:, columns].t(), hidden, out=buffer[: columns.stop - columns.start])
                if first:
                    out[columns].copy_(product).mul_(scale)
                else:
                    out[columns].add_(product, alpha=scale)
        else:
            out.addmm_(gradient.t(), hidden, beta=0.0 if first else 1.0, alpha=scale)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields columns and that part of the weight in the operand dtype; a cast tile overwrites the one before."""
        if self.tile is None:
            yield slice(0, self.weight.shape[0]), self.weight
            return
        for columns in _slices(self.weight.shape[0], self.tile.shape[0]):
            yield columns, self.tile[: columns.stop - columns.start].copy_(self.weight[columns])


def _slices(count: int, size: int) -> Iterator[slice]:
    """Cuts 0 to `count` into steps of `size`, the last one shorter."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
