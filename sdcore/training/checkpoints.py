"""Keeps checkpoints whole: what they hold of ours, which one to go on from, and what if one cannot be written.

    own = OwnState.of(args, teacher=teacher, reference=reference)
    with writing(folder, main_process=True):         # a full disk: the folder goes, and the error says what is left
        own.save(folder, step, seen={"samples": 8, "tokens": 90}, window=groups, run=run)
    folder = start_of(output_dir, True, run)         # the last whole one; a torn one is passed over
    seen = own.load(folder)
    with saving_whole(plugin):                       # FSDP2: a whole model, also where checkpoints are of shards
        trainer.save_model()

What differs from the obvious: `transformers.trainer_utils.get_last_checkpoint` takes the folder with the highest
number, also one that a killed process was still writing, and begins anew with the optimizer where its file is missing.
It writes `trainer_state.json` last, so a folder in which that can be read was written to its end, provided that what is
not transformers' is written before it; then `seal` notes which files there are and how large, so that one which has
lost some since (to a copy that was cut off, to whoever wanted the space) is known. Nor does it ask whose
checkpoints they are: a new run would leave those of an older one in its folder, and resuming take the older one's for
their higher number. So a folder has the checkpoints of one run, up to the step that it goes on from.

Not covered: checkpoints on several nodes that share no disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.fsdp import StateDictType

from ..errors import SdcoreError
from ..presets.method import Method, field_types
from ..rollouts.environments import Agent
from ..rollouts.episodes import opened_by
from ..rollouts.window import load_rollouts, save_rollouts
from ..types import Example, Group
from .config import SelfDistillationConfig

STATE: Final = "trainer_state.json"  # transformers', written last
OWN_STATE: Final = "sdcore.json"
SENTINEL: Final = "checkpoint-is-incomplete.txt"  # transformers', around a checkpoint that a signal asked for
_NUMBERED: Final = re.compile(r"checkpoint-(\d+)$")
# What torch.save says, as a RuntimeError, when a file cannot be written.
_UNWRITTEN: Final = re.compile(r"inline_container|PytorchStreamWriter|iostream|File too large|No space")
# Of a run's arguments: what optimizer and scheduler take from the checkpoint, whatever is asked; where the seeds come
# from; and where files are, which decides nothing.
_FROM_CHECKPOINT: Final = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim"}
_DECIDES: Final = {"method", "data", "seed", "data_seed", *_FROM_CHECKPOINT, *field_types()}
DESCRIBED: Final = {"model", "data", "tools", "environment"}  # of it, what run.json says beside method and arguments
_PLACES: Final = {"output_dir", "resume_from_checkpoint"}

logger = logging.getLogger(__name__)


class CheckpointError(SdcoreError, OSError):
    """Says that a checkpoint could not be written, or cannot be gone on from."""


def lacking(folder: Path) -> list[str]:
    """Names the files of a checkpoint that were not written, or are not all there any more."""
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
        files = _own_file(folder).get("files", {})  # none: of an earlier version
    except (OSError, ValueError):
        return [f"{STATE} or {OWN_STATE}"]
    there = {name: (folder / name).stat().st_size for name in files if (folder / name).exists()}
    return [name for name, size in files.items() if there.get(name, -1) < size]


def whole(folder: Path) -> bool:
    """True where everything was written and is still there."""
    return not lacking(folder)


def seal(folder: Path) -> None:
    """Notes the files of a checkpoint that has just been written, and their sizes."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in (STATE, OWN_STATE, SENTINEL)]
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    partial = folder / f".{OWN_STATE}.partial"
    with suppress(OSError):  # a full disk: it is whole as it is, and earlier ones may be gone
        partial.write_text(json.dumps(_own_file(folder) | {"files": files}, indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / OWN_STATE)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns all checkpoints, whole or not, by step."""
    return sorted(
        (path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _step(path) >= 0), key=_step
    )


def to_resume(output_dir: str | Path, asked: str | Path | bool) -> Path:
    """Returns the folder to go on from; `asked` True is the last whole one. Raises `CheckpointError` for none."""
    if asked is True:
        torn: list[str] = []
        for folder in reversed(checkpoints(output_dir)):
            if whole(folder):
                if torn:
                    logger.warning("passed over %s", ", ".join(torn))
                return folder
            torn.append(f"{folder} (lacks all or some of {', '.join(lacking(folder)[:3])})")
        raise CheckpointError(
            f"resume_from_checkpoint must find a checkpoint in {output_dir}, got "
            + (f"only torn ones: {', '.join(torn)}" if torn else "none there")
        )
    folder = Path(str(asked))
    if names := lacking(folder):
        raise CheckpointError(
            f"resume_from_checkpoint must be a whole checkpoint of this trainer, got {folder}, which "
            + (f"lacks all or some of {', '.join(names[:3])}" if folder.is_dir() else "is not there")
        )
    return folder


def start_of(
    output_dir: str | Path, asked: str | Path | bool | None, run: Mapping[str, Any] | None = None
) -> Path | None:
    """Returns the folder to go on from, None for a new run; `run` is what `describe_run` says, None if not known yet.

    Raises `CheckpointError` as `to_resume`, for a checkpoint of another run, and where checkpoints in `output_dir`
    would be taken for later ones of this run: those of another, and those after the one that is gone on from.
    """
    folder = None if asked in (None, False) else to_resume(output_dir, asked)
    if folder is not None and run is not None:
        _require_same_run(folder, run)
    kept = _step(folder) if folder is not None and is_in(folder, output_dir) else -1
    later = [path for path in checkpoints(output_dir) if _step(path) > kept and whole(path)]
    if later:
        raise CheckpointError(
            f"output_dir must have no checkpoints beyond the start of this run, got {later[-1]}, which resuming would "
            "later take for its own: resume from it, take another output_dir, or move it away"
        )
    return folder


def describe_run(
    method: Method, args: SelfDistillationConfig, model: Any, examples: Sequence[Example], agent: Agent | None = None
) -> dict[str, Any]:
    """Returns what decides the losses of a run, flat: the method's fields, the arguments', a digest of the rows."""
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    digest = hashlib.sha256()
    for example in examples:
        row = [example.prompt, example.privileged_context, dict(example.columns)]
        # What JSON does not know is told apart by its type alone: a text of it may have an address in it.
        digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
    own = {"method": type(method).__name__, "model": name, "data": digest.hexdigest(), "world_size": args.world_size}
    own |= {"tools": [], "environment": None} if agent is None else agent.summary
    return json.loads(json.dumps({**vars(method), **args.to_dict(), **own}, default=str))


def _require_same_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where the checkpoint's run was another one; warns of arguments that are others now."""
    before = _own_file(folder).get("run", {})
    if before.get("save_only_model"):
        raise CheckpointError(f"{folder} has no optimizer's state, it was written with save_only_model=True")
    changes = {
        name: f"{name}={value!r} (was {before[name]!r})"
        for name, value in run.items()
        if name in before and name not in _PLACES and before[name] != value  # earlier versions noted less, or nothing
    }
    if run["ignore_data_skip"]:  # the rows begin anew, so they may be others
        changes.pop("data", None)
    refused = [change for name, change in changes.items() if name in _DECIDES]
    if refused:
        raise CheckpointError(
            f"{folder} is of a run with another {', '.join(refused)}: resume with the same, or start a new run in "
            "another output_dir with this folder as the model"
        )
    if changes:
        warnings.warn(f"{folder} is gone on from with {', '.join(changes.values())}", stacklevel=4)


def is_in(folder: Path, output_dir: str | Path) -> bool:
    """True for a checkpoint of the run that has this output directory."""
    return folder.resolve().parent == Path(output_dir).resolve()


def _step(folder: Path) -> int:
    match = _NUMBERED.search(folder.name)
    return -1 if match is None else int(match[1])


@contextmanager
def writing(folder: Path, *, main_process: bool) -> Iterator[None]:
    """Wraps all that writes a checkpoint, on all ranks, and seals it.

    Where it could not be written, removes it and raises `CheckpointError`.
    """
    if main_process:
        # A torn one, or one of an earlier run, must not look whole because of what it had.
        (folder / STATE).unlink(missing_ok=True)
    try:
        yield
        if main_process:
            seal(folder)
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

    def save(
        self,
        folder: Path,
        step: int,
        *,
        seen: Mapping[str, int],
        window: Sequence[Sequence[Group]],
        run: Mapping[str, Any],
    ) -> None:
        """Writes the state, the completions of `window` if the next step uses them too. All ranks must call it.

        `run` is what `describe_run` says, for `start_of`.
        """
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**seen, **self._batching, "run": run}, indent=1) + "\n"
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
        opened = [
            [(opened_by(example, kept[0].opening), kept) for example, kept in zip(batch, kept_B, strict=True)]
            for batch, kept_B in zip(examples, rollouts, strict=True)
        ]
        return [
            [Group(example=example, prompt_ids=prompt(example), rollouts=kept) for example, kept in batch]
            for batch in opened
        ]

    @property
    def _batching(self) -> dict[str, int]:
        """Returns what a window of completions depends on, which resuming must not change."""
        return {"world_size": self.args.world_size, "num_iterations": self.args.num_iterations}

    def _rollouts(self, folder: Path) -> Path:
        return folder / f"rollouts-{self.args.process_index}.json"


def _own_file(folder: Path) -> dict[str, Any]:
    return json.loads((folder / OWN_STATE).read_text(encoding="utf-8"))
