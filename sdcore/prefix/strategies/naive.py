"""Runs each sequence by itself, from its first token: the reference, and the fallback for every model.

Nothing is shared: of a tree only the sequences are read. Those of similar length are batched and padded on the right,
where no earlier token sees it, so no mask is passed and attention stays on its causal path.

Not covered: models that see tokens ahead; `find_body` refuses those that say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...models import Body
from ..planner import buckets
from ..tree import Tree
from .caches import far, positions

Piece: TypeAlias = tuple[Tensor, Tensor]  # which of the plan's rows, (n,) on the CPU, and their states (n, H)

# A batch more costs about as much as this much padding.
FREE_PADDING = 16


def hidden_states(
    body: Body, trees: Sequence[Tree], *, prompts: Any = None, record: Any = False, alone: bool = False
) -> tuple[Tensor, None]:
    """Returns the (N, H) asked-for states, in the order of the plan's rows.

    `prompts` and `record` are other strategies' ways to share; here nothing is read and nothing recorded. `alone`: one
    sequence at a time, without padding. With a graph if gradients are enabled.
    """
    pieces: list[Piece] = []
    wanted = [(tree, i) for tree in trees for i in tree.active]
    sequences = [tree.sequence(i) for tree, i in wanted]
    for bucket in length_buckets(body, [len(ids) for ids in sequences], alone=alone):
        states = run_whole(body, [sequences[index] for index in bucket])  # (B, L, H)
        for row, (tree, i) in enumerate(wanted[index] for index in bucket):
            of_sequence = tree.slices[i]
            pieces.append((tree.places[of_sequence], taken(states[row], tree.positions[of_sequence])))
    return in_order(body, pieces), None


def taken(states: Tensor, positions: Tensor) -> Tensor:
    """Returns (n, H) of (L, H) at these positions; a slice, which is not copied, where they follow each other."""
    start, stop = int(positions[0]), int(positions[-1]) + 1
    return states[start:stop] if stop - start == len(positions) else states[positions.to(states.device)]


def length_buckets(body: Body, lengths: Sequence[int], *, alone: bool = False) -> list[list[int]]:
    """Batches sequences, as indices, so that none changes how another one's positions are encoded."""
    if alone:
        return [[i] for i in range(len(lengths))]
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


def in_order(body: Body, pieces: Sequence[Piece]) -> Tensor:
    """Joins pieces to the (N, H) states in the order of their places.

    Without rows the result has none, but is connected to the model, so that a rank without completions takes part in
    what the ranks do together.
    """
    if not pieces:
        return body(torch.zeros(1, 1, dtype=torch.int64, device=body.device))[0, :0]
    pieces = sorted(pieces, key=lambda piece: int(piece[0][0]))
    places, states = torch.cat([places for places, _ in pieces]), torch.cat([states for _, states in pieces])
    return states if bool((places[1:] > places[:-1]).all()) else states[places.argsort().to(states.device)]
