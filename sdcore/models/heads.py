"""Reads a model's output layer through the wrappers of PEFT, FSDP2 and quantisation.

    head = models.head_of(model)
    linear_divergence(head.states(hidden), head.weight, ..., student_head=head.transform)

    layer                                         weight                               gradient reaches
    nn.Linear, tied to the embeddings or not      its own tensor                       the parameter
    PEFT, `modules_to_save=["lm_head"]`           that of the trained copy             the copy
    PEFT, LoRA on lm_head                         [W, s·B], states [h, h·Aᵀ]           A, B, W if it is trained
    FSDP2 (`DTensor`)                             gathered                             the shards, averaged over ranks
    DeepSpeed ZeRO-3                              gathered                             DeepSpeed's own reduction
    bitsandbytes, 4 and 8 bit                     dequantised                          nothing: it is frozen

What differs from the obvious: an adapter is not added to its matrix. In bfloat16 `W + s·B·A` is rounded to the digits
of `W`, which leaves nothing of a young adapter; as R more columns, R the sum of the adapters' ranks, it keeps its own
digits. The copy takes about the memory of `W` either way, and so does its gradient.

Not covered, and refused by name: adapters that are more than `B·A` (DoRA), other PEFT methods on the output layer, and
every layer or weight whose type is not known here (torchao, HQQ, GPTQ, AWQ).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from sdkernels import LogitTransform
from sdkernels.driver.call import transform_scalars
from sdkernels.tile.elementwise import transform_

from ..errors import UnsupportedModelError

# Elements of the weight that `logits_at` gathers at a time: 64 MiB in float32.
GATHERED = 2**24
LORA_LAYERS = frozenset(
    {"peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit", "peft.tuners.lora.bnb.Linear8bitLt"}
)
QUANTISED_LAYERS = frozenset({"bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt"})

# What configurations call the soft-cap of the logits: Gemma, RecurrentGemma, xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Head(NamedTuple):
    """Is the output layer: the logits are `transform` applied to `states(hidden) @ weight.T`."""

    weight: Tensor  # (V, H), with LoRA on it (V, H + R); a gradient that reaches it reaches the model's parameters
    transform: LogitTransform
    lift: Tensor | None = None  # (R, H) the adapters' A; None where there is none

    def states(self, hidden: Tensor) -> Tensor:
        """Returns what goes with the weight, of (N, H) hidden states: they themselves, with LoRA (N, H + R)."""
        return lifted(hidden, self.lift)


def lifted(hidden: Tensor, lift: Tensor | None) -> Tensor:
    """Puts the products of (N, H) states with (R, H) `lift` beside them, in the dtype of the states."""
    if lift is None:
        return hidden
    return torch.cat([hidden, (hidden.to(lift.dtype) @ lift.T).to(hidden.dtype)], dim=-1)


@torch.no_grad()
def logits_at(hidden: Tensor, head: Head, ids: Tensor, temperature: float) -> Tensor:
    """Computes, (N, K) in float32 or better, the logits of K ids a row and no others, of `head.states(...)`."""
    logits = hidden.new_empty(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    scalars, bias = transform_scalars(head.transform, temperature), head.transform.bias
    step = max(1, GATHERED // (ids.shape[1] * hidden.shape[1]))
    for states, here, into in zip(hidden.split(step), ids.split(step), logits.split(step), strict=True):
        into.copy_((head.weight[here].to(into.dtype) @ states.to(into.dtype)[:, :, None])[:, :, 0])
        transform_(into, scalars, None if bias is None else bias[here].to(into.dtype))
    return logits


class Matrix(NamedTuple):
    """Is an output layer without what the model does to its result."""

    weight: Tensor  # as in `Head`
    bias: Tensor | None  # (V,)
    lift: Tensor | None  # as in `Head`


def read_layer(layer: nn.Module, *, model: nn.Module, name: str, dtype: torch.dtype) -> Matrix:
    """Reads the matrix of an output layer as it is now: adapters active or not, weights sharded or not.

    `model` is the outermost module, of which FSDP2's units are part; `name` is what errors call it; `dtype` is that of
    the states, in which a weight is dequantised. Raises `UnsupportedModelError` for a layer that is not one matrix.
    """
    layer = in_use(layer)
    base = layer.get_base_layer() if _kind(layer) in LORA_LAYERS else layer  # type: ignore[operator]
    _require_matrix(base, name)
    adapters = list(_adapters(layer, name))
    weight = _dequantised(base).to(dtype) if _kind(base) in QUANTISED_LAYERS else _whole(base, "weight", model)
    bias = None if base.bias is None else _whole(base, "bias", model)
    if not adapters:
        return Matrix(weight, bias, None)
    columns = [weight]
    for _, up, scaling in adapters:
        columns.append((_whole(up, "weight", model) * scaling).to(weight.dtype))
        if up.bias is not None:
            shift = _whole(up, "bias", model) * scaling
            bias = shift if bias is None else bias + shift
    lift = torch.cat([_whole(down, "weight", model) for down, _, _ in adapters])
    return Matrix(torch.cat(columns, dim=1), bias, lift)


def count_rows(layer: nn.Module) -> int:
    """Counts the logits of a token, without gathering or dequantising anything."""
    layer = in_use(layer)
    base: Any = layer.get_base_layer() if _kind(layer) in LORA_LAYERS else layer  # type: ignore[operator]
    # A copy that PEFT ties to the embeddings has in_features and out_features the wrong way round.
    return int(base.out_features if _kind(base) in QUANTISED_LAYERS else shape_of(base.weight)[0])


def shape_of(weight: Tensor) -> torch.Size:
    """Returns the shape of the whole weight, also where DeepSpeed has left nothing of it."""
    return getattr(weight, "ds_shape", weight.shape)


def _kind(layer: object) -> str:
    """Names the class of a layer or a weight; of a unit of FSDP2 the class it had before."""
    kind = next(base for base in type(layer).__mro__ if not issubclass(base, FSDPModule))
    return f"{kind.__module__}.{kind.__qualname__}"


def in_use(layer: Any) -> nn.Module:
    """Returns, of PEFT's modules_to_save, a trained copy beside the original, the one that is in use."""
    if not (hasattr(layer, "modules_to_save") and hasattr(layer, "original_module")):
        return layer
    names = [name for name in layer.active_adapters if name in layer.modules_to_save]
    if layer.disable_adapters or not names:
        return layer.original_module
    return layer.modules_to_save[names[0]]


