"""The benchmark of shared prefixes checks what it times, keeps its rows through JSON, and gets into the README."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import prefix, readme, report
from benchmarks.passes import save
from benchmarks.prefix import PrefixRow, case_table, load, main, markdown, measure_case, overview
from benchmarks.prefix_cases import (
    MODELS,
    STEP,
    STUDENT,
    TEACHER,
    TEACHER_EACH,
    WORKS,
    Case,
    Contender,
    Outcome,
    Setup,
    Step,
    cases,
    contenders,
    make_setup,
)
from sdcore.prefix import ModelSizes, cost_of_sizes

TINY = Case(model="quick", prompt=48, completion=8, completions=3, context=12)
NAIVE = contenders(TINY)[0]


@pytest.fixture(scope="module")
def quick_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that `python -m benchmarks.prefix --quick` writes."""
    output = tmp_path_factory.mktemp("benchmark") / "quick.json"
    main(["--quick", "--device", "cpu", f"--output={output}"])
    return output


def test_a_quick_run_times_every_row_of_every_kind_of_pass(quick_json: Path) -> None:
    found = load(quick_json).by_case()
    assert {case.work for case in found} == set(WORKS)
    for case, rows in found.items():
        assert [row.contender for row in rows] == [contender.name for contender in contenders(case)]
        assert [row.reason for row in rows] == [None] * len(rows)
        assert all(row.seconds for row in rows)


def test_what_a_quick_run_timed_was_equal_to_naive(quick_json: Path) -> None:
    for row in load(quick_json).rows:
        if row.contender == "naive batch":
            continue
        most = {"fp32": 1e-5, "bf16": 0.05}[row.group.dtype]
        assert row.values_error < most
        assert row.gradient_error < most or row.group.work in (TEACHER, TEACHER_EACH)


def test_a_quick_run_counts_the_bytes_of_every_pass(quick_json: Path) -> None:
    for row in load(quick_json).rows:
        assert row.live_bytes is not None
        assert row.live_bytes > row.gradient_bytes
        assert (row.gradient_bytes > 0) == (row.group.work in (STUDENT, STEP))


def test_a_report_survives_being_saved(quick_json: Path, tmp_path: Path) -> None:
    found = load(quick_json)
    save(found, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == quick_json.read_text()
    assert quick_json.with_suffix(".md").read_text() == markdown(found)
    assert quick_json.with_suffix(".png").stat().st_size > 0


def _changed(change: Callable[[Outcome], Outcome]) -> Contender:
    def build(setup: Setup) -> Step:
        step = NAIVE.build(setup)
        return lambda: change(step())

    return replace(NAIVE, name="changed", build=build)


def _one_gradient(outcome: Outcome, factor: float) -> Outcome:
    name = next(name for name in outcome.gradients if "q_proj" in name)
    return outcome._replace(gradients=outcome.gradients | {name: factor * outcome.gradients[name]})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda outcome: outcome._replace(values=1.01 * outcome.values), "differs from naive by 1.0e-02"),
        (lambda outcome: outcome._replace(values=math.nan * outcome.values), "differs from naive by nan"),
        (lambda outcome: _one_gradient(outcome, 2.0), "gradients differ from naive's by"),
        (lambda outcome: _one_gradient(outcome, math.nan), "gradients differ from naive's by inf"),
        (lambda outcome: outcome._replace(gradients={}), "gradients differ from naive's by inf"),
    ],
    ids=["states", "states not finite", "one gradient", "gradient not finite", "no gradients"],
)
def test_a_contender_that_computes_something_else_is_not_timed(
    change: Callable[[Outcome], Outcome], reason: str
) -> None:
    rows = measure_case(make_setup(TINY), [NAIVE, _changed(change), NAIVE], seconds_per_row=0.0)
    assert rows[1].reason is not None
    assert rows[1].reason.startswith(reason)
    assert not rows[1].seconds
    assert rows[0].seconds
    assert rows[2].seconds
    assert f"changed: not timed, {rows[1].reason}" in case_table(TINY, rows).notes


def test_a_contender_that_fails_gets_its_error_as_the_reason() -> None:
    def build(setup: Setup) -> Step:
        raise RuntimeError("out of luck\nsecond line")

    rows = measure_case(make_setup(TINY), [replace(NAIVE, build=build), NAIVE], seconds_per_row=0.0)
    assert rows[0].reason == "RuntimeError: out of luck"
    assert rows[1].reason is None


def test_what_would_not_fit_the_memory_keeps_its_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = make_setup(TINY)
    kept = {one.name: setup.cost(one).student.kept_bytes for one in contenders(TINY)}
    monkeypatch.setattr(prefix, "_free_bytes", lambda device: (kept["naive batch"] - 1) / prefix.MOST_OF_FREE)
    rows = {row.contender: row for row in measure_case(setup, contenders(TINY), seconds_per_row=0.0)}
    assert "GiB for backward" in str(rows["naive batch"].reason)
    assert rows["packed"].reason is None
    assert rows["packed"].gradient_error < 1e-5  # of the naive loop, which is the reference then


