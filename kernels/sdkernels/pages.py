"""Fresh memory on a CPU in pages of 2 MiB rather than 4 KiB, where Linux gives them to those who ask.

Every call touches its chunk of logits and the head's gradient for the first time. With small pages the kernel is asked
half a million times per 2 GiB, which takes longer than filling them with numbers: of a step that takes 800 ms (float32,
N=384, V=50257, H=1024) 50. PyTorch asks for large pages itself if `THP_MEM_ALLOC_ENABLE=1` was set before it started.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

import torch
from torch import Tensor

PAGE = 1 << 21
# Smaller tensors come from memory that the allocator has kept, which was touched before.
LEAST_BYTES = 1 << 25


def fresh(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`, for a tensor that is written as a whole."""
    tensor = like.new_empty(shape, dtype=dtype)
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and nbytes >= LEAST_BYTES and sys.platform == "linux":
        start = tensor.data_ptr()
        first, last = -(-start // PAGE) * PAGE, (start + nbytes) // PAGE * PAGE
        # Advice: whether it is followed changes no result, so a kernel that knows nothing of it is none of our errors.
        _madvise()(first, last - first, mmap.MADV_HUGEPAGE)
    return tensor


@cache
def _madvise() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
