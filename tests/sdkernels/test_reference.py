"""The oracle itself: closed forms against autograd, and against definitions that others wrote."""

from __future__ import annotations

import ast
import inspect
import math

import mpmath
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sdkernels import reference
from sdkernels.reference import (
    Transform,
    at,
    bucketed,
    bucketed_gradient,
    bucketed_logprobs,
    clipped_divergence,
    clipped_divergence_gradient,
    contributions,
    divergence,
    divergence_gradient,
    entropy,
    entropy_gradient,
    final_logits,
    linear_divergence_reference,
    sampled_divergence,
    sampled_divergence_gradient,
    textbook_divergence,
)

N, V, K = 6, 19, 4
ALPHAS = [(0.0, False), (1.0, False), (0.5, False), (0.05, False), (0.9, True)]


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.rand(N, V, generator=generator).argsort(-1)[:, :K]
    return student.requires_grad_(), teacher, ids


def autograd(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), logits)[0]


def test_the_oracle_imports_nothing_of_ours() -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(reference))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "relative").split(".")[0])
    assert imported <= {"__future__", "collections", "math", "typing", "torch"}


@pytest.mark.parametrize(("alpha", "normalize"), ALPHAS)
def test_full_gradient_is_the_derivative(alpha: float, normalize: bool) -> None:
    student, teacher, _ = draw()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = autograd(divergence(log_p, log_q, alpha, normalize), student)
    torch.testing.assert_close(divergence_gradient(log_p, log_q, alpha, normalize), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("alpha", "normalize"), ALPHAS)
def test_bucketed_gradient_is_the_derivative(alpha: float, normalize: bool, tail: bool) -> None:
    student, teacher, ids = draw()
    log_p, log_q = bucketed(student, ids, tail), bucketed(teacher, ids, tail)
    expected = autograd(divergence(log_p, log_q, alpha, normalize), student)
    per_bucket = divergence_gradient(log_p, log_q, alpha, normalize)
    torch.testing.assert_close(bucketed_gradient(per_bucket, student, ids, tail), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("alpha", "normalize"), ALPHAS)
def test_clipped_gradient_is_the_derivative(alpha: float, normalize: bool) -> None:
    student, teacher, _ = draw()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    entries = contributions(log_p, log_q, alpha, normalize)
    clip = entries.detach().quantile(0.9).item()
    assert 0 < (entries >= clip).sum() < entries.numel()
    expected = autograd(clipped_divergence(log_p, log_q, alpha, clip, normalize), student)
    actual = clipped_divergence_gradient(log_p, log_q, alpha, clip, normalize)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_sampled_and_entropy_gradients_are_the_derivatives() -> None:
    student, teacher, ids = draw()
    targets, log_q = ids[:, 0], teacher.log_softmax(-1)
    log_p = student.log_softmax(-1)
    expected = autograd(sampled_divergence(log_p, log_q, targets), student)
    torch.testing.assert_close(sampled_divergence_gradient(log_p, log_q, targets), expected, rtol=0, atol=1e-14)
    log_p = student.log_softmax(-1)
    torch.testing.assert_close(entropy_gradient(log_p), autograd(entropy(log_p), student), rtol=0, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_the_kullback_leibler_divergences_of_torch(alpha: float) -> None:
    student, teacher, _ = draw()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    under, of = (log_p, log_q) if alpha == 0 else (log_q, log_p)
    expected = functional.kl_div(under, of, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(log_p, log_q, alpha), expected)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.5, 0.1, 0.9])
def test_it_is_the_divergence_of_trl(alpha: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher, _ = draw()
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        student[:, None].detach(), teacher[:, None], beta=alpha, temperature=1.3, reduction="sum"
    )
    log_p, log_q = (student / 1.3).log_softmax(-1), (teacher / 1.3).log_softmax(-1)
    torch.testing.assert_close(divergence(log_p, log_q, alpha).sum(), expected)


def test_normalize_joins_the_ends_and_without_it_they_are_apart() -> None:
    student, teacher, _ = draw()
    log_p, log_q = (student.detach() / 3).log_softmax(-1), (teacher / 3).log_softmax(-1)
    for alpha, end in ((1e-6, 0.0), (1 - 1e-6, 1.0)):
        at_the_end = divergence(log_p, log_q, end)
        torch.testing.assert_close(divergence(log_p, log_q, alpha, True), at_the_end, rtol=1e-3, atol=0)
        assert (divergence(log_p, log_q, alpha) < 1e-5 * at_the_end).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.5])