def _row(contender: str, seconds: float, **fields: object) -> PrefixRow:
    return PrefixRow(group=TINY, contender=contender, seconds=[seconds] * 3, **fields)  # type: ignore[arg-type]


def test_speed_and_memory_are_relative_to_the_naive_batch_and_to_the_loop_where_it_did_not_fit() -> None:
    batch = _row("naive batch", 6.0, allowed=1.0, live_bytes=1000)
    loop = _row("naive loop", 9.0, allowed=1.0, live_bytes=200)
    packed = _row("packed", 2.0, allowed=4.0, live_bytes=100)
    table = case_table(TINY, [batch, loop, packed])
    assert table.rows[2][4:7] == ["3.00×", "4.00×", "75%"]
    assert table.rows[2][8] == "0.10"
    batch.reason, batch.seconds = "too large", []
    table = case_table(TINY, [batch, loop, packed])
    assert table.rows[1][4:7] == ["4.50×", "4.00×", "112%"]
    assert table.rows[1][8] == "0.50"
    shown = overview(STUDENT, prefix.PrefixReport(machine={}, rows=[batch, loop, packed]))
    assert shown.rows[1] == ["packed", "4.50 (112%)"]
    assert shown.rows[-1] == ["naive, seconds", "9.00"]


@pytest.mark.parametrize("work", [TEACHER, TEACHER_EACH])
def test_the_allowed_speedup_is_that_of_the_cost_model(work: str) -> None:
    case = Case(model="quick", prompt=200, completion=16, completions=4, context=40, work=work)
    size = MODELS["quick"]
    setup = make_setup(case)
    for contender in contenders(case)[1:]:
        counted = cost_of_sizes(
            ModelSizes.dense(
                layers=size.layers,
                hidden=size.hidden,
                intermediate=size.intermediate,
                heads=size.heads,
                kv_heads=size.kv_heads,
                vocab=size.vocab,
            ),
            prompt_tokens=200,
            context_tokens=40,
            completion_tokens=16,
            completions=4,
            tail_tokens=16,
            context_per_completion=work == TEACHER_EACH,
            teacher_shares="live" in contender.name,
        )
        assert counted.teacher is not None
        # Random contexts may begin with an equal token.
        assert setup.allowed_speedup(contender) == pytest.approx(counted.teacher.speedup, rel=0.02)
    assert setup.allowed_speedup(contenders(case)[0]) == 1.0


def test_a_run_on_a_cpu_covers_what_was_promised_and_everything_the_grid() -> None:
    sizes = {(case.prompt, case.completion, case.completions, case.context) for case in cases("cpu")}
    assert {(512, 128, 8, 256), (2048, 64, 8, 256), (512, 128, 1, 256)} == sizes
    grid = {(case.prompt, case.completion, case.completions, case.work) for case in cases("cpu", everything=True)}
    assert {entry[0] for entry in grid} == {512, 2048, 8192}
    assert {entry[1] for entry in grid} == {64, 128, 512}
    assert {entry[2] for entry in grid} == {1, 4, 8}
    assert len(grid) == 9 * (2 + 3 + 3)
    assert {case.dtype for case in cases("cuda")} == {"bf16"}


def test_setups_are_seeded_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = make_setup(TINY), make_setup(TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.plan.target_ids, second.plan.target_ids)
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_readme_shows_the_newest_committed_results_of_shared_prefixes() -> None:
    text = readme.README.read_text()
    assert text == readme.with_prefix_block(text), "run `python -m benchmarks --readme`"


def test_the_block_takes_the_newest_file_of_a_device_and_the_other_suite_takes_none(
    quick_json: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "results" / "some-device" / "prefix"
    folder.mkdir(parents=True)
    empty = f"{readme.PREFIX_BEGIN}\n{readme.PREFIX_END}"
    assert readme.NO_PREFIX in readme.with_prefix_block(empty, tmp_path / "results", tmp_path)
    for date in ("2026-01-02", "2026-01-10"):
        stored = json.loads(quick_json.read_text())
        stored["machine"]["date"] = date
        (folder / f"{date}.json").write_text(json.dumps(stored))
    (folder / "2026-01-10.png").touch()
    text = readme.with_prefix_block(f"before {empty} after", tmp_path / "results", tmp_path)
    assert "(results/some-device/prefix/2026-01-10.json)" in text
    assert "(results/some-device/prefix/2026-01-10.png)" in text
    assert "2026-01-02" not in text
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert readme.with_prefix_block(text, tmp_path / "results", tmp_path) == text
    assert report.newest_results(tmp_path / "results") == []


def test_a_readme_without_these_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="<!-- prefix results -->"):
        readme.with_prefix_block(f"{readme.BEGIN}\n{readme.END}")
