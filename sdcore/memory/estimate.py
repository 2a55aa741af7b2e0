"""Predicts what a training step needs in memory, part by part, from a model's configuration: no weights, no GPU.

    config = AutoConfig.from_pretrained("Qwen/Qwen3-8B")
    memory = compare(config, Load(prompt_tokens=1000, context_tokens=500, completion_tokens=500, completions=8))
    memory["fused, shared"].total, memory["plain, naive"].total

Parameters are counted on the meta device; activations and prompt caches are `sdcore.prefix.cost`'s. Four variants stand
side by side: the loss fused or from whole logits, prefixes shared or every completion as a sequence of its own.

What differs from the obvious: the update's peak is no sum of all parts. Gradients grow while activations shrink, so it
is at the loss or at the end of the backward, whichever is more. There autograd has both summands of a matrix that is
read twice, and their sum: a tied embedding's gradient three times, more than all layers' in a small model.

What differs from a measurement (`measured`; docs/memory.md has both side by side): padding is none, and of the
allocator's fragmentation, the CUDA context and temporaries of the optimizer it knows nothing: leave a few GB. What the
layers keep is within a tenth for the families of `prefix.sizes`, in transformers' own code.

Not covered: several devices (FSDP, DeepSpeed: divide weights, gradients and optimizer by their number), quantised
weights, and optimizers with other states than AdamW's. Whether it fits a given device is `fits`' question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import torch
from torch import nn

from ..errors import ArgumentError, UnsupportedModelError
from ..prefix.costs.count import STRATEGIES, cost_of_sizes
from ..prefix.costs.sizes import ModelSizes, model_sizes
from ..presets.method import TeacherKind

if TYPE_CHECKING:
    from rich.table import Table


MIB: Final = 1 << 20
# Teachers that hold a copy of the weights; the others are the student's own.
COPIES: Final = ("frozen", "ema", "periodic", "trust_region")
# Plain PyTorch's divergence at its peak, in arrays of (N, V): logits of both sides in the model's dtype, and float32
# log-probabilities of both, the product, its gradient, and the gradient of the log-probabilities and of the logits.
PLAIN_LOGITS: Final = 2
PLAIN_FLOAT32: Final = 6
# Sampling: logits of a row in float32, the warped copy, its softmax and its log-softmax.
SAMPLING_FLOAT32: Final = 4
# The fused loss on few rows needs less than its budget: two float32 logits, and scratch for one block of them.
FUSED_BYTES_PER_ENTRY: Final = 8
SCRATCH_BYTES_PER_ENTRY: Final = 16
BLOCK_ENTRIES: Final = 1 << 17
DEFAULT_WORKSPACE_MB: Final = 256.0
# Of the fused loss on a GPU; less on one with under 38 GB.
GPU_WORKSPACE_MB: Final = 1536.0
PARTS: Final = (
    "weights",
    "teacher weights",
    "gradients",
    "optimizer",
    "activations",
    "prompt cache",
    "workspace",
    "logits",
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Says what one device holds at a time. Raises `ArgumentError`, which names the field."""

    prompt_tokens: int  # P, of the student's prompt
    context_tokens: int  # C, what the teacher's prompt has beyond it
    completion_tokens: int  # R
    completions: int = 1  # G, of each prompt
    prompts: int = 1  # B, groups in one forward and backward
    context_per_completion: bool = False  # each completion has a context of its own, as feedback is

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "completion_tokens", "completions", "prompts"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.context_tokens < 0:
            raise ArgumentError(f"context_tokens must be at least 0, got {self.context_tokens}")

    @property
    def rows(self) -> int:
        """Counts the completion tokens, N."""
        return self.prompts * self.completions * self.completion_tokens


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Says how the step is run. Raises `ArgumentError`, which names the field."""

    teacher: TeacherKind = "live"
    fused: bool = True  # the loss by `linear_divergence`; False: from whole logits
    strategy: Literal["packed", "cached", "two_phase", "naive"] = "packed"
    micro_batch: int | None = None  # completions in flight at a time, "two_phase"; None: all
    checkpointing: bool = False  # gradient checkpointing
    lora_rank: int | None = None  # of adapters on every linear layer but the head; None: all weights are trained
    accumulates: bool = False  # an earlier backward's gradients are there
    dtype: str | None = None  # "float32", "bfloat16", ...; None: what the configuration says, else float32
    workspace_mb: float | None = None  # of the fused loss; None: what it takes on a GPU

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ArgumentError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ArgumentError(f"lora_rank must be at least 1, or None, got {self.lora_rank}")
        if self.dtype is not None and not _is_float(getattr(torch, self.dtype, None)):
            raise ArgumentError(f"dtype must be the name of one of torch's float dtypes, got {self.dtype!r}")
        if self.workspace_mb is not None and self.workspace_mb <= 0:
            raise ArgumentError(f"workspace_mb must be positive, got {self.workspace_mb}")
        if self.teacher not in get_args(TeacherKind):
            raise ArgumentError(f"teacher must be one of {', '.join(get_args(TeacherKind))}, got {self.teacher!r}")


class Parameters(NamedTuple):
    """Counts the parameters of a model."""

    all: int
    head: int  # of the output layer, also where it is tied to the embedding
    linear_sides: int  # Σ (inputs + outputs) of the linear layers but the head: LoRA's parameters per rank
    tied: bool = False  # the head is the embedding


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Holds the most bytes of each part of a step, in the order of `PARTS`."""

    parts: Mapping[str, int]
    update: int  # what is there at its peak; not all parts are at their most at the same time
    sampling: int  # what sampling holds beside weights and optimizer, before the update

    @property
    def resident(self) -> int:
        """Adds up what is there all the time."""
        return sum(self.parts[name] for name in ("weights", "teacher weights", "optimizer"))

    @property
    def total(self) -> int:
        """Takes the larger of update and sampling."""
        return max(self.update, self.resident + self.sampling)


