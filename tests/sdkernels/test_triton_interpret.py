"""The Triton kernels against the float64 definition, in Triton's interpreter on a CPU, or compiled on a GPU.

The interpreter has to be chosen before triton is imported, which other test modules (through transformers) do first. So
without a GPU this file runs itself once more in a process of its own with TRITON_INTERPRET=1, where `INTERPRETED` is
true, and everything but that one test is skipped here. With a CUDA device the tests run compiled, in this process.

C rows of a tile, V vocabulary, K ids.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdkernels import linear_divergence, reference
from sdkernels.testing import (
    allowed_error,
    assert_within_reference_error,
    make_arguments,
    make_inputs,
    relative_error,
    run_operation,
    run_reference,
)
from sdkernels.types import Objective, RowValues, TileRows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"

if INTERPRETED or COMPILED:
    from sdkernels.tile import triton_backend

in_this_process = pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="runs in a process with TRITON_INTERPRET=1")

# (C, V), the head on both sides as (scale, softcap, temperature), and whether there are biases.
TILES = {
    "one entry": ((2, 1), (1.0, None, 1.0), False),
    "one block": ((3, 63), (0.7, None, 1.7), True),
    "two blocks": ((3, 507), (1.0, None, 1.0), False),
    "soft-capped": ((3, 300), (1.3, 5.0, 0.8), True),
    "many blocks": ((1, 1000), (1.0, None, 0.9), False),
}
OBJECTIVES = {
    "forward KL": Objective(alpha=0.0),
    "reverse KL": Objective(alpha=1.0),
    "JSD": Objective(alpha=0.5),
    "JSD normalized": Objective(alpha=0.07, normalize=True),
    "JSD far end normalized": Objective(alpha=0.97, normalize=True),
    "forward KL, clipped": Objective(alpha=0.0, entry_clip=0.005),
    "reverse KL, clipped": Objective(alpha=1.0, entry_clip=0.005),
    "JSD, clipped": Objective(alpha=0.4, entry_clip=0.002),
    "JSD normalized, clipped": Objective(alpha=0.4, normalize=True, entry_clip=0.01),
    "sampled": Objective(support="sampled"),
    "forward KL, student top-k": Objective(alpha=0.0, support="topk", topk=5),
    "reverse KL, teacher top-k": Objective(alpha=1.0, support="topk", topk=20, topk_of="teacher"),
    "JSD, student top-k": Objective(alpha=0.3, support="topk", topk=7, normalize=True),
    "forward KL, teacher top-k without tail": Objective(
        alpha=0.0, support="topk", topk=6, topk_of="teacher", tail=False
    ),
    "reverse KL, student top-k without tail": Objective(alpha=1.0, support="topk", topk=40, tail=False),
    "JSD, teacher top-k without tail": Objective(alpha=0.5, support="topk", topk=3, topk_of="teacher", tail=False),
}
CACHED = {
    "forward KL": Objective(alpha=0.0, support="topk", topk=4),
    "reverse KL": Objective(alpha=1.0, support="topk", topk=4),
    "JSD": Objective(alpha=0.6, support="topk", topk=4),
    "reverse KL without tail": Objective(alpha=1.0, support="topk", topk=4, tail=False),
}


def for_vocabulary(objective: Objective, vocab: int, head: tuple[float, float | None, float]) -> Objective:
    """The objective with a head on both sides and a k that V allows."""
    fields = vars(objective) | {"topk": min(objective.topk, vocab), "student": head, "teacher": head}
    return Objective(**fields)


def make_tile(
    count: int, vocab: int, *, noise: float = 1.0, std: float = 3.0, bias: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, TileRows]:
    """Raw projections (C, V) of student and teacher, and the rest; everything float32."""
    generator = torch.Generator().manual_seed(seed)
    student = std * torch.randn(count, vocab, generator=generator)
    teacher = student + noise * torch.randn(count, vocab, generator=generator)
    biases = torch.randn(2, vocab, generator=generator).to(DEVICE)
    rows = TileRows(
        student_bias=biases[0] if bias else None,
        teacher_bias=biases[1] if bias else None,
        target_ids=torch.randint(vocab, (count,), generator=generator).to(DEVICE),
    )
    return student.to(DEVICE), teacher.to(DEVICE), rows


def logits_in(
    dtype: torch.dtype, projection: Tensor, bias: Tensor | None, head: tuple[float, float | None, float]
) -> Tensor:
    scale, softcap, temperature = head
    z = scale * (projection.to(dtype) + (0.0 if bias is None else bias.to(dtype)))
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def defined_loss(
    z: Tensor, z_teacher: Tensor | None, rows: TileRows, objective: Objective, ids: Tensor | None
) -> Tensor:
    """Loss per row (C,) of final logits, by the definitions, in their dtype."""
    log_p = z.log_softmax(-1)
    divergence = reference.divergence if z.dtype == torch.float64 else reference.textbook_divergence
    alpha, normalize = objective.alpha, objective.normalize
    if rows.teacher_ids is not None:
        tail = objective.tail and rows.teacher_ids.shape[1] < z.shape[1]
        teacher = reference.bucketed_logprobs(rows.teacher_logprobs.to(z.dtype), tail)
        return divergence(reference.bucketed(z, rows.teacher_ids, tail), teacher, alpha, normalize)
    log_q = z_teacher.log_softmax(-1)
    if objective.support == "sampled":
        return reference.sampled_divergence(log_p, log_q, rows.target_ids)
    if objective.support == "topk":
        tail = objective.tail and objective.topk < z.shape[1]
        sides = (reference.bucketed(side, ids, tail) for side in (z, z_teacher))
        return divergence(*sides, alpha, normalize)
    if objective.entry_clip is not None:
        return reference.clipped_divergence(log_p, log_q, alpha, objective.entry_clip, normalize)
    return divergence(log_p, log_q, alpha, normalize)


def defined(
    dtype: torch.dtype, student: Tensor, teacher: Tensor | None, rows: TileRows, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Loss (C,) and its gradient (C, V) with respect to the raw projection, by autograd in `dtype`."""
    projection = student.detach().to(dtype, copy=True).requires_grad_()
    z = logits_in(dtype, projection, rows.student_bias, objective.student)
    z_teacher = None if teacher is None else logits_in(dtype, teacher, rows.teacher_bias, objective.teacher)
    ids = None
    if objective.support == "topk" and teacher is not None:
        # Selected in float64 for every dtype, so that all look at the same support.
        side, bias, head = (
            (student, rows.student_bias, objective.student)
            if objective.topk_of == "student"
            else (teacher, rows.teacher_bias, objective.teacher)
        )
        ids = logits_in(torch.float64, side, bias, head).topk(objective.topk, -1).indices
    loss = defined_loss(z, z_teacher, rows, objective, ids)
    (gradient,) = torch.autograd.grad(loss.sum(), projection)
    return loss.detach(), gradient


