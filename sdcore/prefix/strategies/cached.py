"""Runs the trunk once, into a cache; then its branches as a batch that reads it. One backward goes through all.

    states, trunk_hidden = run_recording(body, tree.trunk)
    branch_hidden = run_reading(body, pad(tree.branches), states)

Works with whatever attention a model uses, and with linear-attention hybrids. What it costs beside each token once:
the trunk's keys and values are copied in front of each branch's, layer by layer. A live teacher starts from the
student's states (`record=`, `prompts=`), as far as its trunk begins with the student's prompt.

Not covered: groups are computed one after the other, so many small ones cost many small passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...models import Body
from ..planner import buckets
from ..tree import Tree
from .caches import OneLevel, TrunkStates, far, one_level, require_readable, run_reading, run_recording
from .naive import FREE_PADDING, Piece, in_order, length_buckets, run_whole


@dataclass(frozen=True, eq=False)
class PromptStates:
    """Holds what a student's pass leaves to a teacher's of the same weights: detached states of each group's prompt."""

    groups: tuple[tuple[TrunkStates, ...], ...]  # B of: after the whole prompt, and maybe after less of it

    def start_of(self, group: int, tree: OneLevel, body: Body) -> TrunkStates | None:
        """Returns the states after the first `tree.shared` tokens of a group, or after as many as there are."""
        candidates = [
            states.up_to(tree.shared, body)
            for states in self.groups[group]
            if tree.shared and far(body, states.length) == far(body, len(tree.trunk))
        ]
        return max(
            (states for states in candidates if states is not None), key=lambda states: states.length, default=None
        )


def hidden_states(
    body: Body,
    trees: Sequence[Tree],
    *,
    prompts: PromptStates | None = None,
    record: bool | Sequence[Sequence[tuple[int, int]]] = False,
    micro_batch: int | None = None,
) -> tuple[Tensor, PromptStates | None]:
    """Returns the (N, H) asked-for states, in the order of the plan's rows.

    With a graph if gradients are enabled. `record` also returns the trunks' states, detached, for a teacher's pass:
    True, or per group what that pass will read (`Tree.reads`), which recurrent layers have to know beforehand. With
    `prompts`, from such a pass under the same weights, the first `tree.shared` tokens of each trunk are read and
    not computed. At most `micro_batch` branches run at a time (None: any number).

    Raises `UnsupportedModelError` for models whose prefix cannot be shared, and for reentrant checkpointing.
    """
    require_readable(body, trees)
    pieces: list[Piece] = []
    recorded: list[tuple[TrunkStates, ...]] = []
    for g, tree in enumerate(one_level(body, tree) for tree in trees):
        kept: tuple[TrunkStates, ...] = ()
        if tree.active:
            start = None if prompts is None else prompts.start_of(g, tree, body)
            trunk = run_trunk(body, tree, start, split_at=split_of(record, g))
            kept = () if record is False else trunk.detached()
            for batch in branch_batches(body, tree, micro_batch=micro_batch):
                pieces += run_branches(body, tree, batch, trunk.whole, trunk.last)
        recorded.append(kept)
    return in_order(body, pieces), None if record is False else PromptStates(tuple(recorded))


def split_of(record: bool | Sequence[Sequence[tuple[int, int]]], group: int) -> int:
    """Says after how many tokens of a group's trunk a teacher's pass goes on from it."""
    return 0 if isinstance(record, bool) or not record[group] else record[group][-1][1]


@dataclass(frozen=True, eq=False)
class Trunk:
    """Is a trunk that has been run."""

    states: tuple[TrunkStates, ...]  # after all of it, and maybe after less; none where the trunk is empty
    last: Tensor | None  # (H,) the hidden state of its last token; None where the trunk is empty

    @property
    def whole(self) -> TrunkStates | None:
        return self.states[0] if self.states else None

    def detached(self) -> tuple[TrunkStates, ...]:
        return tuple(states.detach() for states in self.states)


def run_trunk(body: Body, tree: OneLevel, start: TrunkStates | None = None, *, split_at: int = 0) -> Trunk:
    """Runs what `start` does not hold of a trunk. Recurrent layers' states are kept after `split_at` tokens too."""
    if len(tree.trunk) == 0:
        return Trunk((), None)
    done = 0 if start is None else start.length
    kept: tuple[TrunkStates, ...] = ()
    unread: list[Tensor] = []
    # A rest of one token would be computed as in decoding, for which fused kernels have no backward.
    split_at = min(split_at, len(tree.trunk) - 2)
    if body.recurrent and done < split_at:
        start, first = run_recording(body, tree.trunk[done:split_at], start)
        kept, done = (start,), split_at
        # FSDP2 gathers a layer's weights for backward when a gradient arrives at its output, not at its states.
        unread = [first[:0]] if body.sharded is not None else []
    whole, hidden = run_recording(body, tree.trunk[done:], start)
    return Trunk((whole, *kept), torch.cat([*unread, hidden[-1:]])[0])


def branch_batches(body: Body, tree: OneLevel, *, micro_batch: int | None = None) -> list[list[int]]:
    """Batches completions with rows: at most `micro_batch` branches of similar length, the longest first.

    A completion with nothing to run, since its only row is the trunk's last state, is no burden to the last batch.
    """
    running = [i for i in tree.active if len(tree.branches[i])]
    lengths = [len(tree.branches[i]) for i in running]
    alike = buckets(lengths, free_padding=FREE_PADDING) if len(tree.trunk) else length_buckets(body, lengths)
    step = micro_batch or max(1, len(running))
    batches = [[running[i] for i in bucket[at : at + step]] for bucket in alike for at in range(0, len(bucket), step)]
    standing = [i for i in tree.active if not len(tree.branches[i])]
    if not batches:
        return [standing] if standing else []
    return [*batches[:-1], batches[-1] + standing]


def run_branches(
    body: Body,
    tree: OneLevel,
    batch: Sequence[int],
    prefix: TrunkStates | None,
    last: Tensor | None,
) -> list[Piece]:
    """Runs these completions' branches after a prefix. `last` (H,) is the trunk's last hidden state, a row of some."""
    running = [i for i in batch if len(tree.branches[i])]
    states: dict[int, Tensor] = {}
    if running:
        branches = [tree.branches[i] for i in running]
        if prefix is None:
            hidden = run_whole(body, branches)  # (B, L, H)
        else:
            tokens = pad_sequence(branches, batch_first=True)
            # As in `run_trunk`: never a single token after a recurrent layer's state.
            if body.recurrent and tokens.shape[1] == 1:
                tokens = torch.nn.functional.pad(tokens, (0, 1))
            hidden = run_reading(body, tokens, prefix)
        states = dict(zip(running, hidden, strict=True))
    pieces = []
    for i in batch:
        rows, length, places = tree.rows[i], len(tree.branches[i]), tree.places[i]
        if rows > length and last is not None:
            pieces.append((places[:1], last[None]))
        if length:
            own = min(rows, length)
            pieces.append((places[len(places) - own :], states[i][length - own : length]))
    return pieces
