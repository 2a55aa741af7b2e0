"""Two processes on CPU with trees of different depth: they get the gradients of one process that sees both plans."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sdcore.errors import UnsupportedModelError
from sdcore.prefix import Plan
from sdcore.prefix.trajectories import View, plan_trajectories
from sdcore.step import distill_step
from tests.processes import assert_right, run_cases
from tests.sdcore.prefix.models import assert_same_gradients, checkpointed, double_precision, gradients, tiny
from tests.sdcore.prefix.test_depth import random_trajectories

RANKS = 2
SECONDS = 120  # a hang is a failure within this time


def plan_of(shapes: str, rank: int) -> Plan:
    """Trees of depth 4 and 1, or of 2 on one rank and no row on the other."""
    if shapes == "no rows" and rank == 0:
        nothing = View(ids=[1, 2, 3], trajectory=0, tokens=[], positions=[])
        return plan_trajectories([[1, 2, 3]], [[False] * 3], [nothing])
    return random_trajectories(2 + rank, depth={"deep": (4, 1), "no rows": (0, 2)}[shapes][rank])


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: Any) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


@cache
def of_one_process(name: str, shapes: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    plain = tiny(name)
    losses = [distill_step(plain, plan_of(shapes, rank), strategy="naive").loss for rank in range(RANKS)]
    return losses, {key: grad / RANKS for key, grad in gradients(plain).items()}


def compare(
    wrap: Callable[[Any], nn.Module], shapes: str, name: str, *, checkpointing: bool = False, **options: Any
) -> None:
    model = wrap(checkpointed(tiny(name)) if checkpointing else tiny(name))
    out = distill_step(model, plan_of(shapes, dist.get_rank()), verify="off", **options)
    losses, expected = of_one_process(name, shapes)
    assert torch.allclose(out.loss, losses[dist.get_rank()], rtol=1e-9), "the loss differs"
    assert_same_gradients(gradients(model), expected)


def refused() -> None:
    with pytest.raises(UnsupportedModelError, match="branch at one depth"):
        distill_step(fsdp(tiny("llama")), plan_of("deep", dist.get_rank()), strategy="two_phase", verify="off")


def cases() -> dict[str, Callable[[], None]]:
    by_name: dict[str, Callable[[], None]] = {
        "fsdp two_phase is refused": refused,
        "fsdp auto takes another": lambda: compare(fsdp, "deep", "gemma3", micro_batch=2),
    }
    for label, wrap in (("ddp", ddp), ("fsdp", fsdp)):
        for strategy in ("cached", "packed", "two_phase"):
            if (label, strategy) == ("fsdp", "two_phase"):
                continue
            for shapes in ("deep", "no rows"):
                for name in ("gemma3", "qwen3_5") if strategy != "packed" else ("gemma3",):
                    options = {"strategy": strategy, "micro_batch": 2 if strategy == "two_phase" else None}
                    by_name[f"{label} {strategy} {shapes} {name}"] = lambda a=(wrap, shapes, name), o=options: compare(
                        *a, **o
                    )
            by_name[f"{label} {strategy} checkpointed"] = lambda a=(wrap, "deep", "gemma3"), o=options: compare(
                *a, checkpointing=True, **o
            )
    return by_name


def work(rank: int, folder: str) -> None:
    torch.use_deterministic_algorithms(True)
    with double_precision():
        run_cases(rank, folder, cases(), ranks=RANKS)


@pytest.mark.parametrize("case", cases())
def test_ranks_with_trees_of_different_depth_get_the_gradients_of_one_process(
    case: str, verdicts: list[dict[str, str]]
) -> None:
    assert_right(case, verdicts)