def nudged(tensor: Tensor | None, seed: int) -> Tensor | None:
    """Each entry moved to one of its two neighbours in float32: the rounding that any float32 projection has."""
    if tensor is None:
        return None
    up = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.device) < 0.5
    return torch.nextafter(tensor, torch.where(up, torch.inf, -torch.inf).to(tensor.dtype))


def naive_runs(
    student: Tensor, teacher: Tensor | None, run: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """A float32 run of the definition on the inputs and on two roundings of them.

    One run alone is no measure where a result is a handful of numbers: it can hit them by luck.
    """
    return [run(student, teacher)] + [run(nudged(student, seed), nudged(teacher, seed + 10)) for seed in range(2)]


def assert_accurate(actual: Tensor, exact: Tensor, naive: list[Tensor], name: str) -> None:
    """Within twice the error of the worst naive run, plus rounding."""
    assert actual.shape == exact.shape, name
    allowed = allowed_error(naive, exact) + torch.finfo(actual.dtype).eps
    assert relative_error(actual, exact) <= allowed, name


def assert_tile_is_exact(student: Tensor, teacher: Tensor | None, rows: TileRows, objective: Objective) -> None:
    """Every value and the gradient against float64."""
    exact = defined(torch.float64, student, teacher, rows, objective)
    naive = naive_runs(student, teacher, lambda s, t: defined(torch.float32, s, t, rows, objective))
    values, gradient = run_tile(student, teacher, rows, objective)
    assert_accurate(values.loss, exact[0], [run[0] for run in naive], "loss")
    assert_accurate(gradient, exact[1], [run[1] for run in naive], "gradient")
    assert_by_products_are_exact("student", student, rows, objective, values.student_logprobs, values.student_entropy)
    if teacher is None:
        assert values.teacher_logprobs is None
        assert values.teacher_entropy is None
    else:
        assert_by_products_are_exact(
            "teacher", teacher, rows, objective, values.teacher_logprobs, values.teacher_entropy
        )


def run_tile(
    student: Tensor, teacher: Tensor | None, rows: TileRows, objective: Objective, **options: Any
) -> tuple[RowValues, Tensor | None]:
    """The function under test on copies, because it destroys its inputs."""
    copies = (student.clone(), None if teacher is None else teacher.clone())
    return triton_backend.divergence_tile(*copies, rows, objective, **{"want_gradient": True} | options)


def assert_by_products_are_exact(
    side: str, projection: Tensor, rows: TileRows, objective: Objective, logprobs: Tensor, entropy: Tensor
) -> None:
    bias, head = getattr(rows, f"{side}_bias"), getattr(objective, side)

    def by_products(dtype: torch.dtype, tensor: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits_in(dtype, tensor, bias, head).log_softmax(-1)
        return reference.at(log_p, rows.target_ids), reference.entropy(log_p)

    exact = by_products(torch.float64, projection)
    naive = naive_runs(projection, None, lambda tensor, _: by_products(torch.float32, tensor))
    assert_accurate(logprobs, exact[0], [run[0] for run in naive], f"{side} log-probability")
    assert_accurate(entropy, exact[1], [run[1] for run in naive], f"{side} entropy")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(INTERPRETED or COMPILED, reason="is what runs this file interpreted")
def test_the_kernels_match_the_definition_in_the_interpreter() -> None:
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-W",
            "ignore",
            __file__,
        ],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@in_this_process
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_matches_the_definition(name: str, tile: str) -> None:
    (count, vocab), head, bias = TILES[tile]
    student, teacher, rows = make_tile(count, vocab, bias=bias)
    assert_tile_is_exact(student, teacher, rows, for_vocabulary(OBJECTIVES[name], vocab, head))


@in_this_process
@pytest.mark.parametrize("vocab", [4, 63, 300])
@pytest.mark.parametrize("name", CACHED)
def test_a_cached_teacher_matches_the_definition(name: str, vocab: int) -> None:
    student, _, rows = make_tile(3, vocab, bias=True, seed=2)
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:4] for _ in range(3)])
    # With all of the vocabulary listed there is no tail, and no mass for it.
    listed = torch.randn(3, 4 if vocab == 4 else 5, generator=generator).log_softmax(-1)[:, :4]
    rows = TileRows(
        student_bias=rows.student_bias,
        target_ids=rows.target_ids,
        teacher_ids=ids.to(DEVICE),
        teacher_logprobs=listed.to(DEVICE),
    )
    assert_tile_is_exact(student, None, rows, for_vocabulary(CACHED[name], vocab, (1.0, None, 0.8)))


