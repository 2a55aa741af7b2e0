"""Makes a model and a step small enough to run here: fewer layers, all else divided, and a list of what was done.

    small = shrunk(config, load, layers=2, width=8, tokens=8)
    small.config, small.load, small.tiles       # for `measure`
    small.changes                               # ("num_hidden_layers 36 → 2", "hidden_size 4096 → 512", ...)

Divided are the sizes that memory grows with: widths and numbers of heads, vocabulary, prompt, context and completion
length. Kept are the number of completions, the size of a head, and which kinds of layers there are. So the shares of
the categories stay near those of the model, though not exactly: weights shrink with the square of the width.

Not covered: configurations with sizes of other names, whose models `measure` then takes as they are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Final

from ..errors import require_positive
from .estimate import Load
from .measured import Tiles

WIDTHS: Final = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
HEADS: Final = (
    ("num_attention_heads", "num_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
)
# Ids that a smaller vocabulary may not have.
SPECIAL: Final = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """Says what to measure instead."""

    config: Any
    load: Load
    tiles: Tiles
    changes: tuple[str, ...]  # () where nothing was


def shrunk(config: Any, load: Load, *, layers: int | None = 2, width: int = 8, tokens: int = 8) -> Shrunk:
    """Leaves `layers` layers (None: all), divides widths and vocabulary by `width` and lengths by `tokens`.

    More layers stay where there are more kinds of them. Raises `ArgumentError` for numbers below 1.
    """
    require_positive(layers=layers, width=width, tokens=tokens)
    small, changes = copy.deepcopy(config), []

    def change(name: str, value: Any) -> None:
        before = getattr(small, name)
        if value != before:
            setattr(small, name, value)
            changes.append(f"{name} {before} → {value}")

    if layers is not None and layers < small.num_hidden_layers:
        _cut_layers(small, layers, change)
    if width > 1:
        _divide_widths(small, width, change)
    lengths = {
        name: max(getattr(load, name) // tokens, 1 if getattr(load, name) else 0)
        for name in ("prompt_tokens", "context_tokens", "completion_tokens")
    }
    changes += [f"{name} {getattr(load, name)} → {n}" for name, n in lengths.items() if n != getattr(load, name)]
    fewer = replace(load, **lengths)
    tiles = Tiles(rows=load.rows / fewer.rows, vocab=config.vocab_size / small.vocab_size)
    return Shrunk(config=small, load=fewer, tiles=tiles, changes=tuple(changes))


def _cut_layers(config: Any, layers: int, change: Any) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        # One of each kind, then the first ones, in the order that they have in the model.
        firsts = {kinds.index(kind) for kind in kinds}
        chosen = sorted([*firsts, *(i for i in range(len(kinds)) if i not in firsts)][: max(layers, len(firsts))])
        change("num_hidden_layers", len(chosen))
        config.layer_types = [kinds[i] for i in chosen]
    else:
        change("num_hidden_layers", layers)


def _divide_widths(config: Any, width: int, change: Any) -> None:
    head = getattr(config, "head_dim", None)
    before = config.num_attention_heads, config.hidden_size
    for of_queries, of_keys in HEADS:
        queries, keys = getattr(config, of_queries, None), getattr(config, of_keys, None)
        if queries is None:
            continue
        fewer_keys = max((keys or queries) // width, 1)
        if keys is not None:
            change(of_keys, fewer_keys)
        # The heads of queries are divided among those of keys.
        change(of_queries, max(queries // width // fewer_keys, 1) * fewer_keys)
    heads = config.num_attention_heads
    if head is None:
        change("hidden_size", heads * (before[1] // before[0]))
    else:
        change("hidden_size", max(before[1] // width // 8, 1) * 8)
    for name in WIDTHS:
        if getattr(config, name, None):
            change(name, max(getattr(config, name) // width // 8, 1) * 8)
    vocab = config.vocab_size
    change("vocab_size", max(vocab // width, 16))
    for name in SPECIAL:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
