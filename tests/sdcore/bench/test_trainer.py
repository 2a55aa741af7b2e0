"""The suite of whole trainers checks what it times against TRL, gives all the same tokens, and leaves the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdcore.bench import peers, readme, trainer
from sdcore.bench.estimate import trainer_bytes
from sdcore.bench.limit import LIMITS
from sdcore.bench.live_memory import MOST_OF_FREE
from sdcore.bench.options import Options
from sdcore.bench.passes import Outcome, Step, save
from sdcore.bench.places import newest_results
from sdcore.bench.trainer import load, markdown, measure_case, overview
from sdcore.bench.trainer_cases import (
    DISTILLATION,
    GKD,
    SDFT,
    SDPO,
    TRAINERS,
    TrainerCase,
    TrainerContender,
    TrainerSetup,
    cases,
    contenders,
    make_trainer_setup,
)

pytest.importorskip("trl")
TINY = cases("cpu", quick=True)
trainers = pytest.mark.parametrize("case", TINY, ids=lambda case: case.trainer)


@pytest.fixture(scope="module")
def quick_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that a quick run writes."""
    output = tmp_path_factory.mktemp("benchmark")
    return trainer.run(Options(suite="trainer", quick=True, device="cpu", output=output))


def test_a_quick_run_times_every_row_of_every_trainer(quick_json: Path) -> None:
    found = load(quick_json).by_case()
    assert list(found) == TINY
    for case, rows in found.items():
        assert [row.contender for row in rows] == [*(one.name for one in contenders(case)), *LIMITS]
        assert [row.reason for row in rows] == [None] * len(rows)
        assert all(row.seconds for row in rows)


def test_what_a_quick_run_timed_was_equal_to_trl(quick_json: Path) -> None:
    rows = [row for row in load(quick_json).rows if row.ours]
    assert {row.group.trainer for row in rows} == set(TRAINERS)
    for row in rows:
        assert row.loss_error < 1e-5
        assert row.gradient_error < 1e-5


def test_a_quick_run_counts_the_bytes_of_every_update(quick_json: Path) -> None:
    for row in load(quick_json).rows:
        if row.contender not in LIMITS:
            assert row.live_bytes is not None
            assert row.live_bytes > row.gradient_bytes > 0


def test_a_report_survives_being_saved(quick_json: Path, tmp_path: Path) -> None:
    found = load(quick_json)
    save(found, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == quick_json.read_text()
    assert quick_json.with_suffix(".md").read_text() == markdown(found)
    assert quick_json.with_suffix(".png").stat().st_size > 0


def test_the_overview_has_a_line_for_every_row_and_sets_ours_off(quick_json: Path) -> None:
    found = load(quick_json)
    table = overview(found)
    assert len(table.rows) == len(found.rows)
    assert {table.rows[i][1].partition(",")[0] for i in table.ours} == {f"Fused{name}Trainer" for name in TRAINERS}


@trainers
def test_an_update_leaves_the_weights_as_they_were_and_does_the_optimizers_work(case: TrainerCase) -> None:
    setup = make_trainer_setup(case)
    before = [parameter.detach().clone() for parameter in setup.model.parameters()]
    step = contenders(case)[-1].build(setup)
    first, second = step(), step()
    assert torch.equal(first.values, second.values)
    for parameter, old in zip(setup.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert setup.optimizer.state[parameter]["step"] == 3  # one before any step
        assert bool(setup.optimizer.state[parameter]["exp_avg"].any())


@trainers
def test_the_peak_memory_is_the_same_every_time(case: TrainerCase) -> None:
    theirs = contenders(case)[0]
    peaks = {measure_case(make_trainer_setup(case), [theirs], seconds_per_row=0.0)[0].live_bytes for _ in range(2)}
    assert len(peaks) == 1


def test_the_limit_has_the_tokens_of_the_trainers_batch() -> None:
    for case in TINY:
        planned = make_trainer_setup(case).plan()
        student, teacher = planned.student[0], planned.teacher[0]
        assert len(student.sequence(0)) == case.prompt + case.completion - 1
        context = case.context if case.has_context else 0
        assert len(teacher.sequence(0)) == case.prompt + context + case.completion - 1


def test_another_model_is_another_model_and_a_copy_is_none() -> None:
    for case in TINY:
        setup = make_trainer_setup(case)
        assert (setup.teacher is None) == (case.trainer in (SDPO, SDFT))
        if setup.teacher is not None:
            own, other = (next(iter(model.parameters())) for model in (setup.model, setup.teacher))
            assert not torch.equal(own, other)
            assert not other.requires_grad


def _changed(case: TrainerCase, change: Callable[[Outcome], Outcome]) -> TrainerContender:
    ours = contenders(case)[1]

    def build(setup: TrainerSetup) -> Step:
        step = ours.build(setup)
        return lambda: change(step())

    return replace(ours, name="changed", build=build)


@trainers
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda outcome: outcome._replace(values=1.01 * outcome.values), "its loss differs from TRL's by 1.0e-02"),
        (lambda outcome: outcome._replace(values=math.nan * outcome.values), "its loss differs from TRL's by nan"),
        (lambda outcome: outcome._replace(gradients={}), "its gradients differ from TRL's by inf"),
    ],
    ids=["loss", "loss not finite", "no gradients"],
)
def test_a_trainer_that_computes_something_else_is_not_timed(
    case: TrainerCase, change: Callable[[Outcome], Outcome], reason: str
) -> None:
    if case.topk is not None:
        case = replace(case, topk=None)
    chosen = [contenders(case)[0], _changed(case, change)]
    rows = measure_case(make_trainer_setup(case), chosen, seconds_per_row=0.0)
    assert rows[0].seconds
    assert not rows[1].seconds
    assert str(rows[1].reason).startswith(reason)


