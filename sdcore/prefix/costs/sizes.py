"""Says what a token costs in a model, from its configuration: weights passed, keys left behind, entries kept.

A linear layer is counted by the entries of its matrix, of experts those that a token is sent to. Norms, activations and
the embedding are not. What backward keeps is counted operator by operator of transformers' own code: the input of every
product and activation, and of the norms what the family's norms keep, which is where families differ most.

What differs from a measurement: within a tenth of it for the families that are tested (`tests/sdcore/prefix`), in what
transformers does without further kernels. Fused norms or the kernels of flash-linear-attention keep much less.

Not covered, and refused by name: multi-head latent attention, encoder-decoders, layers that are neither attention nor a
gated delta rule (Mamba, convolutions), sizes that differ from layer to layer. Norms of families that are not named
below are Llama's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import UnsupportedModelError

# Families whose feed-forward layer is two matrices and not three; in the first group every head has its own keys too.
UNGROUPED = frozenset(
    {"gpt2", "gpt_neo", "gpt_neox", "gptj", "bloom", "opt", "codegen", "mpt", "xglm", "biogpt", "persimmon"}
)
UNGATED = UNGROUPED | {"phi", "starcoder2", "nemotron"}
# Families whose attention has an output gate, projected along with the queries.
GATED_ATTENTION = ("qwen3_next", "qwen3_5")
# What configurations call the width of a feed-forward layer: most, GPT-2, OPT. Where none is set it is 4 · hidden.
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")
# Layers that are attention over keys and values, and of how many tokens.
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
# Tokens that the kernels of linear attention work on at a time, quadratic inside.
LINEAR_CHUNK = 64
# Families that norm the queries and keys of every head (or all of them at once, which keeps as much).
NORMED_HEADS = ("qwen3", "gemma3", "gemma4", "olmo2", "olmo3")
# Families with two more norms in a layer, behind attention and feed-forward layer.
SANDWICHED = ("gemma2", "gemma3", "gemma4")
SANDWICHED_ONLY = frozenset({"glm4"})
# Norms that multiply by their weight in float32, and round last.
WIDE_NORMS = ("gemma", "qwen3_next", "qwen3_5", "olmo2", "olmo3")
# torch's own layer norm.
LAYER_NORMS = UNGATED | {"stablelm", "falcon"}
# One norm in front of attention and feed-forward layer alike, centred in float32.
CENTRED_NORMS = ("cohere",)
# One matrix for queries, keys and values, of which the values are a view, and the others are rotated copies.
FUSED_PROJECTION = frozenset({"phi3", "gpt_neox"})
# Activations that are several operators: what they keep beyond their input.
COMPOSITE_ACTIVATIONS = {"gelu_new": 3, "gelu_fast": 4, "quick_gelu": 1}


class Norm(NamedTuple):
    """Counts the entries that a norm keeps of each that it norms, without its output."""

    own: int  # in the model's dtype
    float32: int


LLAMA_NORM = Norm(own=1, float32=1)  # the input, widened; what the weight multiplies


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Says what one decoder layer costs."""

    weights: int  # entries of the matrices that a token passes
    score_width: int = 0  # attention: query heads × (entries of a key + of a value); 0 where there is none
    kv_entries: int = 0  # keys and values of a token, kept for those after it
    window: int | None = None  # how many tokens a token sees, itself included; None: all before it
    state_flops: int = 0  # linear attention: per token, forward
    state_entries: int = 0  # linear attention: the state after a prompt, however long it is
    kept: int = 0  # entries that backward needs of a token, in the model's dtype
    kept_float32: int = 0  # and of those that are kept in float32, or wider where the model is
    kept_chunked: int = 0  # float32 entries of linear attention, of tokens counted up to whole chunks
    groups: int = 1  # query heads per head of keys: so often a masked attention repeats keys and values, and keeps them
    score_heads: int = 0  # heads whose scores are formed and kept, for each pair of tokens: eager attention
    softcapped: bool = False  # the scores are kept once more


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Says what a token costs in a model."""

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
        """Describes a decoder of equal layers.

        `kv_heads` None: as many as `heads`; `head_dim` None: `hidden // heads`.
        """
        head = head_dim or hidden // heads
        weights, kept = _feed_forward(hidden, intermediate, gated=gated)
        of_norms = _norms_of("", hidden)
        layer = _attention_layer(
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads or heads,
            head=head,
            window=window,
            weights=weights,
            kept=Norm(of_norms.own + kept, of_norms.float32),
        )
        return cls(layers=(layer,) * layers, hidden=hidden, vocab=vocab)


def model_sizes(config: Any) -> ModelSizes:
    """Reads from a Hugging Face configuration what a token costs; a `ModelSizes` is returned as it is."""
    if isinstance(config, ModelSizes):
        return config
    try:
        return _read(config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a family's configuration has in place of what is read here
        raise UnsupportedModelError(
            f"config must say what a layer costs, got {type(config).__name__}, read as other families are: "
            f"{type(error).__name__}: {error}"
        ) from error


def _read(config: Any) -> ModelSizes:
    family = str(getattr(config, "model_type", ""))
    missing = [
        name
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if getattr(config, name, None) is None
    ]
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
    others = sorted({*kinds} - {*ATTENTION, "linear_attention" if hasattr(config, "linear_num_value_heads") else ""})
    reason = ""
    if missing:
        reason = f"{', '.join(missing)} of it"
    elif getattr(config, "kv_lora_rank", None) is not None:
        reason = "the sizes of multi-head latent attention"
    elif others:
        reason = f"layers of type {', '.join(others)}"
    if reason:
        raise UnsupportedModelError(
            f"config must say what a layer costs, got {type(config).__name__}: {reason} unknown"
        )

    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads = heads if family in UNGROUPED else getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or hidden // heads
    window = getattr(config, "sliding_window", None)
    kinds = kinds or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    of_norms, norm = _norms_of(family, hidden), _norm_of(family)
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    implementation = getattr(config, "_attn_implementation", None)
    # transformers takes eager attention where scores are soft-capped, if it is not told another one.
    eager = implementation == "eager" or (softcapped and implementation in (None, "sdpa"))
    layers = []
    for i, kind in enumerate(kinds):
        weights, kept, kept_float32 = _feed_forward_of(config, i, gated=family not in UNGATED)
        kept_around = Norm(of_norms.own + kept, of_norms.float32 + kept_float32)
        if kind == "linear_attention":
            layers.append(_linear_layer(config, weights=weights, kept=kept_around))
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
                kept=kept_around,
                head_norm=norm if family.startswith(NORMED_HEADS) else None,
                gated=family.startswith(GATED_ATTENTION),
                fused=family in FUSED_PROJECTION,
                eager=eager,
                softcapped=softcapped,
            )
        )
    return ModelSizes(layers=tuple(layers), hidden=hidden, vocab=config.vocab_size)


def _norm_of(family: str) -> Norm:
    if family in LAYER_NORMS:
        return Norm(own=1, float32=0)
    if family.startswith(CENTRED_NORMS):
        return Norm(own=0, float32=3)
    return Norm(own=0, float32=2) if family.startswith(WIDE_NORMS) else LLAMA_NORM


def _norms_of(family: str, hidden: int) -> Norm:
    """Counts what the norms of a layer keep, with the inputs of the projections and of the feed-forward layer."""
    norm = _norm_of(family)
    if family.startswith(CENTRED_NORMS):
        return Norm(hidden * (norm.own + 1), hidden * norm.float32)
    # The output of a norm behind a layer is only added to something, which keeps nothing.
    count = 4 if family.startswith(SANDWICHED) or family in SANDWICHED_ONLY else 2
    return Norm(hidden * (count * norm.own + 2), hidden * count * norm.float32)


def _feed_forward(hidden: int, intermediate: int, *, gated: bool, activation: str = "") -> tuple[int, int]:
    """Counts weights and kept entries: inputs of activations, factors of products, the input of the last matrix."""
    kept = (4 if gated else 2) + COMPOSITE_ACTIVATIONS.get(activation, 0)
    return (3 if gated else 2) * hidden * intermediate, kept * intermediate


def _feed_forward_of(config: Any, layer: int, *, gated: bool) -> tuple[int, int, int]:
    """Counts the same for a layer that may be a mixture of experts, and its kept float32 entries."""
    hidden = config.hidden_size
    activation = str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", ""))
    dense = next((width for name in WIDTHS if (width := getattr(config, name, None))), 4 * hidden)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    step = getattr(config, "decoder_sparse_step", None) or 1
    if not experts or layer in (getattr(config, "mlp_only_layers", None) or []) or (layer + 1) % step:
        return *_feed_forward(hidden, dense, gated=gated, activation=activation), 0
    active = config.num_experts_per_tok
    width = getattr(config, "moe_intermediate_size", None) or dense
    weights, kept = _feed_forward(hidden, active * width, gated=gated, activation=activation)
    weights += hidden * experts  # the router
    kept += active * 2 * hidden  # each expert's input and output, which is weighted
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    if shared:
        more_weights, more_kept = _feed_forward(hidden, shared, gated=gated, activation=activation)
        weights, kept = weights + more_weights + hidden, kept + more_kept + hidden
    # The router's probabilities, and of each choice an order and its inverse, in int64.
    return weights, kept, experts + 6 * active


def _attention_layer(
    *,
    hidden: int,
    heads: int,
    kv_heads: int,
    head: int,
    window: int | None,
    weights: int,
    kept: Norm,
    head_norm: Norm | None = None,
    gated: bool = False,
    fused: bool = False,
    eager: bool = False,
    softcapped: bool = False,
) -> LayerSizes:
    queries, keys_values = heads * head, 2 * kv_heads * head
    projections = hidden * (queries * (3 if gated else 2) + keys_values)
    rotated = queries + keys_values // 2
    # Queries, keys, values and the output; a gate and what it multiplies.
    own = kept.own + queries * (4 if gated else 2) + keys_values + (rotated if fused else 0)
    kept_float32 = kept.float32 + heads  # the log-sum-exp
    if head_norm is not None:
        own, kept_float32 = own + rotated * head_norm.own, kept_float32 + rotated * head_norm.float32
    return LayerSizes(
        weights=weights + projections,
        score_width=2 * queries,
        kv_entries=keys_values,
        window=window,
        kept=own,
        kept_float32=kept_float32,
        groups=heads // kv_heads,
        score_heads=heads if eager else 0,
        softcapped=softcapped,
    )


def _linear_layer(config: Any, *, weights: int, kept: Norm) -> LayerSizes:
    """Counts a gated delta rule, as in Qwen3-Next: a short convolution, a gate, and a state per head."""
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    keys, values = config.linear_num_key_heads * key, heads * value
    mixed = 2 * keys + values  # what the convolution runs over
    projections = hidden * (mixed + values + 2 * heads + values)
    # Per token and head three products with the (key, value) state; within a chunk two of keys, two of values.
    state_flops = 2 * heads * (3 * key * value + LINEAR_CHUNK * 2 * (key + value))
    # The chunked rule works in float32, on keys of every value head: padded, scaled and decayed queries and keys, the
    # solved ones, values and new values, five squares of a chunk (two raw, two decayed, the decay), the state after it.
    chunked = heads * (6 * key + 3 * value + 5 * LINEAR_CHUNK + key * value // LINEAR_CHUNK + 4)
    return LayerSizes(
        weights=weights + projections,
        state_flops=state_flops + 2 * mixed * config.linear_conv_kernel_dim,
        state_entries=heads * key * value + mixed * config.linear_conv_kernel_dim,
        # The convolution's input and output; the norm behind it, its product with the gate, and the last input.
        kept=kept.own + 2 * mixed + 3 * values,
        # Queries and keys before they are normed; the output, the gate and its activation; decay and step size.
        kept_float32=kept.float32 + heads * (2 * key + 3 * value + 8),
        kept_chunked=chunked,
    )