@in_this_process
def test_a_cached_teacher_without_mass_to_spare_gives_finite_numbers() -> None:
    student, _, _ = make_tile(2, 40)
    ids = torch.arange(3, device=DEVICE).expand(2, 3)
    rows = TileRows(teacher_ids=ids, teacher_logprobs=torch.full((2, 3), math.log(1 / 3) + 1e-6, device=DEVICE))
    for alpha in (0.0, 0.5, 1.0):
        values, gradient = run_tile(student, None, rows, Objective(alpha=alpha, support="topk", topk=3))
        assert torch.isfinite(values.loss).all()
        assert torch.isfinite(gradient).all()


@in_this_process
@pytest.mark.parametrize("name", ["forward KL", "reverse KL, teacher top-k", "sampled"])
def test_student_and_teacher_have_heads_of_their_own(name: str) -> None:
    student, teacher, rows = make_tile(3, 300, bias=True, seed=4)
    rows = TileRows(student_bias=None, teacher_bias=rows.teacher_bias, target_ids=rows.target_ids)
    fields = vars(OBJECTIVES[name]) | {"student": (1.0, 7.0, 1.2), "teacher": (0.8, None, 0.9)}
    assert_tile_is_exact(student, teacher, rows, Objective(**fields))


@in_this_process
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gradients_are_within_a_tolerance_by_fewer_columns(alpha: float) -> None:
    inputs = make_inputs(80, 16, 700, logit_std=5.0, noise=0.3, device=DEVICE)
    sides = (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden)
    found = {}
    for tolerance in (None, 0.02):
        output = linear_divergence(*sides, alpha=alpha, backend="triton", gradient_tolerance=tolerance)
        found[tolerance] = torch.autograd.grad(output.loss, sides[:2])
    assert output.gradient_error is not None
    for right, got, said in zip(found[None], found[0.02], output.gradient_error.tolist(), strict=True):
        assert 1e-4 < relative_error(got, right) <= 0.02
        assert said == pytest.approx(relative_error(got, right), rel=0.5)


