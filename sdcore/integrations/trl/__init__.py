"""Gives TRL's trainers fused losses: two lines in a script that has a trainer, or another class in its place.

    from sdcore.integrations.trl import patch
    patch(trainer)                                   # before trainer.train(); options are those of `FusedOptions`

    trainer = FusedSDPOTrainer(model, reward_funcs=verify, args=SDPOConfig(...), ..., fused=FusedOptions(...))

Importing this imports neither TRL nor torch; whoever asks for a trainer where TRL is missing is told what to install.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .patching import PATCHABLE, patch, require_trl

if TYPE_CHECKING:
    from .distillation import FusedDistillationTrainer
    from .fused import FusedOptions
    from .gkd import FusedGKDTrainer
    from .sdft import FusedSDFTTrainer
    from .sdpo import FusedSDPOTrainer

__all__ = [
    "FusedDistillationTrainer",
    "FusedGKDTrainer",
    "FusedOptions",
    "FusedSDFTTrainer",
    "FusedSDPOTrainer",
    "patch",
]

_MODULES = {"FusedOptions": "fused"} | {name: module for module, name in PATCHABLE.values()}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_trl()
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
