"""The tilted reference, by enumeration in float64: identities, fixed points of each log Z, the token form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reproduce.tilt import self_normalized_weights
from sdcore.errors import ArgumentError
from sdcore.losses import Tilted, TokenTilt
from sdkernels import logit_divergence

INV_TEMPERATURE = 1.7
OUTCOMES = 4
REWARD = torch.tensor([1.0, 0.0, 0.4, -0.3], dtype=torch.float64)
LOG_REF = torch.tensor([0.2, 0.9, -0.5, 0.1], dtype=torch.float64).log_softmax(0)
LOG_Z = (LOG_REF + INV_TEMPERATURE * REWARD).logsumexp(0)
LOG_STAR = LOG_REF + INV_TEMPERATURE * REWARD - LOG_Z
SOMEWHERE = torch.tensor([0.5, -0.4, 0.1, 0.8], dtype=torch.float64)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q), (…), of terms that are never negative: the plain sum may be, where p is q but for rounding."""
    gap = log_q - log_p
    return (log_p.exp() * (gap.expm1() - gap)).sum(-1)


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits.log_softmax(0)), logits)[0]


def close(value: Tensor, wanted: Tensor) -> bool:
    return bool(torch.allclose(value, wanted, rtol=1e-9, atol=1e-12))


def expected_gradient(
    target: Tilted, logits: Tensor, *, size: int = 3, log_sampler: Tensor | None = None, **options: Any
) -> Tensor:
    """Of a group's loss, over all groups of `size` samples of the policy, or of another sampler."""

    def loss(log_p: Tensor) -> Tensor:
        sampler = log_p.detach() if log_sampler is None else log_sampler
        groups = torch.cartesian_prod(*[torch.arange(OUTCOMES)] * size)
        count = len(groups)
        if "log_z" in options or "reference_rewards" in options:
            of_each = {name: value.expand(count, *value.shape[1:]) for name, value in options.items()}
        else:
            of_each = {}
        chosen, flat = groups.flatten(), [size] * count
        out = target.loss(log_p[chosen], LOG_REF[chosen], REWARD[chosen], flat, **of_each)
        # The gradient of a weighted sum, through the derivatives that the output has.
        chances = sampler[groups].sum(1).exp().repeat_interleave(size) * count
        return (chances * out.coefficients * log_p[chosen]).sum()

    return gradient(loss, logits)


def options_of(logz: str) -> dict[str, Any]:
    if logz == "exact":
        return {"log_z": LOG_Z[None]}
    # Rewards of four samples of the reference, none of them the policy's.
    return {"reference_rewards": REWARD[None, [1, 1, 3, 2]]} if logz == "reference_lme" else {}


def to_star(log_p: Tensor) -> Tensor:
    return kl(log_p, LOG_STAR)


def test_the_kl_to_the_tilt_is_regularised_reward_with_its_sign_turned() -> None:
    def objective(log_p: Tensor) -> Tensor:
        return INV_TEMPERATURE * (log_p.exp() * REWARD).sum() - kl(log_p, LOG_REF)

    assert close(gradient(to_star, SOMEWHERE), -gradient(objective, SOMEWHERE))
    assert close(to_star(SOMEWHERE.log_softmax(0)) + objective(SOMEWHERE.log_softmax(0)), LOG_Z)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("logz", ["group_var", "leave_one_out", "exact", "reference_lme"])
def test_on_policy_the_expected_gradient_is_that_of_the_kl_to_the_tilt(logz: Any, size: int) -> None:
    target = Tilted(inv_temperature=INV_TEMPERATURE, logz=logz)
    mean = expected_gradient(target, SOMEWHERE, size=size, **options_of(logz))
    assert close(mean, gradient(to_star, SOMEWHERE))


def test_half_the_variance_of_the_gap_has_the_gradient_of_the_kl() -> None:
    """The identity itself, with the expectations written out and the samples held."""

    def half_variance(log_p: Tensor) -> Tensor:
        p, gap = log_p.detach().exp(), log_p - LOG_REF - INV_TEMPERATURE * REWARD
        return 0.5 * (p * (gap - (p * gap).sum()).square()).sum()

    assert close(gradient(half_variance, SOMEWHERE), gradient(to_star, SOMEWHERE))


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_reward_tilts_by_less_than_it_is_asked_to(size: int) -> None:
    """Its own reward is in the mean: the fixed point is the tilt by (1 - 1/G)·inv_temperature."""
    target = Tilted(inv_temperature=INV_TEMPERATURE, logz="mean_reward")
    weaker = (LOG_REF + (1 - 1 / size) * INV_TEMPERATURE * REWARD).log_softmax(0)
    assert close(expected_gradient(target, SOMEWHERE, size=size), gradient(lambda log_p: kl(log_p, weaker), SOMEWHERE))
    assert float(expected_gradient(target, LOG_STAR, size=size).norm()) > 0.01


