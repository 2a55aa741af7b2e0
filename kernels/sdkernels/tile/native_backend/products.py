"""Does the products with a head on a CPU with AVX-512, by `products.c`: a 16-bit head as fast as a float32 one."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..head import Head, cpu_vendor, prefers_bfloat16
from ..threads import run_all, shares
from .build import BLOCK_COLUMNS, BLOCK_ROWS, DEPTH, TILE_COLUMNS, TILE_ROWS, library

# An Intel Emerald Rapids does products of 512 rows in 0.92 to 1.03 of the time of MKL and oneDNN; no AMD was at hand.
FASTER_ON = frozenset({"GenuineIntel"})
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Entries of a head whose products are worth packing.
LEAST_HEAD = 1 << 18
# Of a product; less is not worth another thread.
LEAST_SUMMANDS = 1 << 20


@cache
def compiled() -> ctypes.CDLL | None:
    """Returns the library, if this CPU has what its products take."""
    native = library()
    if native is None or not native.sdkernels_has_products():
        return None
    pointer, integer, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    entries = {
        "left_entries": [integer, integer],
        "right_entries": [integer, integer],
        "project_scratch": [integer, integer],
        "hidden_gradient_scratch": [integer, integer, integer],
        "weight_gradient_scratch": [integer],
    }
    factor = [pointer, code, integer]
    work = {
        "pack_left": [*factor, integer, integer, pointer],
        "pack_right": [*factor, integer, integer, pointer, pointer],
        "project": [code, pointer, integer, *factor, integer, integer, pointer, pointer, integer],
        "hidden_gradient": [pointer, integer, integer, *factor, integer, integer, pointer, pointer, integer],
        "weight_gradient": [pointer, integer, integer, integer, pointer, integer, pointer, pointer, integer, code],
    }
    for functions, result in ((entries, integer), (work, None)):
        for name, arguments in functions.items():
            function = getattr(native, f"sdkernels_{name}")
            function.argtypes, function.restype = arguments, result
    return native


def takes(weight: Tensor, dtype: torch.dtype) -> bool:
    """True where the products of this head (V, H), summed in `dtype`, can be done here."""
    known = weight.device.type == "cpu" and weight.dtype in CODES and weight.stride(1) == 1
    return known and dtype == torch.float32 and compiled() is not None


def make_head(weight: Tensor, dtype: torch.dtype) -> Head:
    """Returns a head (V, H) for logits of `dtype`: compiled where that was measured to beat torch's products."""
    faster = cpu_vendor() in FASTER_ON and weight.numel() >= LEAST_HEAD
    in_16_bits = weight.dtype == torch.bfloat16 and prefers_bfloat16()
    return (NativeHead if faster and not in_16_bits and takes(weight, dtype) else Head)(weight, dtype)


