"""The benchmark of scaling checks every size before it times it, also where nothing but ours fits, and can be drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sdcore.bench import readme, running, scaling, scaling_cases
from sdcore.bench.compare import compare
from sdcore.bench.live_memory import MOST_OF_FREE
from sdcore.bench.options import SWEEPS, Options
from sdcore.bench.oracle import solve
from sdcore.bench.passes import Outcome, PassReport, Step, save
from sdcore.bench.places import checkout, newest_results
from sdcore.bench.scaling import ScalingReport, exponent, load, markdown, measure, overview, sweep_table, sweeps
from sdcore.bench.scaling_cases import (
    LIMIT,
    MOST_ROWS,
    OF_HEAD,
    Job,
    Point,
    ScalingRow,
    distinct_completions,
    distinct_rows,
    job,
    names,
    points,
)
from sdcore.bench.shapes import JSD, CaseInputs, Shape, make_case_inputs
from sdcore.cli import bench
from sdcore.errors import ArgumentError

ROWS = Point(sweep="N", sizes="N=512,V=300,H=16", dtype="fp32")
COMPLETIONS = Point(sweep="G", sizes="G=8,P=24,R=4", dtype="fp32", model="quick")


@pytest.fixture(scope="module")
def quick_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that a quick run writes."""
    output = tmp_path_factory.mktemp("benchmark")
    return scaling.run(Options(suite="scaling", quick=True, device="cpu", output=output))


@pytest.fixture
def this_run(tmp_path: Path) -> running.Run:
    options = Options(suite="scaling", quick=True, device="cpu", output=tmp_path)
    return running.start(options, seconds=0.0, progress=Console(quiet=True))


def test_a_quick_run_times_the_plain_way_ours_and_the_limit_at_every_size(quick_json: Path) -> None:
    found = load(quick_json).by_case()
    assert [point.sweep for point in found] == sorted((point.sweep for point in found), key=SWEEPS.index)
    assert {point.sweep for point in found} == set(SWEEPS)
    for point, rows in found.items():
        assert [row.contender for row in rows] == [*names(point), LIMIT]
        assert [row.reason for row in rows] == [None] * 3
        assert all(row.seconds for row in rows)


def test_what_a_quick_run_timed_was_right_and_its_bytes_were_counted(quick_json: Path) -> None:
    for row in load(quick_json).rows:
        if row.contender == LIMIT:
            continue
        assert row.values_error < 1e-5
        assert row.gradient_error < 1e-5
        assert row.live_bytes is not None
        assert row.live_bytes >= row.gradient_bytes > 0
        assert row.needed_bytes > 0


def test_a_quick_run_has_sizes_that_repeat_rows_and_completions(quick_json: Path) -> None:
    sizes = {(point.sweep, point.size) for point in load(quick_json).by_case()}
    assert any(sweep == "N" and distinct_rows(size) < size for sweep, size in sizes)
    assert any(sweep == "G" and distinct_completions(size) < size for sweep, size in sizes)


def test_the_right_answer_of_repeated_rows_is_that_of_all_of_them() -> None:
    found = job(ROWS, "cpu")
    few = make_case_inputs(Shape(MOST_ROWS, 300, 16), "fp32", noise=1.0)
    hidden = few.student_hidden.detach().repeat(2, 1).requires_grad_()
    exact = solve(CaseInputs(hidden, few.student_weight, few.teacher_hidden.repeat(2, 1)), (JSD,))[JSD]
    torch.testing.assert_close(found.exact.values, exact.loss)
    torch.testing.assert_close(found.exact.gradients["hidden"], exact.hidden_gradient)
    torch.testing.assert_close(found.exact.gradients["weight"], exact.weight_gradient)


def test_the_right_answer_of_repeated_completions_is_that_of_all_of_them() -> None:
    found = job(COMPLETIONS, "cpu")
    naive = found.candidates[0].build()()
    assert len(naive.values) == 8 * 4
    torch.testing.assert_close(found.exact.values, naive.values)
    for name, gradient in naive.gradients.items():
        torch.testing.assert_close(found.exact.gradients[name], gradient, rtol=1e-4, atol=1e-5)


def _with(change: Callable[[Outcome], Outcome], point: Point, device: str) -> Job:
    found = job(point, device)

    def build(whole: Callable[[], Step]) -> Step:
        step = whole()
        return lambda: change(step())

    return found._replace(candidates=[one._replace(build=partial(build, one.build)) for one in found.candidates])


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
    point: Point,
    change: Callable[[Outcome], Outcome],
    reason: str,
    this_run: running.Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaling, "job", partial(_with, change))
    plain, ours, limit = measure(this_run, point)
    for row in (plain, ours):
        assert str(row.reason).startswith(reason)
        assert not row.seconds
    assert limit.reason is not None


def _twice(outcome: Outcome, ending: str) -> Outcome:
    (name,) = (name for name in outcome.gradients if name.endswith(ending))
    return outcome._replace(gradients=outcome.gradients | {name: 2 * outcome.gradients[name]})


