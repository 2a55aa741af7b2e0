"""Says what a step is like: its metrics, what is measured beside it now and then, and the log's lines of both.

    probed = watch.probes(model, batch, step)         # before the update, on the first batch of a step
    values = watch.metrics(batch, out)                # after it

A probe costs passes of its own and is due every so many steps, the first one among them. All ranks take part.

`Hooks` tells the trainer where transformers' loop is. A `Tally` makes one line of the log of what several batches,
steps and ranks say:

    tally.add(values); ...; line = tally.drain()

A count is added up over everything since the last line. The step's loss is added up over the batches of a step, since
each is its part of it, and averaged over ranks and steps. Everything else is a mean over those that have it; batches
are not weighed by their size, and batches of a step are of equal size but for the last.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from accelerate.utils import gather_object  # type: ignore[import-untyped, unused-ignore]
from torch import nn
from transformers import TrainerCallback

from ..contexts import ContextBuilder
from ..contexts.teacher_prompts import COUNTS
from ..diagnostics import drift, leak, metrics, overlap
from ..presets.method import Method
from ..step import StepOutput
from ..teachers import Snapshot
from .config import SelfDistillationConfig
from .turns import first_turns
from .update import Batch

SUMS: Final = frozenset({*COUNTS, "loss/active_tokens"})
# Parts of the step's loss: what the batches say adds up.
LOSSES: Final = frozenset({"self_distillation/distillation_loss", "loss/distillation", "loss/policy"})
WITHOUT_LOSS: Final = (
    "no completion since the last line of the log has a loss, so nothing is learned; context/missing and "
    "completions/truncated_masked say why, or skip_first_tokens is more than they have"
)
OVERLAP_TOKENS = 20  # of the overlap probe, where the method has no top-k of its own


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """Measures the batches of a run."""

    method: Method
    args: SelfDistillationConfig
    tokenizer: Any
    context: ContextBuilder
    teacher: Any
    origin: Any  # the model before training, for the drift; None: it is not measured

    def metrics(self, batch: Batch, out: StepOutput) -> dict[str, float]:
        """Returns `diagnostics.metrics`; the active fraction is of all tokens, also those that were not computed."""
        values = metrics(
            batch.groups,
            batch.conditioned,
            out,
            plan=batch.plan,
            token_weights=batch.weights(self.method),
            success_threshold=self.method.success_threshold,
        )
        return values | {"loss/active_fraction": values["loss/active_tokens"] / max(1, batch.tokens)}

    def probes(self, model: nn.Module, batch: Batch, step: int) -> dict[str, float]:
        """Runs the probes that are due after `step` optimizer steps, on the first turns of trajectories."""
        values: dict[str, float] = {}
        method, args = self.method, self.args
        groups, conditioned = first_turns(batch.groups, batch.conditioned)
        strategy: Any = "auto" if args.strategy == "two_phase" else args.strategy
        taught = {"teacher": self.teacher, "temperature": method.temperature, "strategy": strategy}
        if method.has_teacher and due(args.leak_probe_every, step):
            values |= leak(model, groups, self.context, self.tokenizer, alpha=method.alpha, **taught)
        if method.has_teacher and due(args.overlap_probe_every, step):
            k, of = method.topk or OVERLAP_TOKENS, method.topk_of
            values |= overlap(model, groups, conditioned, k=k, of=of, **taught)
        if self.origin is not None and due(args.drift_probe_every, step):
            values |= drift(model, groups, self.origin, strategy=strategy)
        return values


def due(every: int, step: int) -> bool:
    """True every so many steps, from step 0 on; never for 0."""
    return every > 0 and step % every == 0


def origin_of(model: nn.Module, args: SelfDistillationConfig, teacher: Any, reference: Any) -> Any:
    """Returns the model before training: a frozen teacher where there is one, else a copy of what is trained.

    Not an adapter's base, which is another model where the adapter has been trained before.
    """
    if args.drift_probe_every == 0:
        return None
    for candidate in (reference, teacher, getattr(teacher, "reference", None)):
        if type(candidate) is Snapshot:
            return candidate
    return Snapshot(model, device=args.teacher_device)


class Tally:
    """Adds up what is said between two lines of the log."""

    def __init__(self) -> None:
        self._counts = set(SUMS)
        self._totals: dict[str, tuple[float, int]] = {}  # sum, number
        self._steps = 0

    def count(self, values: Mapping[str, int]) -> None:
        """Adds numbers that are summed in a line and not averaged, whatever they are called."""
        self._counts |= set(values)
        self.add(values)

    def add(self, values: Mapping[str, float]) -> None:
        """Adds what a batch says."""
        for name, value in values.items():
            total, number = self._totals.get(name, (0.0, 0))
            self._totals[name] = total + float(value), number + 1

    def step(self) -> None:
        """Notes that a step is over."""
        self._steps += 1

    def drain(self) -> dict[str, float]:
        """Returns one line of all ranks, which all must call this; empty afterwards."""
        mine: list[Any] = [(self._totals, sorted(self._counts), self._steps)]
        ranks = gather_object(mine)
        self._totals, self._steps = {}, 0
        counts = {name for _, names, _ in ranks for name in names}
        steps = max(1, max(number for _, _, number in ranks))
        line: dict[str, float] = {}
        for name in dict.fromkeys(name for totals, _, _ in ranks for name in totals):
            parts = [totals[name] for totals, _, _ in ranks if name in totals]
            total = math.fsum(part for part, _ in parts) if all(math.isfinite(p) for p, _ in parts) else math.nan
            if name in counts:
                line[name] = total
            elif name in LOSSES:
                line[name] = total / (len(ranks) * steps)
            else:
                line[name] = total / sum(number for _, number in parts)
        if line.get("completions/count") == line.get("completions/without_loss", 0) > 0:
            warnings.warn(WITHOUT_LOSS, stacklevel=2)
        return line


class Hooks(TrainerCallback):
    """Passes on what Trainer's loop tells its callbacks and the trainer has to know."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Its epoch is not told by accelerate on resuming with several processes.
        if (order := self._trainer.order) is not None:
            order.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.after_step()
