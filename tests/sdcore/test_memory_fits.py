"""The largest step that fits: one more does not, and what limits it is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console
from transformers import LlamaConfig, Qwen3Config

from sdcore.errors import ArgumentError
from sdcore.memory import Load, Setting, count_parameters, device_bytes, fits_table, largest, predict, what_fits
from sdcore.memory.fits import MOST, QUANTITIES

GIB = 1 << 30
CONFIG = Qwen3Config(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    tie_word_embeddings=True,
    dtype="bfloat16",
)
LOAD = Load(prompt_tokens=1024, context_tokens=512, completion_tokens=512, completions=8)
COUNTED = count_parameters(CONFIG)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize(
    "setting", [Setting(), Setting(strategy="two_phase", micro_batch=1), Setting(strategy="naive", fused=False)]
)
def test_the_largest_fits_and_one_more_does_not(quantity: str, setting: Setting) -> None:
    available = int(21.6 * GIB)
    found = largest(CONFIG, LOAD, setting, quantity, available=available, parameters=COUNTED)
    if found.value is None:
        smallest = replace(LOAD, **{quantity: QUANTITIES[quantity][1]})  # type: ignore[arg-type]
        assert predict(CONFIG, smallest, setting, parameters=COUNTED).total > available
        return
    most, more = (replace(LOAD, **{quantity: found.value + i}) for i in (0, 1))  # type: ignore[arg-type]
    assert predict(CONFIG, most, setting, parameters=COUNTED).total <= available
    assert found.rows == most.rows
    if not found.limit:
        assert predict(CONFIG, more, setting, parameters=COUNTED).total > available


def test_sharing_and_fusing_each_fit_more() -> None:
    found = what_fits(CONFIG, LOAD, device_bytes=24 * GIB, parameters=COUNTED)
    completions = {name: fits["completions"].value or 0 for name, fits in found.items()}
    assert list(found) == ["fused, shared", "fused, naive", "plain, shared", "plain, naive", "fused, 1 at a time"]
    assert completions["fused, shared"] > completions["plain, shared"] > completions["plain, naive"]
    assert completions["fused, shared"] > completions["fused, naive"]
    assert completions["fused, 1 at a time"] > 4 * completions["fused, shared"]


def test_a_length_ends_where_the_model_does() -> None:
    found = largest(CONFIG, LOAD, Setting(checkpointing=True), "prompt_tokens", available=500 * GIB, parameters=COUNTED)
    assert found.value == 40_960 - 1024
    assert found.limit == "the model's positions"
    endless = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1)
    groups = largest(endless, replace(LOAD, prompt_tokens=8), Setting(), "prompts", available=1 << 60)
    assert groups.value == MOST
    assert groups.limit


def test_what_does_not_fit_at_all_is_nothing() -> None:
    found = what_fits(CONFIG, LOAD, device_bytes=GIB, parameters=COUNTED)
    assert {fit.value for fits in found.values() for fit in fits.values()} == {None}
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(fits_table(found, LOAD, "nothing"))
    assert "–" in console.export_text()


def test_headroom_is_left_alone() -> None:
    whole, less = (
        what_fits(CONFIG, LOAD, device_bytes=24 * GIB, headroom=share, parameters=COUNTED) for share in (0.0, 0.3)
    )
    for name, fits in whole.items():
        assert (fits["completion_tokens"].value or 0) > (less[name]["completion_tokens"].value or 0)
    with pytest.raises(ArgumentError, match=r"headroom must be in \[0, 1\), got 1"):
        what_fits(CONFIG, LOAD, device_bytes=GIB, headroom=1, parameters=COUNTED)


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


@pytest.mark.parametrize("name", ["", "big", "H1000", "12 parsec", "-3GB"])
def test_an_unknown_device_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"device memory must be a size such as 80GB or one of T4, L4, .*got"):
        device_bytes(name)


def test_an_unknown_quantity_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"quantity must be one of completion_tokens, .*got 'tokens'"):
        largest(CONFIG, LOAD, Setting(), "tokens", available=GIB, parameters=COUNTED)
