"""Attention over packed rows against plain attention with a dense mask, and the rectangles that it is cut into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sdcore.errors import UnsupportedModelError
from sdcore.prefix.attention import cuda as attention_cuda
from sdcore.prefix.attention import function as attention
from sdcore.prefix.attention.function import PLAIN, Call, RowContext, RowMask, attend, packed_attention, packed_mask
from sdcore.prefix.attention.segments import BORROWED, ROW, Block, Row, pack
from sdkernels.testing import LiveBytes, allowed_error, relative_error

SCALING = 0.31


class Shape(NamedTuple):
    """A node: its parent's index, its tokens, and whether it is borrowed."""

    parent: int
    length: int
    borrowed: bool = False


# Tokens of what is borrowed that no node is, in front of each that is.
UNUSED = 2


def group(prefix: int, trunk: int, branches: Sequence[int], first: int = 0) -> list[Shape]:
    """One level: branches behind a trunk behind a borrowed prefix; the first of them is to be node `first`."""
    shapes = [Shape(-1, prefix, True)] if prefix else []
    shapes.append(Shape(first if prefix else -1, trunk))
    return [*shapes, *(Shape(first + len(shapes) - 1, length) for length in branches)]


def groups(*given: tuple[int, int, Sequence[int]]) -> list[Shape]:
    shapes: list[Shape] = []
    for of_group in given:
        shapes += group(*of_group, first=len(shapes))
    return shapes


def row_of(shapes: Sequence[Shape]) -> Row:
    places, place = [], 0
    for shape in shapes:
        places.append(place + UNUSED if shape.borrowed else -1)
        place += UNUSED + shape.length if shape.borrowed else 0
    return pack([shape.parent for shape in shapes], [shape.length for shape in shapes], places)


class Token(NamedTuple):
    """Who a token of a row, or of what is borrowed, is, from first principles."""

    node: int  # -1: none of the row's
    position: int

    def sees(self, other: Token, shapes: Sequence[Shape], window: int | None) -> bool:
        above = self.node
        while above != other.node and above >= 0:
            above = shapes[above].parent
        return other.node == above >= 0 and 0 <= self.position - other.position < (window or 10**9)


def tokens_of(shapes: Sequence[Shape]) -> tuple[list[Token], list[Token]]:
    borrowed, row, ends = [], [], []
    for i, shape in enumerate(shapes):
        start = ends[shape.parent] if shape.parent >= 0 else 0
        ends.append(start + shape.length)
        if shape.borrowed:
            borrowed += [Token(-1, 0)] * UNUSED
        (borrowed if shape.borrowed else row).extend(Token(i, start + n) for n in range(shape.length))
    return borrowed, row


def dense_mask(shapes: Sequence[Shape], window: int | None) -> Tensor:
    """(L, borrowed tokens + L) bool."""
    borrowed, row = tokens_of(shapes)
    return torch.tensor([[q.sees(k, shapes, window) for k in borrowed + row] for q in row]).view(len(row), -1)


class Case(NamedTuple):
    shapes: list[Shape]
    key_heads: int = 2
    heads_per_key: int = 2
    size: int = 5
    value_size: int = 5
    window: int | None = None
    softcap: float | None = None
    seed: int = 0

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Any]:
        """Query, key, value, laid out as a projection's views are; and what is borrowed, or None."""
        draw = torch.Generator().manual_seed(self.seed)

        def states(length: int, heads: int, size: int) -> Tensor:
            return torch.randn(1, length, heads, size, generator=draw, dtype=torch.float64).to(dtype).transpose(1, 2)

        borrowed, own = (len(tokens) for tokens in tokens_of(self.shapes))
        heads = self.key_heads * self.heads_per_key
        row = [
            states(own, h, d)
            for h, d in ((heads, self.size), (self.key_heads, self.size), (self.key_heads, self.value_size))
        ]
        lent = tuple(states(borrowed, self.key_heads, d) for d in (self.size, self.value_size))
        return row, lent if borrowed else None

    def call(self, borrowed: Any) -> Call:
        row = row_of(self.shapes)
        window = None if self.window is None or self.window >= row.longest else self.window
        return Call(row, borrowed, SCALING, window, self.softcap, {})

    def reference(self, row: list[Tensor], borrowed: Any) -> Tensor:
        """(1, L, Hq, Dv) in the dtype of the tensors."""
        query, key, value = row
        if borrowed is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(borrowed, (key, value), strict=True))
        key, value = (x.repeat_interleave(self.heads_per_key, 1) for x in (key, value))
        scores = query @ key.mT * SCALING
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~dense_mask(self.shapes, self.window), float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2)

    def fused(self, row: list[Tensor], borrowed: Any) -> Tensor:
        """What a model's own attention gives on the whole row: scores are never rounded to the dtype of the tensors."""
        if self.softcap is not None:
            wide = borrowed and tuple(x.float() for x in borrowed)
            return self.reference([x.float() for x in row], wide).to(row[0].dtype)
        query, key, value = row
        if borrowed is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(borrowed, (key, value), strict=True))
        mask = dense_mask(self.shapes, self.window)
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=SCALING, enable_gqa=True)
        return out.transpose(1, 2)


