"""Compares our `LigerFusedLinearJSDLoss` with Liger's: the same where Liger is right, and each of its faults shown.

Liger runs uncompiled. Truth, where the two differ, is the plain computation in float64.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sdcore.errors import ArgumentError
from sdcore.integrations.liger import LigerFusedLinearJSDLoss
from sdkernels.live_bytes import LiveBytes

N, H, HT, V, IGNORE = 37, 12, 9, 53, -100


class Inputs(NamedTuple):
    student: Tensor  # (N, H)
    student_weight: Tensor  # (V, H)
    teacher: Tensor  # (N, Ht)
    teacher_weight: Tensor  # (V, Ht)
    labels: Tensor  # (N,)
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None


def inputs(
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    ignored: float = 0.3,
    gap: float = 1.0,
    rows: int = N,
    vocab: int = V,
) -> Inputs:
    """Draws states, heads and labels; `gap` says how far the teacher is from the student, below 1 they share a head."""
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    student, weight, labels = normal(rows, H), normal(vocab, H), torch.randint(vocab, (rows,), generator=draw)
    labels[torch.rand(rows, generator=draw) < ignored] = IGNORE
    other = (normal(rows, HT), normal(vocab, HT))
    teacher, teacher_weight = other if gap == 1 else (student + gap * normal(rows, H), weight)
    biases = (normal(vocab), normal(vocab)) if bias else (None, None)
    given = (student, weight, teacher, teacher_weight, labels, *biases)
    return Inputs(*(x.to(dtype) if x is not None and x.is_floating_point() else x for x in given))


def run(loss: Any, given: Inputs, upstream: float = 1.0) -> tuple[Tensor, ...]:
    """Returns the value, and the gradients of student, head and bias."""
    leaves = [tensor.clone().requires_grad_() for tensor in given[:2]]
    bias = None if given.student_bias is None else given.student_bias.clone().requires_grad_()
    value = loss(*leaves, *given[2:5], bias, given.teacher_bias)
    value = value[0] if isinstance(value, tuple) else value
    (upstream * value).backward()
    return (value.detach(), *(leaf.grad for leaf in (*leaves, bias) if leaf is not None))


def theirs(**options: Any) -> Any:
    peer = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    return peer.LigerFusedLinearJSDLoss(compiled=False, **options)


def truth(given: Inputs, *, beta: float = 0.5, hard: float = 0.5, soft: float = 0.5, temperature: float = 1.0) -> Any:
    """Computes the definition in float64, on the given numbers."""
    wide = Inputs(*(x.double() if x is not None and x.is_floating_point() else x for x in given))

    def definition(
        student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor, bias: Any, other: Any
    ) -> Tensor:
        on = labels != IGNORE
        student, teacher = student[on], teacher[on]
        z = student @ weight.T + (0 if bias is None else bias)
        t = teacher @ teacher_weight[: len(weight)].T + (0 if other is None else other)
        log_p, log_q = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        if beta in (0, 1):
            divergence = (q * (log_q - log_p) if beta == 0 else p * (log_p - log_q)).sum()
        else:
            log_m = ((1 - beta) * p + beta * q).log()
            divergence = (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum()
        count = max(1, int(on.sum()))
        return (hard * cross_entropy(z, labels[on], reduction="sum") + soft * divergence) / count

    return run(definition, wide)


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def test_the_constructor_and_the_call_are_ligers() -> None:
    peer = type(theirs())
    for name in ("__init__", "forward"):
        ours, other = (list(inspect.signature(getattr(kind, name)).parameters.values())
                       for kind in (LigerFusedLinearJSDLoss, peer))  # fmt: skip
        positional = [argument for argument in ours if argument.kind is argument.POSITIONAL_OR_KEYWORD]
        assert [(a.name, a.default) for a in positional] == [(a.name, a.default) for a in other]
    assert set(vars(theirs())) - set(vars(torch.nn.Module())) <= set(vars(LigerFusedLinearJSDLoss()))


@pytest.mark.parametrize(
    ("weights", "temperature", "bias"),
    [((0.5, 0.5), 2.5, True), ((0.5, 0.5), 1.0, False), ((0.0, 1.0), 2.5, True), ((0.7, 0.0), 2.5, False)],
)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_value_and_gradients_are_ligers(
    beta: float, weights: tuple[float, float], temperature: float, bias: bool
) -> None:
    options = {
        "beta": beta,
        "weight_hard_loss": weights[0],
        "weight_soft_loss": weights[1],
        "temperature": temperature,
    }
    given = inputs(bias=bias)
    results = run(LigerFusedLinearJSDLoss(**options), given, upstream=3.0)
    expected = run(theirs(**options, chunk_size=16), given, upstream=3.0)
    exact = truth(given, beta=beta, hard=weights[0], soft=weights[1], temperature=temperature)
    # Liger adds up its loss in float32 whatever the inputs are, and makes its cross-entropy in it.
    assert float(results[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    for ours, other, wanted in zip(results[1:], expected[1:], exact[1:], strict=True):
        assert error(ours, other) < (1e-6 if weights[0] else 1e-10)
        assert error(ours, 3.0 * wanted) < 1e-10


@pytest.mark.parametrize("labels", ["all", "none"])
def test_where_all_rows_are_ignored_the_loss_is_0_and_so_are_gradients(labels: str) -> None:
    given = inputs(ignored=1.1 if labels == "none" else 0.0)
    results, expected = (run(kind, given) for kind in (LigerFusedLinearJSDLoss(), theirs()))
    assert float(results[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    for ours, other in zip(results[1:], expected[1:], strict=True):
        assert torch.allclose(ours, other, rtol=1e-5, atol=1e-7)
    assert labels == "all" or not any(bool(value.any()) for value in results)


def test_another_ignore_index_is_honoured() -> None:
    given = inputs(ignored=0.0)
    given.labels[::3] = 0
    assert torch.allclose(
        run(LigerFusedLinearJSDLoss(ignore_index=0), given)[1], run(theirs(ignore_index=0), given)[1], rtol=1e-5
    )


def test_soft_and_hard_loss_are_returned_before_their_weights() -> None:
    given = inputs()
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 0.3, "return_soft_hard_loss": True}
    results, expected = (kind(*given) for kind in (LigerFusedLinearJSDLoss(**options), theirs(**options)))
    assert [float(loss) for loss in results] == pytest.approx([float(loss) for loss in expected], rel=1e-6)


def test_batches_with_a_length_are_taken_as_liger_takes_them() -> None:
    given = inputs(ignored=0.2)
    shaped = given._replace(
        student=given.student[:36].view(4, 9, H),
        teacher=given.teacher[:36].view(4, 9, HT),
        labels=given.labels[:36].view(4, 9),
    )
    results, expected = (run(kind, shaped) for kind in (LigerFusedLinearJSDLoss(), theirs()))
    assert results[1].shape == (4, 9, H)
    assert error(results[1], expected[1]) < 1e-6
    assert error(results[2], expected[2]) < 1e-6


def test_options_may_be_set_between_calls() -> None:
    loss, given = LigerFusedLinearJSDLoss(), inputs()
    loss.beta, loss.temperature, loss.weight_hard_loss = 1.0, 2.0, 0.0
    assert float(loss(*given)) == pytest.approx(
        float(LigerFusedLinearJSDLoss(beta=1.0, temperature=2.0, weight_hard_loss=0.0)(*given))
    )
    loss.beta = 7.0
    with pytest.raises(ValueError, match="beta"):
        loss(*given)


# What is different.


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_teacher_near_the_student_in_bf16_is_exact_to_rounding_where_ligers_is_not(beta: float) -> None:
    given = inputs(dtype=torch.bfloat16, bias=False, gap=0.005)
    options: dict[str, Any] = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": beta}
    exact = truth(given, beta=beta, hard=0.0, soft=1.0)
    results, peer = (run(kind(**options), given) for kind in (LigerFusedLinearJSDLoss, theirs))
    ours, other = ([error(a, b) for a, b in zip(values, exact, strict=True)] for values in (results, peer))
    # The gradients that are returned are bfloat16 themselves: half a unit in the last place is 2^-9.
    assert ours[0] < 1e-3
    assert max(ours[1:]) < 2**-7
    assert min(other) > 1


def test_a_loss_in_float32_cannot_be_negative_where_ligers_is() -> None:
    given = inputs(dtype=torch.float32, bias=False, gap=3e-5, ignored=0.0)
    options: dict[str, Any] = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
    exact = float(truth(given, hard=0.0, soft=1.0)[0])
    rows = [given._replace(**{name: getattr(given, name)[i : i + 1] for name in ("student", "teacher", "labels")})
            for i in range(N)]  # fmt: skip
    ours, other = (
        [float(kind(*row)) for row in rows] for kind in (LigerFusedLinearJSDLoss(**options), theirs(**options))
    )
    assert min(ours) >= 0
    assert sum(ours) / N == pytest.approx(exact, rel=1e-2)
    assert min(other) < 0


def test_what_ignored_rows_hold_does_not_matter_where_it_spoils_ligers_gradients() -> None:
    given = inputs()
    row = int((given.labels == IGNORE).nonzero()[0, 0])
    expected = run(LigerFusedLinearJSDLoss(), given)
    given.student[row] = torch.nan
    results, peer = run(LigerFusedLinearJSDLoss(), given), run(theirs(), given)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert peer[2].isnan().all()


def test_the_weights_gradient_is_added_up_in_float32_where_ligers_is_rounded_per_chunk() -> None:
    given = inputs(dtype=torch.bfloat16, bias=False, ignored=0.0, rows=800, vocab=211)
    exact = truth(given)
    # Several chunks of rows for both; below 19 MiB not one block fits.
    results, peer = run(LigerFusedLinearJSDLoss(workspace_mb=20), given), run(theirs(chunk_size=16), given)
    assert error(results[2], exact[2]) < 2**-8 < error(peer[2], exact[2])


def test_the_loss_of_float64_inputs_is_float64_where_ligers_is_float32() -> None:
    given = inputs()
    results, peer = run(LigerFusedLinearJSDLoss(), given)[0], run(theirs(), given)[0]
    assert results.dtype == torch.float64
    assert error(results, truth(given)[0]) < 1e-12
    assert peer.dtype == torch.float32


def test_soft_and_hard_loss_have_gradients_where_ligers_are_silently_0() -> None:
    def gradient(kind: Any, index: int) -> Tensor:
        given = inputs()
        leaf = given.student.requires_grad_()
        kind(return_soft_hard_loss=True)(*given)[index].backward()
        return leaf.grad

    for index, weights in ((1, (0.0, 1.0)), (2, (1.0, 0.0))):
        exact = truth(inputs(), hard=weights[0], soft=weights[1])[1]
        assert error(gradient(LigerFusedLinearJSDLoss, index), exact) < 1e-10
        assert not gradient(theirs, index).any()


def test_a_teachers_padded_vocabulary_is_left_out_where_liger_gives_the_student_logits_of_0_there() -> None:
    given, more = inputs(), 11
    given.student.mul_(0.1)  # logits near 0, as those of the padding then
    # The padding of a head is never trained up, so the teacher gives it nothing.
    padded = given._replace(
        teacher_weight=torch.cat([given.teacher_weight, torch.zeros(more, HT).double()]),
        teacher_bias=torch.cat([given.teacher_bias, torch.full((more,), -1e4).double()]),
    )
    exact = truth(given)
    results, peer = run(LigerFusedLinearJSDLoss(), padded), run(theirs(), padded)
    assert max(error(a, b) for a, b in zip(results, exact, strict=True)) < 1e-10
    assert error(peer[0], exact[0]) > 1e-3


def test_a_frozen_head_gets_no_gradient_and_costs_none_where_liger_allocates_it() -> None:
    def probe(kind: Any) -> tuple[float, Any]:
        given = inputs(bias=False)
        given.student.requires_grad_()
        with LiveBytes() as seen:
            kind(weight_hard_loss=0.0)(*given).backward()
        return seen.matmul_count(N, V, H), given.student_weight.grad

    ours, gradient = probe(LigerFusedLinearJSDLoss)
    others, _ = probe(theirs)
    teachers = HT / H
    assert gradient is None
    assert ours < 2 + teachers <= others


def test_no_tensor_of_rows_times_vocabulary_exists_however_large_the_chunk_is() -> None:
    def largest(kind: Any, **options: Any) -> int:
        given = inputs(bias=False, dtype=torch.float32, rows=rows, vocab=vocab)
        given.student.requires_grad_()
        given.student_weight.requires_grad_()
        with LiveBytes() as seen:
            kind(**options)(*given).backward()
        return seen.largest_numel

    rows, vocab = 1200, 503
    ours = largest(LigerFusedLinearJSDLoss, chunk_size=4096, workspace_mb=20)
    assert ours < rows * vocab // 2
    assert largest(theirs, chunk_size=4096) >= rows * vocab


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"beta": 1.5}, ValueError, ["beta", "[0, 1]", "1.5"]),
        ({"beta": "half"}, TypeError, ["beta", "str"]),
        ({"temperature": 0.0}, ValueError, ["temperature", "(0", "0.0"]),
        ({"weight_hard_loss": None}, TypeError, ["weight_hard_loss", "NoneType"]),
        ({"weight_soft_loss": float("nan")}, ValueError, ["weight_soft_loss", "nan"]),
        ({"workspace_mb": 0}, ValueError, ["workspace_mb", "0"]),
    ],
)
def test_bad_options_are_refused_when_it_is_made(options: Any, kind: Any, words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        LigerFusedLinearJSDLoss(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"teacher_weight": torch.ones(V - 1, HT).double()}, ArgumentError, ["teacher_weight", "V=53", "52"]),
        ({"teacher": torch.ones(N - 1, HT).double()}, ValueError, ["teacher_input", "(37, *)", "(36, 9)"]),
        ({"labels": torch.ones(N)}, TypeError, ["true_labels", "int64", "float32"]),
        ({"labels": torch.ones(N - 1, dtype=torch.int64)}, ValueError, ["true_labels", "(37)", "(36,)"]),
        ({"labels": torch.full((N,), V)}, ValueError, ["target_ids", "[0, V=53)", "53"]),
        ({"student_weight": torch.ones(V, H + 1).double()}, ValueError, ["student_weight", "(*, 12)", "(53, 13)"]),
        ({"student_bias": torch.ones(V - 1).double()}, ValueError, ["bias", "(53)", "(52,)"]),
        ({"student": torch.ones(2, 3, H).double()}, ArgumentError, ["teacher_input", "(2, 3)", "(37, 9)"]),
    ],
)
def test_what_does_not_fit_is_refused(changes: Any, kind: Any, words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        LigerFusedLinearJSDLoss()(*inputs()._replace(**changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_liger_is_not_imported(run_python: Any) -> None:
    out = run_python("import sys, sdcore.integrations.liger; print([m for m in sys.modules if 'liger_' in m])")
    assert out.strip() == "[]"
