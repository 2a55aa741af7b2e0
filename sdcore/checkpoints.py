"""Checkpoints that are whole: which one to go on from, and what happens when one cannot be written.

    with writing(folder, main_process=True): ...     # a full disk: the folder goes, and the error says what is left
    folder = to_resume(output_dir, True)             # the last whole one; a torn one is passed over

What differs from the obvious: `transformers.trainer_utils.get_last_checkpoint` takes the folder with the highest
number, also one that a killed process was still writing. The trainer writes `trainer_state.json` last, so a folder in
which that can be read is whole, provided that what is not transformers' is written before it.

Not covered: checkpoints on several nodes that share no disk.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError

from .errors import SdcoreError

STATE: Final = "trainer_state.json"  # transformers', written last
OWN_STATE: Final = "sdcore.json"
_NUMBERED: Final = re.compile(r"checkpoint-(\d+)$")
# What torch.save says, as a RuntimeError, when a file cannot be written.
_UNWRITTEN: Final = re.compile(r"inline_container|PytorchStreamWriter|iostream|File too large|No space")

logger = logging.getLogger(__name__)


class CheckpointError(SdcoreError, OSError):
    """A checkpoint that could not be written, or that cannot be gone on from."""


def whole(folder: Path) -> bool:
    """Whether everything was written."""
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
        json.loads((folder / OWN_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All of them, whole or not, by step."""
    found = [
        (int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := _NUMBERED.search(path.name))
    ]
    return [path for _, path in sorted(found) if path.is_dir()]


def to_resume(output_dir: str | Path, asked: str | Path | bool) -> Path:
    """The folder to go on from; `asked` True is the last whole one. Raises `CheckpointError` where there is none."""
    if asked is True:
        torn: list[str] = []
        for folder in reversed(checkpoints(output_dir)):
            if whole(folder):
                if torn:
                    logger.warning("passed over %s, which was not written to its end", ", ".join(torn))
                return folder
            torn.append(str(folder))
        raise CheckpointError(
            f"resume_from_checkpoint must find a checkpoint in {output_dir}, got "
            + (f"only torn ones: {', '.join(torn)}" if torn else "none there")
        )
    folder = Path(str(asked))
    if not whole(folder):
        raise CheckpointError(
            f"resume_from_checkpoint must be a whole checkpoint of this trainer, got {folder}, which "
            + (f"lacks {STATE} or {OWN_STATE}" if folder.is_dir() else "is not there")
        )
    return folder


@contextmanager
def writing(folder: Path, *, main_process: bool) -> Iterator[None]:
    """Around all that writes a checkpoint. Raises `CheckpointError` where it could not be written, and removes it."""
    if main_process:
        # A torn one, or one of an earlier run, must not look whole because of what it had.
        (folder / STATE).unlink(missing_ok=True)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _UNWRITTEN.search(str(error)):
            raise
        if main_process:
            shutil.rmtree(folder, ignore_errors=True)
        left = [path for path in checkpoints(folder.parent) if whole(path)]
        usable = f"the last whole one is {left[-1]}" if left else "there is no earlier one"
        raise CheckpointError(f"could not write {folder}: {error}; it was removed, and {usable}") from error


def write_state(folder: Path, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWN_STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / OWN_STATE).read_text(encoding="utf-8"))


__all__ = ["CheckpointError", "checkpoints", "read_state", "to_resume", "whole", "write_state", "writing"]
