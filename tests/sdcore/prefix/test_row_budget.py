"""`max_tokens`: groups share rows as far as a budget of tokens goes, and the step stays what it is."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.losses import PolicyTerm, Tilted
from sdcore.prefix import Plan, passes, plan, plan_trajectories
from sdcore.prefix.planner import filled
from sdcore.step import distill_step, imitate_step, policy_gradient_step, tilt_step
from sdcore.teachers import Frozen, Live, TrustRegion
from sdkernels.live_bytes import LiveBytes
from tests.sdcore.prefix.models import assert_same_gradients, double_precision, gradients, tiny, tokens_of
from tests.sdcore.prefix.trees import conversations, random_plan

TEACHERS = {
    "live": lambda: Live(),
    "frozen": lambda: Frozen(tiny("llama", seed=1)),
    "trust": lambda: TrustRegion(Frozen(tiny("llama", seed=1)), 0.3),
}


def plan_of(shapes: str) -> Plan:
    return random_plan(0) if shapes == "groups" else conversations(Random(4), 3).plan


@cache
def all_at_once(shapes: str, teacher: str) -> tuple[Tensor, dict[str, Tensor]]:
    model = tiny("llama")
    with double_precision():
        return distill_step(model, plan_of(shapes), teacher=TEACHERS[teacher](), strategy="naive").loss, gradients(
            model
        )


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("strategy", ["packed", "cached", "naive"])
@pytest.mark.parametrize("shapes", ["groups", "conversations"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_rows_of_a_budget_give_the_loss_and_gradients_of_naive(
    teacher: str, shapes: str, strategy: Any, max_tokens: int
) -> None:
    model, (loss, expected) = tiny("llama"), all_at_once(shapes, teacher)
    with double_precision():
        out = distill_step(
            model, plan_of(shapes), teacher=TEACHERS[teacher](), strategy=strategy, max_tokens=max_tokens
        )
    assert out.report.student.strategy == strategy
    assert float(out.loss) == pytest.approx(float(loss), rel=1e-9)
    assert_same_gradients(gradients(model), expected)


def test_each_row_has_as_many_groups_as_fit_and_no_token_twice() -> None:
    """The student's trees have 22, 13, 9, 4 and 24 tokens, the teacher's read from it: each side's rows are counted."""
    planned = random_plan(0)
    sizes = [
        [tree.tokens(read_shared=shared) for tree in trees]
        for trees, shared in ((planned.student, False), (planned.teacher, True))
    ]
    model = tiny("llama")
    seen = tokens_of(model)
    distill_step(model, planned, strategy="packed", max_tokens=40, verify="off")
    rows = seen[::2], seen[1::2]
    assert [sum(of_pass) for of_pass in rows] == [sum(of_groups) for of_groups in sizes]
    assert len(rows[0]) < len([count for count in sizes[0] if count])
    assert max(seen) <= 40
    seen.clear()
    distill_step(model, planned, strategy="packed", max_tokens=10, verify="off")
    assert all(count <= 10 or count in sizes[0] + sizes[1] for count in seen)


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), max_size=12), st.integers(1, 20))
def test_bins_hold_what_fits_and_no_two_could_have_been_one_of_single_loads(loads: list[list[int]], most: int) -> None:
    bins = filled(loads, most)
    assert sorted(index for members in bins for index in members) == list(range(len(loads)))
    totals = [[sum(loads[i][side] for i in members) for side in range(2)] for members in bins]
    assert all(max(total) <= most or len(members) == 1 for total, members in zip(totals, bins, strict=True))
    single = [sum(loads[i][0] for i in members) for members in filled([load[:1] for load in loads], most)]
    assert all(a + b > most for n, a in enumerate(single) for b in single[:n])


def test_other_steps_take_a_budget_too() -> None:
    planned = random_plan(0)
    count = sum(len(group) for group in planned.counts)
    rewards, advantages = torch.arange(count) % 2.0, torch.linspace(-1, 1, planned.num_rows)
    target = Tilted(inv_temperature=2.0, logz="leave_one_out")
    steps = {
        "imitate": lambda model, **options: imitate_step(model, planned, **options),
        "policy": lambda model, **options: policy_gradient_step(
            model,
            planned,
            PolicyTerm(advantages=advantages, kl_anchor=0.2),
            reference=Frozen(tiny("llama", seed=1)),
            kl_estimator="exact",
            **options,
        ),
        "tilt": lambda model, **options: tilt_step(
            model, planned, rewards, target=target, reference=Frozen(tiny("llama", seed=1)), **options
        ),
    }
    for step in steps.values():
        expected, model = tiny("llama"), tiny("llama")
        with double_precision():
            losses = [float(step(expected, strategy="naive").loss), float(step(model, max_tokens=30).loss)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-9)
        assert_same_gradients(gradients(model), gradients(expected))


def test_a_budget_bounds_the_memory() -> None:
    """Sixteen groups take hardly more than two, where one row of all of them takes much more."""

    def peak(groups: int, **options: Any) -> int:
        model = tiny("llama")
        planned = plan([[g, *range(30)] for g in range(groups)], [[[1, 2, 3], [4, 5]] for _ in range(groups)])
        with LiveBytes(uncounted_bytes=[weight.nbytes for weight in model.parameters()]) as probe:
            imitate_step(model, planned, strategy="packed", verify="off", **options)
        return probe.peak_bytes

    assert peak(16, max_tokens=70) < 1.5 * peak(2)
    assert peak(16) > 3 * peak(2)


def test_the_rows_before_the_last_must_have_gone_backward() -> None:
    model, planned = tiny("llama"), random_plan(0)
    parts = passes(model, planned, max_tokens=30, verify="off").parts
    next(parts)
    with pytest.raises(RuntimeError, match=r"call backward on part\.attach"):
        next(parts)


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 0}, {"max_tokens": 9, "micro_batch": 2}, {"max_tokens": 9, "strategy": "two_phase"}],
    ids=str,
)
def test_a_budget_that_cannot_be_is_refused(options: Any) -> None:
    with pytest.raises(ArgumentError, match="max_tokens must be positive, without micro_batch and 'two_phase', got"):
        distill_step(tiny("llama"), random_plan(0), **options)


def test_without_a_backward_there_is_no_budget() -> None:
    with pytest.raises(ArgumentError, match="nor micro_batch or max_tokens be set"):
        distill_step(tiny("llama"), random_plan(0), max_tokens=9, backward=None)


def test_an_engine_with_one_backward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdcore.models.body.Body.one_backward", True, raising=False)
    with pytest.raises(UnsupportedModelError, match="DeepSpeed takes one backward per step"):
        distill_step(tiny("llama"), random_plan(0), max_tokens=9)


def test_a_plan_without_rows_has_a_step() -> None:
    nothing = plan_trajectories([[1, 2, 3]], [[False] * 3], [], teachers=1)
    assert float(distill_step(tiny("llama"), nothing, max_tokens=5).loss) == 0
