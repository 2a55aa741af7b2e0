"""Knows what transformers calls things whose names differ from version to version, or from model to model.

    model(ids, **{cache_argument(model): cache})      # cache= from transformers 5.24 on, else past_key_values=
    set_checkpointing(model, True)                    # activation_checkpointing_enable from 5.23 on

All that depends on the version of transformers is decided here, by looking at what is there and not at the version:
code from the Hub has the names of the version that it was written for. Callers never see more than one name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from torch import nn
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.utils import ModelOutput

# What models call the cache that they are given: all from 5.24 on; before, most, and those that keep states alone.
CACHE_ARGUMENTS: Final = ("cache", "past_key_values", "cache_params")
# What their outputs call it. The output that has a new name keeps the old one as a property.
CACHE_OUTPUT: Final = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"
WINDOWED_TYPES: Final = frozenset({"sliding_attention", "hybrid_sliding"})


def cache_argument(model: nn.Module) -> str | None:
    """Returns the name under which a model, or its body, takes a cache; None for one that takes none.

    It is the class's: who replaces a model's own forward may take anything and pass it on.
    """
    parameters = inspect.signature(type(model).forward).parameters
    taken = (name for name in CACHE_ARGUMENTS if name in parameters)
    # XLM's `cache` is a dictionary of its own.
    return next((name for name in taken if "dict" not in str(parameters[name].annotation)), None)


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """Returns the cache that is among a call's arguments; None where there is none."""
    return next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def set_checkpointing(model: Any, on: bool, *, use_reentrant: bool = False) -> None:
    """Turns checkpointing of activations on or off."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": use_reentrant})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def checkpointing_option(arguments: type) -> str:
    """Returns what a class of training arguments calls checkpointing of activations."""
    fields = arguments.__dataclass_fields__  # type: ignore[attr-defined]
    return "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"


def layers_of(config: Any) -> list[tuple[str, int | None]]:
    """Lists each layer's type, and how many tokens its attention sees, itself included; None for all of them."""
    types, arguments = get_layer_types_and_kwargs(config)
    # Up to 5.17 one set of arguments serves all layers.
    each = arguments if isinstance(arguments, list) else [arguments] * len(types)
    return [
        (kind, layer.get("sliding_window") if kind in WINDOWED_TYPES else None)
        for kind, layer in zip(types, each, strict=True)
    ]
