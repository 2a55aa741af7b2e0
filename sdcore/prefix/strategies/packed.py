"""Runs all completions in one row `[trunk 0 | branch 0,0 | branch 0,1 | ... | trunk 1 | ...]`.

    for tree in trees:                                            # the same as this, but each token is computed once
        for branch, rows in zip(tree.branches, tree.rows):
            states = body(torch.cat([tree.trunk, branch])[None])  # (1, T + B, H)
            yield states[0, len(states[0]) - rows :]

The model's linear layers see a row without padding; what a token attends to is `attention`'s business. For the time
of the call the model's configuration names that function as its attention implementation; afterwards, and after an
error, everything is as before. A layer that gradient checkpointing runs anew in backward gets it once more.

A teacher with the student's weights does not compute what its trunk begins with: the student's pass records each
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
from ..planner import Tree
from .caches import far

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Attributes by which modules hold what runs a layer under checkpointing: transformers' and torch's wrapper.
CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")


@dataclass(frozen=True, eq=False)
class PromptStates:
    """Holds keys and values of each tree's first tokens in each layer, without a graph. Opaque to others."""

    trunks: tuple[dict[int, KeyValue] | None, ...]  # per tree; None where it has no rows
    lengths: tuple[int, ...]  # tokens of each tree
    long: bool  # whether LongRoPE's factors for long sequences are in them


class PackedRow(NamedTuple):
    """Says what of the trees is computed in one row."""

    row: Row
    input_ids: Tensor  # (L,)
    position_ids: Tensor  # (L,)
    rows: Tensor  # (n,) where in the row the asked-for states are


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
    record: bool | Sequence[int] = False,
) -> tuple[Tensor, PromptStates | None]:
    """Returns the (N, H) states that predict each completion token, in the order group, completion, position.

    With a graph where gradients are enabled. `record` also returns the trunks' states, detached: True, or of each tree
    so many first tokens. With `prompts`, which such a pass over trees with the same prompts returned, the first
    `tree.shared` tokens of each trunk are read from there. Ids are expected to be on the model's device.

    Raises `ArgumentError` for prompts that do not fit, `UnsupportedModelError` where `supports` gives a reason, or the
    model asks its attention for what packed rows do not do.
    """
    if prompts is not None:
        _check_prompts(trees, prompts)
    reason = supports(body)
    if reason is not None:
        raise UnsupportedModelError(reason)
    long = _is_long(body, trees, prompts)
    active = [i for i, tree in enumerate(trees) if tree.active]
    packed = _row_of(trees, active, prompts is not None) if active else _row_of_nothing(trees)
    prefixes = tuple(prompts.trunks[tree] if prompts else None for tree in active)
    context = RowContext(packed.row, prefixes, recorded=None if record is False else {})
    with _packed_mode(body, context) as checkpointed:
        states = body(packed.input_ids.unsqueeze(0), position_ids=packed.position_ids.unsqueeze(0))  # (1, L, H)
    hidden = states[0][packed.rows]
    if context.recorded is None:
        return hidden, None
    # Layers that run anew in backward must not record: their keys and values would stay until its end.
    layers, context.recorded = context.recorded, None
    kept = [len(tree.trunk) for tree in trees] if isinstance(record, bool) else list(record)
    trunks: list[dict[int, KeyValue] | None] = [None] * len(trees)
    for tree, group in zip(active, packed.row.groups, strict=False):
        place = slice(group.trunk.start, group.trunk.start + kept[tree])
        # The graph keeps the row's keys and values; where there is none, a view would keep all of them.
        trunks[tree] = _part(layers, place, copy=checkpointed or not torch.is_grad_enabled())
    return hidden, PromptStates(tuple(trunks), tuple(kept), long)


def _row_of_nothing(trees: Sequence[Tree]) -> PackedRow:
    """Makes a row of a single token, of which no state is asked for, so that the result still has a graph."""
    token = torch.zeros(1, dtype=torch.int64, device=trees[0].trunk.device if trees else None)
    return PackedRow(pack([(0, 1, [])]), token, token, token[:0])


def _row_of(trees: Sequence[Tree], which: Sequence[int], read_shared: bool) -> PackedRow:
    shapes, ids, rows = [], [], []
    for tree in (trees[i] for i in which):
        prefix = tree.shared if read_shared else 0
        branches = [tree.branches[i] for i in tree.active]
        shapes.append((prefix, len(tree.trunk) - prefix, [len(branch) for branch in branches]))
        ids += [tree.trunk[prefix:], *branches]
    row = pack(shapes)
    for g, group in zip(which, row.groups, strict=True):
        for i, branch in zip(trees[g].active, group.branches, strict=True):
            own = min(trees[g].rows[i], branch.length)
            # A row that no token of the branch gives is the trunk's last state.
            rows += [group.trunk.stop - 1] * (trees[g].rows[i] - own) + list(range(branch.stop - own, branch.stop))
    spans = [span for group in row.groups for span in (group.trunk, *group.branches)]
    positions = [torch.arange(span.position, span.position + span.length) for span in spans]
    input_ids = torch.cat(ids)
    return PackedRow(
        row,
        input_ids,
        torch.cat(positions).to(input_ids.device),
        torch.tensor(rows, dtype=torch.int64).to(input_ids.device),
    )


def _part(layers: dict[int, KeyValue], place: slice, *, copy: bool) -> dict[int, KeyValue]:
    def part(states: Tensor) -> Tensor:
        return states[:, :, place].clone() if copy else states[:, :, place]

    return {layer: (part(key), part(value)) for layer, (key, value) in layers.items()}


def _check_prompts(trees: Sequence[Tree], prompts: PromptStates) -> None:
    if not isinstance(prompts, PromptStates):
        raise ArgumentError(f"prompts must be what a packed pass with record=True returned, got {type(prompts)}")
    if len(prompts.trunks) != len(trees):
        raise ArgumentError(f"prompts must hold {len(trees)} trees, got {len(prompts.trunks)}")
    for i, (tree, states, length) in enumerate(zip(trees, prompts.trunks, prompts.lengths, strict=True)):
        if tree.active and tree.shared and (states is None or length < tree.shared):
            got = "none: that tree had no rows" if states is None else f"{length}"
            raise ArgumentError(f"prompts must hold the {tree.shared} shared tokens of trees[{i}], got {got}")


def _is_long(body: Body, trees: Sequence[Tree], prompts: PromptStates | None) -> bool:
    """True where the sequences get LongRoPE's factors for long ones: the longest decides for the whole row."""
    lengths = {len(tree.trunk) + len(tree.branches[i]) for tree in trees for i in tree.active}
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
