"""Attends over a packed row on a GPU: flash kernels on ragged segments, FlexAttention for windows and soft-caps.

UNTESTED on a GPU: written without one at hand, after the signatures of torch 2.13. Tests on a CPU put plain arithmetic
in the place of the flash kernels, which are torch's own, and run FlexAttention without a gradient.

`varlen_*` does what `blockwise_*` in function.py does with a handful of launches whatever the number of branches is:
one for every node of the row against itself, and at each depth of the trees one for the nodes there against what comes
after them, and one for those that are borrowed.

Not covered: head sizes above 256 or not a multiple of 8, float32 and float64; function.py's plain kernel does those.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .segments import BORROWED, ROW, Call, Row, Span

HALF = (torch.float16, torch.bfloat16)


def can_varlen(query: Tensor, value: Tensor, call: Call) -> bool:
    size = query.shape[-1]
    plain = call.window is None and call.softcap is None
    fits = query.dtype in HALF and value.shape[-1] == size and size % 8 == 0 and size <= 256
    return query.is_cuda and plain and fits and _has_flash(query.device)


@cache
def _has_flash(device: torch.device) -> bool:
    """True where torch's flash kernels run: its build has them, and the chip is an Ampere or newer.

    On ROCm their log-sum-exp has another layout.
    """
    built = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


class Launch(NamedTuple):
    """Describes one call of a varlen kernel: the i-th span of queries against the i-th span of keys."""

    queries: Tensor | None  # (n,) which tokens of the row; None: all of them, in order
    keys: Tensor | None  # (m,) which tokens of the row, or of what is borrowed; None: all
    query_bounds: Tensor  # (spans + 1,) int32
    key_bounds: Tensor
    longest_query: int
    longest_key: int
    causal: bool
    from_borrowed: bool


def launches(row: Row, device: torch.device) -> list[Launch]:
    """Lists the calls; the first has every token of the row among its queries, in order, and the others add to it."""
    spans = [span for span in row.own if span.length]
    calls = [_launch([(span, span) for span in spans], row.length, device, causal=True)]
    everything = max((node.span.stop for node in row.nodes if node.source == BORROWED), default=0)
    # Nodes of one depth have nothing after them in common.
    levels: dict[tuple[int, int], list[tuple[Span, Span]]] = {}
    depths: list[int] = []
    for node in row.nodes:
        depths.append(depths[node.parent] + 1 if node.parent >= 0 else 0)
        if node.span.length and node.after.length:
            levels.setdefault((depths[-1], node.source), []).append((node.after, node.span))
    for (_, source), pairs in levels.items():
        borrowed = source == BORROWED
        calls.append(_launch(pairs, everything if borrowed else row.length, device, from_borrowed=borrowed))
    return calls


def _launch(
    pairs: Sequence[tuple[Span, Span]],
    all_keys: int,
    device: torch.device,
    *,
    causal: bool = False,
    from_borrowed: bool = False,
) -> Launch:
    queries, keys = [query for query, _ in pairs], [key for _, key in pairs]
    return Launch(
        None if causal else _tokens(queries, device),
        None if sum(span.length for span in keys) == all_keys else _tokens(keys, device),
        _bounds(queries, device),
        _bounds(keys, device),
        max(span.length for span in queries),
        max(span.length for span in keys),
        causal,
        from_borrowed,
    )


def _tokens(spans: Sequence[Span], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(device)


def _bounds(spans: Sequence[Span], device: torch.device) -> Tensor:
    lengths = torch.tensor([0, *(span.length for span in spans)], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device)


def _rows(states: Tensor, index: Tensor | None) -> Tensor:
    return states if index is None else states.index_select(0, index)


def _sources(call: Call, key: Tensor, value: Tensor) -> Iterator[tuple[Launch, Tensor, Tensor]]:
    name = ("launches", key.device)
    if name not in call.shared:
        call.shared[name] = launches(call.row, key.device)
    borrowed = [states[0].transpose(0, 1) for states in call.borrowed or ()]  # (tokens, Hkv, D)
    for launch in call.shared[name]:
        keys, values = borrowed if launch.from_borrowed else (key, value)
        yield launch, _rows(keys, launch.keys), _rows(values, launch.keys)


def varlen_forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Returns (1, L, Hq, D) and the log-sum-exp (Hq, L) float32, of (1, heads, L, D) float16 or bfloat16."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, D)
    out, lse = torch.empty(()), torch.empty(())
    for launch, keys, values in _sources(call, key, value):
        part, part_lse = _forward(_rows(query, launch.queries), keys, values, launch, call.scaling)
        if launch.queries is None:
            out, lse = part, part_lse
            continue
        before, before_lse = out[launch.queries], lse[:, launch.queries]
        share = torch.sigmoid(part_lse - before_lse).t().unsqueeze(-1)  # (n, Hq, 1)
        out[launch.queries] = torch.lerp(before.float(), part.float(), share).to(out.dtype)
        lse[:, launch.queries] = torch.logaddexp(before_lse, part_lse)
    return out.unsqueeze(0), lse


def varlen_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value, in their shapes."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    grad, out = grad[0].contiguous(), out[0]
    grads: list[Tensor] = []
    for launch, keys, values in _sources(call, key, value):
        rows = launch.queries
        merged_lse = lse if rows is None else lse[:, rows].contiguous()
        parts = _backward(
            _rows(grad, rows), _rows(query, rows), keys, values, _rows(out, rows), merged_lse, launch, call.scaling
        )
        if rows is None:
            grads = list(parts)
            continue
        grads[0].index_add_(0, rows, parts[0])  # no index occurs twice: the order of additions is fixed
        if launch.keys is not None and not launch.from_borrowed:  # among a row's keys are never those of leaves
            for total, part in zip(grads[1:], parts[1:], strict=True):
                total.index_add_(0, launch.keys, part)
    grad_query, grad_key, grad_value = (x.transpose(0, 1).unsqueeze(0) for x in grads)
    return grad_query, grad_key, grad_value


def _forward(query: Tensor, key: Tensor, value: Tensor, launch: Launch, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns (n, Hq, D) and the log-sum-exp (Hq, n) of one launch."""
    bounds = (launch.query_bounds, launch.key_bounds, launch.longest_query, launch.longest_key)
    return torch.ops.aten._flash_attention_forward(
        query, key, value, *bounds, 0.0, launch.causal, False, scale=scaling
    )[:2]


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    launch: Launch,
    scaling: float,
) -> Sequence[Tensor]:
    bounds = (launch.query_bounds, launch.key_bounds, launch.longest_query, launch.longest_key)
    # Without dropout the state of the random numbers is not read.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, *bounds, 0.0, launch.causal, state, query.new_empty(0), scale=scaling
    )


