"""Whether the installed TRL is one that these trainers know: present, tested, and with the methods that are overridden.

TRL's trainers of self-distillation are experimental, and change without notice. A version that was not tested is warned
about once; one that lacks a method is refused by that method's name, since overriding what nobody calls does nothing.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

TESTED = "1.16"


def require_trl() -> None:
    """Raises `ImportError`, which says what to install, where TRL is missing; warns of a version that is not tested."""
    if importlib.util.find_spec("trl") is None:
        raise ImportError('sdcore.integrations.trl needs TRL: pip install "sdcore[trl]"')
    _warn_of_version()


@cache
def _warn_of_version() -> None:
    try:
        found = version("trl")
    except PackageNotFoundError:  # on the path, not installed
        found = "of an unknown version"
    if not found.startswith(f"{TESTED}."):
        warnings.warn(
            f"trl {found} is not tested with sdcore.integrations.trl, which is for trl {TESTED}.*: compare a step with "
            "TRL's own before you rely on it",
            stacklevel=3,
        )


def require_methods(trainer: type, names: Iterable[str]) -> None:
    """Raises `ImportError` where a trainer's class lacks one of these."""
    missing = [name for name in names if not hasattr(trainer, name)]
    if missing:
        raise ImportError(
            f"{trainer.__module__}.{trainer.__name__} of the installed TRL has no {', '.join(missing)}, which "
            f"sdcore.integrations.trl overrides or calls; it is for trl {TESTED}.*"
        )


__all__ = ["TESTED", "require_methods", "require_trl"]
