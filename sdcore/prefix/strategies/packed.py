"""Runs all trees in one row, depth first: `[prompt 0 | completion 0,0 | completion 0,1 | ... | prompt 1 | ...]`.

    for tree in trees:                                            # the same as this, but each token is computed once
        for i in tree.active:
            states = body(tree.sequence(i)[None])                 # (1, L, H)
            yield states[0, tree.positions[tree.slices[i]]]

The model's linear layers see a row without padding; what a token attends to is `attention`'s business. For the time
of the call the model's configuration names that function as its attention implementation; afterwards, and after an
error, everything is as before. A layer that gradient checkpointing runs anew in backward gets it once more.

A teacher with the student's weights does not compute the nodes that it can borrow: the student's pass records each
layer's keys and values, and the teacher's row attends to them.

Not covered: layers that carry a state from token to token (linear attention, convolutions, state spaces), attention
that does not go through transformers' `AttentionInterface`, reentrant checkpointing, and rotary embeddings that depend
on the length of the row. `supports` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ...errors import ArgumentError, UnsupportedModelError
from ...models import Body
from ..attention.function import NAME, RowContext, row_context
from ..attention.segments import KeyValue, Row, pack
from ..tree import Tree, in_order
from .caches import far

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Attributes by which modules hold what runs a layer under checkpointing: transformers' and torch's wrapper.
CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")


@dataclass(frozen=True, eq=False)
class PromptStates:
    """Holds keys and values of some tokens of a student's trees, without a graph. Opaque to others."""

    layers: dict[int, KeyValue]
    # Per tree which of its tokens, flat from `start` to `stop`, are there, and where; () where it has no rows.
    kept: tuple[tuple[tuple[int, int, int], ...], ...]
    long: bool  # whether LongRoPE's factors for long sequences are in them

    def place_of(self, tree: int, start: int, length: int) -> int | None:
        """Says where these tokens of a tree are in the layers; None if they are not."""
        places = (place + start - a for a, b, place in self.kept[tree] if a <= start and start + length <= b)
        return next(places, None)


class PackedRow(NamedTuple):
    """Says what of the trees is computed in one row."""

    row: Row
    input_ids: Tensor  # (L,)
    position_ids: Tensor  # (L,)
    rows: Tensor  # (n,) where in the row the asked-for states are, in the order of their places


def supports(body: Body) -> str | None:
    """Says why this model cannot be packed; None if it can, as far as can be told without running it."""
    base = body.base
    others = sorted(set(body.layer_types) - LAYER_TYPES)
    if others:
        return f"{body.name} has layers of type {', '.join(others)}, which packed rows do not know"
    if not base._supports_attention_backend:
        return f"{body.name} does not call its attention through transformers' AttentionInterface"
    for module in base.modules():
        if isinstance(module, nn.Conv1d):
            return f"{body.name} has convolutions, which run across the borders of sequences"
        if isinstance(getattr(module, "sinks", None), Tensor):
            return f"{body.name} has attention sinks"
    parameters = getattr(body.config, "rope_parameters", None) or {}
    kinds = {parameters.get("rope_type"), *(v.get("rope_type") for v in parameters.values() if isinstance(v, dict))}
    if "dynamic" in kinds:
        return f"{body.name} has rotary embeddings that depend on the length of the input (rope_type dynamic)"
    for owner, name in _checkpoint_functions(body):
        if not getattr(owner, "gradient_checkpointing", True):
            continue
        function = getattr(owner, name)
        if isinstance(function, partial) and function.keywords.get("use_reentrant") is not False:
            return f"{body.name} checkpoints its layers with use_reentrant=True, which packed rows are not tested with"
    return None


def hidden_states(
    body: Body,
    trees: Sequence[Tree],
    *,
    prompts: PromptStates | None = None,
    record: bool | Sequence[Sequence[tuple[int, int]]] = False,
) -> tuple[Tensor, PromptStates | None]:
    """Returns the (N, H) asked-for states, in the order of the plan's rows.

    With a graph where gradients are enabled. `record` also returns the keys and values, detached: True for those of all
    tokens, or of each tree the spans that are wanted, as `Tree.reads` gives them. With `prompts`, which such a pass
    over the student's trees returned, `borrowed` nodes are read from there. Ids are expected to be on the model's
    device.

    Raises `ArgumentError` for prompts that do not fit, `UnsupportedModelError` where `supports` gives a reason, or the
    model asks its attention for what packed rows do not do.
    """
    if prompts is None:
        trees = [tree.alone for tree in trees]
    elif not isinstance(prompts, PromptStates):
        raise ArgumentError(f"prompts must be what a packed pass with record=True returned, got {type(prompts)}")
    elif len(prompts.kept) != len(trees):
        raise ArgumentError(f"prompts must hold {len(trees)} trees, got {len(prompts.kept)}")
    reason = supports(body)
    if reason is not None:
        raise UnsupportedModelError(reason)
    long = _is_long(body, trees, prompts)
    active = [i for i, tree in enumerate(trees) if tree.active]
    packed = _row_of(trees, active, prompts) if active else _row_of_nothing(body)
    context = RowContext(packed.row, prompts.layers if prompts else None, recorded=None if record is False else {})
    with _packed_mode(body, context) as checkpointed:
        states = body(packed.input_ids.unsqueeze(0), position_ids=packed.position_ids.unsqueeze(0))  # (1, L, H)
    hidden = states[0][packed.rows]
    if context.recorded is None:
        return hidden, None
    # Layers that run anew in backward must not record: their keys and values would stay until its end.
    layers, context.recorded = context.recorded, None
    # The graph keeps the row's keys and values; where there is none, a view would keep all of them.
    copied = checkpointed or not torch.is_grad_enabled()
    kept: list[tuple[tuple[int, int, int], ...]] = [()] * len(trees)
    parts: list[Tensor] = []
    start = place = 0
    for i in active:
        wanted = [(0, trees[i].starts[-1])] if isinstance(record, bool) else record[i]
        of_tree = []
        for first, stop in wanted:
            of_tree.append((first, stop, place if copied else start + first))
            parts.append(torch.arange(start + first, start + stop))
            place += stop - first
        kept[i], start = tuple(of_tree), start + trees[i].starts[-1]
    if copied:
        index = torch.cat([*parts, torch.empty(0, dtype=torch.int64)]).to(body.device)
        layers = {i: (key[:, :, index], value[:, :, index]) for i, (key, value) in layers.items()}
    return hidden, PromptStates(layers, tuple(kept), long)


