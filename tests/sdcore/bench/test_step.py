"""The benchmark of a step's update phase checks what it times against TRL, and keeps its rows through JSON."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdcore.bench import peers, readme, step
from sdcore.bench.limit import LIMITS
from sdcore.bench.options import Options
from sdcore.bench.passes import Outcome, Step, save
from sdcore.bench.places import newest_results
from sdcore.bench.step import (
    StepReport,
    StepRow,
    case_table,
    load,
    markdown,
    measure_case,
    overview,
    tolerance,
)
from sdcore.bench.step_cases import (
    EACH,
    ONE,
    StepCase,
    StepContender,
    StepSetup,
    cases,
    contenders,
    make_setup,
    make_trainer,
)

pytest.importorskip("trl")
TINY = cases("cpu", quick=True)[0]
TRL = contenders(TINY)[0]
# The row that ours has to beat, and one of ours.
PACKED = next(one for one in contenders(TINY) if one.name == "packed, live")


@pytest.fixture(scope="module")
def quick_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that a quick run writes."""
    output = tmp_path_factory.mktemp("benchmark")
    return step.run(Options(suite="step", quick=True, device="cpu", output=output))


def test_a_quick_run_times_every_row_of_every_case(quick_json: Path) -> None:
    found = load(quick_json).by_case()
    assert list(found) == cases("cpu", quick=True)
    for case, rows in found.items():
        assert [row.contender for row in rows] == [*(contender.name for contender in contenders(case)), *LIMITS]
        assert [row.reason for row in rows] == [None] * len(rows)
        assert all(row.seconds for row in rows)


def test_what_a_quick_run_timed_was_equal_to_trl(quick_json: Path) -> None:
    for row in load(quick_json).rows:
        if row.contender not in ("TRL", *LIMITS):
            assert row.loss_error < 1e-5
            assert row.gradient_error < 1e-5


def test_a_quick_run_counts_the_bytes_of_every_step(quick_json: Path) -> None:
    for row in load(quick_json).rows:
        if row.contender in LIMITS:
            continue
        assert row.live_bytes is not None
        assert row.live_bytes > row.gradient_bytes > 0


def test_a_report_survives_being_saved(quick_json: Path, tmp_path: Path) -> None:
    found = load(quick_json)
    save(found, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == quick_json.read_text()
    assert quick_json.with_suffix(".md").read_text() == markdown(found)
    assert quick_json.with_suffix(".png").stat().st_size > 0


def _changed(change: Callable[[Outcome], Outcome]) -> StepContender:
    def build(setup: StepSetup) -> Step:
        step = PACKED.build(setup)
        return lambda: change(step())

    return replace(PACKED, name="changed", build=build)


def _one_gradient(outcome: Outcome) -> Outcome:
    name = next(name for name in outcome.gradients if "q_proj" in name)
    return outcome._replace(gradients=outcome.gradients | {name: 2.0 * outcome.gradients[name]})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda outcome: outcome._replace(values=1.01 * outcome.values), "its loss differs from TRL's by 1.0e-02"),
        (lambda outcome: outcome._replace(values=math.nan * outcome.values), "its loss differs from TRL's by nan"),
        (_one_gradient, "its gradients differ from TRL's by"),
        (lambda outcome: outcome._replace(gradients={}), "its gradients differ from TRL's by inf"),
    ],
    ids=["loss", "loss not finite", "one gradient", "no gradients"],
)
def test_a_contender_that_computes_something_else_is_not_timed(
    change: Callable[[Outcome], Outcome], reason: str
) -> None:
    rows = measure_case(make_setup(TINY), [TRL, _changed(change), PACKED], seconds_per_row=0.0)
    assert rows[1].reason is not None
    assert rows[1].reason.startswith(reason)
    assert not rows[1].seconds
    assert rows[0].seconds
    assert rows[2].seconds
    assert f"changed: not timed, {rows[1].reason}" in case_table(TINY, rows).notes


def test_a_contender_that_fails_gets_its_error_as_the_reason() -> None:
    def build(setup: StepSetup) -> Step:
        raise RuntimeError("out of luck\nsecond line")

    rows = measure_case(make_setup(TINY), [replace(TRL, build=build), PACKED], seconds_per_row=0.0)
    assert rows[0].reason == "RuntimeError: out of luck"
    assert rows[1].reason is None


def test_only_the_choice_of_a_top_k_may_differ_by_more_than_rounding() -> None:
    full = next(case for case in cases("cpu") if case.topk is None)
    assert tolerance(full) == (1e-4, 1e-4)
    assert tolerance(replace(full, topk=100)) == (1e-3, 0.02)


