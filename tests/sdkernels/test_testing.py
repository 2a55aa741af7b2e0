"""What an error is held against is a number: a truth or tolerance that is none stops the test, whatever came out."""

from __future__ import annotations

import math
from pathlib import Path

import hypothesis
import pytest
import torch

from sdkernels.testing import allowed_error, assert_within, assert_within_reference_error, relative_error

ONE, NAN = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.0, -1e-9])
def test_a_tolerance_is_a_positive_number(wrong: float) -> None:
    tolerance = torch.tensor([1.0, wrong, 1.0])
    for actual in (ONE, 2 * ONE):
        with pytest.raises(ValueError, match="tolerance must be positive and finite, got"):
            assert_within(actual, ONE, tolerance)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_truth_is_finite(wrong: float) -> None:
    exact = torch.tensor([1.0, wrong, 1.0])
    for judged in (relative_error, allowed_error, lambda a, e: assert_within(a, e, ONE)):
        with pytest.raises(ValueError, match="exact must be finite, got"):
            judged(ONE, exact)


def test_a_run_with_a_nan_is_nothing_to_be_held_against_even_beside_others() -> None:
    for runs in (NAN, [ONE, NAN], [NAN, ONE]):
        with pytest.raises(ValueError, match="the runs that an error is held against must be finite"):
            allowed_error(runs, ONE)
    with pytest.raises(ValueError, match="must be finite"):
        assert_within_reference_error(ONE, ONE, NAN)


def test_an_error_beyond_its_tolerance_and_a_nan_are_said() -> None:
    assert_within(ONE + 1e-3, ONE, 2e-3 * ONE)
    for actual in (ONE + 3e-3, NAN):
        with pytest.raises(AssertionError, match="loss: off by"):
            assert_within(actual, ONE, 2e-3 * ONE, name="loss")
    assert allowed_error([ONE, 1.5 * ONE], ONE, factor=3.0) == pytest.approx(1.5)


def test_examples_are_fixed_or_many_as_the_profile_says_and_no_test_has_a_number_of_its_own() -> None:
    fixed, many = (hypothesis.settings.get_profile(name) for name in ("fixed", "random"))
    assert fixed.derandomize
    assert not many.derandomize
    assert many.max_examples >= 10 * fixed.max_examples
    assert fixed.database is many.database is None
    tests = Path(__file__).parent.parent
    own = [path for path in tests.rglob("test_*.py") if "\n@settings(" in path.read_text(encoding="utf-8")]
    assert own == []
