"""Records a model's memory of a trunk once, for every branch to read, with gradient.

`run_recording` runs tokens and keeps what each layer remembers of them: keys and values, or, of recurrent layers, the
states after the last token. `run_reading` runs a batch of branches that all continue there:

    states, hidden = run_recording(body, trunk)       # (T,) ids → hidden: (T, H)
    hidden = run_reading(body, branches, states)      # (G, L) ids → (G, L, H)

What differs from the obvious: neither cache changes while a model uses it, which a `DynamicCache` does even with
`use_cache=False`. One hands back what it is given and remembers the first; the other puts its prefix in front of what
it is given and remembers nothing. So layers may be run again by non-reentrant checkpointing, and a prefix be read by
several batches. Lengths are what the prefix had from the start, and transformers makes each layer type's mask from
them. A layer that never asked for its cache is an error, since its states would be those of another sequence.

Not covered: layers that share another layer's keys (Gemma 3n), indexed or compressed attention, and recurrent layers
other than `linear_attention`; `unreadable` says so by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from ...errors import UnsupportedModelError
from ...models import Body
from ..tree import Tree

ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass(frozen=True, eq=False)
class TrunkStates:
    """Holds what every layer remembers after `length` tokens of one sequence, beside what is held `before`.

    A layer with attention has (keys, values), each (1, heads, tokens or less, head size), of the tokens that are not
    before; a recurrent one (convolution inputs, state) after all tokens, (1, channels, kernel) and (1, ...).
    """

    length: int
    layers: tuple[tuple[Tensor, ...], ...]
    before: TrunkStates | None = None  # those that these tokens were run after; None: from the start

    @property
    def start(self) -> int:
        """Counts the tokens before."""
        return 0 if self.before is None else self.before.length

    def path(self) -> list[TrunkStates]:
        """Lists all that is held, from the start."""
        path, states = [self], self.before
        while states is not None:
            path.append(states)
            states = states.before
        return path[::-1]

    def map(self, function: Callable[[Tensor], Tensor], before: TrunkStates | None = None) -> TrunkStates:
        """Applies a function to every state, and puts the result after other states."""
        layers = tuple(tuple(function(state) for state in layer) for layer in self.layers)
        return TrunkStates(self.length, layers, before)

    def tensors(self) -> list[Tensor]:
        return [state for layer in self.layers for state in layer]

    def reachable(self, body: Body) -> TrunkStates:
        """Drops the keys and values that no later token's window reaches."""
        layers = tuple(
            layer if window is None else tuple(_last(state, window - 1) for state in layer)
            for layer, window in zip(self.layers, body.windows, strict=True)
        )
        return replace(self, layers=layers)

    def up_to(self, length: int, body: Body) -> TrunkStates | None:
        """Returns the states after at most `length` tokens; None where a recurrent layer, or a window, is past them."""
        if length >= self.length:
            return self
        if self.before is not None and (length <= self.start or body.recurrent):
            return self.before.up_to(length, body)
        if body.recurrent or any(keys.shape[2] < self.length - self.start for keys, _ in self.layers):
            return None
        layers = tuple(tuple(state[:, :, : length - self.start] for state in layer) for layer in self.layers)
        return TrunkStates(length, layers, self.before)


def unreadable(body: Body) -> str | None:
    """Says why a model's prefix cannot be recorded and read; None where it can."""
    unknown = sorted(set(body.layer_types) - ATTENTION_TYPES - {"linear_attention"})
    if unknown:
        return f"{body.name} has layers of type {', '.join(unknown)}"
    if body.recurrent and body.rotary_switch is not None:
        return f"{body.name} has recurrent layers and positions that depend on the length of the sequence"
    if ATTENTION_TYPES.isdisjoint(body.layer_types):
        return f"{body.name} has no attention layer, so that its cache has no length"
    return None


def require_readable(body: Body, trees: Sequence[Tree]) -> None:
    """Refuses a model whose prefixes cannot be recorded and read, or cannot be for these trees.

    Raises `UnsupportedModelError`.
    """
    if (reason := unreadable(body)) is not None:
        raise UnsupportedModelError(reason)
    for tree in trees if body.rotary_switch is not None else ():
        alone = tree.alone
        for root in alone.children[-1]:
            block = range(alone.starts[root], alone.stops[root])
            inner = [
                alone.begins[i] + len(ids)
                for i, ids in enumerate(alone.spans)
                if alone.starts[i] in block and alone.children[i]
            ]
            ends = [alone.lengths[i] for i in alone.active if int(alone.rows[alone.slices[i].start]) in block]
            if ends and far(body, least := min(ends + inner)) != far(body, most := max(ends)):
                raise UnsupportedModelError(
                    f"{body.name} encodes every position otherwise in sequences of more than {body.rotary_switch} "
                    f"tokens (LongRoPE), so that one of {most} cannot share a prefix of {least}"
                )


def far(body: Body, length: int) -> bool:
    """True where positions are encoded as in long sequences."""
    return body.rotary_switch is not None and length > body.rotary_switch


def run_recording(body: Body, tokens: Tensor, prefix: TrunkStates | None = None) -> tuple[TrunkStates, Tensor]:
    """Runs (L,) tokens after a prefix, or from the start, and keeps the states after all of them.

    Returns the states, put after the prefix's, and the tokens' last hidden states (L, H). Both carry gradient where
    gradients are enabled. L is at least 1.
    """
    cache = PrefixCache(body, prefix, batch=1, recording=True)
    start = 0 if prefix is None else prefix.length
    states = _run(body, tokens[None], cache, start)[0]
    return TrunkStates(start + len(tokens), cache.recorded(), prefix), states


