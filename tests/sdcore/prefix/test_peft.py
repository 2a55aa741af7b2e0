"""Adapters: the student's pass with them, the teacher's without, and everything as before afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from sdcore.errors import UnsupportedModelError
from sdcore.prefix.planner import Plan
from sdcore.prefix.runner import run
from sdcore.step import distill_step
from sdcore.teachers import AdapterOff, TrustRegion
from tests.sdcore.prefix.models import (
    assert_same_gradients,
    checkpointed,
    gradients,
    plain_rows,
    reverse_kl,
    shaken,
    tiny,
)
from tests.sdcore.prefix.trees import random_plan

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("in_double_precision")

SEED = 4
SHARING: list[Any] = ["packed", "cached", "two_phase"]


def adapted(*, name: str = "llama", **options: Any) -> Any:
    """A model with an adapter that is not zero: its states differ from the base model's by about their size."""
    config = peft.LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    return shaken(peft.get_peft_model(tiny(name), config))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("strategy", ["naive", *SHARING])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_step_with_an_adapter_is_that_of_plain_forwards(dora: bool, strategy: Any, checkpointing: bool) -> None:
    planned = random_plan(SEED)
    plain, model = adapted(use_dora=dora), adapted(use_dora=dora)
    if checkpointing:
        checkpointed(model)
    loss = reverse_kl(plain_rows(plain, planned.student)[1], plain_rows(tiny("llama"), planned.teacher)[1])
    loss.backward()
    out = distill_step(model, planned, teacher=AdapterOff(), strategy=strategy)
    assert torch.allclose(out.loss, loss.detach(), rtol=1e-9)
    assert_same_gradients(gradients(model), gradients(plain))
    assert all("lora_" in name for name in gradients(model))


@pytest.mark.parametrize("strategy", SHARING[:2])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_with_the_adapter_off_the_teacher_is_the_base_model(dora: bool, strategy: Any) -> None:
    """It reads none of the student's states: one of them, and its states would be off by far more than this."""
    planned, model = random_plan(SEED), adapted(use_dora=dora)
    assert any(tree.shared for tree in planned.teacher)
    with torch.no_grad():
        expected, _ = plain_rows(tiny("llama"), planned.teacher)
        with_adapter, _ = plain_rows(model, planned.teacher)
    out = run(model, planned, AdapterOff(), strategy=strategy)
    assert out.teacher_hidden is not None
    assert float((out.teacher_hidden - expected).abs().max()) < 1e-10
    assert float((with_adapter - expected).abs().max()) > 0.1
    assert not out.report.teacher_shares
    live = run(model, planned, strategy=strategy)
    assert live.teacher_hidden is not None
    assert float((live.teacher_hidden - with_adapter).abs().max()) < 1e-10
    assert live.report.teacher_shares


@pytest.mark.parametrize("strategy", SHARING)
def test_a_trust_region_is_between_the_base_model_and_the_adapted_one(strategy: Any) -> None:
    planned, plain, model = random_plan(SEED), adapted(), adapted()
    with torch.no_grad():
        base, live = (plain_rows(reference, planned.teacher)[1] for reference in (tiny("llama"), plain))
    loss = reverse_kl(plain_rows(plain, planned.student)[1], 0.7 * base + 0.3 * live)
    loss.backward()
    out = distill_step(model, planned, teacher=TrustRegion(AdapterOff(), share=0.3), strategy=strategy)
    assert torch.allclose(out.loss, loss.detach(), rtol=1e-9)
    assert_same_gradients(gradients(model), gradients(plain))


@pytest.mark.parametrize("strategy", ["packed", "two_phase"])
def test_a_trained_copy_of_the_head_is_the_students_and_the_original_the_teachers(strategy: Any) -> None:
    planned = random_plan(SEED)
    models = [adapted(modules_to_save=["lm_head"]) for _ in range(2)]
    for adapter in models:
        copy = adapter.get_base_model().lm_head.modules_to_save["default"]
        copy.weight.data.mul_(1.5)
    plain, model = models
    loss = reverse_kl(plain_rows(plain, planned.student)[1], plain_rows(tiny("llama"), planned.teacher)[1])
    loss.backward()
    out = distill_step(model, planned, teacher=AdapterOff(), strategy=strategy)
    assert torch.allclose(out.loss, loss.detach(), rtol=1e-9)
    head = model.get_base_model().lm_head
    assert head.original_module.weight.grad is None
    expected = plain.get_base_model().lm_head.modules_to_save["default"].weight.grad
    assert torch.allclose(head.modules_to_save["default"].weight.grad, expected, rtol=1e-7)


def switches(model: nn.Module) -> dict[str, Any]:
    """The modules that are told when an adapter is turned off."""
    switch = {name: getattr(module, "disable_adapters", None) for name, module in model.named_modules()}
    return {name: off for name, off in switch.items() if isinstance(off, bool)}


def state_of(model: Any) -> dict[str, Any]:
    state = {name: (off, list(model.get_submodule(name).active_adapters)) for name, off in switches(model).items()}
    assert len(state) == 7  # three layers in each of two, and the head
    state |= {name: weight.requires_grad for name, weight in model.named_parameters()}
    state["training"] = [module.training for module in model.modules()]
    return state


@pytest.mark.parametrize("fails", [None, "teacher", "backward"])
@pytest.mark.parametrize("strategy", SHARING)
def test_the_adapter_is_as_before_also_after_an_error(
    strategy: Any, fails: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(modules_to_save=["lm_head"])
    # A second adapter that is not in use, and weights of the first that are not trained.
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "layers.0" in name:
            weight.requires_grad_(False)
    before = state_of(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    def step(**options: Any) -> None:
        distill_step(model, random_plan(SEED), teacher=AdapterOff(), strategy=strategy, **options)

    if fails is None:
        step()
    elif fails == "backward":
        with pytest.raises(RuntimeError, match="out of memory"):
            step(backward=fail)
    else:
        layer: PreTrainedModel = model.get_base_model().model.layers[1]
        layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            step(verify="off")
    assert state_of(model) == before


def test_a_model_without_an_adapter_has_none_to_turn_off() -> None:
    planned: Plan = random_plan(SEED)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no adapter to switch off"):
        run(tiny("llama"), planned, AdapterOff())


def test_the_adapter_of_a_compiled_model_is_found() -> None:
    model = adapted()
    with AdapterOff().weights(torch.compile(model)):
        assert set(switches(model).values()) == {True}
    assert set(switches(model).values()) == {False}
