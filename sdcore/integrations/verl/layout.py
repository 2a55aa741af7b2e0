"""Says where responses are in verl's batches, packed or padded, and what their tokens weigh in the loss.

    responses = Responses.packed(input_ids.offsets(), lengths)      # or .padded(attention_mask, width)
    hidden = flat("hidden_states", hidden_states, 1)[responses.rows]                 # (N, H)
    loss = (loss_weights("token-mean", responses, mask) * per_token).sum()          # verl's agg_loss

What differs from the obvious: the row that predicts a response's first token is the prompt's last, and the response's
last row is not read. Aggregation is `losses.token_weights`, with verl's own normalizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...losses import token_weights

# verl's names for the ways to aggregate; `seq-mean-token-sum-norm` divides the sum by a length as well.
AGGREGATIONS = {
    "token-mean": "token-mean",
    "token-sum": "token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "seq-mean-token-sum",
    "seq-mean-token-mean": "seq-mean-token-mean",
}


class Scored(NamedTuple):
    """Holds a teacher's top-k from a rollout server, beside the hidden states: row i is about token i + 1."""

    ids: Tensor  # nested (B, j, K), or (total, K)
    logprobs: Tensor  # likewise


class Hidden(NamedTuple):
    """Holds a teacher's states, where its own prompt stands before the same responses."""

    states: Tensor  # as the student's
    responses: Responses
    weight: Tensor | None = None  # (V, Ht); None: the student's


