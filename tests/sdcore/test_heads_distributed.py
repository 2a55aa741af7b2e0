"""Output layers on two processes: sharded, adapted, tied, in mixed precision, they get the gradients of one process.

The processes are started once, run all cases, and leave a file each with what they found; the tests read it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sdcore.models import find_body, head_of, heads
from sdcore.step import distill_step
from sdcore.teachers import AdapterOff, Frozen, Live, Snapshot
from tests.processes import assert_right, run_cases
from tests.sdcore.prefix.models import (
    adapted,
    assert_same_gradients,
    assert_trained_have_gradients,
    double_precision,
    gradients,
    tied,
    tiny,
)
from tests.sdcore.prefix.trees import random_plan

RANKS = 2
SECONDS = 120  # a hang is a failure within this time
# Of each rank: tokens of the prompts, and of the completions of each; more rows, and more parts, on the second rank.
SHAPES = (((9,), ((4, 2),)), ((5, 12), ((7, 2, 1), (1, 1))))


def plan_of(rank: int) -> Any:
    return random_plan(rank, prompts=SHAPES[rank][0], sizes=SHAPES[rank][1])


def alike() -> Any:
    """A plan that has as many parts on each rank."""
    return random_plan(dist.get_rank(), prompts=(9,), sizes=((4, 2, 5),))


# Models, the same on every rank.


def plain() -> Any:
    return tiny("llama")


def frozen_head() -> Any:
    model = tiny("llama")
    model.lm_head.requires_grad_(False)
    return model


def trained_copy() -> Any:
    return adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])


MODELS: dict[str, Callable[[], Any]] = {"plain": plain, "tied": tied, "frozen head": frozen_head}
if importlib.util.find_spec("peft"):
    MODELS |= {"lora": adapted, "trained copy": trained_copy, "tied lora": lambda: adapted(tied())}


# Wrappers.


def inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fsdp(model: Any, *, reshard: bool = False, own_unit: bool = False, **options: Any) -> Any:
    """`reshard`: the root's own weights are not kept from forward to backward either."""
    for layer in inner(model).model.layers:
        fully_shard(layer, **options)
    if own_unit:
        fully_shard(inner(model).get_output_embeddings(), **options)
    return fully_shard(model, reshard_after_forward=reshard, **options)


def over_copies(model: Any) -> Any:
    """Sharded over one half of the mesh, copied over the other."""
    return fsdp(model, reshard=True, mesh=init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("copies", "shards")))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "ddp": lambda model: DistributedDataParallel(model),
    "kept": fsdp,
    "resharded": lambda model: fsdp(model, reshard=True),
    "own unit": lambda model: fsdp(model, own_unit=True),
    "own unit, resharded": lambda model: fsdp(model, reshard=True, own_unit=True),
    "over copies": over_copies,
}


def teacher_of(kind: str, model: nn.Module) -> Any:
    if kind == "sharded":
        return Frozen(fsdp(tiny("llama", seed=1), reshard=True))
    return {"live": Live, "adapter off": AdapterOff, "frozen": lambda: Frozen(tiny("llama", seed=1))}[kind]()


