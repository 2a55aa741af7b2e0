"""The compiled backend: what its rows are, alone and beside others, and what happens where it cannot be had.

That it computes what the reference does is in `test_divergence.py` and `test_accuracy.py`, which run with it and
without.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from sdkernels import linear_divergence, logit_divergence
from sdkernels.driver import backends
from sdkernels.reference import divergence
from sdkernels.testing import allowed_error, assert_within, make_inputs, relative_error
from sdkernels.tile import native_backend, threads, torch_backend
from sdkernels.tile.native_backend import build
from sdkernels.types import Objective, RowValues, TileRows

needs_compiler = pytest.mark.skipif(not native_backend.is_available(), reason="this machine has no C compiler")
ALPHAS = (0.0, 0.3, 1.0)


def tile(
    student: Tensor, teacher: Tensor, /, *, backend: Any = native_backend, is_gap: bool = True, **objective: Any
) -> tuple[RowValues, Tensor]:
    rows = TileRows(teacher_is_gap=is_gap, target_ids=torch.arange(len(student)) % student.shape[1])
    values, gradient = backend.divergence_tile(
        student.clone(), teacher.clone(), rows, Objective(**objective), want_gradient=True
    )
    return values, gradient


def exact(student: Tensor, gap: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Loss (C,) and gradient (C, V) of float64."""
    z = student.double().requires_grad_()
    loss = divergence(z.log_softmax(-1), (z.detach() + gap.double()).log_softmax(-1), alpha=alpha, normalize=False)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@needs_compiler
@pytest.mark.parametrize("alpha", ALPHAS)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 300),
    log_noise=st.floats(-4.0, 0.5),
    spread=st.floats(0.1, 8.0),
    seed=st.integers(0, 9999),
)
def test_a_tile_is_what_float64_makes_of_the_same_logits(
    alpha: float, rows: int, vocab: int, log_noise: float, spread: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(rows, vocab, generator=draw)
    gap = 10.0**log_noise * torch.randn(rows, vocab, generator=draw)
    values, gradient = tile(student, gap, alpha=alpha)
    loss, slope = exact(student, gap, alpha)
    # Every log-ratio may have a rounding of the largest gap in it. The loss is half their mean square, about.
    rounding = 4e-7 * gap.double().abs().amax(1)
    assert_within(values.loss, loss, 1e-6 * loss + rounding * (2 * loss).sqrt() + rounding**2)
    size = slope.norm() + (student.double().softmax(-1) * gap).norm()
    assert (gradient - slope).norm() <= 1e-6 * size + 1e-9


@needs_compiler
@pytest.mark.parametrize("alpha", ALPHAS)
def test_what_all_logits_are_higher_by_costs_no_digits(alpha: float) -> None:
    student, gap = torch.randn(5, 2000), 3.1 + 1e-3 * torch.randn(5, 2000)
    values, gradient = tile(student, gap, alpha=alpha)
    loss, slope = exact(student, gap, alpha)
    # Half a rounding of 3.1 is 1e-4 of a log-ratio.
    assert relative_error(values.loss, loss) < 4e-5
    assert relative_error(gradient, slope) < 4e-5


@needs_compiler
@pytest.mark.parametrize("alpha", ALPHAS)
def test_digits_do_not_depend_on_the_threads(alpha: float) -> None:
    student, gap = torch.randn(37, 5000), 0.1 * torch.randn(37, 5000)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(tile(student, gap, alpha=alpha))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][1], found[1][1])
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)


@needs_compiler
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_row_that_float_cannot_hold_is_done_in_float64_and_the_others_are_not(alpha: float) -> None:
    student, gap = torch.randn(6, 400), 0.1 * torch.randn(6, 400)
    plain, plain_gradient = tile(student, gap, alpha=alpha)
    for row in (1, 2, 5):
        student[row, 7], gap[row, 7] = -60.0, 75.0
    values, gradient = tile(student, gap, alpha=alpha)
    loss, slope = exact(student, gap, alpha)
    theirs, their_gradient = tile(student, gap, backend=torch_backend, alpha=alpha)
    assert relative_error(values.loss, loss) <= allowed_error(theirs.loss, loss) + 1e-6
    assert relative_error(gradient, slope) <= allowed_error(their_gradient, slope) + 1e-6
    for row in (0, 3, 4):
        assert torch.equal(gradient[row], plain_gradient[row])
        assert values.loss[row] == plain.loss[row]
    redone, redone_gradient = tile(student[5:], gap[5:], backend=torch_backend, alpha=alpha)
    assert values.loss[5] == redone.loss[0]
    assert torch.equal(gradient[5], redone_gradient[0])