def test_without_trl_every_row_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    rows = measure_case(make_trainer_setup(TINY[0]), contenders(TINY[0]), seconds_per_row=0.0)
    assert {row.reason for row in rows if row.contender not in LIMITS} == {"not installed: pip install trl"}


def test_trls_trainer_is_not_tried_where_it_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in TINY if case.trainer == GKD)
    setup = make_trainer_setup(case)
    needed = trainer_bytes(case, setup.model.config)
    monkeypatch.setattr(trainer, "free_bytes", lambda device: (needed - 1) / MOST_OF_FREE)
    rows = measure_case(setup, contenders(case), seconds_per_row=0.0)
    assert str(rows[0].reason).startswith("not run: needs")
    assert rows[1].seconds


@pytest.mark.parametrize("name", TRAINERS)
def test_the_estimate_of_trls_memory_is_near_what_is_counted_where_logits_are_most_of_it(name: str) -> None:
    # The quick model's vocabulary is small, but beside its 32 hidden entries it is most of the memory.
    case = TrainerCase(trainer=name, model="quick", prompt=8, context=4, completion=64, completions=8)
    setup = make_trainer_setup(case)
    row = measure_case(setup, contenders(case)[:1], seconds_per_row=0.0)[0]
    assert row.live_bytes
    if name != DISTILLATION:  # its tiles have a least size, which is far above this
        assert 0.7 < trainer_bytes(case, setup.model.config) / row.live_bytes < 1.6


def test_a_run_on_a_cpu_covers_every_trainer_at_a_real_vocabulary() -> None:
    found = cases("cpu")
    assert {case.trainer for case in found} == set(TRAINERS)
    assert {case.model for case in found} == {"h512, V=151936"}
    assert {case.trainer: case.topk for case in found} == {SDPO: 100, SDFT: None, GKD: None, DISTILLATION: None}
    chosen = trainer.planned_cases(Options(suite="trainer", peers=("gkd",), shapes=("P=9,R=2,G=3,L=1",)), "cpu")
    assert [(case.trainer, case.prompt, case.completion, case.completions) for case in chosen] == [(GKD, 9, 2, 3)]
    assert chosen[0].model == "h512, V=151936, 1 layers"


def test_the_readme_block_takes_the_newest_file_and_the_others_take_none(quick_json: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "some-device" / "trainer"
    folder.mkdir(parents=True)
    block = readme.TRAINER
    empty = f"{block.begin}\n{block.end}"
    assert "`sdcore bench trainer`" in block.renewed(empty, tmp_path / "results", tmp_path)
    (folder / "2026-01-02.json").write_text(quick_json.read_text())
    text = block.renewed(empty, tmp_path / "results", tmp_path)
    assert "(results/some-device/trainer/2026-01-02.json)" in text
    assert block.renewed(text, tmp_path / "results", tmp_path) == text
    assert newest_results(tmp_path / "results") == []


def test_the_readme_shows_the_newest_committed_results_of_the_trainers() -> None:
    file = readme.readme_file()
    text = file.read_text(encoding="utf-8")
    results = file.parent / "benchmarks" / "results"
    assert text == readme.TRAINER.renewed(text, results, file.parent), "run `sdcore bench --readme`"
