"""Attends over one packed row of trees, by a function that a transformers model can be told to use.

    scores = query @ key.mT * scaling                          # (heads, L, L), never formed for the whole row
    scores = softcap * tanh(scores / softcap)                  # where the model does so
    visible[i, j] = j is on the path to i, borrowed or not, and 0 <= position[i] - position[j] < window
    out = softmax(scores.where(visible, -inf)) @ value

The row is cut into rectangles (`segments.py`), each done by a dense kernel; where a query has several, their outputs
are merged by log-sum-exp. Keys and values are read where they are, once for all that comes after them; heads that share
keys and values are not repeated.

What differs from the obvious: the backward is written by hand. A kernel's log-sum-exp carries no gradient, so letting
autograd differentiate the merge is wrong. But a kernel's own backward only uses the output and log-sum-exp to recover
`p = exp(score - lse)` and `sum(grad_out * out)`: given the *merged* ones, it gives this rectangle's exact share.

`RowContext` says what the row is made of. It reaches the attention function inside of the attention mask that the model
hands from layer to layer: so it is there again when gradient checkpointing runs a layer anew in backward.

Not covered: attention dropout, attention sinks, biases on the scores, bidirectional or chunked attention, a KV cache.
Each is refused with `UnsupportedModelError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ...errors import UnsupportedModelError
from . import cuda
from .segments import BORROWED, ROW, Block, Call, KeyValue, Row, cut

NAME = "sdcore_packed"

# Queries per rectangle of the plain kernel, which forms the scores of one rectangle for all heads.
PLAIN_QUERIES = 128


@dataclass(eq=False)
class RowContext:
    """Holds what one pass over one row needs in every layer."""

    row: Row
    # The layers' keys and values that nodes of the row are borrowed from; None where none is.
    borrowed: dict[int, KeyValue] | None
    # Layers' keys and values of the row are put here; None: nothing is recorded.
    recorded: dict[int, KeyValue] | None = None
    # Masks of rectangles and the like, which layers have in common.
    shared: dict[Any, Any] = field(default_factory=dict)

    def borrowed_in(self, layer: int) -> KeyValue:
        if self.borrowed is None or layer not in self.borrowed:
            raise ValueError(f"prompts must hold the states of layer {layer}, recorded by a packed pass of this model")
        return self.borrowed[layer]


class RowMask:
    """Stands where the model has its attention mask, and holds the row and the window that a mask was asked for.

    No dataclass: of one among a layer's arguments FSDP2's mixed precision makes a copy, and records would be put there.
    """

    def __init__(self, context: RowContext, window: int | None) -> None:
        self.context = context
        self.window = window


_ACTIVE: ContextVar[RowContext | None] = ContextVar("sdcore_packed_row", default=None)


@contextmanager
def row_context(context: RowContext) -> Iterator[None]:
    """Lets models in packed mode make their masks from this context, while entered."""
    token = _ACTIVE.set(context)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,  # offsets, dtype, device, config, and the mask that the row's positions seem to ask for
) -> RowMask:
    """Makes the mask that `packed_attention` expects; transformers' models call it."""
    context = _ACTIVE.get()
    if context is None:
        raise RuntimeError(f"a model in {NAME} mode can only be called by sdcore.prefix.strategies.packed")
    length = context.row.length
    if (batch_size, q_length, kv_length) != (1, length, length) or attention_mask is not None:
        shape = (batch_size, q_length, kv_length)
        raise UnsupportedModelError(
            f"a packed row must be the model's whole input, (1, {length}, {length}) without a mask; the model asks for "
            f"a mask of {shape}" + (" on top of another one" if attention_mask is not None else "")
        )
    if use_vmap:
        raise UnsupportedModelError("the model adds a mask function of its own to the causal mask")
    return RowMask(context, local_size)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, Hq, L, D)
    key: Tensor,  # (1, Hkv, L, D)
    value: Tensor,  # (1, Hkv, L, Dv)
    attention_mask: RowMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Returns (1, L, Hq, Dv), and no attention weights; transformers' models call it."""
    if not isinstance(attention_mask, RowMask):
        got = type(attention_mask).__name__
        raise UnsupportedModelError(f"{_where(module)} makes its attention mask without transformers' masks: got {got}")
    context, window = attention_mask.context, attention_mask.window
    _refuse(module, dropout, is_causal, others)
    if sliding_window != window:
        raise UnsupportedModelError(
            f"{_where(module)} must be given the window that its mask has: got sliding_window={sliding_window} with a "
            f"mask for {window}, which is chunked attention or a window of another kind"
        )
    length = context.row.length
    if query.shape[::2] != (1, length) or key.shape[::2] != (1, length):
        shapes = (tuple(query.shape), tuple(key.shape))
        raise UnsupportedModelError(
            f"{_where(module)} must attend from and to {length} tokens, got query and key {shapes}"
        )
    if not query.dtype == key.dtype == value.dtype:
        # Under autocast a norm on queries and keys leaves them in float32.
        key, value = key.to(query.dtype), value.to(query.dtype)
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    layer = getattr(module, "layer_idx", None)
    if context.recorded is not None:
        context.recorded[_index(module, layer)] = key.detach(), value.detach()
    borrows = any(node.source == BORROWED for node in context.row.nodes)
    call = Call(
        context.row,
        context.borrowed_in(_index(module, layer)) if borrows else None,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        None if window is None or window >= context.row.longest else window,
        softcap,
        context.shared,
    )
    return attend(query, key, value, call), None


