"""Picks the backend that computes the tiles of a call, and loads its module.

"auto" takes Triton on a GPU, compiled C on a CPU that has a compiler, and PyTorch's operators for float64 and for
everything else. A backend that is asked for by name is taken or refused, never replaced.

What differs from the obvious: a backend's module is imported when it is first used and not before, so that `sdkernels`
works where Triton is missing and starts no compiler on import.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

# A top-k support of this size or more does not fit the registers of a Triton program.
TRITON_BUCKETS = 2048


def choose_backend(backend: str, *tensors: Tensor | None, buckets: int = 0) -> str:
    """Returns the backend for tensors like these, "auto" resolved; refuses one that cannot take them."""
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device.type
    wide = any(tensor.dtype == torch.float64 for tensor in present)
    if backend == "auto":
        if wide:
            return "torch"
        if device == "cpu":
            return "native" if _can_compile() else "torch"
        fits = device == "cuda" and buckets < TRITON_BUCKETS
        return "triton" if fits and importlib.util.find_spec("triton") else "torch"
    if backend != "torch" and wide:
        raise TypeError(f"backend={backend!r} needs inputs of at most 32 bits, got torch.float64; use backend='torch'")
    if backend == "triton":
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend='triton' needs tensors on a GPU (or TRITON_INTERPRET=1), got {present[0].device}"
            )
        if not importlib.util.find_spec("triton"):
            raise ModuleNotFoundError("backend='triton' needs the triton package: pip install triton")
    if backend == "native":
        if device != "cpu":
            raise ValueError(f"backend='native' needs tensors on a CPU, got {present[0].device}")
        if not _can_compile():
            raise RuntimeError(
                "backend='native' needs a C compiler ($CC, or cc) and a folder for what it makes ($SDKERNELS_CACHE, or "
                "~/.cache/sdkernels); use backend='torch'"
            )
    return backend


@torch.compiler.assume_constant_result
def _can_compile() -> bool:
    from ..tile.native_backend import is_available

    return is_available()


def load_backend(name: str) -> ModuleType:
    """Imports the module of a backend; triton is imported here and nowhere else."""
    return importlib.import_module(f"..tile.{name}_backend", __package__)
