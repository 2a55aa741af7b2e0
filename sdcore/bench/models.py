"""Lists the sizes of the models that the suites build: real ones by name and small stand-ins, all with random weights.

    size = size_of("qwen3-4b")               # as in its config.json
    size = size_of("qwen3-4b, 2 layers")     # the same layers, fewer of them
    config = size.config(vocab=size.step_vocab)

Nothing is downloaded: a benchmark's time does not depend on the weights' values. What differs from the real model: rope
scaling (Llama-3.1, Gemma-3) and the image tower (Gemma-3) are left out; neither takes time in a step on text.

Sources of the numbers: the `config.json` of each repository on huggingface.co, `Qwen/Qwen3-0.6B`, `Qwen/Qwen3-4B`,
`Qwen/Qwen3-8B`, `Qwen/Qwen3-30B-A3B`, `meta-llama/Llama-3.1-8B` and `google/gemma-3-4b-pt` (its `text_config`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from ..errors import ArgumentError

NO_MORE: Final[Mapping[str, Any]] = MappingProxyType({})


class ModelSize(NamedTuple):
    """Holds a decoder's sizes; `family` is transformers' `model_type`, `more` what its configuration has besides."""

    hidden: int  # H
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int  # of passes that do not call the output layer
    step_vocab: int  # V, where they do
    head_size: int | None = None  # None: hidden / heads
    family: str = "llama"
    source: str = ""  # the repository, of a real model
    more: Mapping[str, Any] = NO_MORE

    def __str__(self) -> str:
        head = self.head_size or self.hidden // self.heads
        return (
            f"{self.source or 'Llama'} with hidden {self.hidden}, {self.layers} layers, {self.heads} heads and "
            f"{self.kv_heads} key/value heads of {head}, intermediate {self.intermediate}, vocabulary {self.vocab:,} "
            f"({self.step_vocab:,} in the whole step)"
        )

    def config(self, *, vocab: int, **changes: Any) -> Any:
        """Makes transformers' configuration, with so many ids; `changes` go into it as they are."""
        from transformers import AutoConfig

        fields: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": vocab,
            "max_position_embeddings": 16384,
        }
        if self.head_size is not None:
            fields["head_dim"] = self.head_size
        return AutoConfig.for_model(self.family, **fields | dict(self.more) | changes)


# The vocabulary of a pass without output layer is small: it would only make embeddings that nobody reads.
V: Final = 4096
QWEN, LLAMA = {"tie_word_embeddings": True, "rope_theta": 1e6}, {"tie_word_embeddings": False}
QWEN_8B = QWEN | LLAMA
GEMMA = {"tie_word_embeddings": True, "sliding_window": 1024, "query_pre_attn_scalar": 256}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True} | LLAMA
REAL_MODELS: Final = {
    "qwen3-0.6b": ModelSize(1024, 28, 16, 8, 3072, V, 151936, 128, "qwen3", "Qwen/Qwen3-0.6B", QWEN),
    "qwen3-4b": ModelSize(2560, 36, 32, 8, 9728, V, 151936, 128, "qwen3", "Qwen/Qwen3-4B", QWEN),
    "qwen3-8b": ModelSize(4096, 36, 32, 8, 12288, V, 151936, 128, "qwen3", "Qwen/Qwen3-8B", QWEN_8B),
    "llama-3.1-8b": ModelSize(4096, 32, 32, 8, 14336, V, 128256, 128, "llama", "meta-llama/Llama-3.1-8B", LLAMA),
    "gemma-3-4b": ModelSize(2560, 34, 8, 4, 10240, V, 262208, 256, "gemma3_text", "google/gemma-3-4b-pt", GEMMA),
    "qwen3-30b-a3b": ModelSize(2048, 48, 32, 4, 6144, V, 151936, 128, "qwen3_moe", "Qwen/Qwen3-30B-A3B", EXPERTS),
}
MODELS: Final = {
    "quick": ModelSize(32, 2, 4, 2, 64, 64, 300),
    "h512": ModelSize(512, 8, 8, 4, 1376, 4096, 32000),
    "h1024, heads of 64": ModelSize(1024, 16, 16, 8, 2816, 4096, 32000),
    "h2048, heads of 128": ModelSize(2048, 16, 16, 8, 5632, 4096, 32000),
    # Shallow, with a real vocabulary: what a trainer's step costs where the output layer is much of it.
    "h512, V=151936": ModelSize(512, 2, 8, 4, 1376, 4096, 151936, more={"tie_word_embeddings": True}),
    **REAL_MODELS,
}


def size_of(name: str) -> ModelSize:
    """Looks up a key of `MODELS`, or one with its layers cut: `"qwen3-4b, 2 layers"`. Raises `ArgumentError`."""
    if name in MODELS:
        return MODELS[name]
    cut = re.fullmatch(r"(.+), (\d+) layers?", name)
    if cut is None or cut[1] not in MODELS or int(cut[2]) < 1:
        raise ArgumentError(f"model must be one of {', '.join(REAL_MODELS)}, got {name!r}")
    return MODELS[cut[1]]._replace(layers=int(cut[2]))


def described(names: Iterable[str], until: str = "") -> tuple[str, str]:
    """Describes each model once, up to the words `until`, and lists their vocabularies."""
    sizes = {name: size_of(name) for name in names}
    texts = [f"{name}: {size}" for name, size in sizes.items()]
    vocabularies = ", ".join(f"{size.step_vocab:,}" for size in sizes.values())
    return "; ".join(text.partition(until)[0] if until else text for text in texts), vocabularies


def with_layers(name: str, layers: int | None) -> str:
    """Returns the name of a model whose layers are cut; None leaves it."""
    return name if layers is None else f"{name}, {layers} layers"


def folder_name(text: str) -> str:
    """Writes the name of a device, a model or a choice as a folder is called."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
