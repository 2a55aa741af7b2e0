"""The rows of a step's update phase for pytest-benchmark: `pytest benchmarks/bench_step.py`.

The cases of `sdcore bench step`, set up and checked against TRL as there. What differs: pytest-benchmark runs
one entry after the other, so that entries compare only on a quiet machine. `-k "packed and full"` selects.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sdcore.bench.passes import Outcome, compare
from sdcore.bench.step import tolerance
from sdcore.bench.step_cases import StepCase, StepContender, StepSetup, cases, contenders, make_setup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENTRIES = [(case, one) for case in cases(DEVICE) for one in contenders(case)]
ROUNDS = 3


@pytest.fixture(autouse=True, scope="module")
def nothing_left_behind() -> Iterator[None]:
    yield
    _setup.cache_clear()
    _exact.cache_clear()


@lru_cache(maxsize=1)
def _setup(case: StepCase) -> StepSetup:
    return make_setup(case, DEVICE)


@lru_cache(maxsize=1)
def _exact(case: StepCase) -> Outcome:
    return contenders(case)[0].build(_setup(case))()


def _identifier(value: StepCase | StepContender) -> str:
    """Only what `-k` can select."""
    name = value.name if isinstance(value, StepContender) else str(value)
    return re.sub(r"\W+", "-", name.replace("=", ""))


@pytest.mark.parametrize(("case", "contender"), ENTRIES, ids=_identifier)
def test_step(benchmark: BenchmarkFixture, case: StepCase, contender: StepContender) -> None:
    benchmark.group = str(case)
    exact = _exact(case)
    step = contender.build(_setup(case))
    loss, gradients = compare(step(), exact)
    most_loss, most_gradients = tolerance(case)
    assert loss <= most_loss
    assert gradients <= most_gradients

    def timed_step() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed_step, rounds=ROUNDS)
