"""Lists the contenders of the output layer: ours, the plain code, the public kernels, and the bare matrix products.

`prepare` is the one set-up function: speed, memory, accuracy and the pytest-benchmark entries all call the step that
it returns, a forward and a backward pass to the gradients of the student's hidden states and of the head. A contender
that cannot run raises `Unavailable` with the reason, which becomes its row.

Every contender gets its best setting: Liger the chunk size that `best_liger_chunk` finds on the shape, a pure soft
loss (its default adds half a hard cross-entropy) and its default compilation. All of them take the mixture weight the
way `alpha` is defined here (0: KL(teacher‖student), 1: KL(student‖teacher)) but orda-kernel, whose `kl_beta` is
1 - alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conform.adapters import ADAPTERS, textbook
from ..conform.cases import with_defaults
from .measure import Unavailable, timed
from .rows import FLOOR, FROZEN_FLOOR, Outcome, Step
from .shapes import DTYPES, CaseInputs, Divergence

LIGER_CHUNK_SIZES = (64, 128, 256, 512, 1024)
LONG_STEP = 4.0  # seconds
# What Liger calls the inner kernels of its fused loss; the second is for compute capability 9.0 and above.
LIGER_TRITON_KERNEL, LIGER_CUTE_KERNEL = "nvidia-triton", "nvidia-cutedsl"
# Its default. On a GPU every further size is compiled for longer than it is timed, and adds up more gradients.
LIGER_CUDA_CHUNK = 1024
NO_TOP_K = "has no top-k + tail"
TOLERANCE = 0.004  # what rounding a gradient's tile to bfloat16 makes, twice
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """Has `build(inputs, divergence)`, which returns a function of no arguments to the mean loss, in the graph."""

    name: str
    build: Callable[[CaseInputs, Divergence], Loss]
    peer: str = ""  # what `--peers` calls it; empty: ours
    colour: str = "black"
    marker: str = "o"  # in line plots
    # The bytes of a compiled graph are allocated where `LiveBytes` does not see them.
    compiled: bool = False
    tolerance: float = 0.0  # relative error of the gradients that it was told to keep


def skipped(contender: Contender, reason: str) -> Contender:
    """Returns the same row without a run."""

    def build(inputs: CaseInputs, divergence: Divergence) -> Loss:
        raise Unavailable(reason)

    return replace(contender, build=build)


def prepare(contender: Contender, inputs: CaseInputs, divergence: Divergence) -> Step:
    """Makes a step of `contender`; raises `Unavailable`."""
    loss_of = contender.build(inputs, divergence)
    frozen = not inputs.student_weight.requires_grad
    leaves = (inputs.student_hidden,) if frozen else (inputs.student_hidden, inputs.student_weight)

    def step() -> Outcome:
        loss = loss_of()
        gradients = torch.autograd.grad(loss, leaves)
        return Outcome(loss.detach(), dict(zip(("hidden", "weight"), gradients, strict=False)))

    return step


def require(module: str, package: str) -> None:
    """Raises `Unavailable`, with how to install `package`, where its `module` is missing."""
    if find_spec(module) is None:
        raise Unavailable(f"not installed: pip install {package}")


def _full_vocabulary_only(divergence: Divergence, name: str) -> None:
    if divergence.topk is not None:
        raise Unavailable(f"{name} {NO_TOP_K}")


def _sdcore(inputs: CaseInputs, divergence: Divergence, *, recompute: bool = False, **arguments: Any) -> Loss:
    from sdkernels import TopK, linear_divergence

    arguments["alpha"] = divergence.alpha
    if divergence.topk is not None:
        arguments["support"] = TopK(divergence.topk)
    if not recompute:
        return lambda: linear_divergence(*inputs, **arguments).loss
    return lambda: linear_divergence(*inputs, **arguments, reduction="none", gradient="recompute").loss.mean()


def plain_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, divergence: Divergence, upcast: bool
) -> Tensor:
    """Computes the loss as trainers write it: all logits in the model's dtype, then (`upcast`) all in float32."""
    student_logits = student_hidden @ student_weight.T  # (N, V)
    with torch.no_grad():
        teacher_logits = teacher_hidden @ student_weight.T  # (N, V)
    if upcast:
        student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if divergence.topk is not None:
        ids = student_logits.topk(divergence.topk, -1).indices  # (N, K)
        log_p, log_q = _with_tail(log_p.gather(-1, ids)), _with_tail(log_q.gather(-1, ids))
    return textbook(log_p, log_q, divergence.alpha).mean()


