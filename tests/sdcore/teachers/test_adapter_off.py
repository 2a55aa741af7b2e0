"""The student without its adapter is the model that training started from, or is refused; `frozen` is right always."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdcore.errors import UnsupportedModelError
from sdcore.integrations.trl.teachers import build_teacher
from sdcore.presets import Method
from sdcore.teachers import AdapterOff, Snapshot
from sdcore.training.config import SelfDistillationConfig
from sdcore.training.watch import origin_of
from tests.sdcore.prefix.models import tiny

peft = pytest.importorskip("peft")

IDS = torch.tensor([[1, 5, 9, 4, 7, 3]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
OFF = Method(template="{{ prompt }}", teacher="adapter_off")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Moves what an optimizer would."""
    torch.manual_seed(3)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(0.1 * torch.randn_like(weight))


def models(family: str = "llama", **options: Any) -> tuple[Any, Any]:
    """The base model, and the same with an adapter on it."""
    base: Any = tiny(family).float()
    model = copy.deepcopy(base)
    config = peft.LoraConfig(r=2, target_modules=TARGETS, **options)
    if config.init_lora_weights == "lora_ga":
        config.lora_ga_config = peft.LoraGAConfig()
    for name, module in model.named_modules():
        if name.endswith(tuple(TARGETS)):  # what `preprocess_loraga` and `preprocess_corda` leave there
            module._peft_loraga_grad = torch.randn_like(module.weight)
            left, values, right = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            module.eigens = SimpleNamespace(U_WC=left[:, :2], S_WC=values[:2], V_WC=right[:2].T)
    return base, peft.get_peft_model(model, config)


KEEPS: list[dict[str, Any]] = [
    *({"init_lora_weights": init} for init in (True, False, "gaussian", "eva", "orthogonal", "mica")),
    {"use_dora": True},
    {"modules_to_save": ["lm_head", "embed_tokens"]},
    {"modules_to_save": ["norm"]},
    {"trainable_token_indices": [1, 5]},
    {"bias": "all"},  # of a model that has none
]
CHANGES = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"]


@pytest.mark.parametrize("options", KEEPS, ids=str)
def test_without_its_adapter_a_student_is_the_base(options: dict[str, Any]) -> None:
    base, model = models(**options)
    assert isinstance(OFF.build_teacher(model), AdapterOff)
    train(model)
    with AdapterOff().weights(model):
        assert torch.equal(logits(model), logits(base))
    assert not torch.allclose(logits(model), logits(base), atol=1e-2)


@pytest.mark.parametrize("init", CHANGES)
def test_an_initialisation_that_changes_the_base_is_refused_by_name_and_frozen_is_right(init: str) -> None:
    base, model = models(init_lora_weights=init)
    compiled: Any = torch.compile(model)
    frozen: Any = Snapshot(model)
    trl: Any = build_teacher("base", model, has_adapter=True, update_rate=0.1)
    origin = origin_of(model, SelfDistillationConfig(output_dir="unused", drift_probe_every=1), None, None)
    train(model)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), logits(base), atol=1e-2)
    for refuse in (lambda: OFF.build_teacher(model), lambda: AdapterOff().weights(compiled).__enter__()):
        with pytest.raises(UnsupportedModelError, match=rf"init_lora_weights='{init}'.*use teacher=\"frozen\""):
            refuse()
    for teacher in (frozen, trl, origin):
        with teacher.weights(model):
            assert torch.allclose(logits(model), logits(base), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "also", "beside"),
    [
        ("qwen2", {"bias": "all"}, None, "k_proj.bias|q_proj.*bias"),
        ("qwen2", {"bias": "lora_only"}, None, "q_proj.base_layer.bias"),
        ("llama", {}, "embed_tokens", "embed_tokens.weight"),
        ("llama", {"modules_to_save": ["lm_head"]}, "model.norm", "norm.weight"),
    ],
)
def test_what_is_trained_beside_the_adapter_is_refused_by_name(
    family: str, options: dict[str, Any], also: str | None, beside: str
) -> None:
    base, model = models(family, **options)
    if also is not None:
        for name, module in model.named_modules():
            if name.endswith(also):
                module.requires_grad_(True)
    trl: Any = build_teacher("base", model, has_adapter=True, update_rate=0.1)
    with pytest.raises(UnsupportedModelError, match=rf"({beside}) is trained beside the adapter"):
        OFF.build_teacher(model)
    train(model)
    with warnings.catch_warnings(action="ignore"), model.disable_adapter():
        assert not torch.allclose(logits(model), logits(base), atol=1e-3)
    with trl.weights(model):
        assert torch.allclose(logits(model), logits(base), atol=1e-4)


def test_an_adapter_that_was_trained_before_drifts_from_where_it_starts() -> None:
    base, model = models()
    train(model)
    start = logits(model)
    origin = origin_of(model, SelfDistillationConfig(output_dir="unused", drift_probe_every=1), AdapterOff(), None)
    train(model)
    with origin.weights(model):
        assert torch.equal(logits(model), start)
    assert not torch.equal(start, logits(base))