@needs_compiler
def test_rows_with_nan_are_nan_and_no_others() -> None:
    student, gap = torch.randn(4, 300), torch.randn(4, 300)
    student[1, 3], gap[2, 299] = float("nan"), float("inf")
    values, gradient = tile(student, gap, alpha=1.0)
    assert values.loss.isfinite().tolist() == [True, False, False, True]
    assert gradient.isfinite().all(dim=1).tolist() == [True, False, False, True]


@needs_compiler
@pytest.mark.parametrize("is_gap", [True, False])
def test_columns_beyond_the_vocabulary_are_neither_read_nor_written(is_gap: bool) -> None:
    student, teacher = (torch.full((5, 70), float("nan")) for _ in range(2))
    student[:, :63], teacher[:, :63] = torch.randn(5, 63), torch.randn(5, 63)
    before = tile(student[:, :63].contiguous(), teacher[:, :63].contiguous(), is_gap=is_gap, alpha=0.5)
    values, gradient = native_backend.divergence_tile(
        student[:, :63], teacher[:, :63], TileRows(teacher_is_gap=is_gap), Objective(alpha=0.5), want_gradient=True
    )
    assert torch.equal(values.loss, before[0].loss)
    assert torch.equal(gradient, before[1])
    assert student[:, 63:].isnan().all()