def _with_tail(logprobs: Tensor) -> Tensor:  # (N, K) -> (N, K + 1)
    rest = torch.log(-torch.expm1(logprobs.logsumexp(-1, keepdim=True)))
    return torch.cat([logprobs, rest], -1)


def _plain(inputs: CaseInputs, divergence: Divergence, *, upcast: bool = True) -> Loss:
    return lambda: plain_loss(*inputs, divergence, upcast)


def _allow_many_graphs() -> None:
    """Lets torch.compile make one graph per chunk size, dtype and divergence; past 8 it would go on in eager code."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True


@lru_cache
def _compiled_plain_loss(divergence: Divergence) -> Callable[..., Tensor]:
    _allow_many_graphs()
    # dynamic: one graph per dtype for all shapes. It ran as fast as one graph per shape.
    return torch.compile(partial(plain_loss, divergence=divergence, upcast=True), dynamic=True)


def _compiled(inputs: CaseInputs, divergence: Divergence) -> Loss:
    loss = _compiled_plain_loss(divergence)
    return lambda: loss(*inputs)


def _peer(inputs: CaseInputs, divergence: Divergence, *, name: str, forward: bool = False, **options: Any) -> Loss:
    """Builds a peer's call as `sdcore conform` has it; `forward`: it has the forward KL only."""
    adapter = ADAPTERS[name]
    require(adapter.module, adapter.package)
    _full_vocabulary_only(divergence, name)
    if forward and divergence.alpha != 0:
        raise Unavailable(f"{name} has the forward KL only")
    hidden, weight, teacher_hidden = inputs
    sides = {"student_hidden": hidden, "student_weight": weight, "teacher_hidden": teacher_hidden}
    call = with_defaults({**sides, "teacher_weight": weight.detach(), "alpha": divergence.alpha})
    return lambda: adapter.body(call, **options)


def _torch(inputs: CaseInputs, divergence: Divergence) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("needs torch 2.13")
    return _peer(inputs, divergence, name="torch linear_cross_entropy", forward=True)


def _liger(inputs: CaseInputs, divergence: Divergence, *, chunk_size: int | None = None) -> Loss:
    name = "Liger chunked, compiled"
    _peer(inputs, divergence, name=name)  # what it does not have is known before a chunk is looked for
    _allow_many_graphs()
    return _peer(inputs, divergence, name=name, chunk_size=chunk_size or best_liger_chunk(inputs))


_best_chunks: dict[tuple[Any, ...], int] = {}