def can_flex(query: Tensor, value: Tensor) -> bool:
    return query.is_cuda and query.dtype in (*HALF, torch.float32) and importlib.util.find_spec("triton") is not None


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def flex(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """Returns (1, L, Hq, Dv): the same attention, windows and soft-caps included, by FlexAttention."""
    if call.borrowed is not None:
        key, value = (torch.cat([lent, own], 2) for lent, own in zip(call.borrowed, (key, value), strict=True))
    softcap = call.softcap or 1.0

    def soft_capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    attention = _compiled_flex() if query.is_cuda else flex_attention
    out = attention(
        query,
        key,
        value,
        score_mod=None if call.softcap is None else soft_capped,
        block_mask=_block_mask(call, query.device),
        scale=call.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def _block_mask(call: Call, device: torch.device) -> BlockMask:
    name = ("block mask", call.window, device)
    if name in call.shared:
        return call.shared[name]
    # Per key: its position, and the interval of the row whose tokens see it; they are all at or behind it.
    lent = call.borrowed[0].shape[2] if call.borrowed is not None else 0
    keys = torch.zeros(lent + call.row.length, 3, dtype=torch.int64)
    for node in call.row.nodes:
        span, start = node.span, node.span.start + (0 if node.source == BORROWED else lent)
        own = torch.arange(span.length)
        first = span.start + own if node.source == ROW else torch.full_like(own, node.after.start)
        keys[start : start + span.length] = torch.stack(
            [span.position + own, first, torch.full_like(own, node.after.stop)], 1
        )
    k_position, k_first, k_stop = keys.to(device).unbind(1)
    q_position = k_position[lent:]
    window = call.window or len(keys)

    def visible(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k_first[k] <= q) & (q < k_stop[k]) & (q_position[q] - k_position[k] < window)

    call.shared[name] = create_block_mask(
        visible,
        None,
        None,
        call.row.length,
        len(keys),
        device=str(device),
        _compile=device.type == "cuda",  # else it holds (L, L) of int64
    )
    return call.shared[name]
