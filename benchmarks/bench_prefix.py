"""The shared-prefix rows for pytest-benchmark: `pytest benchmarks/bench_prefix.py`.

The cases of `sdcore bench prefix` with the shorter prompt, set up and checked against naive as there. What
differs: pytest-benchmark runs one entry after the other, so that entries compare only on a quiet machine. `-k "packed
and step"` selects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sdcore.bench.passes import Outcome, compare
from sdcore.bench.prefix import EQUAL
from sdcore.bench.prefix_cases import Case, Contender, Setup, cases, contenders, make_setup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENTRIES = [(case, one) for case in cases(DEVICE) if case.prompt <= 512 for one in contenders(case)]
ROUNDS = 3


@pytest.fixture(autouse=True, scope="module")
def nothing_left_behind() -> Iterator[None]:
    yield
    _setup.cache_clear()
    _exact.cache_clear()


@lru_cache(maxsize=1)
def _setup(case: Case) -> Setup:
    return make_setup(case, DEVICE)


@lru_cache(maxsize=1)
def _exact(case: Case) -> Outcome:
    return contenders(case)[0].build(_setup(case))()


def _identifier(value: Case | Contender) -> str:
    """Only what `-k` can select."""
    name = value.name if isinstance(value, Contender) else f"{value.work} {value}"
    return re.sub(r"\W+", "-", name.replace("=", ""))


@pytest.mark.parametrize(("case", "contender"), ENTRIES, ids=_identifier)
def test_pass(benchmark: BenchmarkFixture, case: Case, contender: Contender) -> None:
    benchmark.group = f"{case.work}, {case}"
    step = contender.build(_setup(case))
    values, gradients = compare(step(), _exact(case))
    assert values <= EQUAL[case.dtype]
    assert math.isnan(gradients) or gradients <= EQUAL[case.dtype]

    def timed_step() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed_step, rounds=ROUNDS)
