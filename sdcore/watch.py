"""What a step says about itself, and what is measured beside it now and then.

    probed = watch.probes(model, batch, step)         # before the update, on the first batch of a step
    values = watch.metrics(batch, out)                # after it

A probe costs passes of its own and is due every so many steps, the first one among them. All ranks take part.

Not covered: how the values of batches, steps and ranks become one line of the log (`sdcore.tally`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import SelfDistillationConfig
from .contexts import ContextBuilder
from .diagnostics import drift, leak, metrics, overlap
from .presets.methods import Method
from .step import StepOutput
from .teachers import AdapterOff, Snapshot
from .update import Batch

OVERLAP_TOKENS = 20  # of the overlap probe, where the method has no top-k of its own


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """What is needed for it."""

    method: Method
    args: SelfDistillationConfig
    tokenizer: Any
    context: ContextBuilder
    teacher: Any
    origin: Any  # the model before training, for the drift; None: it is not measured

    def metrics(self, batch: Batch, out: StepOutput) -> dict[str, float]:
        """See `diagnostics.metrics`; the active fraction is of all tokens, also those that were not computed."""
        found = metrics(
            batch.groups,
            batch.conditioned,
            out,
            plan=batch.plan,
            token_weights=batch.weights(self.method),
            success_threshold=self.method.success_threshold,
        )
        return found | {"loss/active_fraction": found["loss/active_tokens"] / max(1, batch.tokens)}

    def probes(self, model: nn.Module, batch: Batch, step: int) -> dict[str, float]:
        """Those that are due after `step` optimizer steps."""
        found: dict[str, float] = {}
        method, args = self.method, self.args
        strategy: Any = "auto" if args.strategy == "two_phase" else args.strategy
        taught = {"teacher": self.teacher, "temperature": method.temperature, "strategy": strategy}
        if method.has_teacher and due(args.leak_probe_every, step):
            found |= leak(model, batch.groups, self.context, self.tokenizer, alpha=method.alpha, **taught)
        if method.has_teacher and due(args.overlap_probe_every, step):
            k, of = method.topk or OVERLAP_TOKENS, method.topk_of
            found |= overlap(model, batch.groups, batch.conditioned, k=k, of=of, **taught)
        if self.origin is not None and due(args.drift_probe_every, step):
            found |= drift(model, batch.groups, self.origin, strategy=strategy)
        return found


def due(every: int, step: int) -> bool:
    """Every so many steps, from step 0 on; never for 0."""
    return every > 0 and step % every == 0


def origin_of(model: nn.Module, args: SelfDistillationConfig, teacher: Any, reference: Any) -> Any:
    """The model before training: the frozen teacher or the adapter's base where there is one, else a copy of it."""
    if args.drift_probe_every == 0:
        return None
    for one in (reference, teacher, getattr(teacher, "reference", None)):
        if type(one) in (Snapshot, AdapterOff):
            return one
    return AdapterOff() if hasattr(model, "disable_adapter") else Snapshot(model, device=args.teacher_device)


__all__ = ["Watch", "due", "origin_of"]
