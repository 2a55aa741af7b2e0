"""Two processes on CPU: each with a plan of its own, they get the gradients of one process that sees both plans.

The processes are started once, run all cases, and leave a file each with what they found; the tests read it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from sdcore.prefix import Plan
from sdcore.step import distill_step
from sdcore.teachers import AdapterOff, Frozen, Live, TrustRegion
from tests.processes import assert_right, run_cases
from tests.sdcore.prefix.models import (
    adapted,
    assert_same_gradients,
    assert_trained_have_gradients,
    checkpointed,
    double_precision,
    gradients,
    tiny,
)
from tests.sdcore.prefix.trees import random_plan

RANKS = 2
SECONDS = 120  # a hang is a failure within this time
STRATEGIES = ["naive", "cached", "packed", "two_phase"]
# Of each rank: tokens of the prompts, and of the completions of each.
SHAPES: dict[str, list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]] = {
    "equal": [((9, 4), ((4, 2, 5), (3, 3))), ((9, 4), ((4, 2, 5), (3, 3)))],
    # More groups, more completions, several buckets of lengths, a group whose completions have one token.
    "unequal": [((9,), ((4, 2),)), ((5, 12, 3), ((40, 2, 1, 6, 7), (1, 1), (3,)))],
    "no rows": [((6, 4), ((), (0,))), ((9, 4), ((4, 2, 5), (3, 3)))],
    "nothing to share": [((9,), ((4,),)), ((9, 4), ((4, 2, 5), (3, 3)))],
}


def plan_of(shapes: str, rank: int) -> Plan:
    prompts, sizes = SHAPES[shapes][rank]
    return random_plan(rank, prompts=prompts, sizes=tuple(size or (0,) for size in sizes))


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_static(model: nn.Module) -> nn.Module:
    """Reduces only after a gradient has arrived at what its call returned."""
    return DistributedDataParallel(model, static_graph=True)


def ddp_looking(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp(model: Any) -> nn.Module:
    for layer in (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp_throughout(model: Any) -> nn.Module:
    """The root's own weights, the head among them, are not kept from forward to backward either."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model, reshard_after_forward=True)


def fsdp_head_with_norm(model: Any) -> nn.Module:
    """As accelerate has it: the output layer and the final norm in one unit."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.model.embed_tokens)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    return fully_shard(model)


def with_adapter(model: PreTrainedModel) -> Any:
    return adapted(model, r=2, target_modules=["q_proj", "v_proj"])


def teacher_of(kind: str, name: str) -> Any:
    if kind in ("live", "adapter off"):
        return Live() if kind == "live" else AdapterOff()
    other = tiny(name, seed=1)
    frozen = Frozen(fsdp(other) if kind == "sharded" else other)
    return TrustRegion(frozen, 0.3) if kind == "trust" else frozen


@cache
def of_one_process(name: str, shapes: str, teacher: str, steps: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The loss of each rank's plan, and the mean of their gradients."""
    plain = with_adapter(tiny(name)) if teacher == "adapter off" else tiny(name)
    alone = teacher_of("frozen" if teacher == "sharded" else teacher, name)
    plans = [plan_of(shapes, rank) for rank in range(RANKS)] * steps
    losses = [distill_step(plain, planned, teacher=alone, strategy="naive").loss for planned in plans]
    return losses, {key: grad / RANKS for key, grad in gradients(plain).items()}


def compare(
    wrap: Callable[[Any], nn.Module],
    shapes: str,
    *,
    name: str = "llama",
    teacher: str = "live",
    steps: int = 1,
    prepare: Callable[[PreTrainedModel], Any] = lambda model: model,
    **options: Any,
) -> None:
    """A step of both ranks gives the mean of what each plan gives in a process of its own."""
    model, rank = wrap(prepare(tiny(name))), dist.get_rank()
    for _ in range(steps):
        out = distill_step(model, plan_of(shapes, rank), teacher=teacher_of(teacher, name), **options)
    losses, expected = of_one_process(name, shapes, teacher, steps)
    assert torch.allclose(out.loss, losses[rank], rtol=1e-9), "the loss differs"
    assert_trained_have_gradients(model)
    assert_same_gradients(gradients(model), expected)


