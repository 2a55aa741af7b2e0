"""Imitates an Apple GPU on a CPU: a device "mps" that has no float64 and is not mixed with the CPU.

    with apple_gpu():
        hidden = torch.randn(3, 4).to("mps")

Its tensors are the CPU's, of a class whose `device` says "mps", so that values and gradients are real. As PyTorch does
there, it raises TypeError for a float64 tensor on the device, also for one that is only on its way to the CPU (the cast
is the device's), and RuntimeError where an operator gets tensors of both. What it does not imitate is what the device's
own operators lack or round otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

MPS = torch.device("mps", 0)
COPIES = {"copy_", "_to_copy"}
# The gradient of an index begins with zeros that C++ makes where it believes the tensor to be.
ADOPTED = {"index_put"}
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero"}


class OnGpu(Tensor):
    """Holds what is on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first")


def refuse_float64(dtype: torch.dtype | None) -> None:
    if dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")


@contextmanager
def apple_gpu() -> Iterator[AppleGpu]:
    """Has the device, and yields what counts the reads from it."""
    with pytest.MonkeyPatch.context() as patch:
        # What PyTorch does below all modes: to it the tensors are on the CPU already.
        patch.setattr(Tensor, "to", _to)
        patch.setattr(Tensor, "cpu", lambda tensor: tensor.to("cpu"))
        patch.setattr(torch, "tensor", partial(_new, torch.tensor))
        patch.setattr(torch, "Generator", lambda device=None, generator=torch.Generator: generator())
        pad = torch._C._nn.pad_sequence
        patch.setattr(torch._C._nn, "pad_sequence", lambda parts, *how: pad(parts, *how).to(parts[0].device))
        # A module's weights that are moved are new ones, since a tensor's class stays what it was.
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        with AppleGpu() as gpu:
            yield gpu


class AppleGpu(TorchDispatchMode):
    """Runs the device's operators on the CPU; `reads` counts what the CPU has waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.operators: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace not in ("aten", "prim", "prims"):
            # A custom operator is what its kernel calls, with the mode on again.
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = list(_tensors([args, kwargs]))
        there = [tensor for tensor in inputs if isinstance(tensor, OnGpu)]
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        on_gpu = bool(there) if device is None else torch.device(device).type == "mps"
        if there and name in COPIES:
            refuse_float64(kwargs.get("dtype"))
        elif there and name not in ADOPTED and any(tensor.dim() and not isinstance(tensor, OnGpu) for tensor in inputs):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got mps:0 and cpu")
        if name == "copy_":
            target, source = args[:2]
            on_gpu = isinstance(target, OnGpu)
            if isinstance(source, OnGpu):
                refuse_float64(target.dtype)
        if there:
            self.reads += name in READS or not (on_gpu or name == "copy_")
            self.operators.add(func.name())
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, _on_gpu, result) if on_gpu else result


def _on_gpu(tensor: Tensor) -> Tensor:
    refuse_float64(tensor.dtype)
    return tensor if isinstance(tensor, OnGpu) else tensor.as_subclass(OnGpu)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _new(tensor: Callable[..., Tensor], data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """Does what `torch.tensor` does, which looks for the device below all modes."""
    made = tensor(data, **options)
    return made if device is None else made.to(device)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Does what `Tensor.to` does between two devices."""
    if args and isinstance(args[0], Tensor):
        device, dtype = args[0].device, args[0].dtype
    else:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    device, dtype = tensor.device if device is None else device, dtype or tensor.dtype
    copy = kwargs.get("copy", False) or device.type != tensor.device.type
    if not copy and dtype == tensor.dtype:
        return tensor
    return Moved.apply(tensor, dtype, device)


class Moved(torch.autograd.Function):
    """Copies to another device or dtype, and the gradient back, each at once as PyTorch does."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        ctx.back = {"dtype": tensor.dtype, "device": tensor.device}
        return torch.ops.aten._to_copy(tensor, dtype=dtype, device=device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.aten._to_copy(gradient, **ctx.back), None, None
