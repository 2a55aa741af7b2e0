"""`sdcore profile-memory` as it is typed: what fits, and a measured step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from transformers import Qwen3Config
from typer.testing import CliRunner

from sdcore.cli.main import app

LENGTHS = ["--prompt-tokens", "64", "--context-tokens", "16", "--completion-tokens", "32", "--completions", "2"]


@pytest.fixture(autouse=True)
def in_a_folder_with_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    Qwen3Config(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
    ).save_pretrained("model")


def profile(*words: str) -> Result:
    return CliRunner().invoke(app, ["profile-memory", "--model", "model", *LENGTHS, *words])


def test_what_fits_is_said_for_a_card_without_weights() -> None:
    result = profile("--what-fits", "--device-memory", "RTX 4090")
    assert result.exit_code == 0, result.output
    for word in ("What fits RTX 4090", "fused, shared", "plain, naive", "1 at a time", "G, completions of a prompt"):
        assert word in result.output
    assert "Predicted peak" not in result.output


def test_a_measured_step_is_written_with_what_was_scaled_down() -> None:
    pytest.importorskip("matplotlib")
    result = profile("--measure", "--contenders", "ours,naive", "--scale-width", "2", "--scale-tokens", "2")
    assert result.exit_code == 0, result.output
    assert "num_hidden_layers 6 → 2" in result.output
    written = json.loads(Path("memory/memory.json").read_text())
    assert written["scaled"][0] == "num_hidden_layers 6 → 2"
    assert written["load"]["prompt_tokens"] == 32
    assert written["contenders"]["ours"]["peak_bytes"] < written["contenders"]["naive"]["peak_bytes"]
    assert Path("memory/memory.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--what-fits"], "--device-memory must be given with --what-fits"),
        (["--what-fits", "--device-memory", "toaster"], "device memory must be a size such as 80GB or one of T4"),
        (["--measure", "--contenders", "theirs"], "contenders must be among ours, naive, trl, liger, got theirs"),
        (["--measure", "--scale-width", "0"], "width must be at least 1, got 0"),
        (["--measure", "--teacher", "ema"], "teacher must be live where a step is measured"),
    ],
)
def test_what_has_no_meaning_is_refused_on_a_line(words: list[str], message: str) -> None:
    result = profile(*words)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not Path("memory").exists()
