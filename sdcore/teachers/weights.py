"""Says whose weights the teacher has: the student's own, another module's, or the student's without its adapter.

A teacher knows no tokens. It says which module to run, and, as `shares_weights`, the one thing that the passes must
know: whether its states of a prompt are the student's, so that they need not be computed again. Where weights differ
they never are, however little: with LoRA, mixing them is wrong by more than 1 in the logits.

Every teacher here is also a `StatefulTeacher`, so that a trainer need not know which one it has. Those that change with
the student are in `ema`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import ArgumentError, UnsupportedModelError


class Teacher(Protocol):
    """Is one set of weights."""

    @property
    def shares_weights(self) -> bool:
        """True where they are the student's, as they are."""

    def weights(self, student: nn.Module) -> Any:
        """Returns a context manager that gives the module to run; its head is read inside too."""


class StatefulTeacher(Protocol):
    """Has what a trainer calls on a teacher, also on one that does not change.

    Here each does nothing, for the teachers that the student and its checkpoint determine.
    """

    def update(self, student: nn.Module, step: int) -> None:
        """Is to be called after each optimizer step, of which there have been `step`."""
        return

    def save(self, directory: Path) -> None:
        """Writes into a checkpoint's folder what `load` needs. To be called on every rank."""
        return

    def load(self, directory: Path) -> None:
        """Becomes what it was at `save`. Raises `ArgumentError` where the folder's teacher is another one."""
        return


def checked_teacher(name: str, teacher: Any) -> Teacher:
    """Returns the teacher. Raises `ArgumentError` for a module, a name, a class, and for two sets of weights."""
    if isinstance(teacher, type) or not hasattr(teacher, "weights"):
        raise ArgumentError(
            f"{name} must be a teacher such as Live(), AdapterOff() or Frozen(another model), got {teacher!r:.80}"
        )
    return cast(Teacher, teacher)


@dataclass(frozen=True)
class Live(StatefulTeacher):
    """Is the student itself, as it is at this step (on-policy context distillation, SDFT without EMA)."""

    shares_weights = True

    @contextmanager
    def weights(self, student: nn.Module) -> Iterator[nn.Module]:
        yield student


@dataclass(frozen=True)
class Frozen(StatefulTeacher):
    """Is another module: a copy from before training, or another model.

    Of its weights only a fingerprint is saved, by which `load` refuses a run that goes on with another teacher. Of the
    student itself as it was, `Snapshot` needs no second module.
    """

    model: nn.Module

    shares_weights = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ArgumentError(f"model must be a module, got {type(self.model).__name__}")

    @contextmanager
    def weights(self, student: nn.Module) -> Iterator[nn.Module]:
        if self.model is student:
            raise ArgumentError("model must be another module than the student: Live() is the student's own weights")
        yield self.model

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        record = {"teacher": "Frozen", "fingerprint": fingerprint(self.model)}
        (directory / FINGERPRINT_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")

    def load(self, directory: Path) -> None:
        path = directory / FINGERPRINT_FILE
        saved = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
        if (own := fingerprint(self.model)) != saved:
            raise ArgumentError(
                f"model must be the teacher that {path} was saved with, of fingerprint {saved[:12]}, got {own[:12]}"
            )


@dataclass(frozen=True)
class AdapterOff(StatefulTeacher):
    """Is the student without its PEFT adapter: the base model that LoRA training started from, at no memory.

    Raises `UnsupportedModelError` for a student without an adapter, and for one whose other weights are not that base
    model's: an `init_lora_weights` such as "pissa" takes out of them what the adapter starts with, and a bias or an
    embedding that is trained beside the adapter is not switched off with it. `Snapshot` is right for all of these.
    """

    shares_weights = False

    @contextmanager
    def weights(self, student: nn.Module) -> Iterator[nn.Module]:
        wrapper = peft_model(student)
        if wrapper is None:
            raise UnsupportedModelError(f"{type(student).__name__} has no adapter to switch off: it is no PeftModel")
        if (reason := changed_base(wrapper)) is not None:
            raise UnsupportedModelError(
                f"{type(student).__name__} without its adapter is not the model that training started from, because "
                f'{reason}: use teacher="frozen", which is Snapshot(student), or Frozen(base model)'
            )
        # Switching an adapter on again makes it trainable, which it may not have been.
        trainable = [(weight, weight.requires_grad) for weight in wrapper.parameters()]
        try:
            with wrapper.disable_adapter():
                yield student
        finally:
            for weight, trained in trainable:
                weight.requires_grad_(trained)


# What `init_lora_weights` may say without taking anything out of the weights that the adapter is on.
KEEPS_BASE = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})


def peft_model(student: nn.Module) -> Any:
    """Returns the `PeftModel` in a student's wrappers; None where there is none."""
    wrapper: Any = student
    while wrapper is not None and not hasattr(wrapper, "disable_adapter"):
        wrapper = getattr(wrapper, "module", getattr(wrapper, "_orig_mod", None))
    return wrapper


def changed_base(student: nn.Module) -> str | None:
    """Says why a student without its adapter is not the model that training starts from; None where it is."""
    if (wrapper := peft_model(student)) is None:
        return None
    for name, config in wrapper.peft_config.items():
        init = getattr(config, "init_lora_weights", True)
        if str(init).lower() not in KEEPS_BASE:
            return f"adapter {name!r} has init_lora_weights={init!r}, which changes the weights that it is on"
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    marks = (*PEFT_TYPE_TO_PREFIX_MAPPING.values(), "adaption_", "modules_to_save.", "token_adapter.")
    trained = (name for name, weight in wrapper.base_model.named_parameters() if weight.requires_grad)
    beside = next((name for name in trained if not any(mark in name for mark in marks)), None)
    return None if beside is None else f"{beside} is trained beside the adapter"


@dataclass(frozen=True)
class TrustRegion:
    """Stands between a reference and the student: logits `(1 - share)·reference + share·student`.

    Both see the teacher's prompt. SDPO's trust-region teacher (arXiv:2601.20802). `reference` is any teacher but a live
    one: `Frozen`, `AdapterOff`, `Snapshot`, `EMA`, `PeriodicSync`; its state is this one's. `share` is in [0, 1].
    """

    reference: Teacher
    share: float = 0.5

    def __post_init__(self) -> None:
        if checked_teacher("reference", self.reference).shares_weights:
            raise ArgumentError(
                "reference must be a teacher with weights of its own, such as Frozen(...) or AdapterOff(), got "
                f"{type(self.reference).__name__}"
            )
        if not 0.0 <= self.share <= 1.0:
            raise ArgumentError(f"share must be in [0, 1], got {self.share}")

    def update(self, student: nn.Module, step: int) -> None:
        self._state.update(student, step)

    def save(self, directory: Path) -> None:
        self._state.save(directory)

    def load(self, directory: Path) -> None:
        self._state.load(directory)

    @property
    def _state(self) -> StatefulTeacher:
        """Returns the reference; where that is a user's own without state, a teacher that keeps nothing."""
        return self.reference if hasattr(self.reference, "update") else Live()  # type: ignore[return-value]


FINGERPRINT_FILE = "teacher.json"
# Elements of each tensor that a fingerprint is made of: it tells models apart, and changes with any training.
SAMPLED = 64


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Hashes every weight's name and shape and some of its elements; this rank's part of sharded ones."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        own: Tensor = weight.to_local() if isinstance(weight, DTensor) else weight
        flat = own.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLED)].cpu().double()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()
