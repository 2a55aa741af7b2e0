"""Finds the body and the output layer of a Hugging Face causal language model, and calls the body.

`find_body` finds the part of a model that turns ids into last hidden states, through the wrappers that training puts
around it; `head_of` finds the rest, the output layer, as a weight and a `LogitTransform` for `sdkernels`:

    hidden = find_body(model)(input_ids)                 # (B, L, H): output_hidden_states=True's hidden_states[-1]
    head = head_of(model)                                # what an output layer is made of: `heads`
    linear_divergence(head.states(hidden), head.weight, ..., student_head=head.transform)

What differs from the obvious: a plain model's base is called directly, but `DistributedDataParallel`, FSDP2 and
DeepSpeed must see the call, because their hooks arm the gradient reduction; then the outer module is called with no
position to compute logits for, and the states are picked up on the way. A head's scale and soft-cap are read from the
configuration but not believed: the model's own forward is run around a stand-in for its body, and a model that does
anything else to its logits is refused by name.

Not covered, and refused by name: encoder-decoders, models with an image or audio side (pass their text model), tensor
parallelism, FSDP1, soft prompts, offloaded embeddings and output layers, and output layers that `heads` does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from threading import get_ident
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sdkernels import LogitTransform

from ..errors import ArgumentError, UnsupportedModelError
from .heads import Head, count_rows, read_layer, scale_and_softcap, shape_of, verify_logits
from .names import cache_argument, layers_of

# Layer types whose state has a fixed size; every other type keeps keys and values per token, or nothing.
RECURRENT_TYPES = frozenset({"linear_attention", "conv", "mamba", "mamba2", "hybrid", "hybrid_sliding"})
# What says in a configuration that a token sees those after it (XLM has `causal`, XLNet `attn_type`).
SEES_AHEAD = (("is_causal", False), ("causal", False), ("attn_type", "bi"), ("model_type", "cpmant"))
# What a configuration says of chance in training mode, beside modules of dropout.
NOISE = ("attention_dropout", "hidden_dropout", "resid_pdrop", "layerdrop", "router_jitter_noise")
OFFLOADED = "offloaded by accelerate, which loads them for their layer's own call alone: keep them on a device"


@dataclass(frozen=True, eq=False)
class Body:
    """Is a causal language model without its output layer. Made by `find_body`."""

    model: nn.Module  # what the user gave; wrapped or not
    causal_lm: PreTrainedModel
    base: PreTrainedModel  # returns last_hidden_state
    through: nn.Module | None = None  # the wrapper that has to see every call; None: `base` is called
    sharded: nn.Module | None = None  # FSDP2's or ZeRO-3's root, at `through` or inside it

    def __call__(self, input_ids: Tensor, *, cache: Any = None, **kwargs: Any) -> Tensor:
        """Turns (B, L) ids into (B, L, H) last hidden states, after the final norm. `kwargs` go to the model unchanged.

        `cache` goes to it under the name that it has there, and `position_ids` only where it takes them; the model
        never makes a cache of its own. Raises `UnsupportedModelError` for a cache that it cannot take.
        """
        if not self.accepts_position_ids:
            kwargs.pop("position_ids", None)
        if cache is not None:
            if self.cache_argument is None:
                raise UnsupportedModelError(f"{self.name} takes no cache of transformers")
            kwargs[self.cache_argument] = cache
        if self.through is None or (isinstance(self.through, DistributedDataParallel) and not torch.is_grad_enabled()):
            return self.base(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
        seen: list[Any] = []
        with ExitStack() as hooks:

            def hook(module: nn.Module, function: Callable[[Any], Any], *, first: bool = False) -> None:
                hooks.callback(in_this_thread(module, function, first=first).remove)

            hook(self.base, lambda output: seen.append(output.last_hidden_state))
            if self.sharded is not None:
                # FSDP2 reduces gradients only after one has arrived at its root's output, so that is what the states
                # become: before its own hook, or DeepSpeed's, and taken up again after it.
                hook(self.sharded, lambda _: seen[-1], first=True)
                hook(self.sharded, seen.append)
            ddp = isinstance(self.through, DistributedDataParallel)
            if ddp:
                # A static graph is reduced only after a gradient has arrived at what the wrapper's call returns; where
                # it looks for unused parameters, it finds the output layer by the logits.
                hook(cast(nn.Module, self.through.module), lambda output: (seen[-1], output.logits))
            if (head := self._head_of_unit) is not None:
                # The unit's weights are gathered for backward when a gradient arrives at this last output of it. So
                # that becomes the states too, while FSDP2 looks at it.
                logits: list[Tensor] = []

                def as_states(output: Tensor) -> Tensor:
                    logits.append(output)
                    return cast(Tensor, seen[-1])

                hook(head, as_states, first=True)
                hook(head, lambda _: logits[-1])
            # A number of positions of 0 means all of them; a list of no positions means none.
            nowhere = torch.empty(0, dtype=torch.int64, device=input_ids.device)
            output = self.through(input_ids=input_ids, use_cache=False, logits_to_keep=nowhere, **kwargs)
        return cast(Tensor, output[0] if ddp else seen[-1])

    @property
    def name(self) -> str:
        return type(self.causal_lm).__name__

    @property
    def _head_of_unit(self) -> nn.Module | None:
        """Returns the output layer, where FSDP2 has it in one unit with others, as accelerate has it with the norm."""
        head: Any = self.causal_lm.get_output_embeddings()
        several = isinstance(head, FSDPModule) and len(head._get_fsdp_state()._modules) > 1
        return cast(nn.Module, head) if several else None

    @property
    def one_backward(self) -> bool:
        """True where a step must have one backward: after one of DeepSpeed's an optimizer step may follow already."""
        return is_deepspeed(self.through)

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def device(self) -> torch.device:
        """Says where the model takes its ids."""
        return self.base.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.get_input_embeddings().weight.dtype

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Counts the ids that can be embedded. The output layer may have more or fewer rows."""
        return int(shape_of(self.base.get_input_embeddings().weight)[0])

    @property
    def num_logits(self) -> int:
        """Counts the logits of a token."""
        return count_rows(self.causal_lm.get_output_embeddings())

    @property
    def max_positions(self) -> int | None:
        """Returns how many tokens the configuration says the model can read; None where it sets no bound."""
        positions = getattr(self.config, "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else None

    @property
    def rotary_switch(self) -> int | None:
        """Returns the length beyond which all positions are encoded otherwise (LongRoPE); no prefix crosses it."""
        parameters = getattr(self.config, "rope_parameters", None) or {}
        variants = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
        lengths = [
            variant.get("original_max_position_embeddings")
            or getattr(self.config, "original_max_position_embeddings", None)
            for variant in variants
            if variant.get("rope_type") == "longrope"
        ]
        return min((length for length in lengths if length), default=None)

    @cached_property
    def layer_types(self) -> tuple[str, ...]:
        """Lists what transformers calls each layer: full_attention, sliding_attention, linear_attention, ..."""
        return tuple(kind for kind, _ in layers_of(self.config))

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """Lists how many tokens each layer's attention sees, itself included; None for all of them."""
        return tuple(window for _, window in layers_of(self.config))

    @property
    def recurrent(self) -> bool:
        """True where some layer keeps a state of fixed size, which can be read only where it was recorded."""
        return not RECURRENT_TYPES.isdisjoint(self.layer_types)

    @cached_property
    def cache_argument(self) -> str | None:
        """Returns the name under which the model takes a cache; None for one that takes none."""
        return cache_argument(self.base)

    @cached_property
    def accepts_position_ids(self) -> bool:
        return "position_ids" in inspect.signature(self.base.forward).parameters

    @contextmanager
    def keeping_caches(self) -> Iterator[None]:
        """Makes checkpointed layers keep the cache they are given, while entered; by default transformers drops it.

        Silently so: the states are then those of a sequence without its prefix. The caches of `prefix.caches` may be
        kept because they do not change when a layer is recomputed. Raises `UnsupportedModelError` for reentrant
        checkpointing, whose gradients through a cache are silently wrong.
        """
        layers = [module for module in self.base.modules() if getattr(module, "gradient_checkpointing", False)]
        for layer in layers:
            _refuse_reentrant(self.name, getattr(layer, "_gradient_checkpointing_func", None))
        layers = [layer for layer in layers if isinstance(layer, GradientCheckpointingLayer)]
        for layer in layers:
            layer._can_checkpoint_with_cache = True
        try:
            yield
        finally:
            for layer in layers:
                del layer._can_checkpoint_with_cache