def _require_matrix(layer: nn.Module, name: str) -> None:
    kind = _kind(layer)
    if kind in QUANTISED_LAYERS:
        return
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise UnsupportedModelError(
            f"{name} has an output layer of type {kind}, which is not one plain matrix "
            "(with PEFT, put lm_head into modules_to_save; where it is quantised, leave it out: "
            "llm_int8_skip_modules=['lm_head'] for bitsandbytes, modules_to_not_convert=['lm_head'] for others)"
        )
    if type(layer.weight) not in (Tensor, nn.Parameter, DTensor):
        raise UnsupportedModelError(
            f"{name} has an output layer whose weight is of type {_kind(layer.weight)}, which is not known: leave "
            "lm_head out of the quantisation (modules_to_not_convert=['lm_head'])"
        )


def _adapters(layer: Any, name: str) -> Iterator[tuple[nn.Linear, nn.Linear, float]]:
    """Yields A, B and scaling of each LoRA adapter that the layer's own forward would apply."""
    if _kind(layer) not in LORA_LAYERS:
        return
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # so does its own forward
    if layer.disable_adapters or layer.merged:
        return
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        if adapter in layer.lora_variant:
            variant = type(layer.lora_variant[adapter]).__name__
            raise UnsupportedModelError(
                f"{name} has an adapter {adapter!r} on its output layer that is more than B·A ({variant}): use plain "
                "LoRA there, or put lm_head into modules_to_save"
            )
        yield layer.lora_A[adapter], layer.lora_B[adapter], float(layer.scaling[adapter])


@torch.no_grad()
def _dequantised(layer: Any) -> Tensor:
    """Computes the (V, H) weight of a layer of bitsandbytes."""
    from bitsandbytes import functional

    weight = layer.weight
    if _kind(layer).endswith("4bit"):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    scale = layer.state.SCB if weight.SCB is None else weight.SCB
    values = layer.state.CB if layer.state.CB is not None else weight.data
    return functional.int8_vectorwise_dequant(values, scale)


def _whole(module: nn.Module, parameter: str, model: nn.Module) -> Tensor:
    """Returns the full tensor behind a parameter that may be sharded, connected to it."""
    weight: Tensor = getattr(module, parameter)
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            # Inside, where autograd learns the shape that the gradient is going to have.
            whole: Tensor = _Copied.apply(weight)
            return whole
    if not isinstance(weight, DTensor):
        return weight
    policy = _precision(model, module)
    dtype = policy.param_dtype or weight.dtype
    whole = _Gathered.apply(weight, dtype, policy.reduce_dtype or dtype)
    return whole


