"""The suite of whole trainers gives all the same tokens, leaves the weights, and says what would not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdcore.bench import passes
from sdcore.bench.cases import Case
from sdcore.bench.measure import MOST_OF_FREE
from sdcore.bench.options import Options
from sdcore.bench.suites.trainer import (
    SUITE,
    contenders,
    make_setup,
    overview,
    own_cases,
    planned_cases,
    trainer_bytes,
)
from sdcore.bench.trl_trainers import DISTILLATION, GKD, SDFT, SDPO, TRAINERS, has_context

pytest.importorskip("trl")
TINY = own_cases("cpu", quick=True)
trainers = pytest.mark.parametrize("case", TINY, ids=lambda case: case.work)


def test_the_overview_has_a_line_for_every_row_and_sets_ours_off(quick_json: Callable[[str], Path]) -> None:
    report = SUITE.load(quick_json("trainer"))
    assert {row.group.work for row in report.rows if row.ours} == set(TRAINERS)
    table = overview(report)
    assert len(table.rows) == len(report.rows)
    assert {table.rows[i][1].partition(",")[0] for i in table.ours} == {f"Fused{name}Trainer" for name in TRAINERS}


@trainers
def test_an_update_leaves_the_weights_as_they_were_and_does_the_optimizers_work(case: Case) -> None:
    setup = make_setup(case)
    before = [parameter.detach().clone() for parameter in setup.model.parameters()]
    step = contenders(case)[-1].build(setup, contenders(case)[-1])
    first, second = step(), step()
    assert torch.equal(first.values, second.values)
    for parameter, old in zip(setup.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert setup.optimizer.state[parameter]["step"] == 3  # one before any step
        assert bool(setup.optimizer.state[parameter]["exp_avg"].any())


@trainers
def test_the_peak_memory_is_the_same_every_time(case: Case) -> None:
    theirs = contenders(case)[0]
    peaks = {SUITE.measure_case(make_setup(case), [theirs], seconds_per_row=0.0)[0].live_bytes for _ in range(2)}
    assert len(peaks) == 1


def test_the_limit_has_the_tokens_of_the_trainers_batch() -> None:
    for case in TINY:
        planned = make_setup(case).plan
        student, teacher = planned.student[0], planned.teacher[0]
        assert len(student.sequence(0)) == case.prompt + case.completion - 1
        context = case.context if has_context(case.work) else 0
        assert len(teacher.sequence(0)) == case.prompt + context + case.completion - 1


def test_another_model_is_another_model_and_a_copy_is_none() -> None:
    for case in TINY:
        setup = make_setup(case)
        assert (setup.other is None) == (case.work in (SDPO, SDFT))
        if setup.other is not None:
            own, other = (next(iter(model.parameters())) for model in (setup.model, setup.other))
            assert not torch.equal(own, other)
            assert not other.requires_grad


def test_trls_trainer_is_not_tried_where_it_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in TINY if case.work == GKD)
    setup = make_setup(case)
    needed = trainer_bytes(case, setup.model.config)
    monkeypatch.setattr(passes, "free_bytes", lambda device: (needed - 1) / MOST_OF_FREE)
    rows = SUITE.measure_case(setup, contenders(case), seconds_per_row=0.0)
    assert str(rows[0].reason).startswith("not run: needs")
    assert rows[1].seconds


@pytest.mark.parametrize("name", TRAINERS)
def test_the_estimate_of_trls_memory_is_near_what_is_counted_where_logits_are_most_of_it(name: str) -> None:
    # The quick model's vocabulary is small, but beside its 32 hidden entries it is most of the memory.
    case = Case(work=name, model="quick", prompt=8, context=4, completion=64, completions=8)
    setup = make_setup(case)
    row = SUITE.measure_case(setup, contenders(case)[:1], seconds_per_row=0.0)[0]
    assert row.live_bytes
    if name != DISTILLATION:  # its tiles have a least size, which is far above this
        assert 0.7 < trainer_bytes(case, setup.model.config) / row.live_bytes < 1.6


def test_a_run_on_a_cpu_covers_every_trainer_at_a_real_vocabulary() -> None:
    cases = own_cases("cpu")
    assert {case.work for case in cases} == set(TRAINERS)
    assert {case.model for case in cases} == {"h512, V=151936"}
    assert {case.work: case.topk for case in cases} == {SDPO: 100, SDFT: None, GKD: None, DISTILLATION: None}
    chosen = planned_cases(Options(suite="trainer", peers=("gkd",), shapes=("P=9,R=2,G=3,L=1",)), "cpu")
    assert [(case.work, case.prompt, case.completion, case.completions) for case in chosen] == [(GKD, 9, 2, 3)]
    assert chosen[0].model == "h512, V=151936, 1 layers"
