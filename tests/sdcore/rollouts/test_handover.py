"""What an engine is handed is the student: for every kind of adapter that PEFT has, or the kind is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.rollouts.handover import whole_state, write_weights
from tests.processes import assert_right, run_cases
from tests.sdcore.prefix import models
from tests.sdcore.prefix.models import tiny

peft = pytest.importorskip("peft")
PEFT_TYPES = dict(pytest.importorskip("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING)

IDS = torch.tensor([[1, 5, 9, 4, 7, 3]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
# What a kind needs said beside its targets; a string: why this student cannot be handed over (or made).
OPTIONS: dict[str, Any] = {
    "ADALORA": {"total_step": 10, "r": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 8},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "OFT": {"oft_block_size": 4, "r": None},
    "ROAD": {"group_size": 16},
    "TRAINABLE_TOKENS": {"token_indices": [1, 5], "target_modules": ["embed_tokens"]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "WAVEFT": {"n_frequency": 8},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1, "target_modules": None},
}
REFUSED = {
    "ADAPTION_PROMPT": "AdaptedAttention, which is more than weights",
    "BEFT": r"layers.0.self_attn.q_proj has an adapter \(beft.layer.Linear\).* no bias",
    "LILY": r"layers.0.self_attn.q_proj has an adapter \(lily.layer.Linear\)",
    **dict.fromkeys(("CARTRIDGE", "CPT", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"), "adds soft prompts"),
    "MULTITASK_PROMPT_TUNING": "adds soft prompts",
    "POLY": r"has an adapter \(poly.layer.Linear\)",
}
ELSEWHERE = {"LORA", "XLORA", "SHADOW"}  # below; made of several models; of no language model's forward

LORA: dict[str, dict[str, Any]] = {
    **{f"{init}": {"init_lora_weights": init} for init in (True, False, "pissa", "olora", "eva", "orthogonal", "mica")},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias": {"bias": "all"},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "saved together": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms saved": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "on the head": {"target_modules": [*TARGETS, "lm_head"]},
    "on the embeddings": {"target_modules": ["embed_tokens"]},
    "on both": {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]},
    "on a parameter": {"target_parameters": ["mlp.up_proj.weight"]},
    "layers twice": {"layer_replication": [[0, 1], [0, 2]]},
}
TIED_REFUSED = {"head saved", "embeddings saved", "both saved", "on the head", "on the embeddings", "on both"}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


@torch.no_grad()
def trained(base: Any, config: Any) -> Any:
    """An adapter of that kind on a copy, all that is trained of it moved."""
    torch.manual_seed(3)
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(copy.deepcopy(base), config).float()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def handed(model: Any) -> Any:
    """A new model without adapters, with the weights that `model` hands over."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    fresh = type(inner)(copy.deepcopy(inner.config)).float()
    kept = fresh.load_state_dict(whole_state(model), strict=False)
    tied = set(fresh.all_tied_weights_keys)
    assert not kept.unexpected_keys
    assert set(kept.missing_keys) <= tied
    return fresh


def assert_handed_over(model: Any, base: Any) -> None:
    expected = logits(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert expected.shape != logits(base).shape or not torch.allclose(expected, logits(base), atol=1e-2)
    assert torch.allclose(logits(handed(model)), expected, atol=2e-5)
    assert_unchanged(model, before)


def assert_unchanged(model: Any, before: dict[str, Tensor]) -> None:
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_every_kind_of_adapter_that_peft_has_is_known_here() -> None:
    assert {str(kind.value) for kind in PEFT_TYPES} >= {*OPTIONS, *REFUSED, *ELSEWHERE}


@pytest.mark.parametrize("kind", sorted(str(kind.value) for kind in PEFT_TYPES if kind.value not in ELSEWHERE))
def test_the_weights_that_are_handed_over_give_the_trained_logits(kind: str) -> None:
    config = PEFT_TYPES[kind]
    names = {field.name for field in dataclasses.fields(config)}
    common = {"target_modules": TARGETS, "r": 2, "num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    options = {name: value for name, value in (common | OPTIONS.get(kind, {})).items() if name in names and value}
    if kind == "MULTITASK_PROMPT_TUNING":
        options["num_tasks"] = 1
    base = tiny("llama").float()
    try:
        model = trained(base, config(**options))
    except ImportError as missing:
        pytest.skip(str(missing))
    if kind not in REFUSED:
        assert_handed_over(model, base)
        return
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=REFUSED[kind]):
        whole_state(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LORA)
def test_lora_of_every_kind_is_handed_over_or_refused_by_name(name: str, tied: bool) -> None:
    base = (models.tied() if tied else tiny("llama")).float()
    model = trained(base, peft.LoraConfig(**{"r": 2, "target_modules": TARGETS} | LORA[name]))
    if tied and name in TIED_REFUSED:
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        with pytest.raises(UnsupportedModelError, match=r"lm_head.weight is tied to model.embed_tokens"):
            whole_state(model)
        assert_unchanged(model, before)
        return
    assert_handed_over(model, base)


def test_an_adapter_with_a_bias_where_the_layer_has_none_is_refused_and_leaves_the_model_as_it_was() -> None:
    """`Linear` is refused after others have been merged: those must be put back too."""
    model = trained(tiny("llama").float(), peft.LoraConfig(r=2, target_modules=TARGETS, lora_bias=True))
    before, expected = {name: weight.clone() for name, weight in model.state_dict().items()}, logits(model)
    with pytest.raises(UnsupportedModelError, match=r"q_proj has an adapter .*lora_bias=True"):
        whole_state(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]], ids=str)