def _refuse(module: torch.nn.Module, dropout: float, is_causal: bool | None, others: dict[str, Any]) -> None:
    if dropout > 0:
        raise UnsupportedModelError(f"{_where(module)} must run without attention dropout, got {dropout}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModelError(f"{_where(module)} must be causal, got is_causal=False")
    unknown = sorted(
        name for name in others.keys() - HARMLESS if others[name] is not None and others[name] is not False
    )
    if unknown:
        raise UnsupportedModelError(f"{_where(module)} gives its attention what packed rows do not know: {unknown}")


# What models hand through to the attention function that does not concern it.
HARMLESS = frozenset(
    {"position_ids", "position_embeddings", "use_cache", "cache_position", "return_dict", "output_hidden_states"}
    | {"output_router_logits", "logits_to_keep", "num_items_in_batch"}
)


def _where(module: torch.nn.Module) -> str:
    return type(module).__name__


def _index(module: torch.nn.Module, layer: int | None) -> int:
    if layer is None:
        raise UnsupportedModelError(f"{_where(module)} has no layer_idx to keep its keys and values under")
    return layer


def attend(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """Computes (1, L, Hq, Dv) from (1, Hq, L, D), (1, Hkv, L, D) and (1, Hkv, L, Dv); differentiable in the three."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    special = call.softcap is not None or call.window is not None
    if special and cuda.can_flex(query, value):
        return cuda.flex(query, key, value, call)
    return _RowAttention.apply(query, key, value, call)


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        ctx.call, ctx.varlen = call, cuda.can_varlen(query, value, call)
        forward = cuda.varlen_forward if ctx.varlen else blockwise_forward
        out, lse = forward(query, key, value, call)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward: Any = cuda.varlen_backward if ctx.varlen else blockwise_backward
        return (*backward(grad, *ctx.saved_tensors, ctx.call), None)


def blockwise_forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Returns (1, L, Hq, Dv) and the log-sum-exp (1, L, Hq), computed rectangle by rectangle."""
    kernel = _kernel(query, value, call)
    _, heads, length, _ = query.shape
    out = query.new_empty(1, length, heads, value.shape[-1])
    lse = query.new_empty(1, length, heads, dtype=torch.promote_types(query.dtype, torch.float32))
    for block in call.blocks(kernel.at_most):
        keys, values = call.keys_of(block, key, value)
        part, part_lse = kernel.forward(_queries(query, block), keys, values, block, call)
        block_out, block_lse = _queries(out.transpose(1, 2), block), _queries(lse.transpose(1, 2), block)
        if block.opens:
            block_out.copy_(part)
            block_lse.copy_(part_lse)
        else:
            # softmax over the union: the share of the second part is exp(its lse) of the sum of both.
            share = torch.sigmoid(part_lse - block_lse).unsqueeze(-1)
            block_out.copy_(torch.lerp(block_out.to(share.dtype), part.to(share.dtype), share))
            block_lse.copy_(torch.logaddexp(block_lse, part_lse))
    return out, lse


def blockwise_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value, in their shapes."""
    kernel = _kernel(query, value, call)
    grad_query, grad_key, grad_value = (_empty_like(x) for x in (query, key, value))
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad, out, lse = grad.transpose(1, 2), out.transpose(1, 2), lse.transpose(1, 2)
    blocks = call.blocks(kernel.at_most)
    # Where every span opens as one rectangle, these also hold each key once: nothing needs to be zero before.
    squares = all(block.causal for block in blocks if block.opens)
    if not squares:
        grad_key.zero_()
        grad_value.zero_()
    for block in blocks:
        keys, values = call.keys_of(block, key, value)
        block_grad, block_query, block_out, block_lse = (_queries(x, block) for x in (grad, query, out, lse))
        parts = kernel.backward(block_grad, block_query, keys, values, block_out, block_lse, block, call)
        _put(_queries(grad_query, block), parts[0], add=not block.opens)
        if block.source == ROW:
            for total, part in zip((grad_key, grad_value), parts[1:], strict=True):
                _put(cut(total, block.key, block.keys, block.copies), part, add=not (block.opens and squares))
    return grad_query, grad_key, grad_value


def _empty_like(states: Tensor) -> Tensor:
    """Makes (1, heads, L, D), laid out as the transpose of (1, L, heads, D), which is how models hold it."""
    return torch.empty_like(states.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _put(total: Tensor, part: Tensor, *, add: bool) -> None:
    if add:
        total.add_(part)
    else:
        total.copy_(part)


def _queries(states: Tensor, block: Block) -> Tensor:
    return cut(states, block.query, block.queries, block.copies)


class Kernel(NamedTuple):
    """Attends in one rectangle: queries (C, Hq, n, D), keys (C, Hkv, m, D), values (C, Hkv, m, Dv)."""

    # (query, keys, values, block, call) -> out (C, Hq, n, Dv), lse (C, Hq, n)
    forward: Callable[..., tuple[Tensor, Tensor]]
    # (grad, query, keys, values, merged out, merged lse, block, call) -> gradients of query, keys, values
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    at_most: int | None  # queries of a rectangle


def _kernel(query: Tensor, value: Tensor, call: Call) -> Kernel:
    fused = query.device.type == "cpu" and call.softcap is None and value.shape[-1] == query.shape[-1]
    return FUSED_CPU if fused else PLAIN


def _fused_forward(query: Tensor, key: Tensor, value: Tensor, block: Block, call: Call) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, block.causal, attn_mask=call.mask_of(block, query), scale=call.scaling
    )


def _fused_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, block: Block, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, block.causal, attn_mask=call.mask_of(block, query), scale=call.scaling
    )


def _scores(query: Tensor, key: Tensor, block: Block, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns scores (C, Hkv, heads per key · n, m), the queries folded so, and tanh where scores are soft-capped."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    folded = query.to(dtype).reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    scores, bent = folded @ key.to(dtype).mT * call.scaling, None
    if call.softcap is not None:
        bent = torch.tanh(scores / call.softcap)
        scores = bent * call.softcap
    mask = call.mask_of(block._replace(masked=True) if block.causal else block, scores)
    if mask is not None:
        scores = (scores.unflatten(2, (-1, block.queries)) + mask).flatten(2, 3)
    return scores, folded, bent


def _plain_forward(query: Tensor, key: Tensor, value: Tensor, block: Block, call: Call) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        scores, _, _ = _scores(query, key, block, call)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        out = torch.exp(scores - lse) @ value.to(scores.dtype)
    return out.reshape(*query.shape[:3], -1), lse.reshape(query.shape[:3])


def _plain_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, block: Block, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        scores, folded, bent = _scores(query, key, block, call)
        shape = (*folded.shape[:3], value.shape[-1])
        grad, out = grad.to(scores.dtype).reshape(shape), out.to(scores.dtype).reshape(shape)
        weights = torch.exp(scores - lse.reshape(*shape[:3], 1))
        grad_scores = grad @ value.to(scores.dtype).mT
        grad_scores = weights * (grad_scores - (grad * out).sum(-1, keepdim=True)) * call.scaling
        if bent is not None:
            grad_scores = grad_scores * (1 - bent * bent)
        grad_query = (grad_scores @ key.to(scores.dtype)).reshape(query.shape)
        return grad_query, grad_scores.mT @ folded, weights.mT @ grad


# CPUs: it takes fewer heads of keys and values than queries as they are, forward and backward.
FUSED_CPU = Kernel(_fused_forward, _fused_backward, None)
# Any device and dtype, soft-capped scores, values of another size than keys; in float32, or float64 for float64.
PLAIN = Kernel(_plain_forward, _plain_backward, PLAIN_QUERIES)

AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)