def _row_of_nothing(body: Body) -> PackedRow:
    """Makes a row of a single token, of which no state is asked for, so that the result still has a graph."""
    token = torch.zeros(1, dtype=torch.int64, device=body.device)
    return PackedRow(pack([-1], [1]), token, token, token[:0])


def _row_of(trees: Sequence[Tree], which: Sequence[int], prompts: PromptStates | None) -> PackedRow:
    """Lays out these trees. Raises `ArgumentError` for prompts without what is to be borrowed from them."""
    parents: list[int] = []
    lengths: list[int] = []
    borrowed: list[int] = []
    ids: list[Tensor] = []
    for t in which:
        first = len(parents)
        for i, span in enumerate(trees[t].spans):
            place = None
            if trees[t].borrowed[i] >= 0 and prompts is not None:
                place = prompts.place_of(t, trees[t].borrowed[i], len(span))
                if place is None:
                    raise ArgumentError(
                        f"prompts must hold the {trees[t].shared} shared tokens of trees[{t}], got "
                        f"{sum(stop - start for start, stop, _ in prompts.kept[t])}"
                    )
            parents.append(trees[t].parents[i] + first if trees[t].parents[i] >= 0 else -1)
            lengths.append(len(span))
            borrowed.append(-1 if place is None else place)
            if place is None:
                ids.append(span)
    row = pack(parents, lengths, borrowed)
    rows, first = [], 0
    for t in which:
        tree = trees[t]
        own = row.nodes[first : first + len(tree.spans)]
        moved = torch.tensor([node.span.start - start for node, start in zip(own, tree.starts, strict=False)])
        rows.append(tree.rows + moved[tree.row_nodes])
        first += len(tree.spans)
    order = in_order([trees[t] for t in which])
    positions = [torch.arange(span.position, span.position + span.length) for span in row.own]
    input_ids, at = torch.cat(ids), torch.cat(rows)
    return PackedRow(
        row,
        input_ids,
        torch.cat(positions).to(input_ids.device),
        (at if order is None else at[order]).to(input_ids.device),
    )


def _is_long(body: Body, trees: Sequence[Tree], prompts: PromptStates | None) -> bool:
    """True where the sequences get LongRoPE's factors for long ones: the longest decides for the whole row."""
    lengths = {length for tree in trees for length in tree.lengths if length}
    regimes = {far(body, length) for length in lengths} | ({prompts.long} if prompts else set())
    if len(regimes) > 1:
        raise UnsupportedModelError(
            f"{body.name} encodes positions otherwise in sequences of more than {body.rotary_switch} tokens "
            "(LongRoPE), and the trees have both longer and shorter ones"
        )
    return regimes == {True}


def _checkpoint_functions(body: Body) -> list[tuple[nn.Module, str]]:
    return [(module, name) for module in body.model.modules() for name in CHECKPOINT_FUNCTIONS if name in vars(module)]


@contextmanager
def _packed_mode(body: Body, context: RowContext) -> Iterator[bool]:
    """Makes the model attend by `context` while entered, and its layers when a later backward runs them anew.

    Yields whether layers are checkpointed.
    """
    configs = {id(module.config): module.config for module in body.model.modules() if _has_config(module)}
    functions = _checkpoint_functions(body)
    with ExitStack() as undo:
        for owner, name in functions:
            original = getattr(owner, name)
            undo.callback(setattr, owner, name, original)
            setattr(owner, name, _in_packed_mode(original, list(configs.values())))
        undo.enter_context(_implementation(list(configs.values())))
        undo.enter_context(row_context(context))
        yield any(getattr(owner, "gradient_checkpointing", True) for owner, _ in functions)


def _has_config(module: nn.Module) -> bool:
    return isinstance(getattr(module, "config", None), PreTrainedConfig)


def _in_packed_mode(checkpoint: Callable[..., Any], configs: list[PreTrainedConfig]) -> Callable[..., Any]:
    """Wraps a checkpoint function so that the checkpointed function enters packed mode each time it runs."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def entered(*inner: Any, **named: Any) -> Any:
            with _implementation(configs):
                return function(*inner, **named)

        return checkpoint(entered, *args, **kwargs)

    return run


@contextmanager
def _implementation(configs: list[PreTrainedConfig]) -> Iterator[None]:
    """Makes the configurations name our attention function, set as transformers does, past the checking setter."""
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
