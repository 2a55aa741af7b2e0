"""How many bytes does a computation keep alive, and which matrix products does it do? Counted, not read off a process.

`LiveBytes` sees every allocation of a torch operator, also inside custom operators and in backward, so that its
numbers are the same on every run and need no GPU. It does not see what a library allocates below torch (a matmul's
own scratch), nor the inside of a graph that torch.compile made. `free_bytes` says how many bytes a device has left.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Matmul(NamedTuple):
    """Stands for a matrix product (m, k) by (k, n); a batch is counted in m."""

    operator: str
    m: int
    k: int
    n: int


# Position of the first factor among the arguments of each operator that multiplies matrices.
FIRST_FACTOR = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "mv": 0, "addmv": 1}


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors among an operator's arguments or results, also those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (item for item in value if isinstance(item, Tensor))


@cache
def _is_composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _name_of(func: Any) -> str:
    return func.overloadpacket.__name__ if func.namespace in ("aten", __package__) else ""


def _factors(name: str, args: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    """Returns the factors of the products that an operator does, each as (..., m, k) and (k, n)."""
    if name in FIRST_FACTOR:
        return [(args[FIRST_FACTOR[name]], args[FIRST_FACTOR[name] + 1])]
    if name == "native_project":
        return [(hidden, args[1].t()) for hidden in args[0]]
    if name == "native_hidden_gradient":
        return [(args[0], args[1])]
    if name == "native_weight_gradient":
        return [(args[0].t(), args[1])]
    return []


def _matmuls_of(func: Any, args: tuple[Any, ...]) -> list[Matmul]:
    name = _name_of(func).removesuffix("_")
    return [
        Matmul(name, math.prod(a.shape[:-1]), a.shape[-1], b.shape[-1] if b.dim() > 1 else 1)
        for a, b in _factors(name, args)
    ]


def _zeros_like_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if "out" in kwargs:
        return kwargs["out"].zero_()
    name = _name_of(func)
    if name.startswith("native_"):
        for out in args[2] if isinstance(args[2], list) else [args[2]]:
            out.zero_()
        return None
    if name.endswith("_"):
        return args[0].zero_()
    a, b = args[FIRST_FACTOR[name]], args[FIRST_FACTOR[name] + 1]
    return a.new_zeros((*a.shape[:-1], *b.shape[-1:]) if b.dim() > 1 else a.shape[:-1])


class LiveBytes(TorchDispatchMode):
    """Counts, inside a `with` block, the bytes of all live storages that were allocated there, and matrix products.

    A storage counts once, from its allocation until the last tensor on it is gone; views and in-place or `out=`
    results are free. `uncounted_bytes` are sizes of storages that the question leaves out (the gradients, the outputs):
    for each number one live storage of exactly that size is not counted, a second one is. With `multiply=False` matrix
    products are counted and allocated but give zeros: for shapes whose products take minutes on a CPU.

        with LiveBytes() as probe:
            linear_divergence(...).loss.backward()
        assert probe.largest_numel < N * V and probe.peak_bytes < 256 << 20
    """

    def __init__(self, *, uncounted_bytes: Iterable[int] = (), multiply: bool = True) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.largest_numel = 0
        self.largest_bytes = 0
        self.largest_origin = ""  # operator and shape of the tensor with the most elements
        self.matmuls: list[Matmul] = []
        self._multiply = multiply
        self._live_bytes = 0
        self._sizes: dict[int, int] = {}  # storage address -> bytes; 0 for storages from before the block
        self._allowances = Counter(uncounted_bytes)

    def matmul_count(self, *dimensions: int) -> float:
        """Counts all multiplications in matrix products in units of a product of these dimensions, e.g. (N, V, H)."""
        return sum(product.m * product.k * product.n for product in self.matmuls) / math.prod(dimensions)

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [*_tensors(args), *_tensors(kwargs.values())]
        for tensor in inputs:
            self._see(tensor, is_new=False)
        products = _matmuls_of(func, args)
        self.matmuls += products
        if products and not self._multiply:
            result = _zeros_like_product(func, args, kwargs)
            self._see_results(result, func)
            return result
        if func.namespace not in ("aten", "prim", "prims"):
            # A mode is off inside its own handler. Calling a custom operator's kernel directly, with the mode on
            # again, shows what it allocates; calling the operator would end up here for ever.
            device = inputs[0].device.type if inputs else "cpu"
            key = getattr(torch._C.DispatchKey, device.upper())
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        if _is_composite(func):
            # Such operators reach a mode undivided in inference mode.
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        self._see_results(result, func)
        return result

    def _see_results(self, result: Any, origin: Any) -> None:
        for tensor in _tensors(result if isinstance(result, tuple | list) else (result,)):
            self._see(tensor, is_new=True, origin=origin)

    def _see(self, tensor: Tensor, *, is_new: bool, origin: Any = None) -> None:
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(address)
        if known is None:
            weakref.finalize(storage, self._forget, address).atexit = False
            if is_new and self._allowances[size] > 0:
                self._allowances[size] -= 1
                weakref.finalize(storage, self._return_allowance, size).atexit = False
                counted = 0
            else:
                counted = size if is_new else 0
            self._sizes[address] = counted
            self._live_bytes += counted
        elif known and size != known:  # resized in place
            self._sizes[address] = size
            self._live_bytes += size - known
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        if is_new and known != 0:
            self.largest_bytes = max(self.largest_bytes, size)
            numel = size // tensor.element_size()
            if numel > self.largest_numel:
                self.largest_numel, self.largest_origin = numel, f"{origin} {tuple(tensor.shape)} {tensor.dtype}"

    def _forget(self, address: int) -> None:
        self._live_bytes -= self._sizes.pop(address, 0)

    def _return_allowance(self, size: int) -> None:
        self._allowances[size] += 1


def free_bytes(device: torch.device) -> int | None:
    """Returns how many bytes can still be allocated on the device; None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # the allocator's, which it gives again
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    # Not the memory that is free: most of what files take up is given back when it is asked for.
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