@in_this_process
@pytest.mark.parametrize("noise", [0.3, 0.03, 0.003])
@pytest.mark.parametrize("name", ["forward KL", "reverse KL", "JSD", "JSD, student top-k", "reverse KL, clipped"])
def test_a_teacher_near_the_student_costs_no_digits(name: str, noise: float) -> None:
    """The textbook sums lose 2e-3 to 0.3 of the loss here (design, section 3)."""
    student, teacher, rows = make_tile(2, 1000, noise=noise, std=2.0, seed=5)
    fields = vars(OBJECTIVES[name]) | ({"entry_clip": 10.0} if "clipped" in name else {})
    objective = Objective(**fields)
    exact_loss, exact_gradient = defined(torch.float64, student, teacher, rows, objective)
    values, gradient = run_tile(student, teacher, rows, objective)
    assert (values.loss > 0).all()
    assert relative_error(values.loss, exact_loss) < 1e-5
    # Of u = log q - log p, float32 logits near 5 leave 5e-7, so this much of the gradient is the inputs' own rounding.
    assert relative_error(gradient, exact_gradient) < 1e-5 + 1e-6 / noise


@in_this_process
@pytest.mark.parametrize(
    "name", ["forward KL", "JSD, clipped", "sampled", "reverse KL, teacher top-k", "JSD, teacher top-k without tail"]
)
def test_a_16_bit_gradient_is_the_32_bit_one_and_lies_in_the_students_memory(name: str) -> None:
    student, teacher, rows = make_tile(2, 507, seed=6)
    _, expected = run_tile(student, teacher, rows, OBJECTIVES[name])
    _, gradient = triton_backend.divergence_tile(
        student, teacher, rows, OBJECTIVES[name], want_gradient=True, gradient_dtype=torch.bfloat16
    )
    assert gradient.untyped_storage().data_ptr() == student.untyped_storage().data_ptr()
    assert gradient.stride() == (2 * 507, 1)
    # The interpreter cuts bits off where a GPU rounds; nothing else may differ.
    if COMPILED:
        assert torch.equal(gradient, expected.to(torch.bfloat16))
    torch.testing.assert_close(gradient.float(), expected, rtol=2**-7, atol=1e-38)


