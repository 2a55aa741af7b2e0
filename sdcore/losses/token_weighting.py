"""Makes the losses of tokens one number: the weight of each, and what their weighted sum is divided by.

    weights, normalizer = token_weights("token-mean", lengths, mask)
    loss = (weights * per_token).sum() / normalizer

Four ways are in use, and they differ in what a long completion counts:

| aggregation           | loss                                                    | a completion counts           |
|-----------------------|---------------------------------------------------------|-------------------------------|
| `token-mean`          | Σ tokens / number of tokens (DAPO, SDPO)                | as much as it has tokens      |
| `seq-mean-token-mean` | mean over completions of the mean over tokens (GRPO)    | 1                             |
| `seq-mean-token-sum`  | mean over completions of the sum over tokens            | as much as it has tokens      |
| `sum-norm`            | Σ tokens / (number of completions · `norm_length`) (Dr. GRPO) | as much as it has tokens |

What differs from the obvious: the normalizer is returned beside the weights and not divided into them. Those of
micro-batches, accumulation steps and ranks add up, and dividing each part by the sum gives the loss of the whole,
however it was split. A mean of the parts' own means does not.

Not covered: padding, which rows of a plan do not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from sdkernels.types import float64_device

from ..errors import ArgumentError

Aggregation: TypeAlias = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum-norm"]


def token_weights(
    aggregation: Aggregation, lengths: Sequence[int], mask: Tensor, *, norm_length: int | None = None
) -> tuple[Tensor, float]:
    """Returns the weights (N,) float32 of the rows of completions of these `lengths`, and this part's normalizer.

    `mask` (N,) bool says which tokens carry a loss. The seq-means are over the completions that have such a token; only
    `sum-norm`, whose point is that nothing in the data changes its divisor, counts the others too. `norm_length` is for
    `sum-norm` alone, which needs it: the length limit of a completion. Where nothing carries a loss the normalizer may
    be 0, which `distill_step` takes for 1. Raises `ArgumentError`.
    """
    if aggregation not in get_args(Aggregation):
        raise ArgumentError(
            f"aggregation must be one of {', '.join(map(repr, get_args(Aggregation)))}, got {aggregation!r}"
        )
    check_lengths(lengths, mask.shape)
    if mask.dtype != torch.bool:
        raise ArgumentError(f"mask must be bool, got {mask.dtype}")
    if aggregation == "sum-norm" and (norm_length is None or norm_length < 1):
        raise ArgumentError(f"norm_length must be a positive number of tokens for 'sum-norm', got {norm_length}")
    weights = mask.float()
    if aggregation == "token-mean":
        return weights, float(weights.sum())
    if aggregation == "sum-norm":
        return weights, float(len(lengths) * (norm_length or 1))
    active = per_completion(weights, lengths)
    if aggregation == "seq-mean-token-mean":
        weights = weights / spread(active, lengths).clamp(min=1)
    return weights, float((active > 0).sum())


def over_ranks(normalizer: float, device: torch.device | str) -> float:
    """Returns what each rank divides by: the mean, since `DistributedDataParallel` and FSDP2 average gradients.

    To be called by all ranks; the normalizer itself where there is only one.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return normalizer
    total = torch.tensor(normalizer, dtype=torch.float64, device=float64_device(torch.device(device)))
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def per_completion(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums the rows (N,) of each of S completions to (S,); in the graph."""
    check_lengths(lengths, rows.shape)
    return rows.new_zeros(len(lengths)).index_add(0, _owner(lengths, rows.device), rows)


def spread(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Gives each row (N,) its completion's value, of (S,)."""
    if values.shape != (len(lengths),):
        raise ArgumentError(f"values must have one entry per completion, {len(lengths)}, got {tuple(values.shape)}")
    return values[_owner(lengths, values.device)]


def check_lengths(lengths: Sequence[int], shape: torch.Size) -> None:
    if any(length < 0 for length in lengths) or tuple(shape) != (sum(lengths),):
        raise ArgumentError(
            f"lengths must be those of the completions, N={tuple(shape)} tokens together, got {sum(lengths)} tokens in "
            f"{len(lengths)} completions"
        )


def _owner(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Says, (N,), which completion a row is of."""
    return torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)).to(device)
