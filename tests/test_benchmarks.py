"""The benchmark suite runs, checks what it times, keeps its rows through JSON, and the README shows the newest."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import readme
from benchmarks.measure import SpeedRow, measure_group, repetitions
from benchmarks.oracle import solve
from benchmarks.peers import PLAIN, SDCORE, Contender, plain_loss, skipped
from benchmarks.report import load, save
from benchmarks.shapes import QUICK_SHAPE, REVERSE_KL, TOP_K, CaseInputs, Divergence, Group, make_case_inputs
from benchmarks.tables import markdown, ratio_table, speed_table

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def quick_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that `python -m benchmarks --quick` writes."""
    output = tmp_path_factory.mktemp("benchmark") / "quick.json"
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([*command, f"--output={output}"], cwd=ROOT, env=environment, check=True, capture_output=True)
    return output


def test_a_quick_run_has_every_row_and_a_reason_for_each_that_is_not_timed(quick_json: Path) -> None:
    report = load(quick_json)
    groups = {row.group for row in report.speed}
    assert len(groups) == 4
    for group in groups:
        rows = {row.contender: row for row in report.speed if row.group == group}
        assert {"sdcore", "sdcore, recompute", "plain torch", "torch.compile", "four matmuls fp32"} <= set(rows)
        assert {"TRL chunked", "Liger chunked", "Liger FusedLinearJSD", "orda-kernel"} <= set(rows)
        for name in ("sdcore", "sdcore, recompute", "plain torch"):
            assert rows[name].reason is None
        for row in rows.values():
            assert bool(row.seconds) == (row.reason is None)


def test_what_a_quick_run_timed_was_equal_to_the_oracle(quick_json: Path) -> None:
    rows = [row for row in load(quick_json).speed if row.seconds and not row.contender.startswith("four matmuls")]
    assert rows
    for row in rows:
        assert row.errors is not None
        assert row.errors.gradient < {"fp32": 1e-5, "bf16": 0.05}[row.group.dtype]


def test_a_quick_run_counts_memory_and_errors_of_both_of_our_paths(quick_json: Path) -> None:
    report = load(quick_json)
    for name in ("sdcore", "sdcore, recompute"):
        memory = [row for row in report.memory if row.contender == name]
        assert len(memory) == 4
        assert all(row.live_bytes and row.live_bytes >= row.gradient_bytes > 0 for row in memory)
        errors = [row.errors for row in report.accuracy if row.contender == name]
        assert len(errors) == 18  # 3 noises, 6 divergences
        assert all(error is not None and math.isfinite(error.gradient) for error in errors)


def test_a_report_survives_being_saved(quick_json: Path, tmp_path: Path) -> None:
    report = load(quick_json)
    save(report, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == quick_json.read_text()
    assert (quick_json.with_suffix(".md")).read_text() == markdown(report)
    assert {path.name for path in quick_json.parent.glob("*.png")} == {
        f"quick-{name}.png" for name in ("speed", "memory", "accuracy")
    }


def _wrong(name: str, factor: float) -> Contender:
    def build(inputs: CaseInputs, divergence: Divergence) -> Callable[[], torch.Tensor]:
        return lambda: factor * plain_loss(*inputs, divergence, upcast=True)

    return Contender(name, build)


def test_a_contender_that_computes_something_else_is_not_timed() -> None:
    inputs = make_case_inputs(QUICK_SHAPE, "fp32", noise=1.0)
    exact = solve(inputs, (REVERSE_KL,))[REVERSE_KL]
    contenders = (_wrong("half", 0.5), _wrong("right", 1.0), skipped(PLAIN, "no reason"))
    speed, _ = measure_group(Group(QUICK_SHAPE, "fp32", REVERSE_KL), contenders, inputs, exact, seconds_per_row=0.0)
    half, right, left_out = speed[1:]
    assert half.reason is not None
    assert half.reason.startswith("loss off by 5.0e-01")
    assert not half.seconds
    assert right.reason is None
    assert right.seconds
    assert left_out.reason == "no reason"
    assert "half: not timed, loss off by 5.0e-01" in speed_table(speed).notes


def test_a_contender_that_fails_gets_its_error_as_the_reason() -> None:
    def build(inputs: CaseInputs, divergence: Divergence) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            raise RuntimeError("out of luck\nsecond line")

        return loss

    inputs = make_case_inputs(QUICK_SHAPE, "fp32", noise=1.0)
    exact = solve(inputs, (TOP_K,))[TOP_K]
    group = Group(QUICK_SHAPE, "fp32", TOP_K)
    speed, memory = measure_group(group, (Contender("broken", build), SDCORE), inputs, exact, seconds_per_row=0.0)
    assert speed[1].reason == memory[0].reason == "RuntimeError: out of luck"
    assert speed[2].reason is None


def test_fast_rows_are_repeated_more_often_and_slow_ones_at_least_twice() -> None:
    assert repetitions(0.5, 0.5, seconds_per_row=3.0) == 6
    assert repetitions(0.01, 0.01, seconds_per_row=3.0) == 15
    assert repetitions(5.0, 4.0, seconds_per_row=3.0) == 3
    assert repetitions(50.0, 4.0, seconds_per_row=3.0) == 2


def test_ratios_are_taken_to_the_faster_of_the_bare_products() -> None:
    group = Group(QUICK_SHAPE, "bf16", REVERSE_KL)
    rows = [
        SpeedRow(group=group, contender="four matmuls fp32", seconds=[2.0, 2.0, 9.0]),
        SpeedRow(group=group, contender="four matmuls bf16", seconds=[4.0]),
        SpeedRow(group=group, contender="sdcore", seconds=[3.0, 3.0]),
    ]
    assert ratio_table(QUICK_SHAPE, rows).rows[0] == ["sdcore", "1.50"]


def test_the_readme_shows_the_newest_committed_results() -> None:
    text = readme.README.read_text()
    assert text == readme.with_block(text), "run `python -m benchmarks --readme`"


def test_the_readme_block_takes_the_newest_file_of_a_device(quick_json: Path, tmp_path: Path) -> None:
    device = tmp_path / "results" / "some-device"
    device.mkdir(parents=True)
    empty = f"{readme.BEGIN}\n{readme.END}"
    assert readme.NOTHING in readme.with_block(empty, tmp_path / "results", tmp_path)
    for date in ("2026-01-02", "2026-01-10"):
        stored = json.loads(quick_json.read_text())
        stored["machine"]["date"] = date
        (device / f"{date}.json").write_text(json.dumps(stored))
    text = readme.with_block(f"before {empty} after", tmp_path / "results", tmp_path)
    assert "(results/some-device/2026-01-10.json)" in text
    assert "2026-01-02" not in text
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert readme.with_block(text, tmp_path / "results", tmp_path) == text


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="<!-- results -->"):
        readme.with_block("no markers")