@in_this_process
@pytest.mark.parametrize("columns", [320, 330], ids=["on multiples of 16", "on no such multiples"])
@pytest.mark.parametrize("head", [(1.0, None, 1.0), (1.3, 5.0, 0.8)], ids=["plain", "soft-capped"])
@pytest.mark.parametrize("name", ["JSD", "forward KL", "forward KL, student top-k", "reverse KL, clipped", "sampled"])
def test_rows_may_be_padded_with_anything(name: str, head: tuple[float, float | None, float], columns: int) -> None:
    vocab = 301
    student, teacher, rows = make_tile(3, vocab, bias=True, seed=7)
    objective = for_vocabulary(OBJECTIVES[name], vocab, head)
    values, gradient = run_tile(student, teacher, rows, objective)
    for filling in (torch.nan, torch.inf, 1e30):
        padded = torch.full((2, 3, columns), filling, device=DEVICE)
        padded[0, :, :vocab], padded[1, :, :vocab] = student, teacher
        padded_values, padded_gradient = triton_backend.divergence_tile(
            padded[0, :, :vocab], padded[1, :, :vocab], rows, objective, want_gradient=True
        )
        # Other strides are other layouts on a GPU: sums are taken in another order.
        assert relative_error(padded_values.loss, values.loss) < 1e-6
        assert relative_error(padded_gradient, gradient) < 1e-6
        kept = 304 if columns == 320 else vocab
        expected = torch.full_like(padded[:, :, kept:], filling)
        torch.testing.assert_close(padded[:, :, kept:], expected, rtol=0, atol=0, equal_nan=True)


@in_this_process
@pytest.mark.parametrize("name", OBJECTIVES)
def test_logits_of_ten_thousand_give_numbers(name: str) -> None:
    student, teacher, rows = make_tile(1, 300, std=1e4, noise=1e4, seed=8)
    values, gradient = run_tile(student, teacher, rows, OBJECTIVES[name])
    assert all(torch.isfinite(value).all() for value in values)
    assert torch.isfinite(gradient).all()
    exact_loss, _ = defined(torch.float64, student, teacher, rows, OBJECTIVES[name])
    assert relative_error(values.loss, exact_loss) < 1e-5


@in_this_process
@pytest.mark.parametrize("name", ["forward KL", "reverse KL", "JSD", "JSD, clipped", "reverse KL, teacher top-k"])
def test_a_token_that_both_sides_forbid_does_not_count(name: str) -> None:
    student, teacher, rows = make_tile(2, 300, seed=9)
    forbidden = torch.arange(300, device=DEVICE) % 7 == 3
    forbidden[rows.target_ids] = False
    expected, _ = run_tile(
        student[:, ~forbidden].contiguous(), teacher[:, ~forbidden].contiguous(), TileRows(), OBJECTIVES[name]
    )
    student[:, forbidden], teacher[:, forbidden] = -torch.inf, -torch.inf
    values, gradient = run_tile(student, teacher, TileRows(), OBJECTIVES[name])
    assert relative_error(values.loss, expected.loss) < 1e-6
    assert relative_error(values.student_entropy, expected.student_entropy) < 1e-6
    assert (gradient[:, forbidden] == 0).all()


@in_this_process
@pytest.mark.parametrize(("side", "poison"), [("student", torch.nan), ("teacher", torch.inf)])
@pytest.mark.parametrize(
    "name", ["forward KL", "reverse KL", "JSD", "JSD, clipped", "forward KL, student top-k", "sampled"]
)
def test_non_finite_logits_reach_the_result_of_their_row_and_no_other(name: str, side: str, poison: float) -> None:
    student, teacher, rows = make_tile(3, 300, seed=10)
    expected, expected_gradient = run_tile(student, teacher, rows, OBJECTIVES[name])
    {"student": student, "teacher": teacher}[side][1, 17] = poison
    values, gradient = run_tile(student, teacher, rows, OBJECTIVES[name])
    assert not torch.isfinite(values.loss[1])
    assert not torch.isfinite(gradient[1]).all()
    for row in (0, 2):
        assert torch.equal(values.loss[row], expected.loss[row])
        assert torch.equal(gradient[row], expected_gradient[row])


