"""DeepSpeed: on two processes on CPU its engines get the gradients of one process. Skipped where it is not installed.

The processes are started once, run all cases, and leave a file each with what they found; the tests read it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sdcore.errors import UnsupportedModelError
from sdcore.losses import FusedLinearDivergence
from sdcore.models import find_body, head_of
from sdcore.prefix import generate
from sdcore.step import distill_step
from sdcore.teachers import AdapterOff, Frozen, Live, Snapshot
from tests.processes import assert_right, run_cases
from tests.sdcore.prefix.models import assert_same_gradients, tiny
from tests.sdcore.test_heads_distributed import MODELS, plan_of

RANKS = 2
SECONDS = 240  # a hang is a failure within this time; the first start of DeepSpeed compiles
IDS = (torch.tensor([[5, 9, 2, 44], [1, 2, 3, 4]]), torch.tensor([[7, 3, 2, 60, 1]]))

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def engine_of(model: Any, *, stage: int = 3, persistent: int = 0) -> Any:
    """`persistent`: ZeRO-3 keeps weights of up to so many elements whole."""
    import deepspeed

    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": persistent}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained, lr=0.5),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        },
    )[0]


def gradients(engine: Any) -> dict[str, Tensor]:
    """The whole ones. To be called by all ranks."""
    from deepspeed.utils import safe_get_full_grad

    named = {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}
    grads = {name: safe_get_full_grad(weight) for name, weight in named.items()}
    assert [name for name, grad in grads.items() if grad is None] == []
    return {name: grad.clone() for name, grad in grads.items()}


def teacher_of(kind: str) -> Any:
    if kind == "partitioned":
        return Frozen(engine_of(tiny("llama", seed=1).float()))
    return {"live": Live, "adapter off": AdapterOff, "frozen": lambda: Frozen(tiny("llama", seed=1).float())}[kind]()


@cache
def of_one_process(model: str, teacher: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The loss of each rank's plan, and the mean of their gradients."""
    alone = MODELS[model]().float()
    taught = teacher_of("frozen" if teacher == "partitioned" else teacher)
    losses = [distill_step(alone, plan_of(rank), teacher=taught, strategy="naive").loss for rank in range(RANKS)]
    named = {name: weight for name, weight in alone.named_parameters() if weight.requires_grad}
    return losses, {name: weight.grad / RANKS for name, weight in named.items() if weight.grad is not None}


def compare(model: str, *, teacher: str = "live", strategy: Any = "packed", **options: Any) -> None:
    """A step of both ranks gives the mean of what each plan gives in a process of its own."""
    engine, rank = engine_of(MODELS[model]().float(), **options), dist.get_rank()
    out = distill_step(
        engine, plan_of(rank), teacher=teacher_of(teacher), strategy=strategy, backward=engine.backward, verify="off"
    )
    losses, expected = of_one_process(model, teacher)
    assert torch.allclose(out.loss, losses[rank], rtol=1e-4), "the loss differs"
    assert_same_gradients(gradients(engine), expected, 1e-4)


def steps_follow_each_other() -> None:
    """What the first step leaves behind does not get into the second one."""
    import deepspeed

    engine, rank = engine_of(tiny("llama").float()), dist.get_rank()
    alone = tiny("llama").float()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.5)
    taught = Frozen(tiny("llama", seed=1).float())
    for _ in range(3):
        distill_step(engine, plan_of(rank), teacher=taught, backward=engine.backward)
        engine.step()
        for other in range(RANKS):
            distill_step(alone, plan_of(other), teacher=taught, backward=lambda loss: (loss / RANKS).backward())
        optimizer.step()
        optimizer.zero_grad()
    for weight, expected in zip(engine.module.parameters(), alone.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([weight]):
            assert float((weight - expected).norm() / expected.norm()) < 1e-5


def a_bare_loop(model: str) -> None:
    """The recipe of the documentation."""
    engine, rank = engine_of(MODELS[model]().float()), dist.get_rank()
    loss, teacher = FusedLinearDivergence(alpha=0.5), tiny("llama", seed=1).float()

    def step(student: Any, ids: Tensor) -> Tensor:
        hidden, head = find_body(student)(ids).flatten(0, 1), head_of(student)
        with torch.no_grad():
            taught = find_body(teacher)(ids).flatten(0, 1)
        return loss(head.states(hidden), head.weight, taught, teacher.lm_head.weight, student_head=head.transform).loss

    engine.backward(step(engine, IDS[rank]))
    alone = MODELS[model]().float()
    for ids in IDS:
        (step(alone, ids) / RANKS).backward()
    expected = {name: weight.grad for name, weight in alone.named_parameters() if weight.grad is not None}
    assert_same_gradients(gradients(engine), expected, 1e-4)


def refusals() -> None:
    engine, planned = engine_of(tiny("llama").float()), plan_of(0)
    calls: dict[str, Callable[[], Any]] = {
        "partitioned by DeepSpeed: pass the engine": lambda: find_body(engine.module),
        "one backward per step": lambda: distill_step(engine, planned, strategy="two_phase"),
        "sample with a server": lambda: generate(engine, [[1, 2]], num_completions=1, max_new_tokens=2, eos_token_id=3),
        "a copy would be empty": lambda: Snapshot(engine),
    }
    for message, call in calls.items():
        with pytest.raises(UnsupportedModelError, match=message):
            call()


def cases() -> dict[str, Callable[[], None]]:
    """Every case has a name, and is run by both ranks in the same order."""
    by_name: dict[str, Callable[[], None]] = {}

    def add(model: str, **how: Any) -> None:
        label = " ".join([model, *(f"{key}={value}" for key, value in how.items())])
        by_name[label] = lambda: compare(model, **how)

    for model in MODELS:
        add(model)
        add(model, teacher="frozen", strategy="naive")
    add("plain", strategy="cached")
    add("plain", strategy="auto", teacher="frozen")
    add("plain", teacher="partitioned")
    add("plain", persistent=10**6)
    add("plain", stage=2)
    add("tied", stage=2)
    if "lora" in MODELS:
        add("lora", teacher="adapter off")
        add("lora", stage=2)
        by_name["bare loop lora"] = lambda: a_bare_loop("lora")
    by_name["bare loop plain"] = lambda: a_bare_loop("plain")
    by_name["steps"] = steps_follow_each_other
    by_name["refusals"] = refusals
    return by_name


def start_deepspeed() -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)


def work(rank: int, folder: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    run_cases(rank, folder, cases(), ranks=RANKS, seconds=60, prepare=start_deepspeed)


@pytest.mark.parametrize("case", cases())
def test_engines_get_the_gradients_of_one_process(case: str, verdicts: list[dict[str, str]]) -> None:
    assert_right(case, verdicts)