def _precision(model: nn.Module, module: nn.Module) -> MixedPrecisionPolicy:
    """Says in which dtypes FSDP2 gathers a module's weights and reduces their gradients."""
    around = [unit for unit in model.modules() if isinstance(unit, FSDPModule) and module in set(unit.modules())]
    # Modules come from the outside in, and the innermost unit is the one that shards. Nothing public says its policy.
    return around[-1]._get_fsdp_state()._mp_policy if around else MixedPrecisionPolicy()


class _Gathered(torch.autograd.Function):
    """Gathers a sharded weight. Each rank has its own rows, so its gradient is averaged over the ranks by shards."""

    @staticmethod
    def forward(ctx: Any, weight: DTensor, dtype: torch.dtype, reduced: torch.dtype) -> Tensor:
        ctx.layout, ctx.dtypes = (weight.device_mesh, weight.placements), (reduced, weight.dtype)
        return cast(DTensor, weight.to(dtype)).full_tensor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mesh, placements), (reduced, dtype) = ctx.layout, ctx.dtypes
        own = DTensor.from_local(gradient.to(reduced) / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
        return own.redistribute(placements=placements).to(dtype), None, None


class _Copied(torch.autograd.Function):
    """Keeps a weight that DeepSpeed has gathered, for longer than that; its gradient is DeepSpeed's to reduce."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if ctx.weight.numel() == 0:
            # A gradient is accumulated only into what has its shape. DeepSpeed frees it again after the backward.
            ctx.weight.all_gather()
        return gradient


def scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """Reads what the configuration says about the logits; `verify_logits` checks it."""
    scale = 1.0
    for attribute, divides in (("logit_scale", False), ("lm_head_multiplier", False), ("logits_scaling", True)):
        value = getattr(config, attribute, None)
        if value is not None:
            scale *= 1 / float(value) if divides else float(value)
    softcaps = (getattr(config, name, None) for name in SOFTCAPS)
    return scale, next((float(softcap) for softcap in softcaps if softcap is not None), None)


@dataclass
class _BodyOutput(ModelOutput):
    """Is what any family's body returns, with nothing but states in it: each has its own names for the rest."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@torch.no_grad()
def verify_logits(causal_lm: PreTrainedModel, base: PreTrainedModel, *, scale: float, softcap: float | None) -> None:
    """Refuses a model that does anything else between its last states and its logits.

    Its own forward runs, between a stand-in for the body, which returns given states, and one for the output layer,
    which checks that it gets them and returns given logits. So no weight is touched and no rank waits for another.
    """
    name, head = type(causal_lm).__name__, causal_lm.get_output_embeddings()
    owners = {child: (owner, key) for owner in causal_lm.modules() for key, child in owner.named_children()}
    states = torch.linspace(-2.0, 2.0, 2 * int(base.config.hidden_size), dtype=base.dtype).view(1, 2, -1)
    projected = torch.linspace(-40.0, 40.0, 2 * count_rows(head)).view(1, 2, -1)
    received: list[Tensor] = []

    class Base(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> _BodyOutput:
            return _BodyOutput(last_hidden_state=states)

        def __getattr__(self, name: str) -> Any:
            return getattr(base, name)

    class Projection(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            received.append(hidden)
            return projected.clone()

        def __getattr__(self, name: str) -> Any:
            return getattr(head, name)

    for module, stand_in in ((base, Base()), (head, Projection())):
        owner, key = owners[module]
        owner._modules[key] = stand_in
    try:
        output = type(causal_lm).forward(causal_lm, input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except Exception as raised:
        raise UnsupportedModelError(
            f"{name} cannot be run around a stand-in for its body, to see what it does to states and logits: "
            f"{type(raised).__name__}: {raised}"
        ) from raised
    finally:
        for module in (base, head):
            owner, key = owners[module]
            owner._modules[key] = module
    expected = projected * scale if softcap is None else softcap * torch.tanh(projected * scale / softcap)
    logits = output.logits.float()
    error = float((logits - expected).abs().max()) if logits.shape == expected.shape else math.inf
    moved = len(received) != 1 or not torch.equal(received[0], states)
    if moved or error > 1e-5 * float(expected.abs().max()):
        raise UnsupportedModelError(
            f"{name} changes its hidden states before the output layer, or its logits after it, in a way that is "
            f"not known: with scale {scale:g} and soft-cap {softcap} the logits differ by {error:.3g}"
        )