def test_of_several_adapters_those_in_use_are_handed_over(active: list[str]) -> None:
    base = tiny("llama").float()
    model = trained(base, peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    if len(active) == 1:
        model.set_adapter(active[0])
    else:
        model.base_model.set_adapter(active)
    assert_handed_over(model, base)


@pytest.mark.parametrize("state", ["off", "merged"])
def test_an_adapter_that_is_off_or_merged_already_is_handed_over_as_it_is(state: str) -> None:
    base = tiny("llama").float()
    model = trained(base, peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]))
    if state == "merged":
        model.merge_adapter()
        assert_handed_over(model, base)
        return
    with model.disable_adapter():
        assert torch.equal(logits(handed(model)), logits(base))


def test_a_model_that_transformers_loaded_from_an_adapters_folder_is_handed_over(tmp_path: Path) -> None:
    base = tiny("llama").float()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trained(base, peft.LoraConfig(r=2, target_modules=TARGETS)).save_pretrained(tmp_path / "adapter")
    assert_handed_over(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), base)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_next", "gemma3", "gpt_neox"])
def test_names_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    """Experts are one tensor in memory and many in a checkpoint."""
    model = tiny(family).float()
    model.save_pretrained(tmp_path)
    saved, state = load_file(tmp_path / "model.safetensors"), whole_state(model)
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_an_outer_and_an_inner_compiled_model_have_the_names_of_the_plain_one() -> None:
    model: Any = tiny("llama").float()
    names = set(whole_state(model))
    model.model.layers[0] = torch.compile(model.model.layers[0])
    compiled: Any = torch.compile(model)
    assert set(whole_state(compiled)) == names


def test_a_quantised_model_is_refused() -> None:
    model: Any = tiny("llama").float()
    model.is_quantized = True
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is quantised"):
        whole_state(model)


@pytest.mark.parametrize("shards", ["one", "several"])
def test_weights_are_written_into_the_files_that_they_are_in(shards: str, tmp_path: Path) -> None:
    model = tiny("llama").float()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "several" else "1GB")
    files = {path.name: set(safe_open(path, "pt").keys()) for path in tmp_path.glob("*.safetensors")}
    assert (len(files) > 1) == (shards == "several")
    changed = trained(model, peft.LoraConfig(r=2, target_modules=TARGETS))
    write_weights(whole_state(changed), tmp_path)
    assert {path.name: set(safe_open(path, "pt").keys()) for path in tmp_path.glob("*.safetensors")} == files
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(changed), atol=2e-5)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_a_file_with_both_names_of_a_tied_weight_gets_both_and_what_lies_beside_is_left(tmp_path: Path) -> None:
    model: Any = models.tied().float()
    weights = whole_state(model)
    tied = model.all_tied_weights_keys
    assert "lm_head.weight" not in weights
    assert tied["lm_head.weight"] in weights
    both = weights | {"lm_head.weight": weights[tied["lm_head.weight"]].clone()}
    save_file({name: torch.zeros_like(weight) for name, weight in both.items()}, tmp_path / "model.safetensors")
    save_file({"other": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    write_weights(weights, tmp_path, tied=tied)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == both.keys()
    assert all(torch.equal(written[name], weight) for name, weight in both.items())
    assert load_file(tmp_path / "consolidated.safetensors").keys() == {"other"}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a model that also sees has its text weights."""
    return {name.replace("model.", "model.language_model."): weight for name, weight in state.items()}


@pytest.mark.parametrize("shards", ["one", "several"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"has 20 more \(lm_head.*\), 20 less|has 20 more \(model.embed.*\), 20 less"),
        (lambda state: dict(list(state.items())[:-1]), r"has 1 more \(\S+\): nothing was written"),
        (lambda state: state | {"visual.weight": torch.zeros(2)}, r"has 1 less \(visual.weight\)"),
        (
            lambda state: state | {"lm_head.weight": torch.zeros(64, 32)},
            r"1 of other shapes \(lm_head.weight \(61, 32\) and not \(64, 32\)\)",
        ),
    ],
    ids=["other layout", "one is missing", "one too many", "vocabulary was resized"],
)
def test_weights_of_other_names_or_shapes_than_the_folders_are_refused_before_anything_is_written(
    change: Any, message: str, shards: str, tmp_path: Path
) -> None:
    model = tiny("llama").float()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "several" else "1GB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ArgumentError, match=message):
        write_weights(change(whole_state(model)), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_empty_folder_gets_one_file(tmp_path: Path) -> None:
    state = whole_state(tiny("llama").float())
    write_weights(state, tmp_path / "new")
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == state.keys()


SHARDED = ("dora", "head saved", "tokens", "rslora")


def handed_over_sharded(name: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = trained(tiny("llama").float(), peft.LoraConfig(**{"r": 2, "target_modules": TARGETS} | LORA[name]))
    expected = whole_state(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        state = whole_state(model)
        assert state.keys() == expected.keys()
        assert all(torch.allclose(state[name], expected[name], atol=1e-6) for name in expected)


RANKS = 2
SECONDS = 120  # a hang is a failure within this time


def cases() -> dict[str, Any]:
    return {name: partial(handed_over_sharded, name) for name in SHARDED}


def work(rank: int, folder: str) -> None:
    run_cases(rank, folder, cases(), ranks=RANKS)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_student_is_handed_over_whole(name: str, verdicts: list[dict[str, str]]) -> None:
    """A merge that replaces a weight's data does nothing to a shard."""
    assert_right(name, verdicts)
