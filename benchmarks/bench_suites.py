"""Runs the rows of the suites under pytest-benchmark: `pytest benchmarks/bench_suites.py -k "prefix and packed"`.

There is one group per case, and each entry is set up and checked as in `sdcore bench` before it is timed. What differs:
pytest-benchmark runs one entry after the other, so that entries compare only on a quiet machine, where those of
`sdcore bench` take turns. `--benchmark-json` and `--benchmark-compare` work. Of `prefix` only the shorter prompts run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sdcore.bench.measure import Unavailable
from sdcore.bench.options import Options
from sdcore.bench.oracle import compare, difference, solve
from sdcore.bench.peers import CONTENDERS, Contender, bare_matmuls
from sdcore.bench.rows import Outcome, PassRow
from sdcore.bench.shapes import ALL, SPEED_NOISE, CaseInputs, Divergence, Group, Shape, make_case_inputs
from sdcore.bench.suites import divergence, suite_named

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS = divergence.planned_groups(Options(suite="divergence"), DEVICE)
PASSES = [
    pytest.param(name, case, contender, id=re.sub(r"\W+", "-", f"{suite_named(name).named(case)} {contender.name}"))
    for name in ("prefix", "step")
    for case in suite_named(name).cases(Options(suite=name), DEVICE)
    for contender in suite_named(name).contenders(case)
    if name == "step" or case.prompt <= 512
]
ROUNDS = 3


@lru_cache(maxsize=1)
def _inputs(shape: Shape, dtype: str, frozen_head: bool) -> CaseInputs:
    return make_case_inputs(shape, dtype, noise=SPEED_NOISE, device=DEVICE, frozen_head=frozen_head)


@lru_cache(maxsize=1)
def _right(shape: Shape, frozen_head: bool) -> dict[Divergence, Outcome]:
    return solve(make_case_inputs(shape, "fp32", noise=SPEED_NOISE, device=DEVICE, frozen_head=frozen_head), ALL)


@lru_cache(maxsize=1)
def _setup(name: str, case: Any) -> Any:
    return suite_named(name).setup(case, DEVICE)


@lru_cache(maxsize=1)
def _first(name: str, case: Any) -> Outcome:
    first = suite_named(name).contenders(case)[0]
    return first.build(_setup(name, case), first)()


def _identifier(value: object) -> str:
    """Keeps what `-k` can select: `N512-V32000-H512-fp32-forward-KL`."""
    return re.sub(r"\W+", "-", str(getattr(value, "name", value)).replace("=", ""))


def _time(benchmark: BenchmarkFixture, group: str, step: Callable[[], object]) -> None:
    def timed() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("contender", [*CONTENDERS, "matmuls fp32", "matmuls bf16"], ids=_identifier)
@pytest.mark.parametrize("group", GROUPS, ids=_identifier)
def test_divergence(benchmark: BenchmarkFixture, group: Group, contender: Contender | str) -> None:
    inputs = _inputs(group.shape, group.dtype, group.frozen_head)
    if isinstance(contender, str):
        _time(benchmark, str(group), bare_matmuls(inputs, contender.split()[1]))
        return
    try:
        step = divergence.built(contender, inputs, group.divergence)
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))
    errors = compare(step(), _right(group.shape, group.frozen_head)[group.divergence])
    assert difference(errors, group.dtype) is None
    benchmark.extra_info["errors"] = errors._asdict()
    _time(benchmark, str(group), step)


@pytest.mark.parametrize(("name", "case", "contender"), PASSES)
def test_passes(benchmark: BenchmarkFixture, name: str, case: Any, contender: Any) -> None:
    suite, first = suite_named(name), _first(name, case)
    step = contender.build(_setup(name, case), contender)
    assert suite.judge(PassRow(group=case, contender=contender.name), step(), first) is None
    _time(benchmark, suite.named(case), step)
