"""The predicted memory against what a step really keeps alive, what it says of sizes nobody can allocate, what fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.memory import (
    PARTS,
    Load,
    Parameters,
    Setting,
    Tiles,
    compare,
    count_parameters,
    device_bytes,
    fits_table,
    largest,
    measure,
    memory_table,
    predict,
    what_fits,
)
from sdcore.memory.fits import MOST, QUANTITIES
from sdcore.memory.measured import predictions
from sdcore.presets import preset
from sdcore.training.config import SelfDistillationConfig
from sdcore.training.dry_run import setting_of_run
from sdkernels.live_bytes import LiveBytes

SIZES: dict[str, Any] = {
    "vocab_size": 3000,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
SMALL = LlamaConfig(**SIZES)
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 64,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=32, sliding_window=32),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=32, sliding_window=32),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **MOE, head_dim=32),
    "qwen3_next": lambda: Qwen3NextConfig(**SIZES | LINEAR, **MOE, head_dim=32),
}
LOAD = Load(prompt_tokens=192, context_tokens=48, completion_tokens=32, completions=4)
# An 8B model, by its sizes: nothing of this size is ever allocated.
LARGE = Qwen3Config(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
LARGE_LOAD = Load(prompt_tokens=1024, context_tokens=512, completion_tokens=512, completions=8)
COUNTED = count_parameters(LARGE)
GIB = 1 << 30


# The torch backend has the scratch that the estimate is about; of tiny models it is a part that counts.
@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        *((family, "packed") for family in FAMILIES if family != "qwen3_next"),
        *((family, "naive") for family in FAMILIES),
        *((family, strategy) for family in ("llama", "qwen3_next") for strategy in ("cached", "two_phase")),
    ],
)
def test_the_prediction_is_near_what_a_step_keeps_alive(family: str, strategy: Any) -> None:
    config = FAMILIES[family]()
    setting = Setting(strategy=strategy, micro_batch=1 if strategy == "two_phase" else None, workspace_mb=256)
    names = ("ours", "naive") if strategy == "naive" else ("ours",)
    found, predicted = measure(config, LOAD, setting, contenders=names), predictions(config, LOAD, setting, Tiles())
    for name in names:
        lives = found[name].lives
        assert lives is not None, found[name].reason
        beyond = lives.peak - lives.at_peak["weights"] - lives.at_peak["optimizer"]
        assert 0.85 <= (predicted[name].update - predicted[name].resident) / beyond <= 1.15
        assert lives.at_peak["weights"] == pytest.approx(predicted[name].parts["weights"], rel=0.01)
        assert lives.at_peak["optimizer"] == pytest.approx(predicted[name].parts["optimizer"], rel=0.01)


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("strategy", ["packed", "naive", "cached", "two_phase"])
def test_the_prediction_knows_the_gradients_of_a_tied_embedding(strategy: Any, accumulates: bool) -> None:
    """Of few tokens it is the peak: both summands and the sum, beside the gradient of an earlier backward."""
    config = LlamaConfig(**SIZES | {"tie_word_embeddings": True, "vocab_size": 12_000})
    setting = Setting(strategy=strategy, micro_batch=1 if strategy == "two_phase" else None, accumulates=accumulates)
    load = replace(LOAD, prompt_tokens=24, context_tokens=8, completion_tokens=4)
    lives = measure(config, load, setting, contenders=("ours",))["ours"].lives
    assert lives is not None
    beyond = lives.peak - lives.at_peak["weights"] - lives.at_peak["optimizer"]
    predicted = predictions(config, load, setting, Tiles())["ours"]
    assert 0.9 <= (predicted.update - predicted.resident) / beyond <= 1.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_logits_are_what_plain_pytorch_holds(dtype: torch.dtype) -> None:
    rows, vocab, hidden = 128, 2000, 8
    student, teacher = torch.randn(rows, hidden, dtype=dtype, requires_grad=True), torch.randn(rows, hidden).to(dtype)
    weight = torch.randn(vocab, hidden, dtype=dtype)
    with LiveBytes() as probe:
        ours, theirs = (torch.nn.functional.linear(side, weight) for side in (student, teacher))
        logp, logq = (logits.float().log_softmax(-1) for logits in (ours, theirs))
        loss = torch.nn.functional.kl_div(logq, logp, reduction="none", log_target=True).sum(-1).mean()
        loss.backward()
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, num_attention_heads=2, dtype=dtype)
    load = Load(prompt_tokens=1, context_tokens=0, completion_tokens=rows)
    predicted = predict(config, load, Setting(fused=False), parameters=Parameters(0, 0, 0))
    assert predicted.parts["logits"] == pytest.approx(probe.peak_bytes, rel=0.02)
    assert predict(config, load, Setting(), parameters=Parameters(0, 0, 0)).parts["logits"] == 0


def test_parameters_are_those_of_the_model_whatever_is_tied() -> None:
    for tied in (False, True):
        config = LlamaConfig(**SMALL.to_dict() | {"tie_word_embeddings": tied})
        model = AutoModelForCausalLM.from_config(config)
        counted = count_parameters(config)
        assert counted.all == sum(p.numel() for p in model.parameters())
        assert counted.head == 3000 * 96


def test_an_8b_model_is_predicted_without_its_weights() -> None:
    table = compare(LARGE, LARGE_LOAD, Setting(teacher="ema"))
    best = table["fused, shared"]
    gib = {name: size / 2**30 for name, size in best.parts.items()}
    assert gib["weights"] == pytest.approx(8.19e9 * 2 / 2**30, rel=0.01)
    assert gib["teacher weights"] == gib["gradients"] == gib["weights"]
    assert gib["optimizer"] == 2 * gib["weights"]
    assert gib["logits"] == 0
    # 4,096 rows of 151,936 logits: two in bfloat16 and six in float32.
    assert table["plain, shared"].parts["logits"] == 4096 * 151_936 * 28
    # The head's gradient in float32, a GPU's 1.5 GiB to work in, and three times the rows' states.
    head = 151_936 * 4096
    assert best.parts["workspace"] == 4 * head + (1536 << 20) + 3 * 4096 * 4096 * 2
    bounded = predict(LARGE, LARGE_LOAD, Setting(workspace_mb=256))
    assert bounded.parts["workspace"] == 4 * head + (256 << 20) + 3 * 4096 * 4096 * 2
    # 8 prompts of 1,024 tokens become one: of 12,280 tokens 5,112 are left.
    shared, naive = (table[f"fused, {kind}"].parts["activations"] for kind in ("shared", "naive"))
    assert shared / naive == pytest.approx(5112 / 12_280, rel=0.02)
    assert table["plain, naive"].total > table["plain, shared"].total > best.total


def test_what_is_not_there_costs_nothing() -> None:
    live, ema = (predict(LARGE, LARGE_LOAD, Setting(teacher=teacher)) for teacher in ("live", "ema"))
    assert live.parts["teacher weights"] == 0
    assert ema.update - live.update >= live.parts["weights"]
    lora = predict(LARGE, LARGE_LOAD, Setting(teacher="frozen", lora_rank=16))
    assert lora.parts["teacher weights"] == 0  # the adapter is switched off
    assert lora.parts["gradients"] < live.parts["gradients"] / 100
    assert lora.parts["optimizer"] == 2 * lora.parts["gradients"]
    checkpointed = predict(LARGE, LARGE_LOAD, Setting(checkpointing=True))
    assert checkpointed.parts["activations"] < live.parts["activations"] / 5
    micro = predict(LARGE, LARGE_LOAD, Setting(strategy="two_phase", micro_batch=1))
    assert micro.parts["activations"] < live.parts["activations"]
    # Of each micro-batch the head's gradient, before it is added; only its rows are in the loss.
    assert micro.parts["gradients"] == live.parts["gradients"] + 151_936 * 4096 * 2
    plain = predict(LARGE, LARGE_LOAD, Setting(strategy="two_phase", micro_batch=1, fused=False))
    assert plain.parts["logits"] == 512 * 151_936 * 28
    # A packed row's keys and values are those that its layers keep.
    assert live.parts["prompt cache"] == 0 < checkpointed.parts["prompt cache"]


def test_a_run_s_arguments_are_its_setting() -> None:
    args = SelfDistillationConfig(output_dir="unused", micro_batch=2, activation_checkpointing=True, use_cpu=True)
    found = setting_of_run(args, preset("sdpo"), lora_rank=4)
    assert found == Setting(
        teacher="ema", strategy="two_phase", micro_batch=2, checkpointing=True, lora_rank=4, dtype="float32"
    )
    plain = SelfDistillationConfig(output_dir="unused", strategy="naive", model_dtype="auto", use_cpu=True)
    assert setting_of_run(plain, preset("grpo")) == Setting(strategy="naive")


def test_memory_grows_with_prompts_and_not_with_the_dtype_of_another_model() -> None:
    one, two = (predict(LARGE, replace(LARGE_LOAD, prompts=prompts)) for prompts in (1, 2))
    assert two.parts["activations"] == 2 * one.parts["activations"]
    assert two.parts["weights"] == one.parts["weights"]
    # Few completions at a time are of one prompt at a time.
    setting = Setting(strategy="two_phase", micro_batch=1)
    one, two = (predict(LARGE, replace(LARGE_LOAD, prompts=prompts), setting) for prompts in (1, 2))
    assert two.update == one.update
    wide = predict(LARGE, LARGE_LOAD, Setting(dtype="float32"))
    assert wide.parts["weights"] == 2 * one.parts["weights"]


def test_a_long_context_costs_what_a_layer_of_the_teacher_s_pass_holds() -> None:
    setting = Setting(lora_rank=1, workspace_mb=256)
    short, long, longer = (
        predict(LARGE, replace(LARGE_LOAD, context_tokens=count), setting) for count in (0, 20_000, 30_000)
    )
    # Gate, up, activation and product alone are four times the intermediate size.
    assert longer.update - long.update > 10_000 * 2 * 12_288 * 2
    assert long.parts["activations"] == short.parts["activations"]


def test_sampling_counts_where_it_needs_more_than_the_update() -> None:
    many = Load(prompt_tokens=30_000, context_tokens=0, completion_tokens=1, completions=64)
    predicted = predict(LARGE, many, Setting(lora_rank=1, checkpointing=True))
    assert predicted.total == predicted.resident + predicted.sampling > predicted.update


def test_the_table_names_every_part_and_its_sum() -> None:
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(memory_table(compare(LARGE, LARGE_LOAD)))
    shown = console.export_text()
    for word in (*PARTS, "peak", "fused, shared", "plain, naive"):
        assert word in shown
    assert "GiB" in shown


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize(
    "setting", [Setting(), Setting(strategy="two_phase", micro_batch=1), Setting(strategy="naive", fused=False)]
)
def test_the_largest_fits_and_one_more_does_not(quantity: str, setting: Setting) -> None:
    available = int(130 * GIB)
    found = largest(LARGE, LARGE_LOAD, setting, quantity, available=available, parameters=COUNTED)
    if found.value is None:
        smallest = replace(LARGE_LOAD, **{quantity: QUANTITIES[quantity][1]})  # type: ignore[arg-type]
        assert predict(LARGE, smallest, setting, parameters=COUNTED).total > available
        return
    most, more = (replace(LARGE_LOAD, **{quantity: found.value + i}) for i in (0, 1))  # type: ignore[arg-type]
    assert predict(LARGE, most, setting, parameters=COUNTED).total <= available
    assert found.rows == most.rows
    if not found.limit:
        assert predict(LARGE, more, setting, parameters=COUNTED).total > available


def test_sharing_and_fusing_each_fit_more() -> None:
    found = what_fits(LARGE, LARGE_LOAD, device_bytes=160 * GIB, parameters=COUNTED)
    completions = {name: fits["completions"].value or 0 for name, fits in found.items()}
    assert list(found) == ["fused, shared", "fused, naive", "plain, shared", "plain, naive", "fused, 1 at a time"]
    assert completions["fused, shared"] > completions["plain, shared"] > completions["plain, naive"]
    assert completions["fused, shared"] > completions["fused, naive"]
    assert completions["fused, 1 at a time"] > 4 * completions["fused, shared"]


def test_a_length_ends_where_the_model_does() -> None:
    found = largest(
        LARGE, LARGE_LOAD, Setting(checkpointing=True), "prompt_tokens", available=4000 * GIB, parameters=COUNTED
    )
    assert found.value == 40_960 - 1024
    assert found.limit == "the model's positions"
    endless = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1)
    groups = largest(endless, replace(LARGE_LOAD, prompt_tokens=8), Setting(), "prompts", available=1 << 60)
    assert groups.value == MOST
    assert groups.limit


def test_what_does_not_fit_at_all_is_nothing() -> None:
    found = what_fits(LARGE, LARGE_LOAD, device_bytes=GIB, parameters=COUNTED)
    assert {fit.value for fits in found.values() for fit in fits.values()} == {None}
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(fits_table(found, LARGE_LOAD, "nothing"))
    assert "–" in console.export_text()


def test_headroom_is_left_alone() -> None:
    whole, less = (
        what_fits(LARGE, LARGE_LOAD, device_bytes=160 * GIB, headroom=share, parameters=COUNTED) for share in (0.0, 0.3)
    )
    for name, fits in whole.items():
        assert (fits["completion_tokens"].value or 0) > (less[name]["completion_tokens"].value or 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("80GB", 80 * 10**9),
        ("79.5 GiB", int(79.5 * GIB)),
        ("1024", 1024),
        ("h100", int(79.2 * GIB)),
        ("RTX4090", int(23.6 * GIB)),
        ("a100 40", int(39.4 * GIB)),
    ],
)
def test_a_device_is_a_card_or_a_size(name: str, expected: int) -> None:
    assert device_bytes(name) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(LOAD, completions=0), "completions must be at least 1, got 0"),
        (lambda: replace(LOAD, context_tokens=-1), "context_tokens must be at least 0, got -1"),
        (lambda: Setting(strategy="fast"), "strategy must be one of packed, .*got 'fast'"),  # type: ignore[arg-type]
        (lambda: Setting(dtype="int8"), "dtype must be the name of one of torch's float dtypes, got 'int8'"),
        (lambda: Setting(teacher="emma"), "teacher must be one of live, .*got 'emma'"),  # type: ignore[arg-type]
        (lambda: Setting(lora_rank=0), "lora_rank must be at least 1, or None, got 0"),
        (lambda: Setting(workspace_mb=0), "workspace_mb must be positive, got 0"),
        (lambda: what_fits(LARGE, LARGE_LOAD, device_bytes=GIB, headroom=1), r"headroom must be in \[0, 1\), got 1"),
        (lambda: largest(LARGE, LOAD, Setting(), "tokens", available=1), "quantity must be one of .*got 'tokens'"),
        *(
            (partial(device_bytes, name), r"device memory must be a size such as 80GB or one of T4, L4, .*got")
            for name in ("", "big", "H1000", "12 parsec", "-3GB")
        ),
    ],
)
def test_sizes_without_meaning_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "gptq", "fp8"])
def test_a_quantised_models_weights_are_not_counted_as_if_it_were_none(method: str) -> None:
    config = LlamaConfig(quantization_config={"quant_method": method, "load_in_4bit": True})
    with pytest.raises(UnsupportedModelError, match=f"not quantised, got quant_method='{method}'"):
        predict(config, LOAD)
