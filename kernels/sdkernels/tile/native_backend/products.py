"""Does the products with a head on a CPU with AVX-512, by `products.c`: a 16-bit head as fast as a float32 one.

Where the processor multiplies pairs of bfloat16, products of bfloat16 with float32 sums are faster still (`PairHead`),
and exact where torch's round their result. Which way is taken, or torch's, is tried once (`trials`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from ..head import Head, fast_products
from ..threads import run_all, shares
from ..trials import fastest
from .build import BLOCK_COLUMNS, BLOCK_ROWS, DEPTH, TILE_COLUMNS, TILE_ROWS, library

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PAIRS: Final = 3
# Entries of a head whose products are worth packing.
LEAST_HEAD = 1 << 18
# Of a product; less is not worth another thread.
LEAST_SUMMANDS = 1 << 20
# Rows, vocabulary and hidden size of a trial.
TRIAL = (128, 2048, 512)


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
        "pack_right": [*factor, integer, integer, pointer],
        "project": [code, pointer, integer, *factor, integer, integer, pointer, pointer, integer],
        "hidden_gradient": [pointer, integer, integer, *factor, integer, integer, pointer, pointer, integer],
        "weight_gradient": [
            *factor,
            integer,
            integer,
            pointer,
            integer,
            pointer,
            pointer,
            integer,
            ctypes.c_float,
            code,
        ],
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


def takes_pairs(weight: Tensor, dtype: torch.dtype) -> bool:
    """True where this head's products with bfloat16 rows can be done two summands at a time."""
    even = all(size % 2 == 0 for size in (*weight.shape, weight.stride(0)))
    return takes(weight, dtype) and weight.dtype == torch.bfloat16 and even and bool(_library().sdkernels_has_pairs())


def make_head(weight: Tensor, dtype: torch.dtype, hidden_dtype: torch.dtype | None = None) -> Head:
    """Returns a head (V, H) for logits of `dtype`: the fastest one on this machine of those that take it."""
    kinds: dict[str, type[Head]] = {"torch": Head}
    if weight.numel() >= LEAST_HEAD and takes(weight, dtype):
        kinds["widened"] = NativeHead
        if hidden_dtype == torch.bfloat16 and takes_pairs(weight, dtype):
            kinds["pairs"] = PairHead
    return kinds[_tried(weight.dtype, tuple(kinds))](weight, dtype, hidden_dtype)


@cache
def _tried(dtype: torch.dtype, names: tuple[str, ...]) -> str:
    """Returns which kind of head does its three products in the least time."""
    kinds: dict[str, type[Head]] = {"torch": Head, "widened": NativeHead, "pairs": PairHead}
    return fastest(f"products with a head in {dtype}", {name: partial(_products, kinds[name], dtype) for name in names})


def _products(kind: type[Head], dtype: torch.dtype) -> Callable[[], object]:
    """Returns what makes the three products of a trial."""
    rows, vocab, width = TRIAL
    head = kind(torch.ones(vocab, width, dtype=dtype), torch.float32)
    head.reserve(vocab)
    given = dtype if head.narrow else torch.float32  # of what enters the gradient products
    side, hidden = torch.ones(rows, width, dtype=head.operand_dtype), torch.ones(rows, width, dtype=given)
    gradient, logits = torch.zeros(rows, vocab, dtype=given), torch.zeros(rows, vocab)
    sums = torch.zeros(vocab, width)

    def products() -> None:
        with fast_products(sums.device, "projection"):
            head.project([side], [logits])
        with fast_products(sums.device, "gradient"):
            head.hidden_gradient(gradient, logits[:, :width])
            head.weight_gradient(gradient, hidden, sums, 1.0, False)

    return products


class NativeHead(Head):
    """Multiplies by a head (V, H) in compiled products; hidden rows and logits are float32."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, hidden_dtype: torch.dtype | None = None) -> None:
        super().__init__(weight, dtype, hidden_dtype)
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


class PairHead(NativeHead):
    """Multiplies bfloat16 rows and gradients by a bfloat16 head two summands at a time; sums are float32."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, hidden_dtype: torch.dtype | None = None) -> None:
        super().__init__(weight, dtype, hidden_dtype)
        if not takes_pairs(weight, dtype):
            raise TypeError(f"no products of pairs with {weight.dtype}, {tuple(weight.shape)}")
        self.narrow, self.operand_dtype = True, torch.bfloat16

    @property
    def rounds(self) -> bool:
        return False


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
    view = _words if _are_pairs(sides[0], weight) else _factor
    depth = width // 2 if view is _words else width
    sides = [side.contiguous() for side in sides]
    packed = [_scratch(1, library.sdkernels_left_entries(rows, depth)) for _ in sides]
    for side, left in zip(sides, packed, strict=True):
        library.sdkernels_pack_left(*view(side), rows, depth, left.data_ptr())
    parts = shares(vocab, step=TILE_COLUMNS, most=_threads(rows, weight))
    scratch = _scratch(len(parts), library.sdkernels_project_scratch(depth, vocab))

    def part(share: int) -> None:
        start, stop = parts[share]
        library.sdkernels_project(
            len(sides),
            _addresses(packed),
            rows,
            *view(weight[start:]),
            stop - start,
            depth,
            scratch[share].data_ptr(),
            _addresses([out[:, start:] for out in outs]),
            outs[0].stride(0),
        )

    run_all(part, len(parts))


@torch.library.impl(OPERATORS, "native_hidden_gradient", "CPU")
def _hidden_gradient(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    library, (vocab, width), rows = _library(), weight.shape, len(gradient)
    are_pairs, threads = _are_pairs(gradient, weight), _threads(rows, weight)
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
            *_factor(weight[:, start:], are_pairs),
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
    hidden, are_pairs = hidden.contiguous(), _are_pairs(gradient, hidden)
    packed = _scratch(1, library.sdkernels_right_entries(rows, width))
    library.sdkernels_pack_right(*_factor(hidden, are_pairs), rows, width, packed.data_ptr())
    parts = shares(vocab, step=TILE_ROWS, most=_threads(rows, out))
    scratch = _scratch(len(parts), library.sdkernels_weight_gradient_scratch(rows))

    def part(share: int) -> None:
        start, stop = parts[share]
        library.sdkernels_weight_gradient(
            *_factor(gradient[:, start:], are_pairs),
            rows,
            stop - start,
            packed.data_ptr(),
            width,
            scratch[share].data_ptr(),
            out[start:].data_ptr(),
            out.stride(0),
            scale,
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


def _are_pairs(left: Tensor, right: Tensor) -> bool:
    """True where both factors are bfloat16; else the left one is float32, and the right one widened."""
    return left.dtype == right.dtype == torch.bfloat16


def _factor(x: Tensor, is_of_pairs: bool = False) -> tuple[int, int, int]:
    """Returns what the library knows of a matrix whose rows are contiguous."""
    return x.data_ptr(), PAIRS if is_of_pairs else CODES[x.dtype], x.stride(0)


def _words(x: Tensor) -> tuple[int, int, int]:
    """Returns the same of a matrix of which neighbours in a row are summed, so that a word of its memory is a pair."""
    return x.data_ptr(), PAIRS, x.stride(0) // 2


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _scratch(parts: int, entries: int) -> Tensor:
    """Allocates (parts, entries), each part on a 64-byte boundary, as torch's memory is."""
    return torch.empty(parts, -(-entries // 16) * 16)