def run_reading(body: Body, tokens: Tensor, prefix: TrunkStates) -> Tensor:
    """Runs (G, L) tokens, each row after the same prefix: (G, L, H) last hidden states."""
    return _run(body, tokens, PrefixCache(body, prefix, batch=len(tokens), recording=False), prefix.length)


def positions(start: int, tokens: Tensor) -> Tensor:
    """Returns the (B, L) positions of a batch of tokens that starts at `start`."""
    return torch.arange(start, start + tokens.shape[1], device=tokens.device).expand(len(tokens), -1)


def _run(body: Body, tokens: Tensor, cache: PrefixCache, start: int) -> Tensor:
    with body.keeping_caches():
        states = body(tokens, position_ids=positions(start, tokens), cache=cache)
    cache.require_used(body)
    return states


class PrefixCache(Cache):
    """Shows a prefix of one sequence as the cache of a batch; if `recording`, keeps what layers remember after it."""

    def __init__(self, body: Body, prefix: TrunkStates | None, *, batch: int, recording: bool) -> None:
        layers: list[Any] = []
        path = [] if prefix is None else prefix.path()
        length = 0 if prefix is None else prefix.length
        for index, (kind, window) in enumerate(zip(body.layer_types, body.windows, strict=True)):
            states = [held.layers[index] for held in path]
            if kind == "linear_attention":
                layers.append(RecurrentLayer(states[-1] if states else None, batch=batch, recording=recording))
            else:
                sliding = kind != "full_attention"
                layers.append(AttentionLayer(states, length, window, sliding=sliding, recording=recording))
        super().__init__(layers=layers)

    def recorded(self) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(layer.recorded() for layer in self.layers)

    def require_used(self, body: Body) -> None:
        """Refuses states that were computed without the prefix."""
        for index, layer in enumerate(self.layers):
            if not layer.used:
                raise UnsupportedModelError(
                    f"{body.name} did not use the cache of its layer {index} ({body.layer_types[index]}): something "
                    "between the model's call and the layer drops it"
                )


class AttentionLayer(CacheLayerMixin):
    """Puts keys and values of a prefix in front of those of the batch."""

    def __init__(
        self, prefix: Sequence[Sequence[Tensor]], length: int, window: int | None, *, sliding: bool, recording: bool
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.length = length
        self.window = window
        # transformers looks for a layer that slides to make the mask of those that do.
        self.is_sliding = sliding
        self.recording = recording
        self.first: tuple[Tensor, Tensor] | None = None
        self.used = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.used = True
        if self.recording and self.first is None:
            self.first = key_states, value_states
        keys, values = key_states, value_states
        if self.prefix:
            reach = None if self.window is None else self.window - 1
            keys, values = (
                torch.cat([*(old.expand(len(new), -1, -1, -1) for old in _tail(olds, reach)), new], dim=2)
                for olds, new in zip(zip(*self.prefix, strict=True), (keys, values), strict=True)
            )
        visible = self.get_mask_sizes(key_states.shape[2])[0]
        return _last(keys, visible), _last(values, visible)

    def recorded(self) -> tuple[Tensor, ...]:
        return self.first or ()

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = self.length if self.window is None else min(self.length, self.window - 1)
        return kept + query_length, self.length - kept

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the prefix is there from the start."""


class RecurrentLayer(LinearAttentionCacheLayerMixin):
    """Gives every row of the batch the states of a linear-attention layer after a prefix."""

    def __init__(self, prefix: Sequence[Tensor] | None, *, batch: int, recording: bool) -> None:
        super().__init__(number_of_states=1)
        # The decoding path writes into the convolution's inputs; a layer that records its past never takes it.
        self.record_past = True
        self.recording = recording
        self.first_inputs: Tensor | None = None
        self.first_state: Tensor | None = None
        self.used = False
        if prefix is not None:
            inputs, state = (old.expand(batch, *old.shape[1:]) for old in prefix)
            self.conv_states[0], self.recurrent_states[0] = inputs, state
            self.has_previous_state[0] = True

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        before = self.conv_states[0]
        inputs = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        if self.recording and self.first_inputs is None:
            kernel = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            # What lies before the sequence is zero.
            padded = torch.nn.functional.pad(inputs, (max(0, kernel - inputs.shape[-1]), 0))
            self.first_inputs = padded[..., padded.shape[-1] - kernel :]
        return inputs

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.used = True
        if self.recording and self.first_state is None:
            self.first_state = recurrent_states
        return recurrent_states

    def recorded(self) -> tuple[Tensor, ...]:
        return () if self.first_inputs is None or self.first_state is None else (self.first_inputs, self.first_state)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the prefix is there from the start."""


def _last(states: Tensor, count: int | None) -> Tensor:
    """Returns the last `count` of a state's tokens, dimension 2; None for all of them."""
    return states if count is None else states[:, :, max(0, states.shape[2] - count) :]


def _tail(states: Sequence[Tensor], count: int | None) -> list[Tensor]:
    """Returns the last `count` tokens of states that follow each other; None for all of them."""
    tail: list[Tensor] = []
    for state in reversed(states):
        if count is not None and count <= 0:
            break
        tail.append(_last(state, count))
        count = None if count is None else count - tail[-1].shape[2]
    return tail[::-1]