@cache
def of_one_process(model: str, teacher: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The loss of each rank's plan, and the mean of their gradients."""
    alone = MODELS[model]()
    taught = teacher_of("frozen" if teacher == "sharded" else teacher, alone)
    losses = [distill_step(alone, plan_of(rank), teacher=taught, strategy="naive").loss for rank in range(RANKS)]
    return losses, {key: grad / RANKS for key, grad in gradients(alone).items()}


def compare(model: str, wrapper: str, *, teacher: str = "live", micro_batch: int | None = None) -> None:
    """A step of both ranks gives the mean of what each plan gives in a process of its own."""
    wrapped, rank = WRAPPERS[wrapper](MODELS[model]()), dist.get_rank()
    out = distill_step(wrapped, plan_of(rank), teacher=teacher_of(teacher, wrapped), micro_batch=micro_batch)
    losses, expected = of_one_process(model, teacher)
    assert torch.allclose(out.loss, losses[rank], rtol=1e-9), "the loss differs"
    assert_trained_have_gradients(wrapped)
    assert_same_gradients(gradients(wrapped), expected)


def snapshot_of_an_adapter() -> None:
    """A teacher that is the sharded student itself with other weights, those on its output layer too."""
    wrapped, single = fsdp(adapted(), reshard=True), adapted()
    losses = []
    for model in (wrapped, single):
        taught = Snapshot(model)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.mul_(0.5)
        losses.append(distill_step(model, plan_of(dist.get_rank()), teacher=taught).loss)
    assert float(losses[1]) > 0.01
    assert torch.allclose(*losses, rtol=1e-9)


def gathers(wrapped: Any, **options: Any) -> tuple[int, int]:
    """How often a step puts a weight of the output layer together, and how often it reduces a gradient of one."""
    counted = {"forward": 0, "backward": 0}

    def counting(name: str) -> Any:
        original = getattr(heads._Gathered, name)

        def called(*args: Any) -> Any:
            counted[name] += 1
            return original(*args)

        return mock.patch.object(heads._Gathered, name, staticmethod(called))

    with counting("forward"), counting("backward"):
        distill_step(wrapped, alike(), verify="off", **options)
    return counted["forward"], counted["backward"]


def gathered_once_per_part() -> None:
    wrapped = fsdp(plain(), reshard=True)
    sharded = Frozen(fsdp(tiny("llama", seed=1), reshard=True))
    assert gathers(wrapped) == (1, 1)
    assert gathers(wrapped, teacher=sharded) == (2, 1)  # the student's, and the teacher's, which is not trained
    assert gathers(wrapped, micro_batch=1) == (3, 3)  # three completions
    assert gathers(wrapped, micro_batch=1, teacher=sharded) == (4, 3)
    assert gathers(fsdp(plain())) == (0, 0)  # FSDP2 keeps the root's weights, and the head is among them
    assert gathers(fsdp(frozen_head(), reshard=True)) == (1, 0)
    if "lora" in MODELS:
        assert gathers(fsdp(adapted(), reshard=True)) == (3, 2)  # W, A, B; W is frozen


def mixed_precision(reshard: bool, reduce: torch.dtype | None) -> None:
    """The head is gathered in the dtype of the forward, and its gradient is reduced in the one that the policy says."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce)
    wrapped = fsdp(tiny("llama").float(), reshard=reshard, mp_policy=policy)
    hidden = find_body(wrapped)(torch.tensor([[5, 9, 2, 44]]))
    assert isinstance(wrapped.lm_head.weight, DTensor) == reshard
    head = head_of(wrapped)
    assert (hidden.dtype, head.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    rank = dist.get_rank()
    own = head.weight.detach().clone().requires_grad_()  # a backward frees what FSDP2 gathered
    loss = ((hidden[0] @ head.weight.T).float() * (1 + rank)).square().sum()
    loss.backward()
    weight = wrapped.lm_head.weight
    assert weight.grad.dtype == weight.dtype == torch.float32
    gradient = weight.grad.full_tensor()
    # The same in one process, in the same dtypes.
    ((hidden[0].detach() @ own.T).float() * (1 + rank)).square().sum().backward()
    assert own.grad is not None
    both = [torch.empty_like(own.grad) for _ in range(RANKS)]
    dist.all_gather(both, own.grad)
    if reduce == torch.float32:
        expected = (both[0].float() + both[1].float()) / RANKS
        assert torch.allclose(gradient, expected, rtol=1e-6)
    else:
        expected = ((both[0] + both[1]) / RANKS).float()
        assert torch.allclose(gradient, expected, rtol=2**-7)
        assert torch.equal(gradient.bfloat16().float(), gradient)


def step_in_mixed_precision(model: str, strategy: Any) -> None:
    """Whether FSDP2 keeps the head or it is gathered makes no difference."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    steps = []
    for reshard in (False, True):
        wrapped = fsdp(MODELS[model]().float(), reshard=reshard, mp_policy=policy)
        out = distill_step(wrapped, plan_of(dist.get_rank()), strategy=strategy, verify="off")
        assert_trained_have_gradients(wrapped)
        steps.append((out.loss, gradients(wrapped)))
    (kept_loss, kept), (loss, resharded) = steps
    assert torch.equal(kept_loss, loss)
    assert float(loss) > 0
    errors = {key: float((resharded[key] - grad).norm() / grad.norm()) for key, grad in kept.items()}
    # The gradients of the two uses of a tied weight are summed in bfloat16 where it is kept.
    bounds = {key: 2**-7 if model == "tied" and "embed_tokens" in key else 1e-6 for key in errors}
    assert {key: error for key, error in errors.items() if not error < bounds[key]} == {}


def cases() -> dict[str, Callable[[], None]]:
    """Every case has a name, and is run by both ranks in the same order."""
    by_name: dict[str, Callable[[], None]] = {}

    def add(model: str, wrapper: str, **how: Any) -> None:
        label = " ".join([f"{model}, {wrapper}", *(f"{key}={value}" for key, value in how.items())])
        by_name[label] = lambda: compare(model, wrapper, **how)

    for model in MODELS:
        for wrapper in WRAPPERS:
            if (model, wrapper) in UNSHARDABLE:
                continue
            add(model, wrapper)
            if wrapper != "over copies":
                add(model, wrapper, micro_batch=2)
        add(model, "resharded", teacher="sharded", micro_batch=1)
    for model in ("lora", "trained copy"):
        if model in MODELS:
            add(model, "resharded", teacher="adapter off")
            add(model, "kept", teacher="adapter off", micro_batch=1)
    if "lora" in MODELS:
        by_name["snapshot of an adapter"] = snapshot_of_an_adapter
    by_name["gathered once per part"] = gathered_once_per_part
    for reshard in (False, True):
        for reduce in (None, torch.float32):
            by_name[f"mixed precision, reshard={reshard}, reduce={reduce}"] = lambda reshard=reshard, reduce=reduce: (  # type: ignore[misc]
                mixed_precision(reshard, reduce)
            )
    for model in ("plain", "tied", "lora"):
        for strategy in ("packed", "cached", "two_phase", "naive") if model in MODELS else ():
            by_name[f"a step in mixed precision, {model}, {strategy}"] = lambda model=model, strategy=strategy: (  # type: ignore[misc]
                step_in_mixed_precision(model, strategy)
            )
    return {name: run if "mixed" in name else double_precision()(run) for name, run in by_name.items()}


# A weight cannot be in two of FSDP2's units.
UNSHARDABLE = {(model, wrapper) for model in ("tied", "tied lora") for wrapper in ("own unit", "own unit, resharded")}


def work(rank: int, folder: str) -> None:
    torch.use_deterministic_algorithms(True)
    run_cases(rank, folder, cases(), ranks=RANKS)


@pytest.mark.parametrize("case", cases())
def test_ranks_get_the_gradients_of_one_process(case: str, verdicts: list[dict[str, str]]) -> None:
    assert_right(case, verdicts)
