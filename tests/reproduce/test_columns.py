"""Tests the study of the columns that carry a gradient, on made up states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from reproduce import columns
from sdcore.bench.states import States


def some_states() -> States:
    generator = torch.Generator().manual_seed(0)
    student, noise, head = (torch.randn(n, 24, generator=generator) for n in (80, 80, 900))
    return States("made up", student.bfloat16(), (student + 0.3 * noise).bfloat16(), (head + 0.5 * head[0]).bfloat16())


def test_few_columns_carry_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "load", lambda name: some_states())
    monkeypatch.setattr(columns, "ROWS", 40)
    monkeypatch.setattr(columns, "CHUNKS", (0, 1))
    monkeypatch.setattr(columns, "RANKS", (0, 4, 24))
    threads, output = torch.get_num_threads(), tmp_path / "columns.json"
    app = columns.typer.Typer()
    app.command()(columns.main)
    result = CliRunner().invoke(app, ["--states", "made up", "--output", str(output)])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    (model,) = json.loads(output.read_text())["models"]
    assert (model["vocabulary"], model["width"], len(model["means"])) == (900, 24, 9)
    for row in model["means"]:
        assert 0 < row["kept"] < 1
        assert row["rank 0"] >= row["rank 4"] >= row["rank 24"]
        assert row["rank 24"] < 1e-5 < row["rank 0"]  # all directions there are
    kept = [row["kept"] for row in model["means"] if row["divergence"] == "JSD"]
    assert kept == sorted(kept)  # more of them, for less that is dropped
    assert result.output.count("| made up |") == 9
