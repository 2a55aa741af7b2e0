"""Settles what the ranks of a group must agree on before a call: that they mean the same, and what its mean is over.

One collective of a few hundred bytes each, and one synchronisation on a GPU. Arguments that cannot belong together are
then an error on every rank, where they would be a hang in the middle of the work.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..types import float64_device, in_float64

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
FACTS = 6  # of a tensor: whether it is one, whether it is trained, dtype, number of dimensions, sizes of the first two


def check_group(name: str, group: object) -> None:
    """Refuses all but a process group that this process belongs to."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        hint = ", whose `.get_group()` gives one" if hasattr(group, "get_group") else ""
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}{hint}")


def agree(
    group: dist.ProcessGroup, tensors: dict[str, object], sharded: tuple[str, ...], options: tuple[Any, ...]
) -> list[int]:
    """Compares what all ranks must have in common, and returns how many rows of the head each of them holds.

    `tensors` are the operands of the call by name, None included; of the `sharded` ones the first dimension may differ,
    and the first of them is the head. Of the tensors it is shapes, dtypes and `requires_grad` that are compared, and
    the number of rows with a weight: not what is in them. What is no tensor on any rank is the caller's to refuse.
    """
    weights = tensors.get("token_weights")
    active = int((weights != 0).sum()) if isinstance(weights, Tensor) else -1
    facts = [active, zlib.crc32(repr(options).encode())]
    for tensor in tensors.values():
        facts += _facts_of(tensor)
    device = next((t.device for t in tensors.values() if isinstance(t, Tensor)), torch.device("cpu"))
    if float64_device(device) != device:
        raise ValueError(f"process_group needs tensors on a device that has float64, got {device}")
    mine = torch.tensor(facts, dtype=torch.int64, device=device)
    whole = mine.new_empty((group.size(), len(facts)))
    dist.all_gather(list(whole.unbind()), mine, group=group)
    active_of, options_of, *columns = whole.t().tolist()

    head = sharded[0]
    sizes = columns[list(tensors).index(head) * FACTS + FACTS - 2]
    if min(sizes) == 0:
        raise ValueError(
            f"{head} must have at least one row on every rank of process_group, got none on rank {sizes.index(0)}"
        )
    for i, name in enumerate(tensors):
        *kind, first, second = columns[i * FACTS : (i + 1) * FACTS]
        compared = [*kind, second] if name in sharded else [*kind, first, second]
        differing = _first_difference(list(zip(*compared, strict=True)))
        if differing is not None:
            described = [_describe(*facts) for facts in zip(*kind, first, second, strict=True)]
            what = " but for the number of rows" if name in sharded else ""
            raise ValueError(
                f"{name} must be alike on all ranks of process_group{what}, "
                f"got {described[0]} on rank 0 and {described[differing]} on rank {differing}"
            )
    for what, values in (("the number of rows with a weight", active_of), ("every option of the call", options_of)):
        differing = _first_difference(values)
        if differing is not None:
            came = f"{values[0]} on rank 0 and {values[differing]}" if values is active_of else "another"
            raise ValueError(f"{what} must be the same on all ranks of process_group, got {came} on rank {differing}")
    return sizes


def normalizer_over(group: dist.ProcessGroup, rows: int, token_weights: Tensor | None, device: torch.device) -> float:
    """Returns the sum of the token weights of all ranks, 1 where none has a row with a weight."""
    mine = torch.zeros(2, dtype=torch.float64, device=float64_device(device))
    if token_weights is None:
        mine += rows
    else:
        weights = in_float64(token_weights)
        mine[0], mine[1] = weights.sum(), (weights != 0).sum()
    dist.all_reduce(mine, group=group)
    total, active = mine.tolist()
    if not math.isfinite(total):
        raise ValueError(f"token_weights must be finite on all ranks of normalizer_group, their sum is {total}")
    if active and total <= 0:
        raise ValueError(f"token_weights must have a positive sum over normalizer_group, got {total:g}")
    return total or 1.0


def _facts_of(tensor: object) -> list[int]:
    if not isinstance(tensor, Tensor):
        return [0, 0, -1, -1, -1, -1]
    dtype = DTYPES.index(tensor.dtype) if tensor.dtype in DTYPES else -1
    return [1, int(tensor.requires_grad), dtype, tensor.dim(), *[*tensor.shape, -1, -1][:2]]


def _describe(is_tensor: int, is_trained: int, dtype: int, dims: int, *shape: int) -> str:
    if not is_tensor:
        return "no tensor"
    name = str(DTYPES[dtype]) if dtype >= 0 else "another dtype"
    return f"{tuple(shape[: min(dims, 2)])} {name}{' with requires_grad' if is_trained else ''}"


def _first_difference(values: list[Any]) -> int | None:
    """Returns the first rank whose value is not that of rank 0."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)
