"""Gathers a student's weights as an engine reads them from a checkpoint, and writes them where a server reads them.

    weights = whole_state(model)             # by their names in the checkpoint: gathered, adapters merged, on the CPU
    write_weights(weights, Path("/shared/policy"))       # in the place of those that are there, file by file

What differs from the obvious: each layer with an adapter is merged by itself, read, and put back to the last bit, so
that layers which share a weight (a tied output layer) keep adapters of their own. A weight that the model ties must be
the same in both places afterwards, because an engine reads it once; else the model is refused.

Not covered, and refused by name: adapters that are no change of a weight (soft prompts, Lily, X-LoRA, a bias where the
layer has none), quantised models, weights partitioned by DeepSpeed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from ..errors import ArgumentError, UnsupportedModelError
from ..models import find_body
from ..models.heads import in_use

WEIGHTS = "model.safetensors"


class _Source(NamedTuple):
    """Says where a weight was read from: two of the same are one weight, unless an adapter is on one of them."""

    parameter: int
    adapted: bool


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns a causal language model's weights by their names in its checkpoint: gathered, merged, on the CPU.

    To be called by all ranks. Adapters are part of the weights that they are on; tied weights come once. Raises
    `UnsupportedModelError`, which names the layer, for what no checkpoint of the model without adapters can hold.
    """
    causal_lm = find_body(model).causal_lm
    if getattr(causal_lm, "is_quantized", False) or getattr(causal_lm, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(f"{type(causal_lm).__name__} is quantised: an engine cannot be handed its weights")
    weights: dict[str, Tensor] = {}
    sources: dict[str, _Source] = {}
    for name, weight, source in _weights(causal_lm, "", adapted=False):
        if hasattr(weight, "ds_id"):
            raise UnsupportedModelError(f"{name} is partitioned by DeepSpeed: an engine cannot be handed it")
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        weights[name], sources[name] = whole.detach().to("cpu", copy=True).contiguous(), source
    for name, origin in (getattr(causal_lm, "all_tied_weights_keys", None) or {}).items():
        if name not in weights or origin not in weights:
            continue
        if sources[name] != sources[origin] or not torch.equal(weights[name], weights[origin]):
            raise UnsupportedModelError(
                f"{name} is tied to {origin}, and an engine reads one weight for both, but an adapter makes them two: "
                "leave both out of it, or train a model that was saved with tie_word_embeddings=False"
            )
        del weights[name]
    if not getattr(causal_lm, "_hf_peft_config_loaded", False):
        return revert_weight_conversion(causal_lm, weights)
    # Reading an adapter puts its own renamings in the place of those that the model was read by.
    renamings = vars(causal_lm).pop("_weight_conversions", None)
    try:
        return revert_weight_conversion(causal_lm, weights)
    finally:
        causal_lm._weight_conversions = renamings


def _weights(module: Any, prefix: str, *, adapted: bool) -> Iterator[tuple[str, Tensor, _Source]]:
    """Yields the weights that a module computes with, by their names without PEFT, valid until the next."""
    module = in_use(module)
    module = getattr(module, "token_adapter", module)
    layers = []
    while hasattr(module, "base_layer") and hasattr(module, "merge"):
        layers.append(module)
        module = module.base_layer
    if layers:
        with _merged(layers, prefix):
            yield from _weights(layers[-1].base_layer, prefix, adapted=True)
        return
    if type(module).__module__.startswith("peft."):
        raise UnsupportedModelError(f"{prefix[:-1]} is a {type(module).__name__}, which is more than weights")
    buffers = {name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set}
    for name, weight in (module._parameters | buffers).items():
        if weight is not None:
            yield prefix + name, weight, _Source(getattr(weight, "_original", id(weight)), adapted)
    for name, child in module.named_children():
        yield from _weights(child, prefix if name == "_orig_mod" else f"{prefix}{name}.", adapted=adapted)


@contextmanager
def _merged(layers: list[Any], prefix: str) -> Iterator[None]:
    """Makes the adapters on one layer, the outermost first, part of its weights, inside.

    Of copies of them, and of whole ones: merging rounds, and where weights are sharded some kinds do nothing.
    """
    merging = [layer for layer in reversed(layers) if not (layer.disable_adapters or layer.merged)]
    owners = [part for part in layers[0].modules() if part._parameters] if merging else []
    before = [(part._parameters, dict(part._parameters)) for part in owners]
    try:
        with torch.no_grad():
            for parameters, originals in before:
                parameters |= {name: _copy(weight) for name, weight in originals.items() if weight is not None}
            for layer in merging:
                _merge(layer, prefix)
        yield
    finally:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            for layer in reversed([layer for layer in merging if layer.merged]):
                layer.unmerge()
                layer.merged_adapters.clear()
        for parameters, originals in before:
            parameters.clear()
            parameters |= originals


def _copy(weight: Tensor) -> nn.Parameter:
    """Returns a whole weight of its own, which remembers whose copy it is."""
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    copied = nn.Parameter(whole.detach().clone(), requires_grad=False)
    copied._original = id(weight)  # type: ignore[attr-defined]
    return copied


def _merge(layer: Any, prefix: str) -> None:
    try:
        if "forward" in vars(layer):
            raise NotImplementedError("its call is another one's")
        layer.merge()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        kind = f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
        raise UnsupportedModelError(
            f"{prefix[:-1]} has an adapter ({kind}) that cannot be made part of its weights: {error}"
        ) from error


def write_weights(weights: Mapping[str, Tensor], folder: Path, *, tied: Mapping[str, str] | None = None) -> None:
    """Writes weights into a checkpoint's folder, each into the file that it is in; where there is none, into one.

    `tied`: name → the weight that it is tied to, for files that hold both. Raises `ArgumentError`, before anything is
    written, where the folder's files have other names or shapes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layout = {path: _shapes(path) for path in _files(folder)}
    there = {name: shape for shapes in layout.values() for name, shape in shapes.items()}
    again = {name: weights[of].clone() for name, of in (tied or {}).items() if name in there and of in weights}
    weights = again | dict(weights)
    own = {name: tuple(weight.shape) for name, weight in weights.items()}
    if layout and own != there:
        lacks, more = sorted(there.keys() - own.keys()), sorted(own.keys() - there.keys())
        other = [f"{name} {there[name]} and not {own[name]}" for name in own if own[name] != there.get(name, own[name])]
        raise ArgumentError(
            f"weights_folder must have the student's weights by their names, got {folder}, which has "
            + ", ".join(
                f"{len(names)} {what} ({', '.join(names[:2])})"
                for names, what in ((lacks, "more"), (more, "less"), (other, "of other shapes"))
                if names
            )
            + ": nothing was written; serve what the student's save_pretrained writes"
        )
    for path, names in (layout or {folder / WEIGHTS: own}).items():
        partial = path.with_name(f".{path.name}.partial")
        save_file({name: weights[name] for name in names}, partial, metadata={"format": "pt"})
        partial.replace(path)


def _files(folder: Path) -> list[Path]:
    """Returns the files that an engine reads a checkpoint from: the index's, or the one, and not what lies beside."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.exists():
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    return [folder / WEIGHTS] if (folder / WEIGHTS).exists() else []


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


__all__ = ["whole_state", "write_weights"]
