"""Measures a training step of random weights, every live byte by what it is for: ours, the plain code, and peers.

    steps = measure(config, Load(prompt_tokens=256, context_tokens=128, completion_tokens=64, completions=4))
    steps["ours"].lives.at_peak["logits"], steps["naive"].lives.peak

A contender takes the same model and the same tokens from ids to gradients and an AdamW update (fused, as transformers'
default is: without temporaries): `ours` as the `Setting` says, by `distill_step`; `naive` as a trainer without either
trick, each completion a sequence with its own prompt and the loss from the logits of all completion tokens; `trl` and
`liger` like naive, with their chunked losses. Reverse KL, a live teacher. A step has run before the one that is
recorded, so that nothing is made for the first time in it; the learning rate is 0, and losses that differ are an error:
what is compared computes the same.

What differs from the obvious: a model that is too large here is made smaller by `shrunk`, in every dimension that
memory grows with. Sizes that a loss works in (our workspace, TRL's tiles, Liger's chunks) are then made smaller by the
same factors (`tiles`), else a scaled-down model would be drawn with a full-size workspace.

Not covered: sampling, other teachers than a live one, several devices, compiled contenders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, UnsupportedModelError
from ..losses import FusedLinearDivergence
from ..models import find_body
from ..models.names import set_checkpointing
from ..prefix import Plan, plan
from ..step import distill_step
from .estimate import DEFAULT_WORKSPACE_MB, Load, Prediction, Setting, count_parameters, dtype_of, predict
from .timeline import Lives, TimeLine

# What counts as the same loss, relative.
EQUAL: Final = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05, torch.float64: 1e-3}
TRL_TILE: Final = (4096, 32_768)  # rows and vocabulary entries of trl.kernels at a time
# What is always granted: the scratch of one block does not depend on the shape.
LEAST_WORKSPACE_MB: Final = 24.0
LIGER_CHUNK: Final = 1024  # rows, its default
MOST_ENTRIES: Final = 1_000_000  # of the CUDA allocator's record


class Tiles(NamedTuple):
    """Says by what the sizes that a loss works in are divided."""

    rows: float = 1.0
    vocab: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Holds the tokens of a step, and the settings of all contenders."""

    plan: Plan
    student_ids: Tensor  # (B·G, P + R)
    teacher_ids: Tensor  # (B·G, P + C + R)
    completion_tokens: int  # R
    setting: Setting
    tiles: Tiles


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Holds one contender's step. Without `lives` it did not run, and `reason` says why."""

    contender: str
    lives: Lives | None = None
    loss: float | None = None
    strategy: str = ""  # of ours, as it was run
    allocator_peak: int | None = None  # on a GPU: bytes, with the CUDA allocator's rounding
    reason: str = ""


Run = Callable[[nn.Module, Batch, Callable[[str], None]], Tensor]


class Contender(NamedTuple):
    """Names one way to do the step."""

    run: Run  # forward and backward: model, batch and the time line's `enter` to the detached loss
    describes: str = ""