@pytest.mark.parametrize(("logz", "fixed"), [
    ("group_var", True),
    ("leave_one_out", True),
    ("exact", True),
    ("reference_lme", False),  # by the error of four samples
    ("mean_reward", False),
])  # fmt: skip
def test_off_policy_the_tilt_is_the_fixed_point_of_those_that_know_log_z_or_need_none(logz: Any, fixed: bool) -> None:
    target = Tilted(inv_temperature=INV_TEMPERATURE, logz=logz)
    uniform = torch.full((OUTCOMES,), -math.log(OUTCOMES), dtype=torch.float64)
    sampler = (0.5 * LOG_REF + 0.5 * uniform).log_softmax(0)
    mean = expected_gradient(target, LOG_STAR, log_sampler=sampler, **options_of(logz))
    assert (float(mean.norm()) < 1e-12) == fixed
    if not fixed:
        assert float(mean.norm()) > 1e-3


def test_off_policy_the_group_variance_leads_to_the_tilt() -> None:
    target, logits = Tilted(inv_temperature=INV_TEMPERATURE), SOMEWHERE.clone()
    uniform = torch.full((OUTCOMES,), -math.log(OUTCOMES), dtype=torch.float64)
    for _ in range(120):
        logits -= 4.0 * expected_gradient(target, logits, size=2, log_sampler=uniform)
    assert 0 <= float(kl(logits.log_softmax(0), LOG_STAR)) < 1e-6


def test_weighted_samples_of_the_group_itself_have_the_tilt_as_their_fixed_point() -> None:
    target = Tilted(inv_temperature=INV_TEMPERATURE, logz="reference_lme")
    out = target.loss(LOG_STAR, LOG_REF, REWARD, [4])
    assert float(out.loss) < 1e-20
    assert float(out.coefficients.norm()) < 1e-12
    assert float(expected_gradient(target, SOMEWHERE).norm()) > 0.01


def test_leave_one_out_is_the_policy_gradient_with_that_baseline() -> None:
    log_p = SOMEWHERE.log_softmax(0)
    out = Tilted(inv_temperature=INV_TEMPERATURE, logz="leave_one_out").loss(log_p, LOG_REF, REWARD, [4])
    gap = log_p - LOG_REF - INV_TEMPERATURE * REWARD
    others = torch.stack([torch.cat([gap[:i], gap[i + 1 :]]).mean() for i in range(4)])
    assert close(out.coefficients, (gap - others) / 4)
    variance = Tilted(inv_temperature=INV_TEMPERATURE).loss(log_p, LOG_REF, REWARD, [4])
    assert close(out.coefficients, variance.coefficients)
    assert close(variance.loss, 0.5 * gap.var())


@pytest.mark.parametrize("logz", ["group_var", "leave_one_out", "exact", "reference_lme", "mean_reward"])
def test_the_coefficients_are_the_derivatives_of_the_loss(logz: Any) -> None:
    """Of several groups, with log Z held; a completion that is left out has none."""
    log_p = torch.randn(9, dtype=torch.float64, requires_grad=True)
    reference, rewards = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    rewards[4] = torch.nan
    active = torch.ones(9, dtype=torch.bool)
    active[4] = False
    options: dict[str, Any] = {}
    if logz == "exact":
        options["log_z"] = torch.randn(3, dtype=torch.float64)
    out = Tilted(inv_temperature=0.8, logz=logz).loss(log_p, reference, rewards, [3, 5, 1], active=active, **options)
    (grad,) = torch.autograd.grad(out.loss, log_p)
    assert close(grad, out.coefficients)
    assert float(grad[4]) == 0.0
    assert out.used.tolist() == [True] * 4 + [False] + [True] * 3 + [logz == "exact"]
    assert bool((grad[out.used] != 0).all())


