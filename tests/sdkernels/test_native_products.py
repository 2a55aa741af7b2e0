"""The compiled products with a head: exact to float32's rounding for every shape, dtype and share of the threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdkernels import linear_divergence
from sdkernels.live_bytes import LiveBytes
from sdkernels.testing import make_arguments, make_inputs, relative_error, run_operation, run_reference
from sdkernels.tile.head import Head
from sdkernels.tile.native_backend import products
from sdkernels.tile.native_backend.products import NativeHead, PairHead, make_head, takes, takes_pairs

pytestmark = pytest.mark.skipif(products.compiled() is None, reason="this machine compiles no products")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
shapes = given(
    rows=st.integers(1, 70),
    vocab=st.integers(1, 600),
    width=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    seed=st.integers(0, 9999),
)
# More than a block in every direction, with a rest in each.
LARGE = (1030, 1201, 700)


@pytest.fixture(autouse=True)
def few_summands_are_worth_a_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "LEAST_SUMMANDS", 1)
        yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, gap: int = 0) -> Tensor:
    """With `gap`, rows that do not follow one another in memory."""
    entries = torch.randn(*shape[:-1], shape[-1] + gap, generator=torch.Generator().manual_seed(seed))
    return entries.to(dtype)[..., : shape[-1]]


def is_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> bool:
    """Whether every sum is exact, but for float32's rounding of its terms."""
    left, right = left.double(), right.double()
    error = (out - scale * left @ right).abs()
    return bool((error <= 1e-6 * abs(scale) * (left.abs() @ right.abs())).all())


def check(
    rows: int, vocab: int, width: int, dtype: torch.dtype, seed: int, gap: int, kind: type[NativeHead] = NativeHead
) -> None:
    """All three products, the last one as it is written first and as it is added to."""
    head = kind(random(vocab, width, seed=seed, dtype=dtype, gap=gap), torch.float32)
    sides = [random(rows, width, seed=seed + i, gap=gap, dtype=head.operand_dtype) for i in (1, 2)]
    gradient = random(rows, vocab, seed=seed + 3, gap=gap, dtype=head.operand_dtype)
    outs = [torch.full((rows, vocab + gap), torch.nan)[:, :vocab] for _ in sides]
    head.project(sides, outs)
    assert all(is_product(out, side, head.weight.t()) for side, out in zip(sides, outs, strict=True))
    out = torch.full((rows, width + gap), torch.nan)[:, :width]
    torch.ops.sdkernels.native_hidden_gradient(gradient, head.weight, out)
    assert is_product(out, gradient, head.weight)
    out = torch.full((vocab, width), torch.nan)
    head.weight_gradient(gradient, sides[0], out, 0.5, True)
    assert is_product(out, gradient.t(), sides[0], 0.5)
    head.weight_gradient(gradient, sides[0], out, 1.0, False)
    assert is_product(out, gradient.t(), sides[0], 1.5)