def measure(
    config: Any,
    load: Load,
    setting: Setting | None = None,
    *,
    contenders: Sequence[str] = ("ours", "naive", "trl"),
    tiles: Tiles | None = None,
    device: torch.device | str = "cpu",
    snapshots: str | None = None,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Records a step of each contender, one after the other, on the same model.

    `config` is a Hugging Face configuration, of a model that fits the device several times over. `snapshots` is a
    directory for the CUDA allocator's own records, one `<contender>.pickle` each, for pytorch.org/memory_viz. Raises
    `ArgumentError` for a contender or teacher that is not known here, and where two contenders' losses differ.
    """
    setting = setting or Setting()
    unknown = sorted(set(contenders) - set(CONTENDERS))
    if unknown:
        raise ArgumentError(f"contenders must be among {', '.join(CONTENDERS)}, got {', '.join(unknown)}")
    if setting.teacher != "live":
        raise ArgumentError(f"teacher must be live where a step is measured, got {setting.teacher!r}")
    dtype = dtype_of(config, setting)
    model = _model(config, setting, dtype, torch.device(device), seed)
    batch = _batch(load, setting, tiles or Tiles(), find_body(model).vocab_size, torch.device(device), seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0, fused=True
    )
    measured: dict[str, Measurement] = {}
    for name in contenders:
        measured[name] = _measured(name, model, batch, optimizer, snapshots)
        _require_equal(measured, dtype)
    return measured


def workspace_of(setting: Setting, tiles: Tiles) -> float:
    """Bounds what our loss works in, in MiB; small shapes take less."""
    return max((setting.workspace_mb or DEFAULT_WORKSPACE_MB) / (tiles.rows * tiles.vocab), LEAST_WORKSPACE_MB)


def predictions(config: Any, load: Load, setting: Setting, tiles: Tiles) -> dict[str, Prediction]:
    """Estimates the same steps, of the contenders that `predict` knows."""
    ours = replace(setting, workspace_mb=workspace_of(setting, tiles))
    naive = replace(setting, strategy="naive", micro_batch=None, fused=False)
    counted = count_parameters(config)
    return {
        "ours": predict(config, load, ours, parameters=counted),
        "naive": predict(config, load, naive, parameters=counted),
    }


def _measured(
    contender: str, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, snapshots: str | None
) -> Measurement:
    run = CONTENDERS[contender].run
    try:
        run(model, batch, lambda _: None)
        optimizer.step()
    except (UnsupportedModelError, ImportError) as error:
        optimizer.zero_grad(set_to_none=True)
        return Measurement(contender=contender, reason=" ".join(str(error).split()))
    optimizer.zero_grad(set_to_none=True)
    line, device = TimeLine(model, optimizer=optimizer), batch.student_ids.device
    with _snapshot(device, snapshots, contender), line:
        if batch.setting.accumulates:
            run(model, batch, line.enter)
        loss = run(model, batch, line.enter)
        line.enter("optimizer")
        optimizer.step()
    lives = line.finished()
    optimizer.zero_grad(set_to_none=True)
    setting = batch.setting
    in_flight = "" if setting.micro_batch is None else f", {setting.micro_batch} at a time"
    return Measurement(
        contender=contender,
        lives=lives,
        loss=float(loss),
        strategy=f"{setting.strategy}{in_flight}" if contender == "ours" else "",
        allocator_peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


@contextmanager
def _snapshot(device: torch.device, directory: str | None, name: str) -> Iterator[None]:
    """Has the CUDA allocator start its peak anew, and record what happens inside for pytorch.org/memory_viz.

    Written without a GPU at hand: on one it has NOT been run.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    if directory is None:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=MOST_ENTRIES)
    try:
        yield
        torch.cuda.synchronize(device)
        Path(directory).mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(Path(directory) / f"{name}.pickle"))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _ours(model: nn.Module, batch: Batch, enter: Callable[[str], None]) -> Tensor:
    setting, tiles = batch.setting, batch.tiles
    loss = FusedLinearDivergence(workspace_mb=workspace_of(setting, tiles))
    loss.register_forward_pre_hook(lambda *_: enter("loss"))

    def backward(scalar: Tensor) -> None:
        enter("backward")
        scalar.backward()

    return distill_step(
        model,
        batch.plan,
        loss=loss,
        strategy=setting.strategy,
        micro_batch=setting.micro_batch,
        verify="off",
        backward=backward,
    ).loss


def _naive(model: nn.Module, batch: Batch, enter: Callable[[str], None]) -> Tensor:
    def logits(ids: Tensor) -> Tensor:  # (B·G, L) -> (B·G, R, V)
        return model(input_ids=ids, use_cache=False, logits_to_keep=batch.completion_tokens + 1).logits[:, :-1]

    def loss_of() -> Tensor:
        """Does what a trainer's `compute_loss` does: what it does not return is only kept where the graph needs it."""
        student = logits(batch.student_ids)
        with torch.no_grad():
            teacher = logits(batch.teacher_ids)
        enter("loss")
        log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        # torch's arguments: KL(p‖q) for input log q and target log p.
        return nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()

    loss = loss_of()
    enter("backward")
    loss.backward()
    return loss.detach()


