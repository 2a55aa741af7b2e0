"""What a token costs in a model, from its configuration: weights that it passes, keys that it leaves, entries kept.

A linear layer is counted by the entries of its matrix, of experts those that a token is sent to. Norms, activations and
the embedding are not. What backward keeps is an estimate: within a fifth on Llama, and up to half too low for families
that norm every head or soft-cap every score.

Not covered: multi-head latent attention, encoder-decoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModelError

# Families whose feed-forward layer is two matrices and not three; in the first group every head has its own keys too.
UNGROUPED = frozenset(
    {"gpt2", "gpt_neo", "gpt_neox", "gptj", "bloom", "opt", "codegen", "mpt", "xglm", "biogpt", "persimmon"}
)
UNGATED = UNGROUPED | {"phi", "starcoder2", "nemotron"}
# Families whose attention has an output gate, projected along with the queries.
GATED_ATTENTION = ("qwen3_next", "qwen3_5")
# Tokens that the kernels of linear attention work on at a time, quadratic inside.
LINEAR_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """What one decoder layer costs."""

    weights: int  # entries of the matrices that a token passes
    score_width: int = 0  # attention: query heads × (entries of a key + of a value); 0 where there is none
    kv_entries: int = 0  # keys and values of a token, kept for those after it
    window: int | None = None  # how many tokens a token sees, itself included; None: all before it
    state_flops: int = 0  # linear attention: per token, forward
    state_entries: int = 0  # linear attention: the state after a prompt, however long it is
    kept: int = 0  # entries that backward needs of a token, in the model's dtype
    kept_float32: int = 0  # and of those that are kept in float32, or wider where the model is


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What a token costs in a model."""

    layers: tuple[LayerSizes, ...]
    hidden: int
    vocab: int

    @classmethod
    def dense(
        cls,
        *,
        layers: int,
        hidden: int,
        intermediate: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        vocab: int,
        window: int | None = None,
        gated: bool = True,
    ) -> ModelSizes:
        """A decoder of equal layers. `kv_heads` None: as many as `heads`; `head_dim` None: `hidden // heads`."""
        head = head_dim or hidden // heads
        weights, kept = _feed_forward(hidden, intermediate, gated=gated)
        layer = _attention_layer(
            hidden=hidden, heads=heads, kv_heads=kv_heads or heads, head=head, window=window, weights=weights, kept=kept
        )
        return cls(layers=(layer,) * layers, hidden=hidden, vocab=vocab)


def model_sizes(config: Any) -> ModelSizes:
    """What a token costs, from a Hugging Face configuration; a `ModelSizes` is returned as it is."""
    if isinstance(config, ModelSizes):
        return config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    family = str(getattr(config, "model_type", ""))
    missing = [
        name
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if getattr(config, name, None) is None
    ]
    if missing or getattr(config, "kv_lora_rank", None) is not None:
        reason = f"{', '.join(missing)} of it" if missing else "the sizes of multi-head latent attention"
        raise UnsupportedModelError(
            f"config must say what a layer costs, got {type(config).__name__}: {reason} unknown"
        )

    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads = heads if family in UNGROUPED else getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or hidden // heads
    window = getattr(config, "sliding_window", None)
    kinds = (
        getattr(config, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    )
    layers = []
    for i, kind in enumerate(kinds):
        weights, kept = _feed_forward_of(config, i, gated=family not in UNGATED)
        if kind == "linear_attention":
            layers.append(_linear_layer(config, weights=weights, kept=kept))
            continue
        limit = {"sliding_attention": window, "chunked_attention": getattr(config, "attention_chunk_size", None)}
        layers.append(
            _attention_layer(
                hidden=hidden,
                heads=heads,
                kv_heads=kv_heads,
                head=head,
                window=limit.get(kind),
                weights=weights,
                kept=kept,
                gated=family.startswith(GATED_ATTENTION),
            )
        )
    return ModelSizes(layers=tuple(layers), hidden=hidden, vocab=config.vocab_size)


def _feed_forward(hidden: int, intermediate: int, *, gated: bool) -> tuple[int, int]:
    """Weights, and entries kept: each activation's input, each product's factors and the input of the last matrix."""
    return ((3 if gated else 2) * hidden * intermediate, (4 if gated else 2) * intermediate)


def _feed_forward_of(config: Any, layer: int, *, gated: bool) -> tuple[int, int]:
    """The same for a layer of a configuration, which may be a mixture of experts."""
    hidden = config.hidden_size
    dense = getattr(config, "intermediate_size", None) or 4 * hidden
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    step = getattr(config, "decoder_sparse_step", None) or 1
    if not experts or layer in (getattr(config, "mlp_only_layers", None) or []) or (layer + 1) % step:
        return _feed_forward(hidden, dense, gated=gated)
    active = config.num_experts_per_tok
    width = getattr(config, "moe_intermediate_size", None) or dense
    weights, kept = _feed_forward(hidden, active * width, gated=gated)
    weights += hidden * experts  # the router
    kept += active * 2 * hidden  # each expert's input and output, which is weighted
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    if shared:
        more_weights, more_kept = _feed_forward(hidden, shared, gated=gated)
        weights, kept = weights + more_weights + hidden, kept + more_kept + hidden
    return weights, kept


def _attention_layer(
    *,
    hidden: int,
    heads: int,
    kv_heads: int,
    head: int,
    window: int | None,
    weights: int,
    kept: int,
    gated: bool = False,
) -> LayerSizes:
    queries, keys_values = heads * head, 2 * kv_heads * head
    projections = hidden * (queries * (3 if gated else 2) + keys_values)
    return LayerSizes(
        weights=weights + projections,
        score_width=2 * queries,
        kv_entries=keys_values,
        window=window,
        # Two norms (their input in float32, and what their weight multiplies), the input of the projections and of the
        # feed-forward layer; queries, keys, values and the output.
        kept=kept + 4 * hidden + queries * (4 if gated else 2) + keys_values,
        kept_float32=2 * hidden,
    )


def _linear_layer(config: Any, *, weights: int, kept: int) -> LayerSizes:
    """Gated delta rule, as in Qwen3-Next: queries, keys, values and a gate, a short convolution, a state per head."""
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    keys, values = config.linear_num_key_heads * key, heads * value
    mixed = 2 * keys + values  # what the convolution runs over
    projections = hidden * (mixed + values + 2 * heads + values)
    # Per token and head three products with the (key, value) state; within a chunk two of keys, two of values.
    state_flops = 2 * heads * (3 * key * value + LINEAR_CHUNK * 2 * (key + value))
    return LayerSizes(
        weights=weights + projections,
        state_flops=state_flops + 2 * mixed * config.linear_conv_kernel_dim,
        state_entries=heads * key * value + mixed * config.linear_conv_kernel_dim,
        kept=kept + 4 * hidden + 3 * mixed + 3 * values,
        # The chunked rule works in float32: its inputs, their decayed copies and a row of each chunk's square.
        kept_float32=2 * hidden + heads * (4 * key + 4 * value + 3 * LINEAR_CHUNK),
    )
