"""The time line against arithmetic and against `LiveBytes`, and what a measured step says of each category."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedModel, Qwen3_5TextConfig

from sdcore.errors import ArgumentError
from sdcore.memory import (
    CATEGORIES,
    Lives,
    Load,
    Measurement,
    Setting,
    Tiles,
    TimeLine,
    measure,
    measured_table,
    save_plot,
    shrunk,
)
from sdcore.memory.plot import as_json
from sdcore.memory.timeline import Phase
from sdkernels.live_bytes import LiveBytes

VOCAB, HIDDEN, ROWS = 997, 32, 4 * 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
CONFIG = LlamaConfig(**SIZES)
IDS = torch.arange(60).view(2, 30)
LOAD = Load(prompt_tokens=40, context_tokens=10, completion_tokens=12, completions=4)


@pytest.fixture(scope="module")
def step() -> dict[str, Measurement]:
    # TRL's tiles would be wider than this vocabulary.
    return measure(CONFIG, LOAD, contenders=("ours", "naive", "trl"), tiles=Tiles(rows=256, vocab=128))


def lives_of(measured: Measurement) -> Lives:
    assert measured.lives is not None, measured.reason
    return measured.lives


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG).train()


def plain_step(made: PreTrainedModel, enter: Callable[[str], None] = lambda _: None) -> None:
    logits = made(input_ids=IDS, use_cache=False).logits
    enter("loss")
    loss = logits.float().logsumexp(-1).mean()
    enter("backward")
    loss.backward()


def test_the_categories_add_up_to_every_byte_that_was_allocated_and_end_as_weights_and_gradients() -> None:
    """`LiveBytes` counts the same step without knowing any category."""
    made = model()
    plain_step(made)  # what is made once
    made.zero_grad()
    with LiveBytes() as probe:
        plain_step(made)
    made.zero_grad()
    with TimeLine(made) as line:
        plain_step(made, line.enter)
    found = line.finished()
    resident = sum(p.numel() * 4 for p in made.parameters()) + sum(b.numel() * 4 for b in made.buffers())
    assert found.bytes["weights"][0] == found.bytes["weights"][-1] == resident
    assert found.peak - resident == probe.peak_bytes
    assert sum(found.at_peak.values()) == found.peak
    assert all((curve >= 0).all() for curve in found.bytes.values())
    left = {name: int(curve[-1]) for name, curve in found.bytes.items() if curve[-1]}
    assert left == {"weights": resident, "gradients": sum(p.numel() * 4 for p in made.parameters())}


def test_logits_are_what_is_as_wide_as_the_vocabulary() -> None:
    made = model()
    with TimeLine(made) as line:
        hidden = made.base_model(torch.randint(VOCAB, (1, 7))).last_hidden_state
        line.enter("loss")
        logits = hidden @ made.lm_head.weight.T  # (1, 7, V)
    found = line.finished()
    assert found.bytes["logits"][-1] == logits.numel() * 4
    assert found.phases[-1].name == "loss"
    # Two norms, queries, keys, values, feed-forward layer, ... of both layers.
    assert found.bytes["activations"][-1] > 2 * 7 * 4 * (6 * HIDDEN + 4 * 80)


def test_a_pass_without_gradient_keeps_nothing_but_what_it_returns() -> None:
    made = model()
    with TimeLine(made) as line, torch.no_grad():
        hidden = made.base_model(torch.randint(VOCAB, (1, 7)), use_cache=False).last_hidden_state
        line.enter("rest")
    found = line.finished()
    assert found.phases[-1].name == "teacher forward"
    assert found.bytes["activations"][-1] == hidden.numel() * 4
    assert found.bytes["activations"].max() == hidden.numel() * 4 < found.bytes["temporary"].max()


def test_a_step_is_the_same_on_every_run(step: dict[str, Measurement]) -> None:
    again = measure(CONFIG, LOAD, contenders=("ours",))["ours"]
    assert again.loss == step["ours"].loss
    for name, curve in lives_of(again).bytes.items():
        assert np.array_equal(curve, lives_of(step["ours"]).bytes[name])


def test_ours_has_no_logits_and_the_plain_code_has_all(step: dict[str, Measurement]) -> None:
    ours, naive, trl = (lives_of(step[name]) for name in ("ours", "naive", "trl"))
    assert ours.bytes["logits"].max() == 0 < ours.bytes["workspace"].max()
    assert naive.at_peak["logits"] >= 4 * ROWS * VOCAB * 4
    # 40 + 4 · 11 tokens against 4 · 52 of them.
    shared, whole = (one.bytes["activations"].max() for one in (ours, naive))
    assert shared / whole == pytest.approx((40 + 44) / 208, rel=0.1)
    assert max(ours.peak, trl.peak) < naive.peak
    assert ours.phase_at(ours.peak_at) == "loss"


def test_phases_follow_one_another_and_cover_the_step(step: dict[str, Measurement]) -> None:
    for measured in step.values():
        phases = lives_of(measured).phases
        assert all(one.end <= other.start for one, other in pairwise(phases))
        order = [phase.name for phase in phases if phase.name != "rest"]
        # AdamW is fused, as transformers' default is, and allocates nothing: no tick of the clock is its own.
        assert order == ["student forward", "teacher forward", "loss", "backward"]


def test_few_completions_at_a_time_keep_few_activations_and_a_prompt_cache(step: dict[str, Measurement]) -> None:
    few = lives_of(measure(CONFIG, LOAD, Setting(strategy="two_phase", micro_batch=1), contenders=("ours",))["ours"])
    assert [phase.name for phase in few.phases].count("backward") == LOAD.completions
    keys_and_values = 2 * 2 * 2 * 40 * 8 * 4  # two layers, keys and values, two heads, P tokens of 8
    assert keys_and_values <= few.bytes["prompt cache"].max() <= 3 * 1.3 * keys_and_values
    backward = next(phase.start for phase in few.phases if phase.name == "backward")
    assert few.bytes["prompt cache"][backward] >= keys_and_values
    assert few.bytes["activations"].max() < lives_of(step["ours"]).bytes["activations"].max()


@pytest.mark.filterwarnings("error:.*`gradient_checkpointing:FutureWarning")
def test_checkpointing_and_lora_are_measured_as_they_are_set() -> None:
    found = measure(CONFIG, LOAD, Setting(lora_rank=2, checkpointing=True), contenders=("ours",))["ours"]
    plain = measure(CONFIG, LOAD, contenders=("ours",))["ours"]
    assert lives_of(found).at_peak["optimizer"] < lives_of(plain).at_peak["optimizer"] / 10
    assert lives_of(found).bytes["activations"].max() < lives_of(plain).bytes["activations"].max() / 2


def test_a_contender_that_cannot_run_says_why() -> None:
    config = Gemma2Config(**SIZES | {"num_hidden_layers": 1, "head_dim": 16, "pad_token_id": None})
    found = measure(config, LOAD, contenders=("naive", "trl"))
    assert found["naive"].lives is not None
    assert found["trl"].lives is None
    assert "final_logit_softcapping" in found["trl"].reason
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(measured_table(found))
    assert "TRL chunked" in console.export_text()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: measure(CONFIG, LOAD, contenders=("ours", "theirs")),
            "must be among ours, naive, trl, liger, got theirs",
        ),
        (
            lambda: measure(CONFIG, LOAD, Setting(teacher="ema")),
            "teacher must be live where a step is measured, got 'ema'",
        ),
        (lambda: TimeLine(model()).enter("sampling"), r"name must be one of student forward, .*, got 'sampling'"),
        (lambda: shrunk(CONFIG, LOAD, width=0), "width must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_contenders_that_compute_different_losses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdcore.memory import measured as module

    wrong = module.Contender(lambda *arguments: 2 * module._naive(*arguments))
    monkeypatch.setitem(module.CONTENDERS, "naive", wrong)
    with pytest.raises(ArgumentError, match=r"contenders must compute the same loss, got .* of naive"):
        measure(CONFIG, LOAD, contenders=("ours", "naive"))


def test_thinning_keeps_the_peak() -> None:
    total = np.zeros(1001, dtype=np.int64)
    total[613] = 7
    lives = Lives(bytes={"weights": total, "logits": total * 2}, phases=(Phase("loss", 0, 1000),))
    ticks, curves = lives.thinned(10)
    assert len(ticks) == 10
    assert curves["logits"].max() == 14
    assert ticks[int(curves["logits"].argmax())] <= 613
    assert lives.peak_at == 613
    assert lives.at_peak == {"weights": 7, "logits": 14}


def test_the_plot_and_the_numbers_behind_it_are_written(step: dict[str, Measurement], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = save_plot(step, tmp_path / "memory.png", title="a step")
    assert target.read_bytes()[:4] == b"\x89PNG"
    written = json.loads(json.dumps(as_json(step)))
    for name, measured in step.items():
        curves = written[name]["bytes"]
        assert set(curves) == set(CATEGORIES)
        assert {len(curve) for curve in curves.values()} == {len(written[name]["ticks"])}
        totals = np.sum(list(curves.values()), axis=0)
        assert totals.max() == written[name]["peak_bytes"] == lives_of(measured).peak
        assert np.all(np.diff(written[name]["ticks"]) >= 0)
    with pytest.raises(ValueError, match="measurements must hold a contender that ran"):
        save_plot({"trl": Measurement(contender="trl", reason="not installed")}, tmp_path / "none.png")


def test_a_scaled_down_model_has_all_kinds_of_layers_and_runs() -> None:
    config = Qwen3_5TextConfig(
        vocab_size=5000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    load = Load(prompt_tokens=80, context_tokens=0, completion_tokens=40, completions=2)
    small = shrunk(config, load, layers=1, width=4, tokens=4)
    assert set(small.config.layer_types) == {"linear_attention", "full_attention"}
    assert (small.config.hidden_size, small.config.vocab_size, small.config.num_hidden_layers) == (64, 1250, 2)
    assert small.load == Load(prompt_tokens=20, context_tokens=0, completion_tokens=10, completions=2)
    assert small.tiles == Tiles(rows=4.0, vocab=4.0)
    assert "hidden_size 256 → 64" in small.changes
    assert config.hidden_size == 256
    setting = Setting(strategy="cached")
    assert measure(small.config, small.load, setting, contenders=("ours",))["ours"].lives is not None


def test_nothing_is_scaled_by_one() -> None:
    same = shrunk(CONFIG, LOAD, layers=None, width=1, tokens=1)
    assert same.changes == ()
    assert same.load == LOAD
    assert same.config.to_dict() == CONFIG.to_dict()
