"""A GPU that is not there: launches of the Triton kernels are written down instead of done, reads by the host counted.

With tensors of FakeTensorMode the driver walks over a call as on that device, without memory and without numbers; with
CPU tensors its results are what happened to be in memory, and only what it does counts.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from sdkernels.tile.triton_backend import buckets, divergence, scale, softmax_gradient, statistics, tiles, topk

MODULES = (buckets, divergence, scale, softmax_gradient, statistics, topk)
GIB = 1 << 30


class Launch(NamedTuple):
    """One launch of a kernel; `device` is the one that was made current for it, None outside of any such block."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    device: torch.device | None

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def specialisation(self) -> tuple[Any, ...]:
        """What Triton compiles a kernel for, on sm_90; only of tensors that have an address."""
        backend = make_backend(GPUTarget("cuda", 90, 32))
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, special, _ = bind(**self.arguments, **self.options)
        constants = (value for value, parameter in zip(bound.values(), self.kernel.params, strict=True)
                     if parameter.is_constexpr)  # fmt: skip
        return self.name, *special, *constants


@contextmanager
def recorded(memory: int = 141 * GIB, capability: tuple[int, int] = (9, 0)) -> Iterator[list[Launch]]:
    """Collects the launches in the block; `memory` and `capability` are those of every CUDA device."""

    launches: list[Launch] = []
    current: list[torch.device] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                names = inspect.signature(self.kernel.fn).parameters
                given = dict(zip(names, args, strict=False)) | kwargs
                options = {name: given.pop(name) for name in list(given) if name not in names}
                device = current[-1] if current else None
                launches.append(Launch(self.kernel, grid, given, options, device))

            return launch

    @contextmanager
    def on_device(tensor: Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "on_device", on_device)
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recorder(getattr(module, name)))
        patch.setattr(tiles, "_check", lambda name, logits: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        # The choice of a backend asks for it; the kernels are those of a GPU, as they were imported.
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
        yield launches


class Indexing(TorchFunctionMode):
    """Does by operators what PyTorch's bindings refuse on a CUDA tensor, a fake one too, in a build without CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        aten = torch.ops.aten
        with torch._C.DisableTorchFunction():
            if name == "copy_":
                return aten.copy_.default(*args)
            if name == "contiguous":
                return args[0].clone(memory_format=torch.contiguous_format)
            if name == "addmm" and "out_dtype" in kwargs:
                _, left, right = args
                assert left.dtype == right.dtype != kwargs["out_dtype"] == kwargs["out"].dtype
                assert kwargs["out"].shape == (left @ right).shape
                return kwargs["out"]
            if name == "__getitem__":
                return _part(*args)
            if name == "__setitem__":
                tensor, index, value = args
                value = torch.as_tensor(value, device=tensor.device).to(tensor.dtype)
                if isinstance(index, Tensor):
                    return aten.index_copy_.default(tensor, 0, index, value)
                return aten.copy_.default(_part(tensor, index), value)
            return func(*args, **kwargs)


def _part(tensor: Tensor, indices: Any) -> Tensor:
    """`tensor[indices]` of slices, numbers, None and, as the only one, a tensor of rows."""
    dim = 0
    for index in indices if isinstance(indices, tuple) else (indices,):
        if index is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(index, int):
            tensor, dim = tensor.select(dim, index), dim - 1
        elif isinstance(index, Tensor):
            tensor = tensor.index_select(dim, index)
        elif index != slice(None):
            assert index.step is None
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, index.start, index.stop)
        dim += 1
    return tensor


class HostReads(TorchFunctionMode):
    """Collects what a GPU would have to wait for: numbers on the host, shapes that depend on them, pageable copies.

    An operator hides what is inside it: call the Python function that it is made of.
    """

    NAMES = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu", "numpy", "equal",
             "masked_select", "unique", "allclose", "tensor", "as_tensor")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else args[1:2])
        )
        if name in self.NAMES or by_mask:
            self.reads.append(name)
        return func(*args, **kwargs or {})
