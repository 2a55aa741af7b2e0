"""Distils what a language model does with extra context into the model without it: self-distillation.

`SelfDistillationTrainer` is the whole of it, `distill_step` one training step, `prefix` what that stands on; `presets`
are the methods, `contexts`, `teachers` and `losses` their parts; `patch` and `integrations` bring them into
other people's training code.

Importing this package imports neither torch nor transformers, so that `python -m sdcore --help` answers at once.
The fused kernels are a package of their own, `sdkernels`. Modules that have moved can be imported from where they were,
with a warning.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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
# Where a module was → where it is.
_MOVED = {
    "config": "training.config",
    "dry_run": "training.dry_run",
    "evaluation": "training.evaluation",
    "heads": "models.heads",
    "solve": "training.solve",
    "targets": "losses",
    "trainer": "training.trainer",
}

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(f".{_MODULES.get(name, 'step')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Moved(MetaPathFinder, Loader):
    """Finds the modules of `_MOVED`, and what is inside of them, under their old names."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, inside = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __name__ and inside.split(".")[0] in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, _, rest = module.__name__.removeprefix(f"{__name__}.").partition(".")
        new = ".".join([__name__, _MOVED[old], *([rest] if rest else [])])
        warnings.warn(f"{module.__name__} is {new} now", DeprecationWarning, stacklevel=2)
        # The import takes what stands here in place of the module that it made, so there are no second copies.
        sys.modules[module.__name__] = import_module(new)


sys.meta_path.insert(0, _Moved())