@in_this_process
@pytest.mark.parametrize("head", [(1.0, None, 1.0), (1.3, 5.0, 0.8)], ids=["plain", "soft-capped"])
@pytest.mark.parametrize("upstream", ["log-probability", "entropy", "both"])
def test_logprob_tile_matches_autograd(upstream: str, head: tuple[float, float | None, float]) -> None:
    logits, _, rows = make_tile(3, 507, bias=True, seed=11)
    grad_logprobs, grad_entropy = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    if upstream == "entropy":
        grad_logprobs = None
    if upstream == "log-probability":
        grad_entropy = None

    def defined_logprobs(dtype: torch.dtype, projection: Tensor) -> tuple[Tensor, ...]:
        projection = projection.to(dtype, copy=True).requires_grad_()
        log_p = logits_in(dtype, projection, rows.student_bias, head).log_softmax(-1)
        values = reference.at(log_p, rows.target_ids), reference.entropy(log_p)
        total = sum(
            (grad.to(dtype) * value).sum()
            for grad, value in zip((grad_logprobs, grad_entropy), values, strict=True)
            if grad is not None
        )
        return *(value.detach() for value in values), *torch.autograd.grad(total, projection)

    exact = defined_logprobs(torch.float64, logits)
    naive = naive_runs(logits, None, lambda tensor, _: defined_logprobs(torch.float32, tensor))
    actual = triton_backend.logprob_tile(
        logits.clone(), rows, Objective(student=head), grad_logprobs=grad_logprobs, grad_entropy=grad_entropy
    )
    for index, name in enumerate(("log-probability", "entropy", "gradient")):
        assert_accurate(actual[index], exact[index], [run[index] for run in naive], name)


@in_this_process
def test_logprob_tile_forms_no_gradient_unasked_and_no_logprobs_without_targets() -> None:
    logits, _, rows = make_tile(2, 63)
    kept = logits.clone()
    _, _, gradient = triton_backend.logprob_tile(logits, rows, Objective())
    assert gradient is None
    assert torch.equal(logits, kept)
    logprobs, entropy, _ = triton_backend.logprob_tile(logits, TileRows(), Objective())
    assert logprobs is None
    assert entropy.shape == (2,)


@in_this_process
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (63, 63), (507, 1), (507, 100), (1000, 7), (1000, 400)])
def test_topk_tile_finds_what_a_full_sort_finds(vocab: int, k: int) -> None:
    logits, _, rows = make_tile(2, vocab, bias=True, seed=12)
    objective = Objective(student=(1.2, 9.0, 0.9))
    log_p = logits_in(torch.float64, logits, rows.student_bias, objective.student).log_softmax(-1)
    expected = log_p.topk(k, -1)
    ids, logprobs = triton_backend.topk_tile(logits, rows, objective, k)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(logprobs.double(), expected.values, rtol=0, atol=5e-6)


@in_this_process
def test_topk_tile_selects_valid_ids_among_ties() -> None:
    logits = torch.zeros(2, 300, device=DEVICE)
    logits[1, ::3] = 1.0
    ids, logprobs = triton_backend.topk_tile(logits, TileRows(), Objective(), 20)
    assert all(len(row.unique()) == 20 for row in ids)
    assert (ids[1] % 3 == 0).all()
    torch.testing.assert_close(logprobs[0], torch.full((20,), -math.log(300), device=DEVICE))


@in_this_process
@pytest.mark.parametrize("gradient", ["in_forward", "recompute"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_loss_scale_costs_float16_no_digits(alpha: float, gradient: str) -> None:
    inputs = make_inputs(12, 16, 301, noise=1e-2, masked=0.2, dtype=torch.float16, device=DEVICE)
    scale = torch.tensor(2.0**16, device=DEVICE)
    arguments = make_arguments(inputs, "JSD", alpha=alpha, upstream=scale)
    actual = run_operation(linear_divergence, **arguments, backend="triton", gradient=gradient)
    exact, plain = run_reference(**arguments), run_reference(**arguments, naive=True)
    for name in ("hidden_gradient", "weight_gradient"):
        assert_within_reference_error(*(getattr(run, name) for run in (actual, exact, plain)), name=name)


@in_this_process
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 0.0, torch.nan])
def test_a_gradient_is_scaled_in_place_by_a_factor_on_the_device(factor: float, dtype: torch.dtype) -> None:
    gradient = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    expected = (gradient.float() * torch.tensor(factor)).to(dtype)
    kept = gradient.data_ptr()
    scaled = triton_backend.scale_(gradient, torch.tensor(factor, device=DEVICE))
    assert scaled.data_ptr() == kept
    # The interpreter cuts bits off where a GPU rounds.
    torch.testing.assert_close(scaled, expected, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)


