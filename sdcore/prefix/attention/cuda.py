"""Attends over a packed row on a GPU: flash kernels on ragged segments, FlexAttention for windows and soft-caps.

UNTESTED on a GPU: written without one at hand, after the signatures of torch 2.13 and flash-attn 2.8. Tests on a CPU
put plain arithmetic in the place of the flash kernels, and run FlexAttention without a gradient.

`varlen_*` does what `blockwise_*` in function.py does with a handful of launches whatever the number of branches is:
one for every span of the row against itself, one for all branches against their trunks, and two for a borrowed prefix.

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

from .segments import Call, Row, Span

HALF = (torch.float16, torch.bfloat16)


def can_varlen(query: Tensor, value: Tensor, call: Call) -> bool:
    size = query.shape[-1]
    plain = call.window is None and call.softcap is None
    return query.is_cuda and plain and query.dtype in HALF and value.shape[-1] == size and size % 8 == 0 and size <= 256


class Launch(NamedTuple):
    """Describes one call of a varlen kernel: the i-th span of queries against the i-th span of keys."""

    queries: Tensor | None  # (n,) which tokens of the row; None: all of them, in order
    keys: Tensor | None  # (m,) which tokens of the row, or of all prefixes one after the other; None: all
    query_bounds: Tensor  # (spans + 1,) int32
    key_bounds: Tensor
    longest_query: int
    longest_key: int
    causal: bool
    from_prefix: bool


def launches(row: Row, device: torch.device) -> list[Launch]:
    """Lists the calls; the first has every token of the row among its queries, in order, and the others add to it."""
    spans = [span for group in row.groups for span in (group.trunk, *group.branches) if span.length]
    calls = [_launch([(span, span) for span in spans], row.length, device, causal=True)]
    pairs = [(g.all_branches, g.trunk) for g in row.groups if g.all_branches.length and g.trunk.length]
    if pairs:
        calls.append(_launch(pairs, row.length, device))
    pairs, start = [], 0
    for group in row.groups:
        length = group.trunk.length + group.all_branches.length
        if group.prefix and length:
            pairs.append((Span(group.trunk.start, length, 0), Span(start, group.prefix, 0)))
        start += group.prefix
    if pairs:
        calls.append(_launch(pairs, start, device, from_prefix=True))
    return calls


def _launch(
    pairs: Sequence[tuple[Span, Span]],
    all_keys: int,
    device: torch.device,
    *,
    causal: bool = False,
    from_prefix: bool = False,
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
        from_prefix,
    )


def _tokens(spans: Sequence[Span], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(device)


def _bounds(spans: Sequence[Span], device: torch.device) -> Tensor:
    lengths = torch.tensor([0, *(span.length for span in spans)], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device)


def _rows(states: Tensor, index: Tensor | None) -> Tensor:
    return states if index is None else states.index_select(0, index)


def _prefix_states(call: Call) -> tuple[Tensor, Tensor]:
    """Returns keys and values (tokens, Hkv, D) of all prefixes, one after the other."""
    states = [prefix for prefix in call.prefixes if prefix is not None]
    keys, values = (torch.cat([state[i][0] for state in states], 1).transpose(0, 1) for i in (0, 1))
    return keys.contiguous(), values.contiguous()


def _sources(call: Call, key: Tensor, value: Tensor) -> Iterator[tuple[Launch, Tensor, Tensor]]:
    name, prefix = ("launches", key.device), None
    if name not in call.shared:
        call.shared[name] = launches(call.row, key.device)
    for launch in call.shared[name]:
        if launch.from_prefix:
            prefix = prefix or _prefix_states(call)
        keys, values = prefix if launch.from_prefix and prefix else (key, value)
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
        if launch.keys is not None and not launch.from_prefix:  # among a row's keys are never those of branches
            for total, part in zip(grads[1:], parts[1:], strict=True):
                total.index_add_(0, launch.keys, part)
    grad_query, grad_key, grad_value = (x.transpose(0, 1).unsqueeze(0) for x in grads)
    return grad_query, grad_key, grad_value


@cache
def _flash_attn() -> Any:
    """Returns flash-attn's functions where it is installed, else None: torch's own copy of the kernel is used."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_interface  # type: ignore[import-not-found]

    return flash_attn_interface


def _forward(query: Tensor, key: Tensor, value: Tensor, launch: Launch, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns (n, Hq, D) and the log-sum-exp (Hq, n) of one launch."""
    bounds = (launch.query_bounds, launch.key_bounds, launch.longest_query, launch.longest_key)
    if (flash := _flash_attn()) is not None:
        return flash._flash_attn_varlen_forward(query, key, value, *bounds, 0.0, scaling, causal=launch.causal)[:2]
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
    if (flash := _flash_attn()) is not None:
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        flash._flash_attn_varlen_backward(
            grad, query, key, value, out, lse, *grads, *bounds, 0.0, scaling, launch.causal, -1, -1, 0.0, None, True
        )
        return grads
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
    prefixes = [prefix for prefix in call.prefixes if prefix is not None]
    if prefixes:
        key, value = (torch.cat([*(p[i] for p in prefixes), x], 2) for i, x in enumerate((key, value)))
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
    # Per token: its group, its span in the group (0: prefix or trunk, which all branches see), its position.
    prefix, row = [], []
    for index, group in enumerate(call.row.groups):
        prefix += [(index, 0, position) for position in range(group.prefix)]
        for branch, span in enumerate((group.trunk, *group.branches)):
            row += [(index, branch, span.position + i) for i in range(span.length)]
    q_group, q_span, q_position = torch.tensor(row).to(device).unbind(1)
    k_group, k_span, k_position = torch.tensor(prefix + row).to(device).unbind(1)
    window = call.window or len(prefix + row)

    def visible(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = q_position[q] - k_position[k]
        related = (k_span[k] == 0) | (k_span[k] == q_span[q])
        return (q_group[q] == k_group[k]) & related & (distance >= 0) & (distance < window)

    call.shared[name] = create_block_mask(visible, None, None, len(row), len(prefix + row), device=str(device))
    return call.shared[name]