def find_body(model: nn.Module) -> Body:
    """Finds the body of a Hugging Face causal language model, wrapped or not.

    Looks through `DistributedDataParallel`, `fully_shard`, DeepSpeed's engine, PEFT and `torch.compile`. Raises
    `ArgumentError` for what is no module, and `UnsupportedModelError`, naming class and reason, for models listed in
    the module's docstring.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a transformers causal language model, got {type(model).__name__}")
    chain = [model]
    while (inner := _unwrap(chain[-1])) is not None:
        chain.append(inner)
    causal_lm = chain[-1]
    name = type(causal_lm).__name__
    if not isinstance(causal_lm, PreTrainedModel):
        raise UnsupportedModelError(f"{name} is not a transformers model, nor a wrapper that is known")
    base, config = _base_of(causal_lm), causal_lm.config
    for refused, reason in (
        (config.is_encoder_decoder, "is an encoder-decoder"),
        (base is causal_lm, "has no base model under a language-model head: pass the ForCausalLM class"),
        (causal_lm.get_output_embeddings() is None, "has no output embeddings"),
        (not _embeds(base), "has no input embeddings in its body"),
        (_embeds(base) and _is_offloaded(base.get_input_embeddings()), f"has its embeddings {OFFLOADED}"),
        (config.get_text_config(decoder=True) is not config, "reads more than text: pass its text model"),
        *(
            (getattr(config, key, None) == value, f"is configured to see tokens ahead ({key}={value!r})")
            for key, value in SEES_AHEAD
        ),
        ((getattr(causal_lm, "_tp_size", None) or 1) > 1, "is tensor-parallel"),
        (
            any(hasattr(weight, "ds_id") for weight in base.parameters()) and not any(map(is_deepspeed, chain)),
            "has its weights partitioned by DeepSpeed: pass the engine that deepspeed.initialize gives",
        ),
    ):
        if refused:
            raise UnsupportedModelError(f"{name} {reason}")
    # A module whose forward was replaced (accelerate's autocast) has to be called as well.
    through = next(
        (
            module
            for module in chain
            if isinstance(module, DistributedDataParallel | FSDPModule)
            or is_deepspeed(module)
            or "forward" in vars(module)
        ),
        None,
    )
    if through is not None and "logits_to_keep" not in inspect.signature(type(causal_lm).forward).parameters:
        raise UnsupportedModelError(f"{name} cannot be called without computing logits, which {type(through)} needs")
    sharded: nn.Module | None = next((module for module in chain if isinstance(module, FSDPModule)), None)
    if any(hasattr(weight, "ds_id") for weight in base.parameters()):
        sharded = next(cast(nn.Module, module.module) for module in chain if is_deepspeed(module))
    return Body(model, causal_lm, base, through, sharded)


def in_this_thread(module: nn.Module, function: Callable[[Any], Any], *, first: bool = False) -> RemovableHandle:
    """Registers a forward hook, `function` of the output, that other threads' calls of the module pass by."""
    compiling = torch.compiler.is_compiling()  # which knows nothing of threads
    thread = None if compiling else get_ident()
    return module.register_forward_hook(
        lambda _module, _args, output: function(output) if compiling or get_ident() == thread else None, prepend=first
    )


