"""Makes a trainer of TRL that is already constructed the fused one, where TRL is installed.

It gets another class, and what that class's constructor would have set (`FusedTrainer.adopt`). A fused class names the
methods of TRL's that it puts its own in place of (`OVERRIDES`) and those that are not called any more (`REPLACES`): a
subclass of TRL's trainer that overrides one of them would be overridden in turn, and is refused.

What differs from the obvious: nothing here imports torch or TRL before somebody asks for a trainer, because
`sdcore.integrations.trl` imports this.

Not covered: trainers that have trained already.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# TRL's class → module here, and class in it.
PATCHABLE = {
    "SDPOTrainer": ("sdpo", "FusedSDPOTrainer"),
    "SDFTTrainer": ("sdft", "FusedSDFTTrainer"),
    "GKDTrainer": ("gkd", "FusedGKDTrainer"),
    "DistillationTrainer": ("distillation", "FusedDistillationTrainer"),
}


def require_trl() -> None:
    """Raises `ImportError`, which says what to install, where TRL is missing; warns of a version that is not tested."""
    if importlib.util.find_spec("trl") is None:
        raise ImportError('sdcore.integrations.trl needs TRL: pip install "sdcore[trl]"')
    _warn_of_version()


@cache
def _warn_of_version() -> None:
    from .fused import TESTED

    try:
        installed = version("trl")
    except PackageNotFoundError:  # on the path, not installed
        installed = "of an unknown version"
    if not installed.startswith(f"{TESTED}."):
        warnings.warn(
            f"trl {installed} is not tested with sdcore.integrations.trl, which is for trl {TESTED}.*: compare a step "
            "with TRL's own before you rely on it",
            stacklevel=3,
        )


def patch(trainer: Any, **options: Any) -> Any:
    """Makes a trainer of TRL that is already constructed the fused one; returns it.

    `options` are those of `FusedOptions`, of which GKD and Distillation take some. To be called before training. A
    subclass keeps what it adds. Raises `TypeError` for anything but one of the four trainers, and for a subclass that
    overrides a method which is replaced here, by its name; `ArgumentError` and `UnsupportedModelError` as the fused
    class's constructor does, and then the trainer is as it was.
    """
    require_trl()
    from .fused import FusedOptions

    own = type(trainer)
    from_trl = (kind for kind in own.__mro__ if kind.__module__.startswith("trl."))
    theirs = next((kind for kind in from_trl if kind.__name__ in PATCHABLE), None)
    if theirs is None:
        raise TypeError(f"trainer must be one of TRL's {', '.join(PATCHABLE)}, got {own.__module__}.{own.__name__}")
    module, name = PATCHABLE[theirs.__name__]
    fused: Any = getattr(import_module(f".{module}", __package__), name)
    if not issubclass(fused, theirs):
        raise TypeError(f"trainer must be a {fused.__mro__[-1].__name__}, got {theirs.__module__}.{theirs.__name__}")
    if issubclass(own, fused):
        raise TypeError(f"trainer is a {name} already")
    fused.check_trl()
    _refuse_overridden(own, theirs, (*fused.OVERRIDES, *fused.REPLACES))
    chosen = FusedOptions(**options)
    before = dict(vars(trainer))
    trainer.__class__ = fused if own is theirs else type(f"Fused{own.__name__}", (fused, own), {})
    try:
        trainer.adopt(chosen)
    except BaseException:
        trainer.__class__ = own
        vars(trainer).clear()
        vars(trainer).update(before)
        raise
    return trainer


def _refuse_overridden(own: type, theirs: type, names: tuple[str, ...]) -> None:
    """Raises `TypeError` for methods of a subclass `own` of TRL's class `theirs` that would be lost."""
    below = own.__mro__[: own.__mro__.index(theirs)]
    lost = sorted({name for kind in below for name in names if name in vars(kind)})
    if lost:
        raise TypeError(
            f"trainer's class {own.__name__} overrides {', '.join(lost)}, which patch would replace: derive it from "
            "the fused class, or leave these to TRL's"
        )