@st.composite
def trees(draw: Any) -> list[Shape]:
    """Nodes depth first, borrowed and not, of many lengths, of one, and of none; at least a token in the row."""
    count, equal = draw(st.integers(1, 9)), draw(st.none() | st.integers(1, 5))
    shapes: list[Shape] = []
    path: list[int] = []
    for i in range(count):
        path = path[: draw(st.integers(0, len(path)))]
        parent = path[-1] if path else -1
        borrowed = (parent < 0 or shapes[parent].borrowed) and draw(st.booleans())
        shapes.append(Shape(parent, draw(st.integers(0, 9)) if equal is None else equal, borrowed))
        path.append(i)
    return shapes if any(shape.length and not shape.borrowed for shape in shapes) else [*shapes, Shape(-1, 1)]


@st.composite
def cases(draw: Any) -> Case:
    """Trees, and groups of one level with ragged, equal, empty and no branches; never an empty row."""
    length = st.integers(0, 9)
    branches = st.lists(length, max_size=4) | st.integers(1, 5).flatmap(lambda n: st.just([n] * 3))
    one_level = st.lists(st.tuples(length | st.just(0), length, branches), min_size=1, max_size=3)
    one_level = one_level.map(lambda given: groups(*given)).filter(lambda shapes: row_of(shapes).length > 0)
    shapes = draw(trees() | one_level)
    size = draw(st.integers(1, 7))
    return Case(
        shapes,
        key_heads=draw(st.integers(1, 2)),
        heads_per_key=draw(st.integers(1, 3)),
        size=size,
        value_size=draw(st.sampled_from([size, size, size + 1])),
        window=draw(st.none() | st.integers(1, 12)),
        softcap=draw(st.none() | st.just(0.8)),
        seed=draw(st.integers(0, 99)),
    )