def head_of(model: nn.Module | Body) -> Head:
    """Reads a model's output layer: a weight (V, H), connected to its parameters, and what is done to the product.

    The logits of `find_body(model)(ids)` are `head.transform` applied to `head.states(hidden) @ head.weight.T`.

    Call it after each forward, once per backward, in the same teacher's context or state of adapters: under FSDP2 and
    ZeRO-3 a backward leaves nothing to reuse. There the weight is gathered, in the dtype of the forward, unless it is
    at hand, and its gradient is averaged over the ranks as that of every other weight is. All ranks must call it.

    Raises `UnsupportedModelError` where the logits are anything else, naming the layer and what to do instead.
    """
    body = model if isinstance(model, Body) else find_body(model)
    layer = body.causal_lm.get_output_embeddings()
    if _is_offloaded(layer):
        raise UnsupportedModelError(f"{body.name} has its output layer {OFFLOADED}")
    if torch.is_grad_enabled() and any(
        _is_offloaded(module) and weight.requires_grad
        for module in body.causal_lm.modules()
        for weight in module.parameters(recurse=False)
    ):
        raise UnsupportedModelError(f"{body.name} has weights that are trained {OFFLOADED}")
    matrix = read_layer(layer, model=body.model, name=body.name, dtype=body.dtype)
    scale, softcap = scale_and_softcap(body.causal_lm.config)
    if _VERIFIED.get(body.causal_lm) != (scale, softcap):
        verify_logits(body.causal_lm, body.base, scale=scale, softcap=softcap)
        _VERIFIED[body.causal_lm] = scale, softcap
    return Head(matrix.weight, LogitTransform(bias=matrix.bias, scale=scale, softcap=softcap), matrix.lift)