def best_liger_chunk(inputs: CaseInputs) -> int:
    """Finds the fastest of `LIGER_CHUNK_SIZES` on this shape and dtype; on a GPU it is the default.

    Of each size it takes the better of two steps of reverse KL (a step of seconds is taken once), from the largest
    down, and stops two sizes past the best: smaller chunks add up more weight gradients.
    """
    key = (inputs.shape, inputs.student_hidden.dtype, inputs.device)
    if inputs.device.type == "cuda":
        _best_chunks[key] = LIGER_CUDA_CHUNK
    if key not in _best_chunks:
        rows = len(inputs.student_hidden)
        seconds: dict[int, float] = {}
        # Sizes that cut the rows into equally many chunks are the same setting; the smallest of them stands for all.
        for chunk_size in {max(1, rows // size): size for size in reversed(LIGER_CHUNK_SIZES)}.values():
            candidate = Contender("", partial(_liger, chunk_size=chunk_size))
            step = prepare(candidate, inputs, Divergence("reverse KL", 1.0))
            step()
            seconds[chunk_size] = timed(step, inputs.device)
            if seconds[chunk_size] < LONG_STEP:
                seconds[chunk_size] = min(seconds[chunk_size], timed(step, inputs.device))
            if min(list(seconds.values())[-2:]) > min(seconds.values()):
                break
        _best_chunks[key] = min(seconds, key=lambda size: seconds[size])
    return _best_chunks[key]


def _liger_fused(inputs: CaseInputs, divergence: Divergence, *, implementation: str) -> Loss:
    """Builds `LigerFusedLinearJSD` with its inner kernel said, which Liger else chooses by what is there."""
    require("liger_kernel", "liger-kernel")
    _full_vocabulary_only(divergence, "Liger")
    if inputs.device.type != "cuda":
        raise Unavailable("needs a GPU")
    if implementation == LIGER_CUTE_KERNEL:
        require("cutlass", "nvidia-cutlass-dsl")
    from liger_kernel.functional import fused_linear_jsd

    tensors = (*inputs, inputs.student_weight.detach())
    return lambda: fused_linear_jsd(*tensors, jsd_beta=divergence.alpha, impl=implementation)


def _orda(inputs: CaseInputs, divergence: Divergence) -> Loss:
    return _peer(inputs, divergence, name="orda-kernel", backend="triton" if inputs.device.type == "cuda" else "torch")


def _flash_linear_attention(inputs: CaseInputs, divergence: Divergence) -> Loss:
    loss = _peer(inputs, divergence, name="flash-linear-attention", forward=True)
    if inputs.device.type != "cuda":
        raise Unavailable("needs a GPU")
    return loss


# Ours stand out in a picture; the others are told apart by hue and marker.
SDCORE = Contender("sdcore", _sdcore, "", "#0b6e99", "o")
SDCORE_RECOMPUTE = Contender("sdcore, recompute", partial(_sdcore, recompute=True), "", "#6bb7d6", "D")
SDCORE_TOLERANT = Contender(
    "sdcore, to 0.4 %", partial(_sdcore, gradient_tolerance=TOLERANCE), "", "#4bb3a0", "H", tolerance=TOLERANCE
)
PLAIN = Contender("plain torch", _plain, "naive", "#8c8c8c", "X")
PLAIN_LOW_PRECISION = Contender("plain torch, no upcast", partial(_plain, upcast=False), "naive", "#4d4d4d", "d")
COMPILED = Contender("torch.compile", _compiled, "compile", "#8a7fb5", "v", compiled=True)
TORCH = Contender("torch linear_cross_entropy", _torch, "torch", "#5b5b3a", "h")
TRL = Contender("TRL chunked", partial(_peer, name="TRL chunked"), "trl", "#c8443c", "P")
LIGER = Contender("Liger chunked", _liger, "liger", "#e08a1e", "s", compiled=True)
_triton, _cute = (partial(_liger_fused, implementation=name) for name in (LIGER_TRITON_KERNEL, LIGER_CUTE_KERNEL))
LIGER_TRITON = Contender("Liger FusedLinearJSD", _triton, "liger", "#b8621b", "^")
LIGER_CUTE = Contender("Liger FusedLinearJSD, CuTe", _cute, "liger", "#8a4a10", "<")
ORDA = Contender("orda-kernel", _orda, "orda", "#7a9a3a", "*")
FLA = Contender("flash-linear-attention", _flash_linear_attention, "fla", "#a0527a", "p")
OURS = (SDCORE, SDCORE_TOLERANT, SDCORE_RECOMPUTE)
CONTENDERS = (*OURS, PLAIN, COMPILED, TORCH, TRL, LIGER, LIGER_TRITON, LIGER_CUTE, ORDA, FLA)


def at_workspace(megabytes: int) -> Contender:
    """Returns ours with a workspace of so many MiB."""
    return Contender(f"{SDCORE.name}, {megabytes} MB", partial(_sdcore, workspace_mb=megabytes))


def wanted(contender: Contender, peers: Sequence[str] | None) -> bool:
    """True if a choice of peers has it; ours are in every choice."""
    return peers is None or not contender.peer or contender.peer in peers


def setting(contender: Contender, inputs: CaseInputs) -> str:
    """Says what was tuned, for the table."""
    if contender.name == LIGER.name:
        chunk_size = _best_chunks.get((inputs.shape, inputs.student_hidden.dtype, inputs.device))
        return "" if chunk_size is None else f"chunk {chunk_size}"
    if contender.name == SDCORE.name and inputs.device.type == "cuda":
        from sdkernels.driver.call import workspace_bytes_for
        from sdkernels.tile.tiling import MIB

        return f"workspace {workspace_bytes_for(None, inputs.student_weight) / MIB:.0f} MB"
    return ""


def floor_name(inputs: CaseInputs) -> str:
    """Names the row of `bare_matmuls`, before its dtype."""
    return FLOOR if inputs.student_weight.requires_grad else FROZEN_FLOOR


def bare_matmuls(inputs: CaseInputs, dtype: str) -> Callable[[], None]:
    """Makes the floor: two projections, the gradients of the hidden states and, if it is trained, of the head.

    All go into outputs that are there before.
    """
    frozen = not inputs.student_weight.requires_grad
    hidden, weight, teacher_hidden = (tensor.detach().to(DTYPES[dtype]) for tensor in inputs)
    student_logits = hidden.new_empty(len(hidden), len(weight))
    teacher_logits = torch.empty_like(student_logits)
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.T, out=student_logits)
        torch.mm(teacher_hidden, weight.T, out=teacher_logits)
        torch.mm(student_logits, weight, out=hidden_gradient)
        if not frozen:
            torch.mm(student_logits.T, hidden, out=weight_gradient)

    return products
