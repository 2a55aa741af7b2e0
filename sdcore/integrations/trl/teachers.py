"""Builds TRL's teachers from the weights in memory, keeps them in step with the student and in its checkpoints.

| `teacher_model_kind`   | full training            | with an adapter                           |
|------------------------|--------------------------|-------------------------------------------|
| "live"                 | `Live`                   | `Live`                                    |
| "base"                 | `Snapshot`               | `AdapterOff`                              |
| "ema"                  | `EMA`                    | `EMA` of what is trained                  |

and a `TrustRegion` around "base" or "ema" where `FusedOptions(teacher="trust_region")` asks for one.

What differs from the obvious: TRL reads "base" and "ema" from the disk once more, by the model's name, whatever the
student in memory is; starts an adapter's average at zero; and writes neither into a checkpoint. Here all three start
from the student as it was given.

An adapter such as PiSSA's, whose start is taken out of the weights below it, or one beside which other weights are
trained, has no base that switching it off would give: "base" is a `Snapshot` there too.

Not covered: a teacher of another model (`FusedDistillationTrainer` is for those).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ...errors import ArgumentError
from ...teachers import EMA, AdapterOff, Live, Snapshot, Teacher, TrustRegion
from ...teachers.ema import FILE_NAME
from ...teachers.weights import changed_base

FOLDER = "sdcore_teacher"  # of a checkpoint


def build_teacher(
    kind: str,
    student: nn.Module,
    *,
    has_adapter: bool,
    update_rate: float,
    trust_share: float | None = None,
    device: Any = None,
) -> Teacher | TrustRegion:
    """Builds the teacher of one of TRL's kinds; `trust_share` None: no trust region. Raises `ArgumentError`."""
    if kind not in ("live", "base", "ema"):
        raise ArgumentError(f"teacher_model_kind must be 'live', 'base' or 'ema', got {kind!r}")
    teacher: Teacher
    if kind == "live":
        teacher = Live()
    elif kind == "ema":
        teacher = EMA(student, update_rate, device=device)
    else:
        base = has_adapter and changed_base(student) is None
        teacher = AdapterOff() if base else Snapshot(student, device=device)
    if trust_share is None:
        return teacher
    if kind == "live":
        raise ArgumentError(
            "teacher_model_kind must be 'base' or 'ema' for a trust region, whose reference it says, got 'live'"
        )
    return TrustRegion(teacher, trust_share)


class TeacherSync(TrainerCallback):
    """Moves the teacher after every `sync_steps` optimizer steps, where TRL's own callbacks do."""

    def __init__(self, trainer: Any, sync_steps: int) -> None:
        self._trainer, self.sync_steps = trainer, sync_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.sync_steps == 0:
            self._trainer.teacher.update(self._trainer.model_wrapped, state.global_step)


def load_teacher(teacher: Any, checkpoint: Path) -> None:
    """Reads the teacher back as it was when the checkpoint was written, unless the student alone determines it."""
    if not isinstance(teacher.reference if isinstance(teacher, TrustRegion) else teacher, Snapshot):
        return
    if not (checkpoint / FOLDER / FILE_NAME).is_file():
        warnings.warn(
            f"{checkpoint} has no {FOLDER}/{FILE_NAME} (TRL's own trainer writes none): the teacher starts from the "
            "model that the trainer was given",
            stacklevel=2,
        )
        return
    teacher.load(checkpoint / FOLDER)