def count_parameters(config: Any) -> Parameters:
    """Counts the parameters of a Hugging Face configuration's causal language model, made on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"config must be a causal language model's, got {type(config).__name__}: no head")
    sides = [m.in_features + m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    tied = model.get_input_embeddings().weight is head.weight
    return Parameters(sum(p.numel() for p in model.parameters()), head.weight.numel(), sum(sides), tied)


def predict(
    config: Any, load: Load, setting: Setting | None = None, *, parameters: Parameters | None = None
) -> Prediction:
    """Predicts the memory of one step. `parameters` None: counted on the meta device.

    `config` is a Hugging Face configuration. Raises `UnsupportedModelError` for one that does not say what a layer
    costs, and for a quantised one.
    """
    if quantised := getattr(config, "quantization_config", None):
        quantised = quantised if isinstance(quantised, dict) else quantised.to_dict()
        raise UnsupportedModelError(
            f"config must be of a model that is not quantised, got quant_method={quantised.get('quant_method')!r}: its "
            "weights have no dtype to be counted by; take the model that it was made of"
        )
    setting = setting or Setting()
    sizes = model_sizes(config)
    parameters = parameters or count_parameters(config)
    itemsize = dtype_of(config, setting).itemsize
    counted = cost_of_sizes(
        sizes,
        prompt_tokens=load.prompt_tokens,
        context_tokens=load.context_tokens,
        completion_tokens=load.completion_tokens,
        completions=load.completions,
        context_per_completion=load.context_per_completion,
        strategy=setting.strategy,
        teacher_shares=setting.teacher == "live",
        checkpointing=setting.checkpointing,
        micro_batch=setting.micro_batch,
        dtype_bytes=itemsize,
    )
    # A packed row reads a prompt's keys and values where the student's layers keep them, unless they keep nothing.
    prompt_bytes = counted.student.prompt_bytes if setting.strategy != "packed" or setting.checkpointing else 0
    if counted.teacher is not None and setting.strategy != "packed":
        prompt_bytes += counted.teacher.prompt_bytes
    at_once = 1 if setting.strategy == "two_phase" else load.prompts  # groups
    trained = parameters.all if setting.lora_rank is None else setting.lora_rank * parameters.linear_sides
    copies = 1 if setting.teacher in COPIES else 0
    if setting.lora_rank is not None and setting.teacher in ("frozen", "trust_region"):
        copies = 0  # the base model with the adapter off
    teacher = copies * (parameters.all if setting.lora_rank is None else trained)
    workspace, logits = _loss_bytes(load, sizes, setting, itemsize, parameters)
    if counted.teacher is not None:
        # The teacher's pass is over when the loss begins.
        workspace = max(workspace, at_once * counted.teacher.working_bytes - logits)
    head = parameters.head if setting.lora_rank is None else 0
    # The fused loss makes the head's gradient. Micro-batches have a backward each, and find what earlier ones left.
    there = trained if setting.accumulates or setting.strategy == "two_phase" else 0
    at_loss = (there + (head if setting.fused else 0)) * itemsize
    # Of the embedding a second summand and the sum, where a pass reads it twice; "two_phase" has one at a time.
    twice = setting.strategy == "cached" or (parameters.tied and setting.strategy != "two_phase")
    at_end = (trained + (2 + setting.accumulates) * head * twice) * itemsize
    activations = at_once * counted.student.kept_bytes
    parts = (
        (parameters.all + (0 if setting.lora_rank is None else trained)) * itemsize,
        teacher * itemsize,
        max(at_loss, at_end),
        2 * trained * itemsize,  # AdamW's two moments, in the parameters' dtype
        activations,
        at_once * prompt_bytes,
        workspace,
        logits,
    )
    resident = parts[0] + parts[1] + parts[3]
    return Prediction(
        parts=dict(zip(PARTS, parts, strict=True)),
        update=resident + max(at_loss + activations + sum(parts[5:]), at_end),
        sampling=_sampling_bytes(load, sizes, itemsize, setting),
    )


def compare(
    config: Any, load: Load, setting: Setting | None = None, *, parameters: Parameters | None = None
) -> dict[str, Prediction]:
    """Predicts a step with the fused loss and with whole logits, with shared prefixes and without."""
    setting = setting or Setting()
    model_sizes(config)  # refuses a configuration that says too little, before a model is made of it
    parameters = parameters or count_parameters(config)
    return {name: predict(config, load, s, parameters=parameters) for name, s in variants_of(setting).items()}


def variants_of(setting: Setting) -> dict[str, Setting]:
    """Varies a setting: the fused loss and whole logits, shared prefixes and none."""
    naive = replace(setting, strategy="naive", micro_batch=None)
    return {
        "fused, shared": replace(setting, fused=True),
        "fused, naive": replace(naive, fused=True),
        "plain, shared": replace(setting, fused=False),
        "plain, naive": replace(naive, fused=False),
    }


def memory_table(variants: Mapping[str, Prediction], title: str = "Predicted peak memory") -> Table:
    """Lists on a terminal a line per part, a column per variant."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for name in variants:
        table.add_column(name, justify="right")
    for part in PARTS:
        table.add_row(part, *(shown_bytes(prediction.parts[part]) for prediction in variants.values()))
    table.add_section()
    table.add_row("update, at its peak", *(shown_bytes(prediction.update) for prediction in variants.values()))
    table.add_row("sampling, before it", *(shown_bytes(p.resident + p.sampling) for p in variants.values()))
    table.add_row("peak", *(shown_bytes(prediction.total) for prediction in variants.values()), style="bold")
    return table