def _chunked(
    divergence: Callable[[Tensor, Tensor, Tensor, Batch], Tensor],
    model: nn.Module,
    batch: Batch,
    enter: Callable[[str], None],
) -> Tensor:
    """Takes another library's loss of hidden states (N, H), weight (V, H) and the teacher's states (N, H)."""
    body = find_body(model)
    head = body.causal_lm.get_output_embeddings()
    changed = [
        name
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
        if getattr(body.config, name, None) not in (None, 1, 1.0)
    ]
    if changed or getattr(head, "bias", None) is not None:
        raise UnsupportedModelError(f"{body.name} does more than one matrix: {', '.join(changed) or 'a bias'}")

    def states(ids: Tensor) -> Tensor:
        hidden = body.base(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[:, -batch.completion_tokens - 1 : -1].flatten(0, 1)

    student = states(batch.student_ids)
    with torch.no_grad():
        teacher = states(batch.teacher_ids)
    enter("loss")
    loss = divergence(student, head.weight, teacher, batch)
    enter("backward")
    loss.backward()
    return loss.detach()


def _trl(model: nn.Module, batch: Batch, enter: Callable[[str], None]) -> Tensor:
    try:
        from trl.kernels import chunked_divergence
    except ImportError as error:
        raise ImportError('the contender trl needs TRL: pip install "sdcore[trl]"') from error

    def divergence(student: Tensor, weight: Tensor, teacher: Tensor, _: Batch) -> Tensor:
        inputs = (student, weight, None, teacher, weight.detach(), None, 1.0)
        return chunked_divergence.ChunkedDivergenceFunction.apply(*inputs)[0].mean()

    rows, vocab = (max(int(size / scale), 1) for size, scale in zip(TRL_TILE, batch.tiles, strict=True))
    # Also for the backward, which has tiles of its own.
    with mock.patch.multiple(chunked_divergence, TOKEN_CHUNK_SIZE=rows, VOCAB_CHUNK_SIZE=vocab):
        return _chunked(divergence, model, batch, enter)


def _liger_divergence(student: Tensor, weight: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise ImportError('the contender liger needs Liger: pip install "sdcore[liger]"') from error
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=1.0,
        chunk_size=max(int(LIGER_CHUNK / batch.tiles.rows), 1),
        compiled=False,  # a compiled graph's tensors cannot be seen
    )
    labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    return module(student, weight, teacher, weight.detach(), labels)


CONTENDERS: Final = {
    "ours": Contender(_ours, "fused loss, shared prefixes"),
    "naive": Contender(_naive, "whole logits, nothing shared"),
    "trl": Contender(_trl, "TRL's chunked loss, nothing shared"),
    "liger": Contender(partial(_chunked, _liger_divergence), "Liger's chunked loss, not compiled, nothing shared"),
}


def _model(config: Any, setting: Setting, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    # Made where it is used: a CPU takes half a minute to fill billions of weights.
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if setting.lora_rank is not None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError('lora_rank needs PEFT: pip install "sdcore[peft]"') from error
        adapters = LoraConfig(r=setting.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    if setting.checkpointing:
        set_checkpointing(model, True)
        if setting.lora_rank is not None:
            model.enable_input_require_grads()
    return model


def _batch(load: Load, setting: Setting, tiles: Tiles, vocab: int, device: torch.device, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(vocab, (load.prompts, *shape), generator=generator).to(device)

    group, each = load.completions, load.context_per_completion
    prompts, completions = ids(1, load.prompt_tokens), ids(group, load.completion_tokens)  # (B, 1, P) and (B, G, R)
    contexts = ids(group if each else 1, load.context_tokens)
    teachers = torch.cat([prompts.expand(-1, contexts.shape[1], -1), contexts], -1)  # (B, G or 1, P + C)
    return Batch(
        plan=plan(
            [prompt for (prompt,) in prompts],
            [[*members] for members in completions],
            [[*members] if each else members[0] for members in teachers],
        ),
        student_ids=torch.cat([prompts.expand(-1, group, -1), completions], -1).flatten(0, 1),
        teacher_ids=torch.cat([teachers.expand(-1, group, -1), completions], -1).flatten(0, 1),
        completion_tokens=load.completion_tokens,
        setting=setting,
        tiles=tiles,
    )


def _require_equal(measured: dict[str, Measurement], dtype: torch.dtype) -> None:
    losses = {name: measurement.loss for name, measurement in measured.items() if measurement.loss is not None}
    first = next(iter(losses.values()), 0.0)
    for name, loss in losses.items():
        if abs(loss - first) > EQUAL[dtype] * max(abs(first), 1e-6):
            raise ArgumentError(f"contenders must compute the same loss, got {first:.6g} and {loss:.6g} of {name}")
