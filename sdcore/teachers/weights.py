"""Whose weights the teacher has: the student's own, another module's, or the student's without its adapter.

A teacher knows no tokens. It says which module to run, and, as `shares_weights`, the one thing that the passes must
know: whether its states of a prompt are the student's, so that they need not be computed again. Where weights differ
they never are, however little: with LoRA, mixing them is wrong by more than 1 in the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..errors import ArgumentError, UnsupportedModelError


class Teacher(Protocol):
    """One set of weights."""

    @property
    def shares_weights(self) -> bool:
        """Whether they are the student's, as they are."""

    def weights(self, student: nn.Module) -> Any:
        """A context manager that gives the module to run; its head is read inside too."""


@dataclass(frozen=True)
class Live:
    """The student itself, as it is at this step (on-policy context distillation, SDFT without EMA)."""

    shares_weights = True

    @contextmanager
    def weights(self, student: nn.Module) -> Iterator[nn.Module]:
        yield student


@dataclass(frozen=True)
class Frozen:
    """Another module: a copy from before training, an average of the student's weights, another model."""

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


@dataclass(frozen=True)
class AdapterOff:
    """The student without its PEFT adapter: the base model that LoRA training started from, at no memory."""

    shares_weights = False

    @contextmanager
    def weights(self, student: nn.Module) -> Iterator[nn.Module]:
        wrapper: Any = student
        while wrapper is not None and not hasattr(wrapper, "disable_adapter"):
            wrapper = getattr(wrapper, "module", getattr(wrapper, "_orig_mod", None))
        if wrapper is None:
            raise UnsupportedModelError(f"{type(student).__name__} has no adapter to switch off: it is no PeftModel")
        # Switching an adapter on again makes it trainable, which it may not have been.
        trainable = [(weight, weight.requires_grad) for weight in wrapper.parameters()]
        try:
            with wrapper.disable_adapter():
                yield student
        finally:
            for weight, trained in trainable:
                weight.requires_grad_(trained)


@dataclass(frozen=True)
class TrustRegion:
    """Between a reference and the student: logits `(1 - share)·reference + share·student`.

    Both see the teacher's prompt. SDPO's trust-region teacher (arXiv:2601.20802). `share` is in [0, 1].
    """

    reference: Frozen | AdapterOff
    share: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.reference, Frozen | AdapterOff):
            raise ArgumentError(f"reference must be Frozen(...) or AdapterOff(), got {type(self.reference).__name__}")
        if not 0.0 <= self.share <= 1.0:
            raise ArgumentError(f"share must be in [0, 1], got {self.share}")


__all__ = ["AdapterOff", "Frozen", "Live", "Teacher", "TrustRegion"]