def cases() -> dict[str, Callable[[], None]]:
    """Every case has a name, and is run by both ranks in the same order."""
    by_name: dict[str, Callable[[], None]] = {}

    def add(case: str, *args: Any, **kwargs: Any) -> None:
        by_name[case] = lambda: compare(*args, **kwargs)

    for strategy in STRATEGIES:
        how = {"strategy": strategy, "micro_batch": 2 if strategy == "two_phase" else None}
        for label, wrap in (("ddp", ddp), ("fsdp", fsdp)):
            for shapes in ("equal", "unequal", "no rows"):
                add(f"{label} {strategy} {shapes}", wrap, shapes, **how)
            add(f"{label} {strategy} checkpointed", wrap, "unequal", prepare=checkpointed, **how)
            if importlib.util.find_spec("peft"):
                add(f"{label} {strategy} adapter", wrap, "unequal", prepare=with_adapter, teacher="adapter off", **how)
        add(f"fsdp {strategy} always verified", fsdp, "unequal", verify="always", **how)
        add(f"fsdp {strategy} trust region", fsdp, "unequal", teacher="trust", **how)
        add(f"fsdp {strategy} sharded teacher", fsdp, "unequal", teacher="sharded", **how)
    for label, wrap in (("ddp", ddp), ("fsdp", fsdp)):
        for strategy in ("cached", "two_phase"):
            add(f"{label} {strategy} hybrid", wrap, "unequal", name="qwen3_5", strategy=strategy)
        for strategy in ("packed", "cached", "naive"):
            for shapes, teacher in (("unequal", "trust"), ("no rows", "live")):
                how = {"strategy": strategy, "max_tokens": 30, "teacher": teacher}
                add(f"{label} {strategy} budget {shapes}", wrap, shapes, **how)
        add(f"{label} budget checkpointed", wrap, "unequal", max_tokens=30, prepare=checkpointed, steps=2)
        add(f"{label} auto chooses alike", wrap, "nothing to share", teacher="frozen")
        add(f"{label} two steps", wrap, "unequal", micro_batch=1, steps=2)
    for strategy in ("naive", "cached", "packed"):
        add(f"ddp static {strategy}", ddp_static, "equal", strategy=strategy, steps=3)
        add(f"ddp looking {strategy}", ddp_looking, "unequal", strategy=strategy)
    add("ddp static checkpointed", ddp_static, "unequal", strategy="cached", prepare=checkpointed)
    if importlib.util.find_spec("peft"):
        add("ddp static adapter", ddp_static, "unequal", strategy="cached", prepare=with_adapter, teacher="adapter off")
    add("fsdp packed sharded head", fsdp_throughout, "unequal", strategy="packed")
    add("fsdp two_phase sharded head", fsdp_throughout, "unequal", micro_batch=2)
    for strategy in ("packed", "cached"):
        add(f"fsdp {strategy} head with norm", fsdp_head_with_norm, "unequal", strategy=strategy)
    add("fsdp two_phase head with norm", fsdp_head_with_norm, "unequal", micro_batch=2, steps=2)
    add("ddp two_phase sharded teacher", ddp, "unequal", teacher="sharded", micro_batch=1)
    return by_name


def work(rank: int, folder: str) -> None:
    torch.use_deterministic_algorithms(True)
    with double_precision():
        run_cases(rank, folder, cases(), ranks=RANKS)


@pytest.mark.parametrize("case", cases())
def test_ranks_get_the_gradients_of_one_process(case: str, verdicts: list[dict[str, str]]) -> None:
    assert_right(case, verdicts)
