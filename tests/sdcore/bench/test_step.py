"""The benchmark of a step's update phase gives TRL and ours the same objective and tokens, and compares with TRL."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sdcore.bench.cases import EACH, ONE
from sdcore.bench.rows import PassReport, PassRow
from sdcore.bench.suites.step import SUITE, make_setup, overview, own_cases, tolerance
from sdcore.bench.trl_trainers import trl_batch, trl_trainer

pytest.importorskip("trl")
TINY = own_cases("cpu", quick=True)[0]


def test_only_the_choice_of_a_top_k_may_differ_by_more_than_rounding() -> None:
    full = next(case for case in own_cases("cpu") if case.topk is None)
    assert tolerance(full) == (1e-4, 1e-4)
    assert tolerance(replace(full, topk=100)) == (1e-3, 0.02)


def test_trl_trains_the_objective_that_it_is_compared_in() -> None:
    for case in own_cases("cpu", quick=True):
        trainer = trl_trainer(make_setup(case), "SDPO")
        assert trainer.args.distillation_alpha == 0.5
        assert trainer.args.distillation_topk == case.topk
        assert trainer.args.distillation_add_tail == (case.topk is not None)
        assert trainer.args.distillation_mode == ("full_logits" if case.topk is None else "topk_logits")
        assert trainer.teacher_model is not trainer.model


def test_both_read_the_same_tokens() -> None:
    for case in own_cases("cpu", quick=True):
        setup = make_setup(case)
        batch, planned = trl_batch(setup, "SDPO"), setup.plan
        student = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        for i in range(case.completions):
            # What is predicted last is never read.
            assert torch.equal(planned.student[0].sequence(i), student[i, :-1])
            assert torch.equal(planned.teacher[0].sequence(i), batch["teacher_input_ids"][i, :-1])
        assert torch.equal(planned.target_ids, batch["completion_ids"].flatten())
        same = bool((batch["teacher_input_ids"][0] == batch["teacher_input_ids"][1])[: case.prompt].all())
        assert same == (case.contexts == ONE)


def _row(contender: str, seconds: float, *, ours: bool, live_bytes: int) -> PassRow:
    return PassRow(group=TINY, contender=contender, seconds=[seconds] * 3, ours=ours, live_bytes=live_bytes)


def test_time_and_memory_are_relative_to_trls_batch() -> None:
    rows = [_row("TRL", 6.0, ours=False, live_bytes=1000), _row("packed, live", 2.0, ours=True, live_bytes=100)]
    table = SUITE.case_table(TINY, rows)
    assert table.rows[1][4] == "3.00×"
    assert table.rows[1][6] == "0.10"
    assert table.ours == {1}
    shown = overview(PassReport(machine={}, rows=rows))
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
    assert SUITE.case_table(TINY, rows).notes[-2:] == [
        "The fastest of ours, packed: 2.00× TRL, fast's speed.",
        "The smallest of ours, two_phase: 0.50 of TRL, small's peak.",
    ]


def test_a_run_on_a_cpu_covers_what_was_promised() -> None:
    cases = own_cases("cpu")
    assert {(case.prompt, case.completion, case.completions) for case in cases} == {(1024, 128, 8)}
    assert {(case.topk, case.contexts) for case in cases} == {(100, EACH), (None, EACH), (100, ONE)}
    assert {case.model for case in cases} == {"h512"}
    assert {case.dtype for case in own_cases("cuda")} == {"bf16"}