class NativeHead(Head):
    """Multiplies by a head (V, H) in compiled products; hidden rows and logits are float32."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        if not takes(weight, dtype):
            raise TypeError(f"no compiled products of {weight.dtype} on {weight.device}, summed in {dtype}")
        self.cast = self.narrow = False  # 16 bits are widened while they are packed

    def scratch_bytes(self) -> tuple[int, int]:
        vocab, width = self.weight.shape
        a_thread = _library().sdkernels_project_scratch(vocab, width) + DEPTH * (BLOCK_ROWS + TILE_ROWS)
        return 4 * torch.get_num_threads() * a_thread, 4 * DEPTH

    def project(self, sides: list[Tensor], outs: list[Tensor]) -> None:
        _operators().native_project(sides, self.weight, outs)

    def hidden_gradient(self, gradient: Tensor, out: Tensor) -> None:
        if self.weight.dtype == torch.float32:  # MKL does this one in 0.93 of the time
            super().hidden_gradient(gradient, out)
            return
        _operators().native_hidden_gradient(gradient, self.weight, out)

    def weight_gradient(self, gradient: Tensor, hidden: Tensor, out: Tensor, scale: float, first: bool) -> None:
        _operators().native_weight_gradient(gradient, hidden, out, scale, first)


# Operators, so that whoever counts products by torch's dispatcher sees these too.
# The package's own name: a copy of it under another one may be loaded beside it.
NAMESPACE = __name__.partition(".")[0]
OPERATORS = torch.library.Library(NAMESPACE, "FRAGMENT")
OPERATORS.define("native_project(Tensor[] sides, Tensor weight, Tensor(a!)[] outs) -> ()")
OPERATORS.define("native_hidden_gradient(Tensor gradient, Tensor weight, Tensor(a!) out) -> ()")
OPERATORS.define(
    "native_weight_gradient(Tensor gradient, Tensor hidden, Tensor(a!) out, float scale, bool first) -> ()"
)


@torch.library.impl(OPERATORS, "native_project", "CPU")
def _project(sides: list[Tensor], weight: Tensor, outs: list[Tensor]) -> None:
    library, (vocab, width), rows = _library(), weight.shape, len(sides[0])
    sides = [side.contiguous() for side in sides]
    packed = [_scratch(1, library.sdkernels_left_entries(rows, width)) for _ in sides]
    for side, left in zip(sides, packed, strict=True):
        library.sdkernels_pack_left(*_factor(side), rows, width, left.data_ptr())
    parts = shares(vocab, step=TILE_COLUMNS, most=_threads(rows, weight))
    scratch = _scratch(len(parts), library.sdkernels_project_scratch(width, vocab))

    def part(share: int) -> None:
        start, stop = parts[share]
        library.sdkernels_project(
            len(sides),
            _addresses(packed),
            rows,
            *_factor(weight[start:]),
            stop - start,
            width,
            scratch[share].data_ptr(),
            _addresses([out[:, start:] for out in outs]),
            outs[0].stride(0),
        )

    run_all(part, len(parts))


@torch.library.impl(OPERATORS, "native_hidden_gradient", "CPU")
def _hidden_gradient(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    library, (vocab, width), rows = _library(), weight.shape, len(gradient)
    threads = _threads(rows, weight)
    columns = shares(width, step=BLOCK_COLUMNS, most=threads)
    parts = list(product(shares(rows, step=TILE_ROWS, most=threads // len(columns)), columns))
    high, wide = (max(stop - start for start, stop in side) for side in zip(*parts, strict=True))
    scratch = _scratch(len(parts), library.sdkernels_hidden_gradient_scratch(high, vocab, wide))

    def part(share: int) -> None:
        (top, bottom), (start, stop) = parts[share]
        library.sdkernels_hidden_gradient(
            gradient[top:].data_ptr(),
            gradient.stride(0),
            bottom - top,
            *_factor(weight[:, start:]),
            stop - start,
            vocab,
            scratch[share].data_ptr(),
            out[top:, start:].data_ptr(),
            out.stride(0),
        )

    run_all(part, len(parts))


@torch.library.impl(OPERATORS, "native_weight_gradient", "CPU")
def _weight_gradient(gradient: Tensor, hidden: Tensor, out: Tensor, scale: float, first: bool) -> None:
    library, (vocab, width), rows = _library(), out.shape, len(hidden)
    hidden = hidden.contiguous()
    packed, factors = _scratch(1, library.sdkernels_right_entries(rows, width)), torch.full((rows,), scale)
    library.sdkernels_pack_right(*_factor(hidden), rows, width, factors.data_ptr(), packed.data_ptr())
    parts = shares(vocab, step=TILE_ROWS, most=_threads(rows, out))
    scratch = _scratch(len(parts), library.sdkernels_weight_gradient_scratch(rows))

    def part(share: int) -> None:
        start, stop = parts[share]
        library.sdkernels_weight_gradient(
            gradient[:, start:].data_ptr(),
            gradient.stride(0),
            rows,
            stop - start,
            packed.data_ptr(),
            width,
            scratch[share].data_ptr(),
            out[start:].data_ptr(),
            out.stride(0),
            not first,
        )

    run_all(part, len(parts))


def _operators() -> Any:
    return getattr(torch.ops, NAMESPACE)


def _library() -> ctypes.CDLL:
    functions = compiled()
    if functions is None:
        raise RuntimeError("there are no compiled products on this machine: takes() tells")
    return functions


def _threads(rows: int, weight: Tensor) -> int:
    """Returns how many threads a product of so many rows is worth."""
    return max(1, min(torch.get_num_threads(), rows * weight.numel() // LEAST_SUMMANDS))


def _factor(x: Tensor) -> tuple[int, int, int]:
    """Returns what the library knows of a matrix whose rows are contiguous."""
    return x.data_ptr(), CODES[x.dtype], x.stride(0)


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _scratch(parts: int, entries: int) -> Tensor:
    """Allocates (parts, entries), each part on a 64-byte boundary, as torch's memory is."""
    return torch.empty(parts, -(-entries // 16) * 16)
