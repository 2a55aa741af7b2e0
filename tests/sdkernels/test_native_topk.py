"""The compiled top-k divergences against float64, on logits at hand.

Through the public operations they are tested in `test_divergence.py`, `test_accuracy.py` and `test_topk.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from sdkernels.reference import at, bucketed, bucketed_logprobs, divergence, entropy
from sdkernels.testing import assert_within
from sdkernels.tile import native_backend, torch_backend
from sdkernels.types import Objective, RowValues, TileRows

pytestmark = pytest.mark.skipif(not native_backend.is_available(), reason="this machine has no C compiler")

ALPHAS = (0.0, 0.3, 1.0)
TEACHERS = ("gap", "logits", "cached")


class Case(NamedTuple):
    """Rows of logits and their teacher, in one of the forms that it is given in."""

    student: Tensor  # (C, V)
    gap: Tensor  # (C, V)
    teacher: str
    ids: Tensor  # (C, K) of a cached teacher
    logprobs: Tensor  # (C, K) of a cached teacher

    @property
    def teacher_logits(self) -> Tensor | None:
        return {"gap": self.gap, "logits": self.student + self.gap, "cached": None}[self.teacher]

    def rows(self) -> TileRows:
        is_cached = self.teacher == "cached"
        return TileRows(
            teacher_is_gap=self.teacher == "gap",
            target_ids=torch.arange(len(self.student)) % self.student.shape[1],
            teacher_ids=self.ids if is_cached else None,
            teacher_logprobs=self.logprobs if is_cached else None,
        )


def make_case(
    rows: int, vocab: int, k: int, *, teacher: str, noise: float = 0.1, spread: float = 2.0, seed: int = 0
) -> Case:
    draw = torch.Generator().manual_seed(seed)
    student, gap = (torch.randn(rows, vocab, generator=draw) for _ in range(2))
    ids = torch.stack([torch.randperm(vocab, generator=draw)[:k] for _ in range(rows)])
    logprobs = torch.randn(rows, k, generator=draw).log_softmax(-1) - 0.1  # a tenth of the mass is elsewhere
    return Case(spread * student, noise * gap, teacher, ids, logprobs)


def tile(case: Case, *, backend: Any = native_backend, **objective: Any) -> tuple[RowValues, Tensor]:
    teacher = case.teacher_logits
    return backend.divergence_tile(
        case.student.clone(),
        None if teacher is None else teacher.clone(),
        case.rows(),
        Objective(support="topk", **objective),
        want_gradient=True,
    )


def exact(case: Case, alpha: float, topk: int, topk_of: str, tail: bool) -> tuple[Tensor, Tensor]:
    """Loss (C,) and gradient (C, V) of float64."""
    z = case.student.double().requires_grad_()
    tail = tail and topk < z.shape[1]
    if case.teacher == "cached":
        ids, teacher = case.ids, bucketed_logprobs(case.logprobs.double(), tail)
    else:
        logits = z.detach() + case.gap.double() if case.teacher == "gap" else (case.student + case.gap).double()
        ids = (case.student if topk_of == "student" else case.student + case.gap).topk(topk).indices
        teacher = bucketed(logits, ids, tail)
    loss = divergence(bucketed(z, ids, tail), teacher, alpha)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("alpha", ALPHAS)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 300),
    share=st.floats(0.0, 1.0),
    topk_of=st.sampled_from(["student", "teacher"]),
    tail=st.booleans(),
    log_noise=st.floats(-4.0, 0.9),
    spread=st.floats(0.1, 8.0),
    seed=st.integers(0, 9999),
)
@example(rows=3, vocab=2, share=0.4, topk_of="teacher", tail=True, log_noise=-2.31483321, spread=0.1, seed=6389)
def test_a_tile_is_what_float64_makes_of_the_same_logits(
    teacher: str,
    alpha: float,
    rows: int,
    vocab: int,
    share: float,
    topk_of: str,
    tail: bool,
    log_noise: float,
    spread: float,
    seed: int,
) -> None:
    topk = max(1, round(share * vocab))
    if teacher == "cached":
        tail = tail and topk < vocab
    case = make_case(rows, vocab, topk, teacher=teacher, noise=10.0**log_noise, spread=spread, seed=seed)
    values, gradient = tile(case, alpha=alpha, topk=topk, topk_of=topk_of, tail=tail)
    loss, slope = exact(case, alpha, topk, topk_of, tail)
    # A log-ratio may have a rounding of the largest gap in it, or of the largest logit where that is what is given. The
    # loss is half its mean square, about.
    given = case.gap.abs() if teacher == "gap" else torch.maximum(case.student.abs(), (case.student + case.gap).abs())
    rounding = 4e-7 * given.double().amax(1)
    if teacher != "gap":  # the masses of both sides are sums of exponentials, each off by a rounding of its own
        rounding = rounding.clamp(min=2**-23)
    assert_within(values.loss, loss, 1e-6 * loss + rounding * (2 * loss).sqrt() + rounding**2)
    # Each entry is its probability times a mean of log-ratios, whose parts may cancel.
    p = case.student.double().softmax(-1)
    size = slope.norm() + (p * case.gap).norm() + (p * rounding[:, None]).norm() / 1e-6
    assert (gradient - slope).norm() <= 2e-6 * size + 1e-9


@pytest.mark.parametrize("teacher", TEACHERS)
def test_entropies_and_log_probabilities_are_those_of_the_whole_vocabulary(teacher: str) -> None:
    case = make_case(7, 301, 5, teacher=teacher)
    values, _ = tile(case, topk=5)
    targets = case.rows().target_ids
    assert targets is not None
    log_p = case.student.double().log_softmax(-1)
    found = [(values.student_entropy, entropy(log_p)), (values.student_logprobs, at(log_p, targets))]
    if teacher == "cached":
        assert values.teacher_entropy is None
        assert values.teacher_logprobs is None
    else:
        log_q = (case.student.double() + case.gap).log_softmax(-1)
        found += [(values.teacher_entropy, entropy(log_q)), (values.teacher_logprobs, at(log_q, targets))]
    for value, expected in found:
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


ORDERS = {
    "random": lambda z: z,
    "ascending": lambda z: z.sort(-1).values,  # each is a candidate when it is seen
    "descending": lambda z: z.sort(-1, descending=True).values,
    "in few steps": lambda z: (2 * z).round(),
    "all the same": torch.ones_like,
    "mostly excluded": lambda z: z.masked_fill(z < 1.0, -torch.inf),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("topk_of", ["student", "teacher"])
@pytest.mark.parametrize(
    ("vocab", "topk"), [(1, 1), (63, 1), (507, 100), (5000, 1), (5000, 100), (5000, 3000), (64, 64)]
)
def test_the_listed_ids_are_those_of_the_largest_logits(order: str, topk_of: str, vocab: int, topk: int) -> None:
    chooser = ORDERS[order](make_case(3, vocab, topk, teacher="logits").student)
    other = torch.randn_like(chooser)
    student, teacher = (chooser, other) if topk_of == "student" else (other, chooser)
    _, gradient = native_backend.divergence_tile(
        student.clone(),
        teacher.clone(),
        TileRows(),
        Objective(alpha=0.0, support="topk", topk=topk, topk_of=topk_of, tail=False),
        want_gradient=True,
    )
    assert gradient is not None
    if order == "mostly excluded":  # with logits of -inf on one side no divergence is finite
        return
    for row, listed in zip(chooser, gradient != 0, strict=True):
        if topk > 1:  # one bucket alone has no gradient
            assert listed.sum() == topk
            assert row[listed].sort().values.equal(row.topk(topk).values.sort().values)


def test_of_equal_logits_the_first_are_listed() -> None:
    case = make_case(2, 700, 9, teacher="logits")
    student = torch.zeros(2, 700)
    student[:, 650:653] = 1.0
    _, gradient = tile(case._replace(student=student), alpha=0.0, topk=9, tail=False)
    assert [row.nonzero()[:, 0].tolist() for row in gradient] == [[*range(6), 650, 651, 652]] * 2


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_row_is_the_same_whatever_the_threads_and_the_columns_beyond_it(teacher: str) -> None:
    case = make_case(37, 3001, 40, teacher=teacher)
    threads, found = torch.get_num_threads(), []
    wide = [torch.full((37, 3017), torch.nan) for _ in range(2)]
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(tile(case, alpha=0.5, topk=40))
    finally:
        torch.set_num_threads(threads)
    given = case.teacher_logits
    inside = [
        buffer[:, :3001].copy_(side)
        for buffer, side in zip(wide, (case.student, given), strict=True)
        if side is not None
    ]
    objective = Objective(alpha=0.5, support="topk", topk=40)
    found.append(
        native_backend.divergence_tile(
            inside[0], inside[1] if given is not None else None, case.rows(), objective, want_gradient=True
        )
    )
    for values, gradient in found[1:]:
        assert torch.equal(values.loss, found[0][0].loss)
        assert torch.equal(gradient, found[0][1])
    assert wide[0][:, 3001:].isnan().all()


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", [True, False])
def test_where_a_row_is_not_finite_is_where_the_torch_backend_has_it(teacher: str, alpha: float, tail: bool) -> None:
    case = make_case(7, 333, 5, teacher=teacher)
    case.student[1, 3], case.student[3, 5], case.student[6, 9] = torch.nan, torch.inf, -torch.nan
    case.gap[2, 332], case.gap[5, 7] = torch.nan, torch.inf
    ours, theirs = (tile(case, backend=one, alpha=alpha, topk=5, tail=tail) for one in (native_backend, torch_backend))
    assert ours[0].loss.isfinite().tolist() == theirs[0].loss.isfinite().tolist()
    assert ours[1].isfinite().all(1).equal(theirs[1].isfinite().all(1))
    assert 1 < ours[0].loss.isfinite().sum() < 7


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_row_whose_tail_floats_cannot_tell_is_the_torch_backends_and_the_others_are_not(
    alpha: float, side: str
) -> None:
    case = make_case(4, 200, 3, teacher="logits")
    plain, plain_gradient = tile(case, alpha=alpha, topk=3)
    changed = case._replace(student=case.student.clone(), gap=case.gap.clone())
    top = changed.student[2].topk(3).indices
    changed.student[2, top] += 90.0
    if side == "teacher":  # the student's tail is as before, the teacher's is not
        changed.student[2, top] -= 90.0
        changed.gap[2, top] += 90.0
    values, gradient = tile(changed, alpha=alpha, topk=3)
    expected, expected_gradient = tile(changed, backend=torch_backend, alpha=alpha, topk=3)
    assert torch.equal(values.loss[2], expected.loss[2])
    assert torch.equal(gradient[2], expected_gradient[2])
    others = [0, 1, 3]
    assert torch.equal(values.loss[others], plain.loss[others])
    assert torch.equal(gradient[others], plain_gradient[others])


def test_ids_outside_the_vocabulary_are_not_looked_up() -> None:
    case = make_case(3, 50, 4, teacher="cached")
    for wrong in (-1, 50, 1 << 40):
        case.ids[1, 2] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            tile(case, topk=4)


def test_the_normalised_divergence_is_the_plain_one_times_a_factor() -> None:
    case = make_case(5, 90, 7, teacher="gap")
    plain, plain_gradient = tile(case, alpha=0.3, topk=7)
    values, gradient = tile(case, alpha=0.3, topk=7, normalize=True)
    torch.testing.assert_close(values.loss, plain.loss / (0.3 * 0.7), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, plain_gradient / (0.3 * 0.7), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_scale_and_temperature_are_those_of_the_final_logits(teacher: str) -> None:
    case = make_case(5, 90, 7, teacher=teacher)
    head = {"student": (1.3, None, 0.7), "teacher": (1.3, None, 0.7)}
    ours, theirs = (tile(case, backend=one, alpha=0.5, topk=7, **head) for one in (native_backend, torch_backend))
    torch.testing.assert_close(ours[0].loss, theirs[0].loss, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-6)
