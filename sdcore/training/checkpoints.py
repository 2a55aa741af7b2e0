"""Keeps checkpoints whole: what they hold of ours, which one to go on from, and what if one cannot be written.

    own = OwnState.of(args, teacher=teacher, reference=reference)
    with writing(folder, main_process=True):         # a full disk: the folder goes, and the error says what is left
        own.save(folder, step, seen={"samples": 8, "tokens": 90}, window=groups)
    folder = to_resume(output_dir, True)             # the last whole one; a torn one is passed over
    seen = own.load(folder)
    with saving_whole(plugin):                       # FSDP2: a whole model, also where checkpoints are of shards
        trainer.save_model()

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.fsdp import StateDictType

from ..errors import SdcoreError
from ..rollouts.window import load_rollouts, save_rollouts
from ..types import Example, Group
from .config import SelfDistillationConfig

STATE: Final = "trainer_state.json"  # transformers', written last
OWN_STATE: Final = "sdcore.json"
_NUMBERED: Final = re.compile(r"checkpoint-(\d+)$")
# What torch.save says, as a RuntimeError, when a file cannot be written.
_UNWRITTEN: Final = re.compile(r"inline_container|PytorchStreamWriter|iostream|File too large|No space")

logger = logging.getLogger(__name__)


class CheckpointError(SdcoreError, OSError):
    """Says that a checkpoint could not be written, or cannot be gone on from."""


def whole(folder: Path) -> bool:
    """True where everything was written."""
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
        json.loads((folder / OWN_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns all checkpoints, whole or not, by step."""
    numbered = [
        (int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := _NUMBERED.search(path.name))
    ]
    return [path for _, path in sorted(numbered) if path.is_dir()]


def to_resume(output_dir: str | Path, asked: str | Path | bool) -> Path:
    """Returns the folder to go on from; `asked` True is the last whole one. Raises `CheckpointError` for none."""
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
    """Wraps all that writes a checkpoint. Where it could not be written, removes it and raises `CheckpointError`."""
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


@contextmanager
def saving_whole(plugin: Any) -> Iterator[None]:
    """Sets accelerate's FSDP plugin to state dicts of the whole model, not of its shards, inside; None: no FSDP."""
    if plugin is None:
        yield
        return
    before = plugin.state_dict_type
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = before


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnState:
    """Saves and loads what a checkpoint holds beside transformers' files: counts, teachers, completions in use."""

    args: SelfDistillationConfig
    stateful: Mapping[str, Any]  # folder in a checkpoint → what is saved and loaded there

    @classmethod
    def of(cls, args: SelfDistillationConfig, **parts: Any) -> OwnState:
        """Takes the parts that have a state; what comes under two names is kept under the first."""
        kept: dict[str, Any] = {}
        for name, one in parts.items():
            if hasattr(one, "save") and all(one is not other for other in kept.values()):
                kept[name] = one
        return cls(args=args, stateful=kept)

    def save(self, folder: Path, step: int, *, seen: Mapping[str, int], window: Sequence[Sequence[Group]]) -> None:
        """Writes the state, the completions of `window` if the next step uses them too. All ranks must call it."""
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**seen, **self._batching}, indent=1) + "\n"
            (folder / OWN_STATE).write_text(text, encoding="utf-8")
        for name, one in self.stateful.items():
            one.save(folder / name)
        if step % self.args.num_iterations:
            save_rollouts(self._rollouts(folder), window)

    def load(self, folder: Path) -> dict[str, int]:
        """Puts the states back; returns what was seen."""
        for name, one in self.stateful.items():
            try:
                one.load(folder / name)
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{folder} has no state of the run's {name}: it was written by a run with other settings (teacher, "
                    "or drift_probe_every), or by an earlier version"
                    + (", and drift_probe_every=0 goes on from it" if name == "origin" else "")
                ) from error
        saved = _own_file(folder)
        return {"samples": saved["samples"], "tokens": saved["tokens"]}

    def window(
        self, folder: Path, examples: Sequence[Sequence[Example]], prompt: Callable[[Example], Tensor]
    ) -> list[list[Group]]:
        """Returns the completions in use when the checkpoint was written, with the examples that the data gives again.

        Raises `CheckpointError` where the data or its batches are others.
        """
        saved = _own_file(folder)
        changed = [f"{name}={saved.get(name)}" for name, value in self._batching.items() if saved.get(name) != value]
        rollouts = [] if changed else load_rollouts(self._rollouts(folder))
        if changed or [len(batch) for batch in rollouts] != [len(batch) for batch in examples]:
            raise CheckpointError(
                f"{folder} was written between two uses of its completions: it can only be gone on from with the same "
                f"batches and data{''.join(f', and {change}' for change in changed)}"
            )
        return [
            [
                Group(example=example, prompt_ids=prompt(example), rollouts=rollouts_G)
                for example, rollouts_G in zip(batch, kept, strict=True)
            ]
            for batch, kept in zip(examples, rollouts, strict=True)
        ]

    @property
    def _batching(self) -> dict[str, int]:
        """Returns what a window of completions depends on, which resuming must not change."""
        return {"world_size": self.args.world_size, "num_iterations": self.args.num_iterations}

    def _rollouts(self, folder: Path) -> Path:
        return folder / f"rollouts-{self.args.process_index}.json"


def _own_file(folder: Path) -> dict[str, Any]:
    return json.loads((folder / OWN_STATE).read_text(encoding="utf-8"))