def _loss_bytes(
    load: Load, sizes: ModelSizes, setting: Setting, itemsize: int, parameters: Parameters
) -> tuple[int, int]:
    """Predicts the workspace of the loss and the bytes of whole logits."""
    rows = load.rows
    if setting.strategy == "two_phase":  # one group at a time, and of its completions those in flight
        rows = min(setting.micro_batch or load.completions, load.completions) * load.completion_tokens
    entries = rows * sizes.vocab
    # The rows' states of both sides and the student's gradient, whichever way the loss is computed.
    states = 3 * rows * sizes.hidden * itemsize
    if not setting.fused:
        return states, entries * (PLAIN_LOGITS * itemsize + PLAIN_FLOAT32 * 4)
    trains_head = setting.lora_rank is None
    budget = setting.workspace_mb or GPU_WORKSPACE_MB
    # Gradients of the head are summed up in float32.
    wide = parameters.head * 4 if trains_head and itemsize < 4 else 0
    needed = FUSED_BYTES_PER_ENTRY * entries + SCRATCH_BYTES_PER_ENTRY * min(entries, BLOCK_ENTRIES)
    return states + wide + min(int(budget * MIB), needed), 0


def _sampling_bytes(load: Load, sizes: ModelSizes, itemsize: int, setting: Setting) -> int:
    """Adds keys, values and states of all completions at once to the logits of one position."""
    rows, length = load.prompts * load.completions, load.prompt_tokens + load.completion_tokens
    kept = sum(min(length, layer.window or length) * layer.kv_entries + layer.state_entries for layer in sizes.layers)
    return rows * (kept * itemsize + sizes.vocab * (itemsize + SAMPLING_FLOAT32 * 4))


def dtype_of(config: Any, setting: Setting) -> torch.dtype:
    """Returns what the model's weights are stored in: the setting's, else the configuration's, else float32."""
    named = setting.dtype or getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, named) if isinstance(named, str) else named
    return dtype if _is_float(dtype) else torch.float32


def _is_float(dtype: object) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def shown_bytes(count: int) -> str:
    """Writes a number of bytes in three digits, a dash for none."""
    if count == 0:
        return "–"
    for unit, size in (("GiB", 1 << 30), ("MiB", MIB), ("KiB", 1 << 10)):
        if count >= size:
            value = count / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count} B"