def with_gradients(function: Any, row: list[Tensor]) -> list[Tensor]:
    """The output of `function(leaves)`, and its three gradients for one fixed upstream."""
    leaves = [x.detach().requires_grad_() for x in row]
    out = function(leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut rectangles after 3 queries, so that short rows have many."""
    monkeypatch.setattr("sdcore.prefix.attention.segments._step", lambda window, at_most: 3)
    monkeypatch.setattr(attention, "PLAIN", PLAIN._replace(at_most=3))


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for name, a, b in zip(("out", "query", "key", "value"), actual, expected, strict=True):
        assert a.shape == b.shape, name
        difference = (a - b).abs().max().item()
        assert difference <= tolerance * max(1.0, b.abs().max().item()), (name, difference)


@pytest.mark.parametrize("steps", ["usual", "small"])
@given(case=cases())
def test_values_and_gradients_are_those_of_dense_attention(case: Case, steps: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if steps == "small":
            small_steps(patch)
        row, borrowed = case.tensors()
        actual = with_gradients(lambda leaves: attend(*leaves, case.call(borrowed)), row)
        expected = with_gradients(lambda leaves: case.reference(leaves, borrowed), row)
        assert_same(actual, expected)


@pytest.mark.parametrize("steps", [None, 3])
@given(case=cases())
def test_every_visible_pair_is_in_exactly_one_rectangle(case: Case, steps: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if steps:
            small_steps(patch)
        check_rectangles(row_of(case.shapes), case, steps)


def check_rectangles(row: Row, case: Case, at_most: int | None) -> None:
    mask = dense_mask(case.shapes, case.window)
    borrowed = len(tokens_of(case.shapes)[0])
    seen, opened = torch.zeros(mask.shape, dtype=torch.int64), torch.zeros(row.length, dtype=torch.int64)
    for block in row.blocks(case.window, at_most=at_most):
        i, j = torch.arange(block.queries)[:, None], torch.arange(block.keys)
        inside = torch.ones(block.queries, block.keys, dtype=torch.bool)
        if block.causal:
            inside = i >= j
        if block.masked:
            distance = block.offset + i - j
            inside = (distance >= 0) & (distance < (case.window or 10**9))
            assert not inside.all(), "a mask that hides nothing is not needed"
        assert inside.any(1).all(), "a query sees none of its keys"
        for copy in range(block.copies):
            query = slice(block.query + copy * block.queries, block.query + (copy + 1) * block.queries)
            start = borrowed if block.source == ROW else 0
            key = start + block.key + copy * block.keys
            seen[query, key : key + block.keys] += inside
            if block.opens:
                opened[query] += 1
            else:
                assert (opened[query] == 1).all(), "merged before it was opened"
    assert torch.equal(seen, mask.long())
    assert (opened == 1).all()


def test_one_level_is_a_square_for_each_run_of_branches_and_a_rectangle_for_the_trunk() -> None:
    squares = [Block(0, 5, 0, 5, 0, causal=True, opens=True)]
    squares.append(Block(5, 3, 5, 3, 0, causal=True, copies=2, opens=True))
    squares.append(Block(11, 4, 11, 4, 0, causal=True, opens=True))
    assert row_of(groups((0, 5, [3, 3, 4]))).blocks() == [*squares, Block(5, 10, 0, 5, 5)]
    # What is borrowed is seen by trunk and branches alike.
    assert row_of(groups((7, 5, [3, 3, 4]))).blocks() == [
        *squares,
        Block(0, 15, UNUSED, 7, 7, source=BORROWED),
        Block(5, 10, 0, 5, 5),
    ]


def test_every_node_with_something_after_it_is_one_rectangle_more() -> None:
    depth, branching = 4, 3
    shapes = [Shape(-1, 2)]

    def grow(parent: int, levels: int) -> None:
        for _ in range(branching if levels else 0):
            shapes.append(Shape(parent, 2))
            grow(len(shapes) - 1, levels - 1)

    grow(0, depth)
    blocks = row_of(shapes).blocks()
    inner = sum(branching**level for level in range(depth))
    assert len(blocks) == 1 + inner
    assert blocks[0].copies == len(shapes) == inner + branching**depth


@pytest.mark.parametrize(
    # Found are 1.3 in 16 bits; log-sum-exps that are rounded to them make it 1.7 to 2.5.
    ("dtype", "factor"),
    [(torch.float32, 2.0), (torch.bfloat16, 1.5), (torch.float16, 1.5)],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_low_precision_is_as_near_to_float64_as_dense_attention(
    dtype: torch.dtype, factor: float, window: int | None, softcap: float | None
) -> None:
    case = Case(groups((0, 33, [7, 7, 12, 1]), (11, 5, [3, 8])), size=16, value_size=16, window=window, softcap=softcap)
    row, borrowed = case.tensors(dtype)
    exact_borrowed = borrowed and tuple(x.double() for x in borrowed)
    exact = with_gradients(lambda leaves: case.reference(leaves, exact_borrowed), [x.double() for x in row])
    naive = with_gradients(lambda leaves: case.fused(leaves, borrowed), row)
    actual = with_gradients(lambda leaves: attend(*leaves, case.call(borrowed)), row)
    for name, a, e, n in zip(("out", "query", "key", "value"), actual, exact, naive, strict=True):
        assert relative_error(a, e) <= allowed_error(n, e, factor=factor), name


def test_autocast_does_not_lower_the_precision_of_soft_capped_scores() -> None:
    case = Case(groups((0, 6, [3, 2])), softcap=1.0)
    row, borrowed = case.tensors(torch.float32)
    plain = with_gradients(lambda leaves: attend(*leaves, case.call(borrowed)), row)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(with_gradients(lambda leaves: attend(*leaves, case.call(borrowed)), row), plain, 0.0)


@pytest.mark.parametrize("window", [None, 256])
def test_keys_and_values_of_a_trunk_are_never_repeated(window: int | None) -> None:
    """32 branches with 4 queries to a key: any repetition is larger than all of the queries together."""
    case = Case(groups((0, 1024, [4] * 32)), key_heads=2, heads_per_key=4, size=16, value_size=16, window=window)
    row, borrowed = case.tensors(torch.float32)
    leaves = [x.detach().requires_grad_() for x in row]
    queries = row[0].numel()
    with LiveBytes() as probe:
        out = attend(*leaves, case.call(borrowed))
        assert probe.largest_numel <= queries, probe.largest_origin
        forward = probe.peak_bytes
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert probe.largest_numel <= queries, probe.largest_origin
    masks = 0 if window is None else 2 * 4 * 256 * (256 + window)
    # The output, its log-sum-exp, and one rectangle's part of it that is being merged.
    assert forward < 3 * 4 * queries + masks
    # And its gradient, the gradients of query, key and value (1.5 queries), and one rectangle's part of them.
    assert probe.peak_bytes < 6 * 4 * queries + masks


def test_a_narrow_window_does_not_compute_what_nobody_sees() -> None:
    row = row_of(groups((0, 4096, [64] * 8)))
    computed = sum(block.queries * block.keys * block.copies for block in row.blocks(128))
    visible = 128 * row.length
    assert computed < 3 * visible


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, launch: attention_cuda.Launch, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What a varlen kernel does, in plain arithmetic: out (n, Hq, D), lse (Hq, n), weights (Hq, n, m)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
    visible = torch.zeros(query.shape[0], key.shape[1], dtype=torch.bool)
    bounds = [x.tolist() for x in (launch.query_bounds, launch.key_bounds)]
    for q0, q1, k0, k1 in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
        assert 0 < q1 - q0 <= launch.longest_query
        assert 0 < k1 - k0 <= launch.longest_key
        ones = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        visible[q0:q1, k0:k1] = ones.tril() if launch.causal else ones
    assert (bounds[0][-1], bounds[1][-1]) == visible.shape
    scores = (query.transpose(0, 1) @ key.mT * scaling).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1), scores.logsumexp(-1), scores


def plain_varlen_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, launch: Any, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
    weights = torch.exp(plain_varlen(query, key, value, launch, scaling)[2] - lse.unsqueeze(-1))
    grad, out = grad.transpose(0, 1), out.transpose(0, 1)
    grad_scores = weights * (grad @ values.mT - (grad * out).sum(-1, keepdim=True)) * scaling

    def fold(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)

    grad_query = (grad_scores @ keys).transpose(0, 1)
    return grad_query, fold(grad_scores.mT @ query.transpose(0, 1)), fold(weights.mT @ grad)


@given(case=cases())
def test_the_varlen_launches_of_the_gpu_path_add_up(case: Case) -> None:
    case = case._replace(window=None, softcap=None, value_size=case.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cuda, "can_varlen", lambda *_: True)
        patch.setattr(attention_cuda, "_forward", lambda *args: plain_varlen(*args)[:2])
        patch.setattr(attention_cuda, "_backward", plain_varlen_backward)
        patch.setattr(torch.Tensor, "float", lambda x: x)
        row, borrowed = case.tensors()
        actual = with_gradients(lambda leaves: attend(*leaves, case.call(borrowed)), row)
    assert_same(actual, with_gradients(lambda leaves: case.reference(leaves, borrowed), row))


@pytest.mark.parametrize(
    ("capability", "built", "hip", "runs"),
    [((8, 0), True, None, True), ((7, 5), True, None, False), ((9, 0), False, None, False), ((9, 4), True, "6", False)],
)
def test_the_flash_kernels_are_taken_only_where_they_run(
    capability: tuple[int, int], built: bool, hip: str | None, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.version, "hip", hip)
    attention_cuda._has_flash.cache_clear()
    with FakeTensorMode():
        query = torch.empty(1, 2, 5, 64, dtype=torch.bfloat16, device="cuda:1")
    call = Case(groups((0, 3, [2]))).call(None)
    assert attention_cuda.can_varlen(query, query, call) == runs
    assert not attention_cuda.can_varlen(query.cpu(), query.cpu(), call)
    attention_cuda._has_flash.cache_clear()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_flex_attention_gives_the_same_output(window: int | None, softcap: float | None) -> None:
    case = Case(groups((0, 33, [7, 7, 12, 1]), (11, 5, [3, 8]), (0, 0, [4, 2])), size=16, value_size=16)
    case = case._replace(window=window, softcap=softcap)
    row, borrowed = case.tensors()
    with torch.no_grad():
        out = attention_cuda.flex(*row, case.call(borrowed))
    assert (out - case.reference(row, borrowed)).abs().max() < 1e-12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", [f"cuda:{i}" for i in range(torch.cuda.device_count())])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (None, 1.5), (40, 1.5)])
@pytest.mark.parametrize(
    "shapes",
    [groups((0, 130, [70, 70, 121, 1])), groups((110, 50, [3, 80]), (0, 300, [129, 64]), (0, 0, [4, 2]))],
    ids=["one group", "several groups"],
)
@pytest.mark.parametrize("size", [64, 128])
def test_on_a_gpu_it_is_as_near_to_float64_as_dense_attention(
    size: int, shapes: list[Shape], window: int | None, softcap: float | None, dtype: torch.dtype, device: str
) -> None:
    """The flash kernels, FlexAttention with its gradient, and the plain kernel, by what `attend` chooses."""
    case = Case(shapes, heads_per_key=4, size=size, value_size=size, window=window, softcap=softcap)
    row, borrowed = case.tensors(dtype)
    exact_borrowed = borrowed and tuple(x.double() for x in borrowed)
    exact = with_gradients(lambda leaves: case.reference(leaves, exact_borrowed), [x.double() for x in row])
    naive = with_gradients(lambda leaves: case.fused(leaves, borrowed), row)
    call = case.call(borrowed and tuple(x.to(device) for x in borrowed))
    there = [x.to(device) for x in row]
    special = window is not None or softcap is not None
    assert attention_cuda.can_varlen(*there[::2], call) == (dtype != torch.float32 and not special)
    actual = with_gradients(lambda leaves: attend(*leaves, call), there)
    for name, a, e, n in zip(("out", "query", "key", "value"), actual, exact, naive, strict=True):
        assert relative_error(a.cpu(), e) <= allowed_error(n, e), name


class Layer(torch.nn.Module):
    layer_idx = 0


def refused(layer: Any = None, mask: Any = None, **arguments: Any) -> str:
    row, _ = Case(groups((0, 3, [2]))).tensors()
    context = RowContext(row_of(groups((0, 3, [2]))), None)
    with pytest.raises(UnsupportedModelError) as error:
        packed_attention(layer or Layer(), *row, RowMask(context, None) if mask is None else mask, **arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal"),
        ({"sliding_window": 4}, "sliding_window=4"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(arguments: dict[str, Any], named: str) -> None:
    assert named in refused(**arguments)


def test_what_does_not_matter_is_let_through() -> None:
    row, _ = Case(groups((0, 3, [2]))).tensors()
    context = RowContext(row_of(groups((0, 3, [2]))), None)
    extras = {"position_ids": torch.arange(5)[None], "use_cache": False, "s_aux": None, "output_attentions": False}
    out, weights = packed_attention(Layer(), *row, RowMask(context, None), **extras)
    assert out.shape == (1, 5, 4, 5)
    assert weights is None


def test_a_mask_of_another_kind_and_tokens_from_elsewhere_are_refused() -> None:
    assert "Tensor" in refused(mask=torch.zeros(1, 1, 5, 5))
    assert "6 tokens" in refused(mask=RowMask(RowContext(row_of(groups((0, 4, [2]))), None), None))
    with pytest.raises(RuntimeError, match="can only be called by"):
        packed_mask(1, 5, 5)
