"""Self-distillation of language models: distil what a model does with extra context into the model without it.

`distill_step` is a training step, `prefix` what it stands on; `losses` and `teachers` are its parts.

Importing this package imports neither torch nor transformers, so that `python -m sdcore --help` answers at once.
The fused kernels are a package of their own, `sdkernels`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .step import StepOutput, distill_step, imitate_step

__all__ = ["StepOutput", "distill_step", "imitate_step"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in __all__:
        from . import step

        return getattr(step, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
