"""Tests the main job end to end: what it writes, what it claims, and what it refuses."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from sdcore.cli.main import app
from sdcore.demo import DemoConfig, run_demo
from sdcore.demo.learners import exam_of, train
from sdcore.demo.report import COLUMNS, LEGEND, Point, table_points
from sdcore.world.language import VOCABULARY, build_tokenizer

SMALL = DemoConfig(steps=2, sft_steps=3, batch_size=4, eval_every=2, eval_episodes=8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """Makes two runs with one seed: the output folder and what was printed."""
    outputs = []
    for name in ("first", "second"):
        console = Console(record=True, width=160, file=io.StringIO())
        output = tmp_path_factory.mktemp(name)
        run_demo(replace(SMALL, output=output), console)
        outputs.append((output, console.export_text()))
    return outputs


def test_the_demo_writes_the_numbers_and_the_curves(runs: list[tuple[Path, str]]) -> None:
    output, _ = runs[0]
    report = json.loads((output / "report.json").read_text())
    assert {learner: [point["step"] for point in curve] for learner, curve in report["curves"].items()} == {
        "sdft": [0, 2],
        "sft": [0, 2, 3],
        "oracle": [0, 2],
    }
    assert report["curves"]["sdft"][0]["prior"]["answers"] == SMALL.eval_episodes
    assert len(report["samples"]) == 3
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_numbers(runs: list[tuple[Path, str]]) -> None:
    first, second = ((output / "report.json").read_text() for output, _ in runs)
    assert first == second


def test_another_seed_is_another_task() -> None:
    assert len({exam_of(replace(SMALL, seed=seed)).task for seed in range(3)}) == 3


def test_the_output_explains_every_column_and_method(runs: list[tuple[Path, str]]) -> None:
    _, shown = runs[0]
    for name, meaning in LEGEND:
        assert name in shown
        assert meaning in shown
    assert {"teacher", "SDFT", "SFT", "oracle"} <= {name for name, _ in LEGEND}
    assert set(COLUMNS) <= {name for name, _ in LEGEND}


def test_the_table_shows_sft_after_equal_steps_and_at_its_end(tmp_path: Path) -> None:
    report = run_demo(replace(SMALL, output=tmp_path, plot=False), Console(quiet=True))
    assert [(title, point.step) for title, point in table_points(report)] == [
        ("before", 0),
        ("SDFT", 2),
        ("SFT", 2),
        ("SFT", 3),
        ("oracle", 2),
    ]
    assert not (tmp_path / "curves.png").exists()


def sdft(config: DemoConfig) -> tuple[torch.Tensor, Point, Point]:
    """Trains by SDFT: the weights, and what could be done before and after."""
    exam = exam_of(config)
    student, curve = train(config, exam, "sdft", Point(0, exam.skills(exam.base.model)), lambda: None)
    return torch.cat([p.detach().flatten() for p in student.parameters()]), curve[0], curve[-1]


def test_how_often_one_measures_changes_nothing() -> None:
    ends = [sdft(replace(SMALL, steps=4, sft_steps=4, eval_every=eval_every)) for eval_every in (1, 4)]
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_sdft_learns_the_task_and_can_still_learn_in_context() -> None:
    _, before, after = sdft(DemoConfig(eval_every=60, eval_episodes=100))
    # Three seeds gave 0.94 to 0.99 and 0.96 to 0.98; 100 answers have a standard error of 0.02 there.
    assert before.skills["new"].lenient <= 0.03
    assert after.skills["new"].strict >= 0.8
    assert after.skills["in_context"].strict >= 0.85


def test_another_model_takes_the_bundled_ones_place(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--output", tmp_path / "out", "--steps", 1, "--sft-steps", 1, "--no-plot"]
    result = CliRunner().invoke(app, ["demo", *map(str, options)])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["model"] == str(tmp_path / "model")
    assert report["curves"]["sdft"][0]["prior"]["strict"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"sft_steps": 1}, "sft_steps must be at least steps=2, got 1"),
    ],
)
def test_settings_without_meaning_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_the_command_line_names_a_bad_setting() -> None:
    result = CliRunner().invoke(app, ["demo", "--alpha", "2"])
    assert result.exit_code == 2
    assert "alpha must be in [0, 1], got 2.0" in result.output


def test_a_missing_matplotlib_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'no-plot .*pip install "sdcore\[plot\]"'):
        run_demo(replace(SMALL, output=tmp_path / "out"), Console(quiet=True))
    assert not (tmp_path / "out").exists()