@dataclass(frozen=True, kw_only=True, eq=False)
class Responses:
    """Says which rows of a batch predict response tokens.

    Letters: B sequences, T width of the padded responses, N tokens. Rows are those of the flattened hidden states:
    (total, H) of a packed batch, or (B·L, H) of a padded one.
    """

    rows: Tensor  # (N,) int64, in the order sequence, position
    lengths: tuple[int, ...]  # B
    width: int  # T

    @classmethod
    def packed(cls, cu_seqlens: Tensor, lengths: Sequence[int], *, width: int | None = None) -> Responses:
        """Takes sequences that begin at `cu_seqlens` (B + 1,), as in `input_ids.offsets()`, and end with a response."""
        ends, sizes = cu_seqlens[1:].tolist(), cu_seqlens.diff().tolist()
        if len(lengths) != len(sizes) or any(not 0 <= n < size for n, size in zip(lengths, sizes, strict=True)):
            raise ArgumentError(
                f"lengths must be of the response of each of {len(sizes)} sequences, shorter than {sizes}, got "
                f"{list(lengths)}"
            )
        rows = [torch.arange(end - n - 1, end - 1) for end, n in zip(ends, lengths, strict=True)]
        return cls._of(rows, lengths, width, cu_seqlens.device)

    @classmethod
    def padded(cls, attention_mask: Tensor, width: int) -> Responses:
        """Takes (B, L): prompts padded on the left, and responses, in the last `width` columns, on the right."""
        columns = attention_mask.shape[1]
        if not 0 < width < columns:
            raise ArgumentError(f"width must be in [1, {columns - 1}], less than the columns, got {width}")
        inside = attention_mask[:, -width:].bool()
        lengths = inside.sum(1).tolist()
        if not bool((inside == (torch.arange(width, device=inside.device) < inside.sum(1, keepdim=True))).all()):
            raise ArgumentError("attention_mask must have each response's tokens before its padding, got others")
        first = columns - width - 1
        rows = [torch.arange(b * columns + first, b * columns + first + n) for b, n in enumerate(lengths)]
        return cls._of(rows, lengths, width, attention_mask.device)

    @classmethod
    def _of(cls, rows: list[Tensor], lengths: Sequence[int], width: int | None, device: torch.device) -> Responses:
        longest = max(lengths, default=0)
        if width is not None and width < longest:
            raise ArgumentError(f"width must be at least that of the longest response, {longest}, got {width}")
        return cls(
            rows=torch.cat(rows).to(device),
            lengths=tuple(int(n) for n in lengths),
            width=longest if width is None else width,
        )

    def take(self, name: str, padded: Tensor) -> Tensor:
        """Takes (B, T, ...), padded on the right or nested, to the (N, ...) that are not padding."""
        if padded.is_nested:
            lengths = padded.offsets().diff().tolist()  # type: ignore[attr-defined]  # of jagged tensors
            if tuple(lengths) != self.lengths:
                raise ArgumentError(f"{name} must have the responses' lengths, {list(self.lengths)}, got {lengths}")
            return padded.values()
        if tuple(padded.shape[:2]) != (len(self.lengths), self.width):
            raise ArgumentError(
                f"{name} must have shape (B={len(self.lengths)}, T={self.width}), got {tuple(padded.shape)}"
            )
        return padded[self.inside(padded.device)]

    def pad(self, rows: Tensor) -> Tensor:
        """Takes (N,) to (B, T), zeros elsewhere; in the graph."""
        padded = rows.new_zeros(len(self.lengths), self.width)
        return padded.masked_scatter(self.inside(rows.device), rows)

    def inside(self, device: torch.device) -> Tensor:
        """Marks, (B, T) bool, what is no padding."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(self.width, device=device) < lengths[:, None]


def loss_weights(
    loss_agg_mode: str,
    responses: Responses,
    mask: Tensor,
    *,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
    norm_counts_sequences: bool = True,
) -> Tensor:
    """Returns (N,) float32, with which `(weights * per_token).sum()` is verl's `agg_loss`; `mask` (N,) bool.

    The keywords are verl's `global_batch_info`; None counts this micro-batch. `norm_counts_sequences=False` is the
    `seq-mean-token-sum-norm` of older versions, 0.7 among them, which did not divide by the number of sequences.
    """
    if loss_agg_mode not in AGGREGATIONS:
        raise ArgumentError(f"loss_agg_mode must be one of {', '.join(map(repr, AGGREGATIONS))}, got {loss_agg_mode!r}")
    weights, counted = token_weights(AGGREGATIONS[loss_agg_mode], responses.lengths, mask)  # type: ignore[arg-type]
    given = batch_num_tokens if loss_agg_mode == "token-mean" else global_batch_size
    if loss_agg_mode == "token-sum":
        normalizer = 1.0
    elif given is None and dp_size > 1:
        name = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
        raise ArgumentError(f"{name} must be given for {loss_agg_mode!r} where dp_size is {dp_size}, got None")
    else:
        normalizer = counted if given is None else float(given)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        scale = responses.width if loss_scale_factor is None else float(loss_scale_factor)
        normalizer = (normalizer if norm_counts_sequences else 1.0) * scale
    return weights * (dp_size / (normalizer or 1.0))


def responses_of(data: Any) -> Responses:
    """Finds the responses' rows in verl's micro-batch, as its `no_padding_2_padding` reads it."""
    prompts, replies = data["prompts"], data["responses"]
    if prompts.is_nested:
        before, after = prompts.offsets().diff(), replies.offsets().diff()
        width = None
        most = data.get("max_response_len", None)
        if isinstance(most, int) and most >= 0:
            width = most
    else:
        attention_mask = data["attention_mask"]
        before, after = attention_mask[:, : prompts.shape[1]].sum(1), attention_mask[:, prompts.shape[1] :].sum(1)
        width = replies.shape[1]
    cu_seqlens = torch.cat([before.new_zeros(1), (before + after).cumsum(0)])
    return Responses.packed(cu_seqlens, after.tolist(), width=width)


def flat(name: str, tensor: Tensor, trailing: int) -> Tensor:
    """Returns all rows of a batch that is nested, (B, L, ...) or flat; `trailing` dimensions are a row's own."""
    if tensor.is_nested:
        return tensor.values()
    if tensor.dim() == trailing + 2:
        return tensor.flatten(0, 1)
    if tensor.dim() != trailing + 1:
        raise ArgumentError(
            f"{name} must be nested or have {trailing + 1} or {trailing + 2} dimensions, got {tuple(tensor.shape)}"
        )
    return tensor