def test_losses_of_parts_add_up_with_the_sum_of_their_groups() -> None:
    log_p, reference, rewards = torch.randn(3, 8, dtype=torch.float64)
    target, sizes = Tilted(inv_temperature=0.8), [3, 2, 3]
    whole = target.loss(log_p, reference, rewards, sizes)
    active = torch.ones(8, dtype=torch.bool)
    normalizer = target.num_groups(sizes[:1], active[:3]) + target.num_groups(sizes[1:], active[3:])
    assert normalizer == 3
    parts = [
        target.loss(log_p[rows], reference[rows], rewards[rows], some, normalizer=normalizer)
        for rows, some in ((slice(0, 3), sizes[:1]), (slice(3, 8), sizes[1:]))
    ]
    assert close(torch.stack([part.loss for part in parts]).sum(), whole.loss)
    assert close(torch.cat([part.coefficients for part in parts]), whole.coefficients)


@pytest.mark.parametrize("logz", ["group_var", "leave_one_out", "mean_reward", "reference_lme"])
def test_a_group_of_one_has_no_loss(logz: Any) -> None:
    target = Tilted(inv_temperature=1.0, logz=logz)
    out = target.loss(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([1.0]), [1])
    assert float(out.loss) == 0.0
    assert not out.used.any()
    assert target.num_groups([1], torch.tensor([True])) == 0


def test_self_normalised_weights_of_a_group_of_8_are_not_the_tilt() -> None:
    """What imitating samples of the reference, with weights softmax(inv_temperature·reward), converges to."""
    inv_temperature, size = 6.0, 8
    log_star = (LOG_REF + inv_temperature * REWARD).log_softmax(0)
    taught = torch.zeros(OUTCOMES, dtype=torch.float64)
    for counts in itertools.product(range(size + 1), repeat=OUTCOMES):
        if sum(counts) != size:
            continue
        chance = math.factorial(size) / math.prod(math.factorial(count) for count in counts)
        chosen = torch.repeat_interleave(torch.arange(OUTCOMES), torch.tensor(counts))
        weights = self_normalized_weights(REWARD[chosen], [size], inv_temperature=inv_temperature)
        taught.index_add_(0, chosen, chance * LOG_REF[chosen].sum().exp() * weights)
    assert float(taught.sum()) == pytest.approx(1.0)
    assert float(kl(taught.log(), log_star)) > 0.1


def test_weights_of_samples_of_the_student_are_corrected_by_the_ratio() -> None:
    weights = self_normalized_weights(
        torch.tensor([1.0, 0.0, 2.0]), [2, 1], inv_temperature=2.0, log_ratios=torch.tensor([0.0, 2.0, 9.0])
    )
    assert weights.tolist() == [0.5, 0.5, 1.0]


def test_the_token_form_multiplies_up_to_the_tilt() -> None:
    """p*(a|s) = p_ref(a|s)·exp(V(sa) - V(s)), V(s) = log E_ref exp(β R): by the token tilt, action by action."""
    first = torch.tensor([0.3, -0.1, 0.6], dtype=torch.float64).log_softmax(0)
    second = torch.tensor([[0.1, 0.5, -1.0], [0.7, 0.0, 0.2], [-0.3, 0.4, 0.9]], dtype=torch.float64).log_softmax(1)
    reward = torch.tensor([[1.0, 0.0, 0.5], [0.2, -1.0, 0.3], [0.0, 0.7, -0.4]], dtype=torch.float64)
    value = (second + INV_TEMPERATURE * reward).logsumexp(1)  # V(a)
    start = (first + value).logsumexp(0)  # V()
    log_star = (first[:, None] + second + INV_TEMPERATURE * reward).flatten().log_softmax(0).view(3, 3)
    product = (first + value - start)[:, None] + second + INV_TEMPERATURE * reward - value[:, None]
    assert close(product, log_star)
    # The same from tilting one action after the other: each is a token tilt of what the others have left.
    tilted = first
    for action in range(3):
        exponents = torch.zeros(3, dtype=torch.float64)
        exponents[action] = value[action] - start
        tilted = (tilted + exponents).log_softmax(0)
    assert close(tilted, first + value - start)