@in_this_process
def test_a_loss_that_is_scaled_scales_its_gradients() -> None:
    inputs = make_inputs(12, 16, 301, device=DEVICE)
    factors = [torch.tensor(factor, device=DEVICE) for factor in (1.0, 3.0)]
    arguments = [make_arguments(inputs, "JSD", upstream=factor, backend="triton") for factor in factors]
    once, thrice = (run_operation(linear_divergence, **given) for given in arguments)
    for name in ("hidden_gradient", "weight_gradient"):
        torch.testing.assert_close(getattr(thrice, name), 3 * getattr(once, name))


@in_this_process
def test_an_empty_tile_gives_empty_results() -> None:
    empty = torch.empty(0, 63, device=DEVICE)
    rows = TileRows(target_ids=torch.empty(0, dtype=torch.int64, device=DEVICE))
    for objective in OBJECTIVES.values():
        values, gradient = run_tile(empty, empty, rows, for_vocabulary(objective, 63, (1.0, None, 1.0)))
        assert values.loss.shape == (0,)
        assert gradient.shape == (0, 63)


@in_this_process
def test_what_the_kernels_cannot_do_is_refused_by_name() -> None:
    student, teacher, rows = make_tile(2, 63)
    objective = Objective()
    with pytest.raises(TypeError, match=r"student_logits must be float32 .* got torch.float64"):
        run_tile(student.double(), teacher, rows, objective)
    with pytest.raises(ValueError, match=r"teacher_logits must have contiguous rows, got strides \(1, 2\)"):
        triton_backend.divergence_tile(student, teacher.t().contiguous().t(), rows, objective, want_gradient=False)
    with pytest.raises(TypeError, match=r"gradient_dtype must be .* got torch.int8"):
        run_tile(student, teacher, rows, objective, gradient_dtype=torch.int8)
    wide, wide_teacher, rows = make_tile(1, 3000)
    with pytest.raises(ValueError, match=r"topk must be below 2048 .* got 2048"):
        run_tile(wide, wide_teacher, rows, Objective(support="topk", topk=2048))


@in_this_process
@pytest.mark.parametrize("name", ["phi", "rho", "tanh"])
def test_the_series_are_as_exact_as_they_say(name: str) -> None:
    """Relative error over the interval that they are used on, in units of float32's rounding (6e-8)."""
    x = {
        "phi": torch.linspace(-0.5, 0.5, 4001),
        "rho": torch.linspace(-0.39, 0.64, 4001),
        "tanh": torch.linspace(-20, 20, 4001),
    }[name]
    x = x[x != 0].to(DEVICE)
    y = torch.empty_like(x)
    formula_kernel[(1,)](x, y, len(x), NAME=name, BLOCK=4096)
    x = x.double()
    exact = {"phi": torch.expm1(x) - x, "rho": x - torch.log1p(x), "tanh": torch.tanh(x)}[name]
    assert ((y.double() - exact) / exact).abs().max() < 6 * 2**-24


if INTERPRETED or COMPILED:
    import triton
    import triton.language as tl

    from sdkernels.tile.triton_backend import formulas

    @triton.jit
    def formula_kernel(p_x, p_y, n, NAME: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        o_x = tl.arange(0, BLOCK)
        b_x = tl.load(p_x + o_x, mask=o_x < n, other=0.1)
        if NAME == "phi":
            b_y = formulas.phi_near(b_x)
        elif NAME == "rho":
            b_y = formulas.rho_near(b_x, b_x / (2 + b_x))
        else:
            b_y = formulas.tanh(b_x)
        tl.store(p_y + o_x, b_y, mask=o_x < n)
