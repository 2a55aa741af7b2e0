"""The speed entries for pytest-benchmark: `pytest benchmarks/bench_divergence.py`.

There is one group per shape, dtype and divergence, and each entry is checked against the oracle before it is timed,
with the set-up of `sdcore bench`. What differs: pytest-benchmark runs one entry after the other, so that
entries compare only on a quiet machine, where those of `sdcore bench` take turns. `-k "N512 and bf16"` selects,
`--benchmark-json` and `--benchmark-compare` work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sdcore.bench.measure import attempt
from sdcore.bench.oracle import compare, difference, solve
from sdcore.bench.peers import CONTENDERS, Contender, StepResult, bare_matmuls
from sdcore.bench.shapes import ALL, SPEED_NOISE, CaseInputs, Divergence, Group, Shape, groups, make_case_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS = groups(DEVICE)
ROUNDS = 5


@pytest.fixture(autouse=True, scope="module")
def no_inputs_left_behind() -> Iterator[None]:
    yield
    _inputs.cache_clear()
    _exact.cache_clear()


@lru_cache(maxsize=1)
def _inputs(shape: Shape, dtype: str, frozen_head: bool) -> CaseInputs:
    return make_case_inputs(shape, dtype, noise=SPEED_NOISE, device=DEVICE, frozen_head=frozen_head)


@lru_cache(maxsize=1)
def _exact(shape: Shape, frozen_head: bool) -> dict[Divergence, StepResult]:
    return solve(make_case_inputs(shape, "fp32", noise=SPEED_NOISE, device=DEVICE, frozen_head=frozen_head), ALL)


def _identifier(value: object) -> str:
    """Only what `-k` can select: `N512-V32000-H512-fp32-forward-KL`."""
    return re.sub(r"\W+", "-", str(value).replace("=", ""))


def _settle() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: _identifier(contender.name))
@pytest.mark.parametrize("group", GROUPS, ids=_identifier)
def test_forward_and_backward(benchmark: BenchmarkFixture, group: Group, contender: Contender) -> None:
    benchmark.group = str(group)
    step, reason = attempt(contender, _inputs(group.shape, group.dtype, group.frozen_head), group.divergence)
    if step is None:
        pytest.skip(str(reason))
    errors = compare(step(), _exact(group.shape, group.frozen_head)[group.divergence])
    assert difference(errors, group.dtype) is None
    benchmark.extra_info["errors"] = errors._asdict()

    def timed_step() -> None:
        step()
        _settle()

    benchmark.pedantic(timed_step, rounds=ROUNDS)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("group", GROUPS, ids=_identifier)
def test_the_bare_matmuls(benchmark: BenchmarkFixture, group: Group, dtype: str) -> None:
    benchmark.group = str(group)
    products = bare_matmuls(_inputs(group.shape, group.dtype, group.frozen_head), dtype)

    def timed_products() -> None:
        products()
        _settle()

    benchmark.pedantic(timed_products, rounds=ROUNDS, warmup_rounds=1)