@pytest.mark.parametrize(
    ("exponent", "alpha"),
    [*((b, alpha) for b in (0.0, 1e-6, -1e-6, 0.8, -6.0, 30.0) for alpha in (0.0, 1.0)), (-30.0, 1.0)],
)
def test_a_tilted_token_is_the_divergence_to_the_tilted_teacher(exponent: float, alpha: float) -> None:
    """Value and gradient from the divergence to the teacher as it is and the log-probability of the token."""
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    log_q = torch.randn(5, 7, dtype=torch.float64).log_softmax(-1)
    log_q[4] = torch.tensor([60.0, 0, 0, 0, 0, 0, 0]).double().log_softmax(-1)  # certain of its token
    targets = torch.tensor([0, 3, 6, 2, 0])
    tilt = torch.zeros(5, 7, dtype=torch.float64).scatter(1, targets[:, None], exponent)
    log_p, log_tilted = logits.log_softmax(-1), (log_q + tilt).log_softmax(-1)
    expected = kl(log_p, log_tilted) if alpha == 1.0 else kl(log_tilted, log_p)
    divergence = kl(log_p, log_q) if alpha == 1.0 else kl(log_q, log_p)
    of_targets = (logprobs.gather(1, targets[:, None])[:, 0] for logprobs in (log_p, log_q))
    tilted = TokenTilt.per_token(torch.full((5,), exponent, dtype=torch.float64), divergence, *of_targets, alpha=alpha)
    assert torch.allclose(tilted, expected, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(expected.sum(), logits, retain_graph=True)[0]
    assert torch.allclose(torch.autograd.grad(tilted.sum(), logits)[0], wanted, rtol=1e-8, atol=1e-9)


def test_a_tilted_tokens_gradient_is_finite_in_float32_for_large_advantages() -> None:
    for exponent in (-10.0, 100.0, 200.0):
        logprobs = torch.tensor([-3.0, -0.1], requires_grad=True)
        tilted = TokenTilt.per_token(
            torch.full((2,), exponent), torch.ones(2), logprobs, torch.tensor([-5.0, 0.0]), alpha=0.0
        )
        assert bool(tilted.isfinite().all() & torch.autograd.grad(tilted.sum(), logprobs)[0].isfinite().all())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_of_several_teachers_forward_kl_learns_the_mean_and_reverse_kl_the_geometric_mean(alpha: float) -> None:
    """Several contexts for one prompt: the gradient of the sum vanishes at one of them, and not at the other."""
    teachers = torch.tensor([[2.0, 0.0, -1.0, 0.5], [-1.0, 1.5, 0.0, 0.3], [0.0, 0.0, 3.0, -2.0]], dtype=torch.float64)
    log_q = teachers.log_softmax(-1)
    means = {0.0: log_q.exp().mean(0).log(), 1.0: log_q.mean(0).log_softmax(0)}
    for of, mean in means.items():
        logits = mean.clone().requires_grad_()
        loss = logit_divergence(logits.expand(3, 4), teachers, alpha=alpha).loss
        (grad,) = torch.autograd.grad(loss, logits)
        assert (float(grad.norm()) < 1e-12) == (of == alpha)


S3 = torch.zeros(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tilted(inv_temperature=0.0), "inv_temperature must be positive, got 0.0"),
        (lambda: Tilted(inv_temperature=1.0, logz="mean"), "logz must be one of 'group_var'"),  # type: ignore[arg-type]
        (lambda: Tilted(inv_temperature=1.0).loss(S3, S3[:2], S3, [3]), r"reference_logprobs must have shape \(S=3,\)"),
        (
            lambda: Tilted(inv_temperature=1.0).loss(S3, S3, S3, [3], log_z=S3[:1]),
            "log_z must be given for logz='exact'",
        ),
        (lambda: Tilted(inv_temperature=1.0, logz="exact").loss(S3, S3, S3, [3]), "log_z must be given"),
        (
            lambda: Tilted(inv_temperature=1.0).loss(S3, S3, S3, [3], reference_rewards=S3[None]),
            "reference_rewards are for logz='reference_lme'",
        ),
        (
            lambda: Tilted(inv_temperature=1.0, logz="reference_lme").loss(S3, S3, S3, [3], reference_rewards=S3),
            r"reference_rewards must have shape \(B=1, M\)",
        ),
        (lambda: Tilted(inv_temperature=1.0).loss(S3, S3, S3 / 0, [3]), "rewards must be finite"),
        (lambda: TokenTilt(exponents=torch.zeros(3, 1)), "exponents must be floats"),
        (lambda: TokenTilt(exponents=S3 / 0), "exponents must be finite"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()
