"""Large pages are asked for where it pays, and nothing else is different about such a tensor."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdkernels import pages
from sdkernels.pages import LEAST_BYTES, fresh

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not SETTING.exists(), reason="this kernel has no transparent huge pages"
)


def flags(tensor: Tensor) -> str:
    """The kernel's for the memory in a tensor's middle; "hg" means that large pages were asked for."""
    place = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first and ":" not in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= place < end
        elif inside and first == "VmFlags:":
            return line
    raise LookupError(f"no mapping holds {place:#x}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_pages_are_asked_for_a_large_tensor(dtype: torch.dtype) -> None:
    like = torch.empty(1, dtype=torch.float64)
    tensor = fresh(like, (LEAST_BYTES // dtype.itemsize // 64, 64), dtype)
    assert (tensor.shape, tensor.dtype, tensor.device) == (
        (LEAST_BYTES // dtype.itemsize // 64, 64),
        dtype,
        like.device,
    )
    assert " hg" in flags(tensor)
    assert tensor.fill_(1.0).sum(dtype=torch.float64) == tensor.numel()


def test_a_smaller_tensor_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *arguments: asked.append(arguments[1]))
    fresh(torch.empty(1), (LEAST_BYTES // 4 - 1,), torch.float32)
    assert asked == []
    fresh(torch.empty(1), (LEAST_BYTES // 4,), torch.float32)
    assert len(asked) == 1
