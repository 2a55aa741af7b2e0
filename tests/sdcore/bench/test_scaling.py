"""The benchmark of scaling checks every size before it times it, also where nothing but ours fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sdcore.bench import passes
from sdcore.bench.compare import compare
from sdcore.bench.measure import MOST_OF_FREE
from sdcore.bench.options import SWEEPS, Options
from sdcore.bench.oracle import solve
from sdcore.bench.rows import Outcome, PassReport, PassRow, Step
from sdcore.bench.shapes import JSD, CaseInputs, Shape, make_case_inputs
from sdcore.bench.suite import Run, start
from sdcore.bench.suites import points as of_points
from sdcore.bench.suites.points import LIMIT, Point, job, names, points
from sdcore.bench.suites.scaling import SUITE, exponent, overview, sweep_table, sweeps
from sdcore.cli import bench
from sdcore.errors import ArgumentError

ROWS = Point(sweep="N", sizes="N=512,V=300,H=16", dtype="fp32")
COMPLETIONS = Point(sweep="G", sizes="G=8,P=24,R=4", dtype="fp32", model="quick")
QuickJson = Callable[[str], Path]


@pytest.fixture
def this_run(tmp_path: Path) -> Run:
    options = Options(suite="scaling", quick=True, device="cpu", output=tmp_path)
    return start(options, seconds=0.0, progress=Console(quiet=True))


def test_a_quick_run_times_the_plain_way_ours_and_the_limit_at_every_size(quick_json: QuickJson) -> None:
    report = SUITE.load(quick_json("scaling"))
    found = report.by_case()
    assert report.machine["free_bytes"] > 0
    assert [point.sweep for point in found] == sorted((point.sweep for point in found), key=SWEEPS.index)
    assert {point.sweep for point in found} == set(SWEEPS)
    for point, rows in found.items():
        assert [row.contender for row in rows] == [*names(point), LIMIT]
        assert [row.reason for row in rows] == [None] * 3
        assert all(row.seconds for row in rows)


def test_what_a_quick_run_timed_was_right_and_its_bytes_were_counted(quick_json: QuickJson) -> None:
    for row in SUITE.load(quick_json("scaling")).rows:
        if row.contender == LIMIT:
            continue
        assert row.values_error < 1e-5
        assert row.gradient_error < 1e-5
        assert row.live_bytes is not None
        assert row.live_bytes >= row.gradient_bytes > 0
        assert row.needed_bytes > 0


def test_a_quick_run_has_sizes_that_repeat_rows_and_completions(quick_json: QuickJson) -> None:
    sizes = {(point.sweep, point.size) for point in SUITE.load(quick_json("scaling")).by_case()}
    assert any(sweep == "N" and of_points.distinct_rows(size) < size for sweep, size in sizes)
    assert any(sweep == "G" and of_points.distinct_completions(size) < size for sweep, size in sizes)


def test_the_right_answer_of_repeated_rows_is_that_of_all_of_them() -> None:
    found = job(ROWS, "cpu")
    few = make_case_inputs(Shape(of_points.MOST_ROWS, 300, 16), "fp32", noise=1.0)
    hidden = few.student_hidden.detach().repeat(2, 1).requires_grad_()
    exact = solve(CaseInputs(hidden, few.student_weight, few.teacher_hidden.repeat(2, 1)), (JSD,))[JSD]
    torch.testing.assert_close(found.exact.values, exact.values)
    torch.testing.assert_close(found.exact.gradients["hidden"], exact.gradients["hidden"])
    torch.testing.assert_close(found.exact.gradients["weight"], exact.gradients["weight"])


def test_the_right_answer_of_repeated_completions_is_that_of_all_of_them() -> None:
    found = job(COMPLETIONS, "cpu")
    naive = found.builds[names(COMPLETIONS)[0]]()()
    assert len(naive.values) == 8 * 4
    torch.testing.assert_close(found.exact.values, naive.values)
    for name, gradient in naive.gradients.items():
        torch.testing.assert_close(found.exact.gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("point", "change", "reason"),
    [
        (ROWS, lambda outcome: outcome._replace(values=1.01 * outcome.values), "loss off by 1.0e-02"),
        (ROWS, lambda outcome: _twice(outcome, "hidden"), "gradient off by 1.0e+00"),
        (ROWS, lambda outcome: _twice(outcome, "weight"), "gradient off by 1.0e+00"),
        (COMPLETIONS, lambda outcome: outcome._replace(values=1.01 * outcome.values), "states off by 1.0e-02"),
        (COMPLETIONS, lambda outcome: _twice(outcome, "layers.0.self_attn.q_proj.weight"), "gradients off by"),
    ],
    ids=["loss", "gradient of the states", "gradient of the head", "states", "gradient of a layer"],
)
def test_a_contender_that_computes_something_else_is_not_timed(
    point: Point, change: Callable[[Outcome], Outcome], reason: str, this_run: Run
) -> None:
    def changed(whole: Callable[[], Step]) -> Callable[[], Step]:
        def build() -> Step:
            step = whole()
            return lambda: change(step())

        return build

    def setup(point: Point, device: str) -> of_points.Job:
        right = job(point, device)
        return replace(right, builds={name: changed(build) for name, build in right.builds.items()})

    plain, ours, limit = replace(SUITE, setup=setup).measure_one(this_run, point)
    for row in (plain, ours):
        assert str(row.reason).startswith(reason)
        assert not row.seconds
    assert limit.reason is not None


def _twice(outcome: Outcome, ending: str) -> Outcome:
    (name,) = (name for name in outcome.gradients if name.endswith(ending))
    return outcome._replace(gradients=outcome.gradients | {name: 2 * outcome.gradients[name]})


@pytest.mark.parametrize("point", [ROWS, COMPLETIONS], ids=["rows", "completions"])
def test_where_the_plain_way_does_not_fit_ours_goes_on_and_is_checked(
    point: Point, this_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = job(point, "cpu").needed.values()
    assert ours < plain
    monkeypatch.setattr(passes, "free_bytes", lambda device: (plain - 1) / MOST_OF_FREE)
    rows = replace(SUITE, resident_bytes=lambda point: 0.0).measure_one(this_run, point)
    assert str(rows[0].reason).startswith("not run: needs")
    assert rows[0].needed_bytes == plain
    assert rows[1].reason is None
    assert rows[1].seconds
    assert rows[1].gradient_error < 1e-5
    assert rows[2].seconds
    table = sweep_table({point: rows})
    assert table.rows[0][1] == "–"
    assert any("not run: needs" in note for note in table.notes)


def test_a_point_whose_inputs_do_not_fit_keeps_its_rows(this_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "free_bytes", lambda device: 1e5)
    for point in (ROWS, COMPLETIONS):
        rows = SUITE.measure_one(this_run, point)
        assert [row.contender for row in rows] == [*names(point), LIMIT]
        assert all(str(row.reason).startswith("not run: needs") for row in rows)


@pytest.mark.parametrize(("asked", "once"), [(None, True), (1e-6, False)], ids=["default", "asked"])
def test_a_row_that_takes_seconds_is_timed_once_unless_asked_otherwise(
    asked: float | None, once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_points, "LARGE_ENTRIES", 512 * 300)
    options = Options(suite="scaling", device="cpu", output=tmp_path, seconds=asked)
    rows = SUITE.measure_one(start(options, seconds=1.0, progress=Console(quiet=True)), ROWS)
    assert ROWS.is_large
    assert all((len(row.seconds) == 1) == once for row in rows)


def _row(size: int, contender: str, seconds: float, mib: int, **fields: object) -> PassRow:
    point = Point(sweep="N", sizes=f"N={size},V=100,H=8", dtype="fp32")
    return PassRow(
        group=point,
        contender=contender,
        seconds=[seconds] if seconds else [],
        live_bytes=mib << 20,
        **fields,  # type: ignore[arg-type]
    )


def test_the_growth_of_each_contender_is_its_exponent_over_the_larger_half() -> None:
    assert exponent([(1, 9.0), (2, 9.0), (4, 16.0), (8, 64.0)]) == pytest.approx(2.0)
    assert math.isnan(exponent([(4, 1.0)]))
    rows = []
    for size in (100, 200, 400):
        rows.append(_row(size, "plain torch", size / 10 if size < 400 else 0, size, needed_bytes=1e9))
        rows += [_row(size, "sdcore", size / 20, 7), _row(size, LIMIT, size / 40, 0)]
    report = PassReport(machine={}, rows=list(reversed(rows)))
    (sweep,) = sweeps(report)
    assert [point.size for point in sweep] == [100, 200, 400]
    (line,) = overview(report).rows
    assert line[2:] == ["1.00", "1.00", "1.00", "1.00", "0.00", "200", "400"]
    assert sweep_table(sweep).rows[1][1:7] == ["20", "10", "5", "2×", "2×", "200"]


def test_a_run_on_a_cpu_covers_what_was_promised_and_everything_goes_further() -> None:
    own = points(Options(suite="scaling"), "cpu")
    spans = {
        sweep: (min(p.size for p in own if p.sweep == sweep), max(p.size for p in own if p.sweep == sweep))
        for sweep in SWEEPS
    }
    assert spans == {"N": (128, 16384), "V": (8192, 262144), "G": (1, 512), "P": (256, 8192)}
    assert {point.dtype for point in own} == {"fp32"}
    all_of_them = points(Options(suite="scaling", everything=True), "cpu")
    assert Options(suite="scaling", everything=True).variant != Options(suite="scaling").variant == ""
    assert set(own) < set(all_of_them)
    assert {point.dtype for point in all_of_them} == {"fp32", "bf16"}
    assert {point.dtype for point in points(Options(suite="scaling"), "cuda")} == {"bf16"}


def test_a_shape_and_a_model_say_what_does_not_vary() -> None:
    found = points(
        Options(suite="scaling", model="qwen3-0.6b", shapes=("L=2,N=64,R=16",), peers=("N", "V", "G"), dtype="bf16"),
        "cpu",
    )
    fixed = {point.sweep: point.fixed for point in found}
    assert fixed == {
        "N": "V=151936 H=1024 bf16",
        "V": "N=64 H=1024 bf16",
        "G": "P=512 R=16 bf16, qwen3-0.6b, 2 layers",
    }
    with pytest.raises(ArgumentError, match="one shape"):
        Options(suite="scaling", shapes=("N=1", "V=2"))


def test_the_distinct_ones_repeat_a_whole_number_of_times() -> None:
    for count in (1, 3, 8, 96, 256, 257, 384, 1000):
        assert count % of_points.distinct_rows(count) == 0
        assert of_points.distinct_rows(count) <= of_points.MOST_ROWS
        assert count % of_points.distinct_completions(count) == 0
    assert of_points.distinct_rows(256) == 256
    assert of_points.distinct_rows(1000) == 250
    assert [of_points.distinct_completions(count) for count in (1, 2, 3, 4, 5, 8)] == [1, 2, 3, 2, 1, 2]


def test_the_sweeps_of_the_output_layer_need_no_transformers(run_python: Callable[..., str]) -> None:
    code = """
import sys
from pathlib import Path
sys.modules |= dict.fromkeys(["typer", "transformers", "trl", "liger_kernel", "matplotlib"])
from sdcore.bench.suite import run
from sdcore.bench.suites.points import LIMIT, Point, job, names, points
from sdcore.bench.suites.scaling import SUITE
from sdcore.bench.options import Options
print(run(SUITE, Options(suite="scaling", quick=True, device="cpu", threads=1, output=Path("."), peers=("N", "V"))))
"""
    assert run_python(code).strip().endswith(".json")


def test_two_results_can_be_compared(quick_json: QuickJson) -> None:
    found = compare(quick_json("scaling"), quick_json("scaling"))
    assert found.rows
    assert all(row.ratio == 1 for row in found.rows)
    assert ("N N=8,V=500,H=32 fp32", "sdcore") in {(row.key.case.strip(), row.key.contender) for row in found.rows}


def test_the_sweeps_in_the_help_are_those_of_the_suite() -> None:
    assert bench.SWEEPS == SWEEPS
    assert set(of_points.OF_HEAD) < set(SWEEPS)
