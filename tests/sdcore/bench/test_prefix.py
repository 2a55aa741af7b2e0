"""The benchmark of shared prefixes shows speed and memory beside what the FLOPs allow, and covers what was promised."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdcore.bench import passes
from sdcore.bench.limit import LIMITS
from sdcore.bench.measure import MOST_OF_FREE, model_bytes
from sdcore.bench.models import size_of
from sdcore.bench.options import Options
from sdcore.bench.rows import PassReport, PassRow
from sdcore.bench.suites import prefix
from sdcore.bench.suites.prefix import STEP, STUDENT, SUITE, TEACHER, TEACHER_EACH, WORKS
from sdcore.prefix import ModelSizes, cost_of_sizes

TINY = prefix.own_cases("cpu", quick=True)[0]


def test_what_would_not_fit_the_memory_keeps_its_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = prefix.make_setup(TINY)
    kept = prefix.cost_of(setup, prefix.contenders(TINY)[0]).student.kept_bytes
    needed = kept + model_bytes(setup.body.config, "fp32", gradients=False)
    monkeypatch.setattr(passes, "free_bytes", lambda device: (needed - 1) / MOST_OF_FREE)
    rows = {row.contender: row for row in SUITE.measure_case(setup, prefix.contenders(TINY), seconds_per_row=0.0)}
    assert str(rows["naive batch"].reason).startswith("not run: needs")
    assert rows["packed"].reason is None
    assert rows["packed"].gradient_error < 1e-5  # of the naive loop, which is the reference then


@pytest.mark.parametrize("work", WORKS)
def test_the_limit_of_a_pass_has_its_tokens_and_the_output_layer_in_a_whole_step_only(work: str) -> None:
    products = dict(SUITE.limits(prefix.make_setup(replace(TINY, work=work))))
    shared, naive = (products[name] for name in LIMITS)
    sequences = TINY.completions * (TINY.prompt + TINY.completion - 1)
    assert naive.student_tokens == (sequences if work in (STUDENT, STEP) else 0)
    assert (naive.teacher_tokens > sequences) == (work != STUDENT)
    assert naive.rows == (TINY.completions * TINY.completion if work == STEP else 0)
    assert shared.flops < naive.flops


def _row(contender: str, seconds: float, **fields: object) -> PassRow:
    return PassRow(group=TINY, contender=contender, seconds=[seconds] * 3, **fields)  # type: ignore[arg-type]


def test_speed_and_memory_are_relative_to_the_naive_batch_and_to_the_loop_where_it_did_not_fit() -> None:
    batch = _row("naive batch", 6.0, allowed=1.0, live_bytes=1000)
    loop = _row("naive loop", 9.0, allowed=1.0, live_bytes=200)
    packed = _row("packed", 2.0, allowed=4.0, live_bytes=100)
    table = SUITE.case_table(TINY, [batch, loop, packed])
    assert table.rows[2][4:7] == ["3.00×", "4.00×", "75%"]
    assert table.rows[2][8] == "0.10"
    batch.reason, batch.seconds = "too large", []
    table = SUITE.case_table(TINY, [batch, loop, packed])
    assert table.rows[1][4:7] == ["4.50×", "4.00×", "112%"]
    assert table.rows[1][8] == "0.50"
    shown = prefix.overview(STUDENT, PassReport(machine={}, rows=[batch, loop, packed]))
    assert shown.rows[1] == ["packed", "4.50 (112%)"]
    assert shown.rows[-1] == ["naive, seconds", "9.00"]


@pytest.mark.parametrize("work", [TEACHER, TEACHER_EACH])
def test_the_allowed_speedup_is_that_of_the_cost_model(work: str) -> None:
    case = replace(TINY, prompt=200, completion=16, completions=4, context=40, work=work)
    size = size_of("quick")
    setup = prefix.make_setup(case)
    for contender in prefix.contenders(case)[1:]:
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
        assert prefix.allowed_speedup(setup, contender) == pytest.approx(counted.teacher.speedup, rel=0.02)
    assert prefix.allowed_speedup(setup, prefix.contenders(case)[0]) == 1.0


def test_a_run_on_a_cpu_covers_what_was_promised_and_everything_the_grid() -> None:
    sizes = {(case.prompt, case.completion, case.completions, case.context) for case in prefix.own_cases("cpu")}
    assert {(512, 128, 8, 256), (2048, 64, 8, 256), (512, 128, 1, 256)} == sizes
    grid = {
        (case.prompt, case.completion, case.completions, case.work) for case in prefix.own_cases("cpu", everything=True)
    }
    assert {entry[0] for entry in grid} == {512, 2048, 8192}
    assert {entry[1] for entry in grid} == {64, 128, 512}
    assert {entry[2] for entry in grid} == {1, 4, 8}
    assert len(grid) == 9 * (2 + 3 + 3)
    assert {case.dtype for case in prefix.own_cases("cuda")} == {"bf16"}


def test_a_model_or_a_shape_takes_the_place_of_the_suites_own() -> None:
    cases = prefix.planned_cases(Options(suite="prefix", model="qwen3-0.6b", shapes=("L=2,G=3",)), "cpu")
    assert {case.work for case in cases} == set(WORKS)
    assert {(case.model, case.prompt, case.completion, case.completions) for case in cases} == {
        ("qwen3-0.6b, 2 layers", 512, 64, 3)
    }
