"""How a constructed trainer becomes the fused one: another class, and what that one's constructor would have set.

A fused class is `class FusedX(Mixin, X)`. It has `adopt(fused)`, which sets an X up, and names the methods of X that it
puts its own in place of (`OVERRIDES`) and those that are not called any more (`REPLACES`); or `CALLS`, of everything
that it overrides or calls. A subclass of X that overrides one of them would be overridden in turn, and is refused.

Not covered: trainers that have trained already.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from .fused import FusedOptions

# TRL's class → module here, and class in it.
PATCHABLE = {
    "SDPOTrainer": ("sdpo", "FusedSDPOTrainer"),
    "SDFTTrainer": ("sdft", "FusedSDFTTrainer"),
    "GKDTrainer": ("gkd", "FusedGKDTrainer"),
    "DistillationTrainer": ("distillation", "FusedDistillationTrainer"),
}


def patched(trainer: Any, options: Mapping[str, Any]) -> Any:
    """See `sdcore.integrations.trl.patch`."""
    own = type(trainer)
    theirs = next((one for one in own.__mro__ if one.__name__ in PATCHABLE and one.__module__.startswith("trl.")), None)
    if theirs is None:
        raise TypeError(f"trainer must be one of TRL's {', '.join(PATCHABLE)}, got {own.__module__}.{own.__name__}")
    module, name = PATCHABLE[theirs.__name__]
    fused: Any = getattr(import_module(f".{module}", __package__), name)
    if not issubclass(fused, theirs):
        raise TypeError(f"trainer must be a {fused.__mro__[-1].__name__}, got {theirs.__module__}.{theirs.__name__}")
    if issubclass(own, fused):
        raise TypeError(f"trainer is a {name} already")
    fused.check_trl()
    names = (*fused.OVERRIDES, *fused.REPLACES) if hasattr(fused, "OVERRIDES") else fused.CALLS
    refuse_overridden(own, theirs, names)
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


def refuse_overridden(own: type, theirs: type, names: tuple[str, ...]) -> None:
    """Raises `TypeError` for methods of a subclass `own` of TRL's class `theirs` that would be lost."""
    below = own.__mro__[: own.__mro__.index(theirs)]
    lost = sorted({name for one in below for name in names if name in vars(one)})
    if lost:
        raise TypeError(
            f"trainer's class {own.__name__} overrides {', '.join(lost)}, which patch would replace: derive it from "
            "the fused class, or leave these to TRL's"
        )


__all__ = ["PATCHABLE", "patched", "refuse_overridden"]