def test_trl_trains_the_objective_that_it_is_compared_in() -> None:
    for case in cases("cpu", quick=True):
        trainer = make_trainer(make_setup(case))
        assert trainer.args.distillation_alpha == 0.5
        assert trainer.args.distillation_topk == case.topk
        assert trainer.args.distillation_add_tail == (case.topk is not None)
        assert trainer.args.distillation_mode == ("full_logits" if case.topk is None else "topk_logits")
        assert trainer.teacher_model is not trainer.model


def test_both_read_the_same_tokens() -> None:
    for case in cases("cpu", quick=True):
        setup = make_setup(case)
        batch, planned = setup.batch(), setup.plan()
        student = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        for i in range(case.completions):
            # What is predicted last is never read.
            assert torch.equal(planned.student[0].sequence(i), student[i, :-1])
            assert torch.equal(planned.teacher[0].sequence(i), batch["teacher_input_ids"][i, :-1])
        assert torch.equal(planned.target_ids, batch["completion_ids"].flatten())
        same = bool((batch["teacher_input_ids"][0] == batch["teacher_input_ids"][1])[: case.prompt].all())
        assert same == (case.contexts == ONE)


def _row(contender: str, seconds: float, *, ours: bool, live_bytes: int) -> StepRow:
    return StepRow(group=TINY, contender=contender, seconds=[seconds] * 3, ours=ours, live_bytes=live_bytes)


def test_time_and_memory_are_relative_to_trls_batch() -> None:
    rows = [_row("TRL", 6.0, ours=False, live_bytes=1000), _row("packed, live", 2.0, ours=True, live_bytes=100)]
    table = case_table(TINY, rows)
    assert table.rows[1][4] == "3.00×"
    assert table.rows[1][6] == "0.10"
    assert table.ours == {1}
    shown = overview(StepReport(machine={}, rows=rows))
    assert shown.rows[1] == ["packed, live", "3.00", "0.10"]
    assert shown.rows[-1] == ["TRL, seconds and MiB", "6.00", "0"]


def test_what_is_left_against_trls_best_settings_is_said() -> None:
    rows = [
        _row("TRL", 6.0, ours=False, live_bytes=1000),
        _row("TRL, small", 8.0, ours=False, live_bytes=100),
        _row("TRL, fast", 4.0, ours=False, live_bytes=900),
        _row("packed", 2.0, ours=True, live_bytes=400),
        _row("two_phase", 3.0, ours=True, live_bytes=50),
    ]
    assert case_table(TINY, rows).notes[-2:] == [
        "The fastest of ours, packed: 2.00× TRL, fast's speed.",
        "The smallest of ours, two_phase: 0.50 of TRL, small's peak.",
    ]


def test_a_run_on_a_cpu_covers_what_was_promised() -> None:
    found = cases("cpu")
    assert {(case.prompt, case.completion, case.completions) for case in found} == {(1024, 128, 8)}
    assert {(case.topk, case.contexts) for case in found} == {(100, EACH), (None, EACH), (100, ONE)}
    assert {case.model for case in found} == {"h512"}
    assert {case.dtype for case in cases("cuda")} == {"bf16"}


def test_setups_are_seeded_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = make_setup(StepCase(model="quick", prompt=20)), make_setup(StepCase(model="quick", prompt=20))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.batch()["teacher_input_ids"], second.batch()["teacher_input_ids"])
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_other_suites_do_not_take_these_files_for_theirs(quick_json: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some-device" / "step"
    folder.mkdir(parents=True)
    (folder / "2026-01-02.json").write_text(quick_json.read_text())
    assert newest_results(tmp_path) == []


def test_the_readme_shows_the_newest_committed_results_of_the_step() -> None:
    text = readme.readme_file().read_text(encoding="utf-8")
    root = readme.readme_file().parent
    results = root / "benchmarks" / "results"
    assert text == readme.STEP.renewed(text, results, root), "run `sdcore bench --readme`"
    assert newest_results(results, "step")
    for path in newest_results(results, "step"):
        assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(load(path))


def test_without_trl_its_rows_say_what_to_install_and_ours_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    rows = measure_case(make_setup(TINY), [TRL, PACKED], seconds_per_row=0.0)
    assert rows[0].reason == "not installed: pip install trl"
    assert rows[1].seconds
    assert "TRL: not installed: pip install trl" in case_table(TINY, rows).notes


def test_the_limit_stands_beside_every_row_and_is_below_ours_in_flops() -> None:
    rows = measure_case(make_setup(TINY), [TRL, PACKED], seconds_per_row=0.0)
    table = case_table(TINY, rows)
    assert table.columns[-1] == "of the matmuls"
    shared = next(row for row in table.rows if row[0] == LIMITS[0])
    assert shared[-1] == "1.00×"
    assert all(row[-1].endswith("×") for row in table.rows)