def test_a_divergence_is_positive_and_zero_only_for_equals(alpha: float) -> None:
    student, teacher, _ = draw()
    log_p, log_q = student.log_softmax(-1).detach(), teacher.log_softmax(-1)
    assert (divergence(log_p, log_q, alpha) > 0).all()
    assert divergence(log_p, log_p, alpha).abs().max() < 1e-15
    assert divergence_gradient(log_p, log_p, alpha).abs().max() < 1e-15


def test_impossible_entries_add_nothing() -> None:
    log_p = torch.tensor([0.0, -math.inf, -math.inf], dtype=torch.float64)
    log_q = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    assert divergence(log_p, log_q, 1.0).item() == pytest.approx(math.log(2))
    assert divergence(log_p, log_p, 0.0).item() == 0
    # m = (3/4, 1/4, 0)
    expected = 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)) + 0.5 * math.log(1 / 0.75)
    assert divergence(log_p[:2], log_q[:2], 0.5).item() == pytest.approx(expected)


def test_buckets_hold_all_mass_and_lose_information() -> None:
    student, teacher, ids = draw()
    log_p, log_q = bucketed(student, ids, True), bucketed(teacher, ids, True)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(N, dtype=torch.float64))
    full = divergence(student.log_softmax(-1), teacher.log_softmax(-1), 1.0)
    assert (divergence(log_p, log_q, 1.0) < full).all()
    all_ids = torch.arange(V).expand(N, V)
    torch.testing.assert_close(bucketed(student, all_ids, False), student.log_softmax(-1))
    for tail in (True, False):
        known = teacher.log_softmax(-1).gather(-1, ids)
        torch.testing.assert_close(bucketed_logprobs(known, tail), bucketed(teacher, ids, tail))


def test_sampled_gradient_is_that_of_reverse_kl_on_average() -> None:
    student, teacher, _ = draw()
    log_p, log_q = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    mean = torch.zeros_like(log_p)
    for token in range(V):
        targets = torch.full((N,), token)
        gradient = sampled_divergence_gradient(log_p, log_q, targets)
        mean += at(log_p, targets).exp().unsqueeze(-1) * gradient
    torch.testing.assert_close(mean, divergence_gradient(log_p, log_q, 1.0), rtol=0, atol=1e-14)


def test_final_logits_apply_bias_scale_softcap_and_temperature_in_this_order() -> None:
    x, bias = torch.tensor([[1.0, -2.0]]), torch.tensor([0.5, 1.0])
    expected = [[4 * math.tanh(3 * 1.5 / 4) / 0.7, 4 * math.tanh(-3 / 4) / 0.7]]
    actual = final_logits(x, bias, scale=3.0, softcap=4.0, temperature=0.7)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def linear(**changes: object) -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    hidden, weight, teacher_hidden = (torch.randn(n, 5, generator=generator).double() for n in (N, V, N))
    arguments: dict[str, object] = {
        "student_hidden": hidden.requires_grad_(),
        "student_weight": weight.requires_grad_(),
        "teacher_hidden": teacher_hidden,
    }
    return arguments | changes


def test_gradients_reach_hidden_weight_and_bias_but_not_the_teachers_use_of_the_weight() -> None:
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    arguments = linear(alpha=0.0, student=Transform(bias=bias), token_weights=torch.tensor([1.0, 0, 2, 1, 1, 1]))
    hidden, weight, teacher_hidden = (arguments[n] for n in ("student_hidden", "student_weight", "teacher_hidden"))
    assert isinstance(hidden, Tensor)
    assert isinstance(weight, Tensor)
    assert isinstance(teacher_hidden, Tensor)
    linear_divergence_reference(**arguments).loss.backward()  # type: ignore[arg-type]
    p, q = (hidden @ weight.T + bias).softmax(-1), (teacher_hidden @ weight.T).softmax(-1)
    by_logit = torch.tensor([1.0, 0, 2, 1, 1, 1]).double().unsqueeze(-1) / 6 * (p - q)
    for leaf, expected in ((hidden, by_logit @ weight), (weight, by_logit.T @ hidden), (bias, by_logit.sum(0))):
        torch.testing.assert_close(leaf.grad, expected)


