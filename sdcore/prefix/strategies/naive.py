"""Runs each completion as a sequence of its own, prompt included: the reference, and the fallback for every model.

Nothing is shared. Sequences of similar length are batched and padded on the right, where no earlier token sees it, so
no mask is passed and attention stays on its causal path.

Not covered: models that see tokens ahead; `find_body` refuses those that say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...models import Body
from ..planner import Tree, buckets, row_slices
from .caches import far, positions

# A batch more costs about as much as this much padding.
FREE_PADDING = 16


def hidden_states(
    body: Body, trees: Sequence[Tree], *, prompts: Any = None, record: Any = False
) -> tuple[Tensor, None]:
    """Returns the (N, H) states that predict each completion token, in the order group, completion, position.

    `prompts` and `record` are other strategies' ways to share; here nothing is read and nothing recorded. With a graph
    if gradients are enabled.
    """
    slices = row_slices(trees)
    pieces: list[tuple[slice, Tensor]] = []
    places = [(g, i) for g, tree in enumerate(trees) for i in tree.active]
    sequences = [trees[g].sequence(i) for g, i in places]
    for bucket in length_buckets(body, [len(ids) for ids in sequences]):
        states = run_whole(body, [sequences[index] for index in bucket])  # (B, L, H)
        for row, index in enumerate(bucket):
            g, i = places[index]
            end = len(sequences[index])
            pieces.append((slices[g][i], states[row, end - trees[g].rows[i] : end]))
    return in_order(body, pieces, trees), None


def length_buckets(body: Body, lengths: Sequence[int]) -> list[list[int]]:
    """Batches sequences, as indices, so that none changes how another one's positions are encoded."""
    sides = [[i for i, length in enumerate(lengths) if far(body, length) == side] for side in (False, True)]
    return [
        [side[index] for index in bucket]
        for side in sides
        for bucket in buckets([lengths[i] for i in side], free_padding=FREE_PADDING)
    ]


def run_whole(body: Body, sequences: Sequence[Tensor]) -> Tensor:
    """Returns (B, L, H) states of whole sequences, padded on the right to the longest."""
    input_ids = pad_sequence(list(sequences), batch_first=True)
    return body(input_ids, position_ids=positions(0, input_ids))


def in_order(body: Body, pieces: Sequence[tuple[slice, Tensor]], trees: Sequence[Tree]) -> Tensor:
    """Joins pieces with their places among the N rows to (N, H).

    Without rows the result has none, but is connected to the model, so that a rank without completions takes part in
    what the ranks do together.
    """
    ordered = [states for _, states in sorted(pieces, key=lambda piece: piece[0].start) if len(states)]
    if ordered:
        return torch.cat(ordered)
    device = trees[0].trunk.device if trees else body.device
    return body(torch.zeros(1, 1, dtype=torch.int64, device=device))[0, :0]
