"""Advantages, the clip and the anchor, by enumeration and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdcore.errors import ArgumentError
from sdcore.losses import PolicyTerm, group_advantages, policy_loss

SIZES = (3, 1, 4)
REWARDS = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)


def test_grpo_standardises_each_group() -> None:
    advantages = group_advantages(REWARDS, SIZES)
    one = REWARDS[:3]
    assert torch.allclose(advantages[:3], (one - one.mean()) / (one.std() + 1e-4))
    assert not advantages[3:].any()  # a group of one, and one whose rewards are alike


def test_dr_grpo_has_no_standard_deviation() -> None:
    assert torch.allclose(
        group_advantages(REWARDS, SIZES, estimator="dr_grpo")[:3], torch.tensor([0.5, -0.5, 0.0]).double()
    )


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others() -> None:
    advantages = group_advantages(REWARDS, SIZES, estimator="leave_one_out")[:3]
    assert torch.allclose(advantages, torch.tensor([1.0 - 0.25, 0.0 - 0.75, 0.5 - 0.5]).double())


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "leave_one_out"])
def test_a_completion_that_was_not_judged_changes_nothing(estimator: Any) -> None:
    rewards = torch.tensor([1.0, torch.nan, 0.0, 0.5, 7.0], dtype=torch.float64)
    active = torch.tensor([True, False, True, True, False])
    advantages = group_advantages(rewards, (5,), estimator=estimator, active=active)
    alone = group_advantages(rewards[active], (3,), estimator=estimator)
    assert torch.equal(advantages[active], alone)
    assert not advantages[~active].any()


def test_the_leave_one_out_gradient_is_unbiased_and_grpos_is_not() -> None:
    """All groups of 3 samples of a policy over 4 answers, exactly; without the std too it is (1 - 1/G) of it."""
    logits = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.0, 0.3, 0.0], dtype=torch.float64)
    log_p = logits.log_softmax(0)
    groups = torch.cartesian_prod(*[torch.arange(4)] * 3)
    (true,) = torch.autograd.grad(-(log_p.exp() * reward).sum(), logits, retain_graph=True)

    def expected(estimator: Any) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for group in groups:
            advantages = group_advantages(reward[group], (3,), estimator=estimator)
            chance = log_p.detach()[group].sum().exp()
            total = total + chance * policy_loss(log_p[group], advantages).per_token.mean()
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    assert torch.allclose(expected("leave_one_out"), true, rtol=1e-9)
    assert torch.allclose(expected("dr_grpo"), 2 / 3 * true, rtol=1e-9)
    direction = torch.nn.functional.cosine_similarity(expected("grpo"), true, dim=0)
    assert 0.8 < float(direction) < 0.9999


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (1.1, 1.0, -1.1, True),
        (1.5, 1.0, -1.2, False),  # already more likely than allowed
        (1.5, -1.0, 1.5, True),  # too likely, and bad: nothing holds it
        (0.5, 1.0, -0.5, True),
        (0.5, -1.0, 0.8, False),
    ],
)
def test_the_clip_holds_what_has_moved_far_enough(ratio: float, advantage: float, loss: float, moves: bool) -> None:
    logprobs = torch.tensor([ratio]).log().double().requires_grad_()
    out = policy_loss(logprobs, torch.tensor([advantage]).double(), old_logprobs=torch.zeros(1).double())
    (grad,) = torch.autograd.grad(out.per_token.sum(), logprobs)
    assert float(out.per_token) == pytest.approx(loss, rel=1e-6)
    assert bool(out.clipped) != moves
    assert float(grad) == pytest.approx(-ratio * advantage if moves else 0.0, rel=1e-6)


def test_without_old_log_probabilities_it_is_reinforce() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    out = policy_loss(logprobs, torch.tensor([0.5, -3.0]))
    (grad,) = torch.autograd.grad(out.per_token.sum(), logprobs)
    assert grad.tolist() == [-0.5, 3.0]
    assert out.ratio.tolist() == [1.0, 1.0]


def test_bounds_may_differ_or_be_none() -> None:
    logprobs = torch.tensor([2.0, 0.1]).log()
    options: dict[str, Any] = {"old_logprobs": torch.zeros(2), "clip_high": 0.5, "clip_low": None}
    assert policy_loss(logprobs, torch.ones(2), **options).per_token.tolist() == pytest.approx([-1.5, -0.1])
    assert policy_loss(logprobs, -torch.ones(2), **options).per_token.tolist() == pytest.approx([2.0, 0.1])


def test_k3_estimates_the_reverse_kl_and_has_the_gradient_of_the_forward_one() -> None:
    """On the student's own samples, by enumeration."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    log_p, log_ref = logits.log_softmax(0), torch.tensor([0.1, 0.5, -0.7, 0.2]).double().log_softmax(0)
    out = policy_loss(log_p, torch.zeros(4).double(), reference_logprobs=log_ref, kl_anchor=1.0)
    p = log_p.detach().exp()
    assert torch.allclose((p * out.anchor).sum(), (p * (log_p - log_ref)).sum())
    (gradient,) = torch.autograd.grad((p * out.per_token).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad(-(log_ref.exp() * log_p).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((log_p.exp() * (log_p - log_ref)).sum(), logits)
    assert torch.allclose(gradient, forward, rtol=1e-9)
    assert not torch.allclose(gradient, reverse, rtol=0.1)


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PolicyTerm(advantages=ONES, old_logprobs=torch.ones(2)),
            r"old_logprobs must be .* \(3,\), got .* \(2,\)",
        ),
        (lambda: PolicyTerm(advantages=torch.ones(3, 1)), "advantages must be"),
        (lambda: PolicyTerm(advantages=ONES.long()), "advantages must be floats"),
        (lambda: PolicyTerm(advantages=ONES * torch.nan), "advantages must be finite"),
        (lambda: PolicyTerm(advantages=ONES, clip_low=0.0), "clip_low must be positive or None, got 0.0"),
        (lambda: PolicyTerm(advantages=ONES, clip_high=-1.0), "clip_high must be"),
        (lambda: PolicyTerm(advantages=ONES, distillation_weight=1.5), r"distillation_weight must be in \[0, 1\]"),
        (lambda: PolicyTerm(advantages=ONES, kl_anchor=-1.0), "kl_anchor must be at least 0"),
        (lambda: PolicyTerm(advantages=ONES, normalizer=-1.0), "normalizer must be finite and at least 0"),
        (lambda: group_advantages(REWARDS, SIZES, estimator="ppo"), "estimator must be one of"),  # type: ignore[arg-type]
        (lambda: group_advantages(REWARDS * torch.nan, SIZES), "rewards must be finite where"),
        (lambda: group_advantages(REWARDS, (3, 1)), "lengths must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_an_advantage_without_weight_may_be_anything() -> None:
    PolicyTerm(advantages=torch.tensor([1.0, torch.nan]), token_weights=torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("old", [True, False])
def test_a_ratio_of_whole_completions_is_of_their_mean_log_ratio(old: bool) -> None:
    """GSPO, completion by completion; a token without a weight has no part in it."""
    lengths, generator = (3, 1, 4), torch.Generator().manual_seed(0)
    logprobs, old_logprobs, advantages = (torch.randn(8, generator=generator).double() for _ in range(3))
    logprobs.requires_grad_()
    owner = torch.repeat_interleave(torch.tensor(lengths))
    weights = torch.tensor([1.0, 0, 2, 1, 1, 1, 0, 1]).double()
    expected = torch.zeros((), dtype=torch.float64)
    for completion in range(3):
        rows = (owner == completion) & (weights != 0)
        log_ratio = (logprobs - (old_logprobs if old else logprobs.detach()))[rows].mean()
        ratio, bounded = log_ratio.exp(), log_ratio.exp().clamp(0.8, 1.3)
        tokens = torch.minimum(ratio * advantages[rows], bounded * advantages[rows])
        expected = expected - (weights[rows] * tokens).sum() / 7
    term = PolicyTerm(
        advantages=advantages,
        old_logprobs=old_logprobs if old else None,
        clip_high=0.3,
        token_weights=weights,
        normalizer=7.0,
        completion_of=owner,
    ).to(torch.device("cpu"))
    rows = weights.nonzero()[:, 0]
    loss, values = term.scalar(rows, logprobs[rows])
    assert torch.allclose(loss, expected)
    assert len(values["ratio"].unique()) == (3 if old else 1)
    (own,) = torch.autograd.grad(loss, logprobs)
    (wanted,) = torch.autograd.grad(expected, logprobs)
    assert torch.allclose(own, wanted)


@pytest.mark.parametrize("owner", [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.tensor([0, -1, 0])])
def test_completions_that_tokens_are_of_are_refused_by_name(owner: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"completion_of must be int64 of shape \(N,\)"):
        PolicyTerm(advantages=torch.zeros(3), completion_of=owner)
