"""Self-distillation of language models: distil what a model does with extra context into the model without it.

`SelfDistillationTrainer` is the whole of it, `distill_step` one training step, `prefix` what that stands on; `presets`
are the methods, `contexts`, `teachers` and `losses` their parts; `patch` and `integrations` bring them into
other people's training code.

Importing this package imports neither torch nor transformers, so that `python -m sdcore --help` answers at once.
The fused kernels are a package of their own, `sdkernels`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .integrations.transformers import patch
    from .step import StepOutput, distill_step, imitate_step
    from .training.config import SelfDistillationConfig
    from .training.trainer import SelfDistillationTrainer

__all__ = ["SelfDistillationConfig", "SelfDistillationTrainer", "StepOutput", "distill_step", "imitate_step", "patch"]

_MODULES = {
    "SelfDistillationConfig": "training.config",
    "SelfDistillationTrainer": "training.trainer",
    "patch": "integrations.transformers",
}

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(f".{_MODULES.get(name, 'step')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