def test_trust_region_is_a_geometric_mean_of_teachers() -> None:
    second = torch.randn(N, 5, generator=torch.Generator().manual_seed(2)).double()
    arguments = linear(mix_hidden=second, mix_share=0.2)
    mixed = linear_divergence_reference(**arguments).per_token  # type: ignore[arg-type]
    hidden, weight, teacher_hidden = (arguments[n] for n in ("student_hidden", "student_weight", "teacher_hidden"))
    q = (teacher_hidden @ weight.T).softmax(-1) ** 0.8 * (second @ weight.T).softmax(-1) ** 0.2  # type: ignore[operator,union-attr]
    log_q = (q / q.sum(-1, keepdim=True)).log()
    expected = divergence((hidden @ weight.T).log_softmax(-1), log_q, 1.0)  # type: ignore[operator,union-attr]
    torch.testing.assert_close(mixed, expected.detach())


def test_rows_of_weight_zero_and_padded_columns_may_hold_anything() -> None:
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0])
    arguments = linear(token_weights=weights, target_ids=torch.tensor([0, 1, 2, 3, 4, 5]))
    expected = linear_divergence_reference(**arguments)  # type: ignore[arg-type]
    spoiled = {n: t.detach().clone() if isinstance(t, Tensor) else t for n, t in arguments.items()}
    spoiled["student_hidden"][1] = math.nan  # type: ignore[index]
    spoiled["target_ids"][4] = -100  # type: ignore[index]
    padding = torch.full((3, 5), math.nan, dtype=torch.float64)
    spoiled["student_weight"] = torch.cat([spoiled["student_weight"], padding])  # type: ignore[list-item]
    actual = linear_divergence_reference(**spoiled, vocab_size=V)  # type: ignore[arg-type]
    for value, same in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, same)
    assert expected.per_token[1] == 0
    assert expected.active_tokens == 4


def test_importance_multiplies_up_to_the_clip_and_carries_no_gradient() -> None:
    targets = torch.arange(N)
    plain = linear(target_ids=targets)
    output = linear_divergence_reference(**plain, reduction="none")  # type: ignore[arg-type]
    assert output.student_logprobs is not None
    old = output.student_logprobs - torch.tensor([0.0, 0.1, -1.0, 0.6, 5.0, 0.7]).double()
    clipped = linear(target_ids=targets, old_logprobs=old, importance_clip=1.9)
    actual = linear_divergence_reference(**clipped, reduction="none")  # type: ignore[arg-type]
    factor = torch.tensor([1.0, math.exp(0.1), math.exp(-1), math.exp(0.6), 1.9, 1.9]).double()
    torch.testing.assert_close(actual.loss, factor * output.loss)
    actual.loss.sum().backward()
    (output.loss * factor).sum().backward()
    torch.testing.assert_close(clipped["student_hidden"].grad, plain["student_hidden"].grad)  # type: ignore[attr-defined]


@pytest.mark.parametrize("noise", [1e-8, 1e-6, 1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_divergence_keeps_its_digits_however_near_the_teacher_is(alpha: float, noise: float) -> None:
    student, far, _ = draw()
    student = student.detach()
    log_p, log_q = student.log_softmax(-1), (student + noise * far).log_softmax(-1)
    assert (divergence(log_p, log_q, alpha) >= 0).all()
    for row in range(N):
        with mpmath.workdps(60):
            z, y = ([mpmath.mpf(x) for x in side[row].tolist()] for side in (student, student + noise * far))
            p, q = ([mpmath.exp(x) / mpmath.fsum(map(mpmath.exp, side)) for x in side] for side in (z, y))
            m = [(1 - alpha) * a + alpha * b for a, b in zip(p, q, strict=True)] if 0 < alpha < 1 else None
            terms = {0.0: [(1, q, p)], 1.0: [(1, p, q)]}.get(alpha, [(alpha, q, m), (1 - alpha, p, m)])
            exact = mpmath.fsum(w * a * mpmath.log(a / b) for w, s, t in terms for a, b in zip(s, t, strict=True))
        # Each log-ratio may have a rounding of the largest log-probability in it.
        assert float(divergence(log_p, log_q, alpha)[row]) == pytest.approx(float(exact), rel=1e-13 + 1e-14 / noise)
        assert float(textbook_divergence(log_p, log_q, alpha)[row]) == pytest.approx(float(exact), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_divergence_has_the_gradient_of_the_textbooks_sum(alpha: float) -> None:
    student, teacher, _ = draw()
    for log_q in ((student.detach() + 1e-3 * teacher).log_softmax(-1), (300 * teacher).log_softmax(-1)):
        ours, textbooks = (
            autograd(form(student.log_softmax(-1), log_q, alpha), student) for form in (divergence, textbook_divergence)
        )
        torch.testing.assert_close(ours, textbooks, rtol=1e-13, atol=1e-14)
