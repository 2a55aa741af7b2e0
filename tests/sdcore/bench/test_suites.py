"""What all suites promise: they time what was checked, keep every row with its reason, on disk and in the documents."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdcore.bench import passes, peers, readme
from sdcore.bench.limit import LIMITS
from sdcore.bench.options import SUITES, Options, checkout, newest_results
from sdcore.bench.rows import Outcome, Step
from sdcore.bench.suite import markdown, run
from sdcore.bench.suites import prefix, step, suite_named, trainer, trees
from sdcore.errors import ArgumentError

ROOT = checkout()
assert ROOT is not None
RESULTS = ROOT / "benchmarks" / "results"
QuickJson = Callable[[str], Path]
# Suites of whole passes that compare contenders with the first of them.
COMPARED = ("prefix", "step", "trainer", "trees")
FOLDERS = [(name, "" if name == "divergence" else name) for name in SUITES] + [("prefix", "prefix/grid")]


@pytest.fixture(autouse=True)
def with_trl(request: pytest.FixtureRequest) -> None:
    if {"step", "trainer"} & set(request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()):
        pytest.importorskip("trl")


def tiny(name: str) -> Any:
    """The first case of a quick run."""
    return suite_named(name).cases(Options(suite=name, quick=True), "cpu")[0]


@pytest.mark.parametrize("name", COMPARED)
def test_a_quick_run_times_every_row_of_every_case(name: str, quick_json: QuickJson) -> None:
    suite = suite_named(name)
    cases = suite.load(quick_json(name)).by_case()
    assert list(cases) == suite.cases(Options(suite=name, quick=True), "cpu")
    for case, rows in cases.items():
        assert [row.contender for row in rows] == [*(one.name for one in suite.contenders(case)), *LIMITS]
        assert [row.reason for row in rows] == [None] * len(rows)
        assert all(row.seconds for row in rows)


@pytest.mark.parametrize("name", COMPARED)
def test_what_a_quick_run_timed_was_equal_to_the_first_and_its_bytes_were_counted(
    name: str, quick_json: QuickJson
) -> None:
    suite = suite_named(name)
    for case, rows in suite.load(quick_json(name)).by_case().items():
        most = {"fp32": 1e-5, "bf16": 0.05}[case.dtype]
        teacher = case.work in (prefix.TEACHER, prefix.TEACHER_EACH, trees.VIEWS)
        for row in [row for row in rows if row.contender not in LIMITS]:
            assert row.live_bytes is not None
            assert row.live_bytes > row.gradient_bytes
            assert (row.gradient_bytes > 0) != teacher
            if row is not rows[0]:
                assert row.values_error < most
                assert row.gradient_error < most or teacher


@pytest.mark.parametrize("name", SUITES)
def test_a_report_survives_being_saved(name: str, quick_json: QuickJson, tmp_path: Path) -> None:
    suite, path = suite_named(name), quick_json(name)
    report = suite.load(path)
    suite.save(report, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert path.with_suffix(".md").read_text() == markdown(suite, report)
    pictures = ["-accuracy", "-memory", "-speed"] if name == "divergence" else [""]
    assert sorted(path.parent.glob("*.png")) == [path.with_name(f"{path.stem}{one}.png") for one in pictures]
    assert all(picture.stat().st_size > 0 for picture in path.parent.glob("*.png"))


@pytest.mark.parametrize(("name", "folder"), FOLDERS)
def test_every_committed_result_can_be_read(name: str, folder: str) -> None:
    newest = newest_results(RESULTS, folder)
    assert newest
    suite = suite_named(name)
    for path in newest:
        assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(suite, suite.load(path))


def test_the_documents_show_the_newest_committed_results() -> None:
    for page, renewed in readme.pages().items():
        assert page.read_text(encoding="utf-8") == renewed, "run `sdcore bench --readme`"


@pytest.mark.parametrize("block", readme.BLOCKS[: len(SUITES)], ids=lambda block: block.suite)
def test_a_block_takes_the_newest_file_of_a_device_and_the_other_suites_take_none(
    block: readme.Block, quick_json: QuickJson, tmp_path: Path
) -> None:
    name, results = block.suite, tmp_path / "results"
    folder = results / "some-device" / ("" if name == "divergence" else name)
    folder.mkdir(parents=True)
    empty = f"before {block.marks[0]}\n{block.marks[1]} after"
    assert f"No results are committed yet; `sdcore bench {name}`" in block.renewed(empty, results, tmp_path)
    for date in ("2026-01-02", "2026-01-10"):
        stored = json.loads(quick_json(name).read_text())
        stored["machine"]["date"] = date
        (folder / f"{date}.json").write_text(json.dumps(stored))
    (folder / "2026-01-10.png").touch()
    text = block.renewed(empty, results, tmp_path)
    place = folder.relative_to(tmp_path).as_posix()
    assert f"({place}/2026-01-10.json)" in text
    assert (f"({place}/2026-01-10.png)" in text) == bool(suite_named(name).picture)
    assert "2026-01-02" not in text
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert block.renewed(text, results, tmp_path) == text
    assert (newest_results(results) == []) == (name != "divergence")


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    block, other = readme.BLOCKS[:2]
    for text in ("no markers", "\n".join(other.marks)):
        with pytest.raises(ArgumentError, match=block.marks[0]):
            block.renewed(text, tmp_path, tmp_path)


def _changed(contender: Any, change: Callable[[Outcome], Outcome]) -> Any:
    right = contender.build

    def build(setup: Any, contender: Any) -> Step:
        whole = right(setup, contender)
        return lambda: change(whole())

    return replace(contender, name="changed", build=build)


def _one_gradient(outcome: Outcome, factor: float) -> Outcome:
    name = next(name for name in outcome.gradients if "q_proj" in name)
    return outcome._replace(gradients=outcome.gradients | {name: factor * outcome.gradients[name]})


CHANGES: list[tuple[str, Callable[[Outcome], Outcome], str, str]] = [
    ("values", lambda outcome: outcome._replace(values=1.01 * outcome.values), "values", "1.0e-02"),
    ("values not finite", lambda outcome: outcome._replace(values=math.nan * outcome.values), "values", "nan"),
    ("one gradient", lambda outcome: _one_gradient(outcome, 2.0), "gradients", ""),
    ("gradient not finite", lambda outcome: _one_gradient(outcome, math.nan), "gradients", "inf"),
    ("no gradients", lambda outcome: outcome._replace(gradients={}), "gradients", "inf"),
]
REASONS = {
    "prefix": {"values": "differs from naive by ", "gradients": "gradients differ from naive's by "},
    "step": {"values": "its loss differs from TRL's by ", "gradients": "its gradients differ from TRL's by "},
}
WRONG_CASES = [
    (name, case)
    for name in COMPARED
    for case in (
        [replace(one, topk=None) for one in trainer.own_cases("cpu", quick=True)]
        if name == "trainer"
        else [replace(tiny(name), work=prefix.STUDENT) if name == "trees" else tiny(name)]
    )
]


@pytest.mark.parametrize(("name", "case"), WRONG_CASES, ids=lambda value: getattr(value, "work", value)[:12])
def test_a_contender_that_computes_something_else_is_not_timed(name: str, case: Any) -> None:
    suite = suite_named(name)
    first, ours = suite.contenders(case)[0], next(one for one in suite.contenders(case)[1:] if one.ours)
    changed = [_changed(ours, change) for _, change, _, _ in CHANGES]
    rows = suite.measure_case(suite.setup(case, "cpu"), [first, *changed, ours], seconds_per_row=0.0)
    assert rows[0].seconds
    assert rows[len(CHANGES) + 1].seconds
    for row, (_, _, what, by) in zip(rows[1:], CHANGES, strict=False):
        assert str(row.reason).startswith(REASONS["prefix" if name in ("prefix", "trees") else "step"][what] + by)
        assert not row.seconds
        assert f"changed: not timed, {row.reason}" in suite.case_table(case, rows).notes


@pytest.mark.parametrize("name", COMPARED)
def test_a_contender_that_fails_gets_its_error_as_the_reason(name: str) -> None:
    def build(setup: Any, contender: Any) -> Step:
        raise RuntimeError("out of luck\nsecond line")

    suite, case = suite_named(name), tiny(name)
    broken, ours = replace(suite.contenders(case)[0], build=build), suite.contenders(case)[-1]
    rows = suite.measure_case(suite.setup(case, "cpu"), [broken, ours], seconds_per_row=0.0)
    assert rows[0].reason == "RuntimeError: out of luck"
    assert rows[1].reason is None


@pytest.mark.parametrize("name", COMPARED)
def test_setups_are_seeded_and_leave_the_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    first, second = (suite_named(name).setup(tiny(name), "cpu") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.plan.target_ids, second.plan.target_ids)
    for one, other in zip(first.teacher_prompts, second.teacher_prompts, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", COMPARED)
def test_a_model_that_would_not_fit_the_memory_keeps_its_rows(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(passes, "free_bytes", lambda device: 1e8)
    suite = suite_named(name)
    options = Options(suite=name, device="cpu", model="qwen3-30b-a3b", shapes=("L=1",), output=tmp_path)
    report = suite.load(run(suite, options))
    assert list(report.by_case()) == suite.cases(options, "cpu")
    for case, rows in report.by_case().items():
        assert [row.contender for row in rows] == [contender.name for contender in suite.contenders(case)]
    assert all(str(row.reason).startswith("not run: needs") for row in report.rows)


@pytest.mark.parametrize("name", ["step", "trainer"])
def test_without_trl_its_rows_say_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    suite, case = suite_named(name), tiny(name)
    rows = suite.measure_case(suite.setup(case, "cpu"), suite.contenders(case), seconds_per_row=0.0)
    needing = [row for row in rows if row.contender not in LIMITS and (name == "trainer" or not row.ours)]
    assert {row.reason for row in needing} == {"not installed: pip install trl"}
    assert all(row.seconds for row in rows if row.ours and name == "step")
    assert f"{rows[0].contender}: not installed: pip install trl" in suite.case_table(case, rows).notes


def test_the_limit_stands_beside_every_row_and_is_below_ours_in_flops(quick_json: QuickJson) -> None:
    pytest.importorskip("trl")
    for case, rows in step.SUITE.load(quick_json("step")).by_case().items():
        table = step.SUITE.case_table(case, rows)
        assert table.columns[-1] == "of the matmuls"
        shared = next(row for row in table.rows if row[0] == LIMITS[0])
        assert shared[-1] == "1.00×"
        assert all(row[-1].endswith("×") for row in table.rows)