@shapes
def test_products_are_float64s_up_to_rounding(
    rows: int, vocab: int, width: int, dtype: torch.dtype, threads: int, seed: int
) -> None:
    torch.set_num_threads(threads)
    check(rows, vocab, width, dtype, seed, gap=seed % 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_products_of_more_than_a_block_are(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    check(*LARGE, dtype, seed=0, gap=0)


with_pairs = pytest.mark.skipif(
    products.compiled() is None or not takes_pairs(torch.zeros(2, 2, dtype=torch.bfloat16), torch.float32),
    reason="this processor has no products of pairs of bfloat16",
)


@with_pairs
@shapes
def test_products_of_pairs_are_float64s_up_to_rounding(
    rows: int, vocab: int, width: int, dtype: torch.dtype, threads: int, seed: int
) -> None:
    torch.set_num_threads(threads)
    check(rows, 2 * vocab, 2 * width, torch.bfloat16, seed, gap=2 * (seed % 3), kind=PairHead)


@with_pairs
@pytest.mark.parametrize("shape", [(2061, 1202, 700), (70, 2302, 1302)], ids=str)
def test_products_of_pairs_of_more_than_a_block_are(shape: tuple[int, int, int]) -> None:
    torch.set_num_threads(2)
    check(*shape, torch.bfloat16, seed=0, gap=0, kind=PairHead)


@with_pairs
def test_pairs_are_for_bfloat16_rows_and_even_sizes() -> None:
    even = torch.zeros(4, 6, dtype=torch.bfloat16)
    assert takes_pairs(even, torch.float32)
    assert not takes_pairs(even, torch.float64)
    for other in (even[:3], even[:, :5], torch.zeros(4, 7, dtype=torch.bfloat16)[:, :6], even.float(), even.half()):
        assert not takes_pairs(other, torch.float32)
        with pytest.raises(TypeError, match="no products of pairs"):
            PairHead(other, torch.float32)


def test_nothing_is_written_beside_what_was_asked_for() -> None:
    head = NativeHead(random(37, 45), torch.float32)
    hidden, out = random(5, 45), torch.full((5 + 2, 37 + 40), 7.0)
    head.project([hidden], [out[1:-1, 20:57]])
    out[1:-1, 20:57] = 7.0
    torch.ops.sdkernels.native_hidden_gradient(random(5, 37), head.weight, out[1:-1, 11:56])
    out[1:-1, 11:56] = 7.0
    assert (out == 7.0).all()


def test_what_is_not_finite_stays_in_its_row() -> None:
    head = NativeHead(random(50, 40), torch.float32)
    hidden, out = random(30, 40), torch.empty(30, 50)
    hidden[7, 3], hidden[8, 0] = torch.nan, torch.inf
    head.project([hidden], [out])
    bad = ~out.isfinite().all(-1)
    assert bad.nonzero()[:, 0].tolist() == [7, 8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", ["forward KL", "reverse KL", "JSD", "JSD, teacher top-k"])
def test_a_divergence_by_them_is_the_references(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, objective: str
) -> None:
    monkeypatch.setattr("sdkernels.tile.native_backend.make_head", NativeHead)
    inputs = make_inputs(50, 70, 900, dtype=dtype, masked=0.2)
    arguments = make_arguments(inputs, objective)
    actual, exact = run_operation(linear_divergence, **arguments), run_reference(**arguments)
    assert relative_error(actual.output.loss, exact.output.loss) < 1e-5
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    assert relative_error(actual.hidden_gradient, exact.hidden_gradient) < limit
    assert relative_error(actual.weight_gradient, exact.weight_gradient) < limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_probe_sees_each_of_them_once_and_the_workspace_holds_their_scratch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """N=700, H=300, V=4001 in 24 MiB, three chunks."""
    monkeypatch.setattr("sdkernels.tile.native_backend.make_head", NativeHead)
    inputs = make_inputs(700, 300, 4001, dtype=dtype)
    left_out = (inputs.student_hidden.nbytes, inputs.student_weight.nbytes, 4 * inputs.student_weight.numel())
    with LiveBytes(uncounted_bytes=left_out) as probe:
        run_operation(linear_divergence, **make_arguments(inputs, "JSD", workspace_mb=24))
    assert probe.matmul_count(700, 300, 4001) == pytest.approx(4)
    assert any(product.operator.startswith("native_") for product in probe.matmuls)
    assert probe.peak_bytes <= 24 << 20
    assert probe.largest_numel < 700 * 4001


def test_heads_that_are_small_wide_or_laid_out_by_columns_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_tried", lambda dtype, names: names[-1])
    assert type(make_head(torch.zeros(2000, 300), torch.float32)) is NativeHead
    assert type(make_head(torch.zeros(2000, 300, dtype=torch.bfloat16), torch.float32)) is NativeHead
    assert type(make_head(torch.zeros(20, 30), torch.float32)) is Head
    assert type(make_head(torch.zeros(300, 2000).t(), torch.float32)) is Head
    assert type(make_head(torch.zeros(2000, 300), torch.float64)) is Head
    assert not takes(torch.zeros(2000, 300, dtype=torch.float64), torch.float64)


@with_pairs
def test_rows_that_are_not_bfloat16_are_not_rounded_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_tried", lambda dtype, names: names[-1])
    weight = torch.zeros(2000, 300, dtype=torch.bfloat16)
    assert type(make_head(weight, torch.float32, torch.bfloat16)) is PairHead
    assert type(make_head(weight, torch.float32, torch.float32)) is NativeHead
    inputs = make_inputs(20, 300, 2000, dtype=torch.bfloat16)
    hidden = inputs.student_hidden.float() * 1.001  # no bfloat16 numbers
    arguments = make_arguments(inputs, "reverse KL") | {"student_hidden": hidden}
    actual, exact = run_operation(linear_divergence, **arguments), run_reference(**arguments)
    assert relative_error(actual.output.loss, exact.output.loss) < 1e-5