@pytest.mark.parametrize("point", [ROWS, COMPLETIONS], ids=["rows", "completions"])
def test_where_the_plain_way_does_not_fit_ours_goes_on_and_is_checked(
    point: Point, this_run: running.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = (one.needed for one in job(point, "cpu").candidates)
    assert ours < plain
    monkeypatch.setattr(scaling, "resident_bytes", lambda point: 0.0)
    monkeypatch.setattr(scaling, "free_bytes", lambda device: (plain - 1) / MOST_OF_FREE)
    rows = measure(this_run, point)
    assert str(rows[0].reason).startswith("not run: needs")
    assert rows[0].needed_bytes == plain
    assert rows[1].reason is None
    assert rows[1].seconds
    assert rows[1].gradient_error < 1e-5
    assert rows[2].seconds
    table = sweep_table({point: rows})
    assert table.rows[0][1] == "–"
    assert any("not run: needs" in note for note in table.notes)


def test_a_point_whose_inputs_do_not_fit_keeps_its_rows(this_run: running.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "free_bytes", lambda device: 1e5)
    for point in (ROWS, COMPLETIONS):
        rows = measure(this_run, point)
        assert [row.contender for row in rows] == [*names(point), LIMIT]
        assert all(str(row.reason).startswith("not run: needs") for row in rows)


@pytest.mark.parametrize(("asked", "once"), [(None, True), (1e-6, False)], ids=["default", "asked"])
def test_a_row_that_takes_seconds_is_timed_once_unless_asked_otherwise(
    asked: float | None, once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_cases, "LARGE_ENTRIES", 512 * 300)
    options = Options(suite="scaling", device="cpu", output=tmp_path, seconds=asked)
    rows = measure(running.start(options, seconds=1.0, progress=Console(quiet=True)), ROWS)
    assert ROWS.is_large
    assert all((len(row.seconds) == 1) == once for row in rows)


def test_a_report_survives_being_saved_and_is_drawn(quick_json: Path, tmp_path: Path) -> None:
    found = load(quick_json)
    save(found, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == quick_json.read_text()
    assert quick_json.with_suffix(".md").read_text() == markdown(found)
    assert quick_json.with_suffix(".png").stat().st_size > 0
    assert found.machine["free_bytes"] > 0


def _row(size: int, contender: str, seconds: float, mib: int, **fields: object) -> ScalingRow:
    point = Point(sweep="N", sizes=f"N={size},V=100,H=8", dtype="fp32")
    return ScalingRow(
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
    report: ScalingReport = PassReport(machine={}, rows=list(reversed(rows)))
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
        assert count % distinct_rows(count) == 0
        assert distinct_rows(count) <= MOST_ROWS
        assert count % distinct_completions(count) == 0
    assert distinct_rows(256) == 256
    assert distinct_rows(1000) == 250
    assert [distinct_completions(count) for count in (1, 2, 3, 4, 5, 8)] == [1, 2, 3, 2, 1, 2]


def test_the_sweeps_of_the_output_layer_need_no_transformers(run_python: Callable[..., str]) -> None:
    code = """
import sys
from pathlib import Path
sys.modules |= dict.fromkeys(["typer", "transformers", "trl", "liger_kernel", "matplotlib"])
from sdcore.bench.scaling import run
from sdcore.bench.options import Options
print(run(Options(suite="scaling", quick=True, device="cpu", threads=1, output=Path("."), peers=("N", "V"))))
"""
    assert run_python(code).strip().endswith(".json")


def test_two_results_can_be_compared(quick_json: Path) -> None:
    found = compare(quick_json, quick_json)
    assert found.rows
    assert all(row.ratio == 1 for row in found.rows)
    assert ("N N=8,V=500,H=32 fp32", "sdcore") in {(row.key.case.strip(), row.key.contender) for row in found.rows}


def test_the_sweeps_in_the_help_are_those_of_the_suite() -> None:
    assert bench.SWEEPS == SWEEPS
    assert set(OF_HEAD) < set(SWEEPS)


def test_the_block_takes_the_newest_file_of_a_device(quick_json: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "some-device" / "scaling"
    folder.mkdir(parents=True)
    block = readme.SCALING
    empty = f"{block.begin}\n{block.end}"
    assert "`sdcore bench scaling`" in block.renewed(empty, tmp_path / "results", tmp_path)
    for date in ("2026-01-02", "2026-01-10"):
        stored = json.loads(quick_json.read_text())
        (folder / f"{date}.json").write_text(json.dumps(stored))
    (folder / "2026-01-10.png").touch()
    text = block.renewed(empty, tmp_path / "results", tmp_path)
    assert "(results/some-device/scaling/2026-01-10.json)" in text
    assert "(results/some-device/scaling/2026-01-10.png)" in text
    assert "2026-01-02" not in text
    assert block.renewed(text, tmp_path / "results", tmp_path) == text


def test_the_readme_shows_the_newest_committed_results_of_scaling() -> None:
    text = readme.readme_file().read_text(encoding="utf-8")
    root = readme.readme_file().parent
    again = readme.SCALING.renewed(text, root / "benchmarks" / "results", root)
    assert text == again, "run `sdcore bench --readme`"


def test_every_committed_result_can_be_read() -> None:
    root = checkout()
    assert root is not None
    for path in newest_results(root / "benchmarks" / "results", "scaling"):
        assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(load(path))