# Models whose logits are verified to be what their configuration says.
_VERIFIED: WeakKeyDictionary[nn.Module, tuple[float, float | None]] = WeakKeyDictionary()


def _is_offloaded(layer: nn.Module) -> bool:
    """True where accelerate's `device_map` has left nothing of the layer's weights but their shapes."""
    return hasattr(layer, "_hf_hook") and any(weight.is_meta for weight in layer.parameters())


def is_deepspeed(module: object) -> bool:
    """True for what `deepspeed.initialize` gives."""
    return hasattr(module, "zero_optimization_stage")


def _base_of(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """Returns the module that the model calls for its last states; the model itself where it has none."""
    base: Any = causal_lm.base_model
    if base is causal_lm:  # the class names it otherwise than its `base_model_prefix` says (Llama 4)
        bodies = [child for child in causal_lm.children() if isinstance(child, PreTrainedModel)]
        base = bodies[0] if len(bodies) == 1 else base
    # What only passes a call on to its decoder is passed by (OPT, Bart).
    while len(inner := list(base.children())) == 1 and isinstance(inner[0], PreTrainedModel):
        base = inner[0]
    return cast(PreTrainedModel, base)


def _embeds(base: PreTrainedModel) -> bool:
    """True where the body itself turns ids into embeddings."""
    try:
        return base.get_input_embeddings() is not None
    except NotImplementedError:
        return False


def _unwrap(module: nn.Module) -> nn.Module | None:
    """Returns the module inside a wrapper; None where the module is no wrapper."""
    if isinstance(module, DataParallel | FullyShardedDataParallel):
        raise UnsupportedModelError(
            f"{type(module).__name__} is not supported: use DistributedDataParallel, or FSDP2 (fully_shard)"
        )
    if isinstance(module, DistributedDataParallel) or is_deepspeed(module):
        return cast(nn.Module, module.module)
    if (compiled := getattr(module, "_orig_mod", None)) is not None:
        return compiled
    configs = getattr(module, "peft_config", None)
    if configs is not None and not isinstance(module, PreTrainedModel):
        for config in configs.values():
            if getattr(config, "is_prompt_learning", False):
                raise UnsupportedModelError(f"{config.peft_type} adds soft prompts, which only the wrapper's call does")
            if getattr(config, "alora_invocation_tokens", None):
                raise UnsupportedModelError("activated LoRA changes its weights within a sequence")
        return cast(nn.Module, module.get_base_model())  # type: ignore[operator]
    return None


def _refuse_reentrant(name: str, function: Any) -> None:
    keywords = function.keywords if isinstance(function, partial) else {}
    if keywords.get("use_reentrant") is not False:
        raise UnsupportedModelError(
            f"{name} checkpoints its layers with use_reentrant={keywords.get('use_reentrant')}: states that leave a "
            "reentrantly checkpointed layer through a cache carry no gradient. Enable checkpointing with "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )


def noise_of(model: nn.Module, config: Any) -> list[str]:
    """Names what a model would draw at random in training mode, by its configuration and its modules."""
    names = [f"{name}={value:g}" for name in NOISE if (value := getattr(config, name, None))]
    drops = {f"dropout of {m.p:g}" for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0}
    return [*names, *sorted(drops)]


@contextmanager
def without_dropout(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Sets evaluation mode for the time of the block; with `training`, not for what checkpoints its activations.

    Gradient checkpointing works in training mode only, which transformers asks of the checkpointed layers and of the
    model around them; dropout is asked of the modules that do it.
    """
    before = [module for module in model.modules() if module.training]
    for module in before:
        checkpoints = isinstance(module, GradientCheckpointingLayer) or getattr(module, "gradient_checkpointing", False)
        module.training = training and bool(checkpoints)
    try:
        yield
    finally:
        for module in before:
            module.training = True