@needs_compiler
@pytest.mark.parametrize("alpha", ALPHAS)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 300),
    log_noise=st.floats(-4.0, 0.9),
    spread=st.floats(0.1, 8.0),
    scale=st.floats(0.3, 2.0),
    seed=st.integers(0, 9999),
)
@example(rows=3, vocab=7, log_noise=-4.0, spread=4.0, scale=2.0, seed=986)
def test_a_tile_of_two_sides_logits_is_what_float64_makes_of_them(
    alpha: float, rows: int, vocab: int, log_noise: float, spread: float, scale: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(rows, vocab, generator=draw)
    teacher = student + 10.0**log_noise * torch.randn(rows, vocab, generator=draw)
    head = (scale, None, 1.0)
    values, gradient = tile(student, teacher, is_gap=False, alpha=alpha, student=head, teacher=head)
    gap = scale * (teacher.double() - student.double())
    loss, slope = exact(scale * student.double(), gap, alpha)
    # Every log-ratio may have a rounding of the largest logits in it.
    rounding = 4e-7 * scale * torch.maximum(student.abs(), teacher.abs()).double().amax(1)
    assert_within(values.loss, loss, 1e-6 * loss + rounding * (2 * loss).sqrt() + rounding**2)
    p = (scale * student.double()).softmax(-1)
    size = scale * slope.norm() + (p * gap).norm() + (p * rounding[:, None]).norm() / 1e-6
    assert (gradient - scale * slope).norm() <= 1e-6 * size + 1e-9


@needs_compiler
@pytest.mark.parametrize("is_gap", [True, False])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_wide_gap_is_no_reason_for_float64_where_the_log_ratios_are_small(
    alpha: float, is_gap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*arguments: Any, **options: Any) -> None:
        raise AssertionError("done by the torch backend")

    monkeypatch.setattr(torch_backend, "divergence_tile", called)
    student, gap = torch.randn(4, 333), 0.5 * torch.randn(4, 333)
    gap[1, 7], gap[2, 9] = -60.0, 45.0  # the second token gets nearly all the mass: its log-ratio is about 6
    values, gradient = tile(student, gap if is_gap else student + gap, is_gap=is_gap, alpha=alpha)
    loss, slope = exact(student, gap if is_gap else (student + gap) - student, alpha)
    torch.testing.assert_close(values.loss.double(), loss, rtol=1e-5, atol=0)
    assert relative_error(gradient, slope) < 1e-5


@needs_compiler
@pytest.mark.parametrize("threads_of", ["torch", "its own"])
def test_rows_are_each_done_once_by_whichever_threads(threads_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if threads_of == "its own":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("this torch runs on something else than OpenMP")
    student, gap = torch.randn(64, 3000), torch.randn(64, 3000)
    expected = tile(student, gap, alpha=1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = tile(student, gap, alpha=1.0)
        seen: set[int] = set()
        meeting = threading.Barrier(4)

        def work() -> None:
            seen.add(threading.get_ident())
            meeting.wait(30)

        threads.together(work, 4)
        assert len(seen) == 4

        def fail() -> None:
            raise ValueError("of a thread")

        with pytest.raises(ValueError, match="of a thread"):
            threads.together(fail, 4)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].loss, expected[0].loss)
    assert torch.equal(found[1], expected[1])


@needs_compiler
def test_a_forked_process_does_not_wait_for_its_parents_threads() -> None:
    student, gap = torch.randn(40, 5000), torch.randn(40, 5000)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = tile(student, gap, alpha=1.0)[0].loss.tolist()
        student, gap = student.clone(), gap.clone()  # by torch's threads, which a child has none of
        rows, objective = TileRows(teacher_is_gap=True), Objective(alpha=1.0)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if not child:
            try:
                values, _ = native_backend.divergence_tile(student, gap, rows, objective, want_gradient=True)
                sender.send(values.loss.tolist())
            finally:
                os._exit(0)
        is_done = receiver.poll(60)
        if not is_done:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert is_done, "the forked process hangs"
        assert receiver.recv() == expected
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own, and a process that has not looked for a library yet."""
    monkeypatch.setenv("SDKERNELS_CACHE", str(tmp_path / "cache"))
    build.library.cache_clear()
    yield tmp_path / "cache"
    build.library.cache_clear()


def _break_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")


def _break_its_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")


def _break_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDKERNELS_CACHE", str(tmp_path / "file" / "cache"))


@pytest.mark.parametrize("damage", [_break_the_compiler, _break_its_output, _break_the_folder])
def test_without_a_library_auto_takes_torch_and_native_says_what_it_needs(
    damage: Callable[[pytest.MonkeyPatch, Path], None],
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    damage(monkeypatch, tmp_path)
    inputs = make_inputs(4, 8, 50, requires_grad=False)[:3]
    assert linear_divergence(*inputs).backend == "torch"
    with pytest.raises(RuntimeError, match=r"backend='native' needs a C compiler .* use backend='torch'"):
        linear_divergence(*inputs, backend="native")


@needs_compiler
def test_a_library_is_compiled_once_and_for_its_owner_alone(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.library() is not None
    (made,) = elsewhere.iterdir()
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o700
    build.library.cache_clear()

    def compiled_again(*arguments: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build, "_compile", compiled_again)
    assert build.library() is not None
    assert list(elsewhere.iterdir()) == [made]


@needs_compiler
def test_auto_takes_it_on_a_cpu_but_not_for_float64() -> None:
    inputs = make_inputs(4, 8, 50, requires_grad=False)[:3]
    assert linear_divergence(*inputs).backend == "native"
    assert linear_divergence(*(tensor.double() for tensor in inputs)).backend == "torch"
    with pytest.raises(TypeError, match="backend='native' needs inputs of at most 32 bits"):
        linear_divergence(*(tensor.double() for tensor in inputs), backend="native")
    with pytest.raises(ValueError, match="backend='native' needs tensors on a CPU"):
        backends.choose_backend("native", torch.empty(1, device="meta"))


@needs_compiler
def test_a_library_is_of_the_sources_and_headers_that_are_there(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, header = tmp_path / "one.c", tmp_path / "two.h"
    source.write_text('#include "two.h"\nint number(void) { return NUMBER + (CLOSE < FAR); }\n')
    monkeypatch.setattr(build, "SOURCES", [source])
    monkeypatch.setattr(build, "HEADERS", [header])
    for number in (1, 2):
        header.write_text(f"#define NUMBER {number}\n")
        build.library.cache_clear()
        found = build.library()
        assert found is not None
        assert found.number() == number + 1
    assert len(list(elsewhere.iterdir())) == 2


@needs_compiler
@pytest.mark.parametrize("vocab", [3, 37, 300])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_what_lies_beyond_a_row_is_not_in_its_sums(alpha: float, vocab: int) -> None:
    # The last vector of a row is filled up, and with the student's logits about 89 above the teacher's the filler's e^u
    # was infinite.
    for offset in (-1000.0, -89.0, *torch.linspace(87.0, 91.0, 17).tolist(), 100.0, 1000.0):
        student, teacher = torch.randn(4, vocab) + offset, torch.randn(4, vocab)
        student.requires_grad_()
        found = {}
        for backend in ("native", "torch"):
            output = logit_divergence(student, teacher, alpha=alpha, backend=backend)
            found[backend] = (output.per_token, *torch.autograd.grad(output.loss, student))
        for got, right in zip(found["native"], found["torch"], strict=True):
            torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-6)
