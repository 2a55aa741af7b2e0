"""The benchmark of shared prefixes checks what it times, keeps its rows through JSON, and gets into the README."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdcore.bench import live_memory, prefix, readme
from sdcore.bench.estimate import model_bytes
from sdcore.bench.limit import LIMITS
from sdcore.bench.models import size_of
from sdcore.bench.options import Options
from sdcore.bench.passes import Outcome, Step, save
from sdcore.bench.places import checkout, newest_results
from sdcore.bench.prefix import PrefixRow, case_table, load, markdown, measure_case, overview
from sdcore.bench.prefix_cases import (
    STEP,
    STUDENT,
    TEACHER,
    TEACHER_EACH,
    WORKS,
    Case,
    Contender,
    Setup,
    cases,
    contenders,
    make_setup,
)
from sdcore.errors import ArgumentError
from sdcore.prefix import ModelSizes, cost_of_sizes

TINY = Case(model="quick", prompt=48, completion=8, completions=3, context=12)
NAIVE = contenders(TINY)[0]


@pytest.fixture(scope="module")
def quick_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that a quick run writes."""
    output = tmp_path_factory.mktemp("benchmark")
    return prefix.run(Options(suite="prefix", quick=True, device="cpu", output=output))


def test_a_quick_run_times_every_row_of_every_kind_of_pass(quick_json: Path) -> None:
    found = load(quick_json).by_case()
    assert {case.work for case in found} == set(WORKS)
    for case, rows in found.items():
        assert [row.contender for row in rows] == [*(contender.name for contender in contenders(case)), *LIMITS]
        assert [row.reason for row in rows] == [None] * len(rows)
        assert all(row.seconds for row in rows)


def test_what_a_quick_run_timed_was_equal_to_naive(quick_json: Path) -> None:
    for row in load(quick_json).rows:
        if row.contender in ("naive batch", *LIMITS):
            continue
        most = {"fp32": 1e-5, "bf16": 0.05}[row.group.dtype]
        assert row.values_error < most
        assert row.gradient_error < most or row.group.work in (TEACHER, TEACHER_EACH)


def test_a_quick_run_counts_the_bytes_of_every_pass(quick_json: Path) -> None:
    for row in load(quick_json).rows:
        if row.contender in LIMITS:
            continue
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
    needed = kept["naive batch"] + model_bytes(setup.body.config, "fp32", gradients=False)
    monkeypatch.setattr(prefix, "free_bytes", lambda device: (needed - 1) / live_memory.MOST_OF_FREE)
    rows = {row.contender: row for row in measure_case(setup, contenders(TINY), seconds_per_row=0.0)}
    assert str(rows["naive batch"].reason).startswith("not run: needs")
    assert rows["packed"].reason is None
    assert rows["packed"].gradient_error < 1e-5  # of the naive loop, which is the reference then


@pytest.mark.parametrize("work", WORKS)
def test_the_limit_of_a_pass_has_its_tokens_and_the_output_layer_in_a_whole_step_only(work: str) -> None:
    setup = make_setup(replace(TINY, work=work))
    limits = {row.contender: products for row, products in prefix.limit_rows(setup)}
    shared, naive = (limits[name] for name in LIMITS)
    sequences = TINY.completions * (TINY.prompt + TINY.completion - 1)
    assert naive.student_tokens == (sequences if work in (STUDENT, STEP) else 0)
    assert (naive.teacher_tokens > sequences) == (work != STUDENT)
    assert naive.rows == (TINY.completions * TINY.completion if work == STEP else 0)
    assert shared.flops < naive.flops


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
    size = size_of("quick")
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
    text = readme.readme_file().read_text(encoding="utf-8")
    root = readme.readme_file().parent
    again = readme.PREFIX.renewed(text, root / "benchmarks" / "results", root)
    assert text == again, "run `sdcore bench --readme`"


def test_every_committed_result_can_be_read() -> None:
    root = checkout()
    assert root is not None
    results = root / "benchmarks" / "results"
    for path in [*newest_results(results, "prefix"), *newest_results(results, "prefix/grid")]:
        assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(load(path))


def test_the_block_takes_the_newest_file_of_a_device_and_the_other_suite_takes_none(
    quick_json: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "results" / "some-device" / "prefix"
    folder.mkdir(parents=True)
    block = readme.PREFIX
    empty = f"{block.begin}\n{block.end}"
    assert "`sdcore bench prefix`" in block.renewed(empty, tmp_path / "results", tmp_path)
    for date in ("2026-01-02", "2026-01-10"):
        stored = json.loads(quick_json.read_text())
        stored["machine"]["date"] = date
        (folder / f"{date}.json").write_text(json.dumps(stored))
    (folder / "2026-01-10.png").touch()
    text = block.renewed(f"before {empty} after", tmp_path / "results", tmp_path)
    assert "(results/some-device/prefix/2026-01-10.json)" in text
    assert "(results/some-device/prefix/2026-01-10.png)" in text
    assert "2026-01-02" not in text
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert block.renewed(text, tmp_path / "results", tmp_path) == text
    assert newest_results(tmp_path / "results") == []


def test_a_readme_without_these_markers_is_refused() -> None:
    with pytest.raises(ArgumentError, match="<!-- prefix results -->"):
        readme.PREFIX.renewed(f"{readme.DIVERGENCE.begin}\n{readme.DIVERGENCE.end}", Path(), Path())


def test_a_model_or_a_shape_takes_the_place_of_the_suites_own() -> None:
    found = prefix.planned_cases(Options(suite="prefix", model="qwen3-0.6b", shapes=("L=2,G=3",)), "cpu")
    assert {case.work for case in found} == set(WORKS)
    assert {(case.model, case.prompt, case.completion, case.completions) for case in found} == {
        ("qwen3-0.6b, 2 layers", 512, 64, 3)
    }


def test_a_model_that_would_not_fit_the_memory_keeps_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prefix, "free_bytes", lambda device: 1e8)
    report = load(
        prefix.run(Options(suite="prefix", device="cpu", model="qwen3-30b-a3b", shapes=("L=1",), output=tmp_path))
    )
    assert {case.work for case in report.by_case()} == set(WORKS)
    assert all(str(row.reason).startswith("not run: needs") for row in report.rows)
