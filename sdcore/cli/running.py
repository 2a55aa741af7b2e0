"""Gives all commands what they share: errors in one line, and models by name.

Nothing heavy is imported until a function is called. Exit codes: 1, something went wrong with the data, the model or
the machine; 2, the command was not used as it is meant, an option or an override without meaning. With
SDCORE_TRACEBACK=1 in the environment the whole traceback is shown.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console

# Fields of a run with tools or an environment.
TURNS: Final = ("max_turns", "max_trajectory_length", "max_trajectory_seconds", "history")
# Fields of a run, and of its method, that say which prompts a model reads and how its answers are drawn and judged.
ANSWERING: Final = (
    *("chat_template_kwargs", "max_completion_length", "sampling_temperature", "eval_temperature"),
    *("top_p", "top_k", "stop_token_ids", "success_threshold", *TURNS, "tools", "environment"),
)
MODEL_HELP: Final = (
    "Path or Hub name of a causal model, or of a .gguf file; `world` is the bundled small one, `world-talks` another "
    "that has read conversations."
)
Tools = Annotated[
    list[str] | None,
    typer.Option(help="tools.py or module: its public functions; with :function one. May be given several times."),
]
Environment = Annotated[str | None, typer.Option(help="module:Class or file.py:Class, which answers the student.")]
GgufFile = Annotated[str | None, typer.Option(help="The .gguf file to take of --model; converted once, beside it.")]


@contextmanager
def readable_errors(command: str) -> Iterator[None]:
    """Turns an error of any kind into one line on stderr and an exit code."""
    from sdcore.errors import ArgumentError, SdcoreError

    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):  # typer's own, which it says in its way
        raise
    except Exception as error:
        if os.environ.get("SDCORE_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, SdcoreError):
            text = f"{type(error).__name__}: {text} (SDCORE_TRACEBACK=1 shows where)"
        typer.echo(f"sdcore {command}: {text}", err=True)
        raise typer.Exit(code=2 if isinstance(error, ArgumentError) else 1) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences, inside, transformers' bar for loading a model and its hints about generation."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def resolved(model: str, gguf_file: str | None) -> str:
    """Returns a bundled model's path for its name, and for a GGUF file the folder that is made of it."""
    from sdcore.models.gguf import plain_folder
    from sdcore.world import CHECKPOINT, TALKS

    bundled = {"world": CHECKPOINT, "world-talks": TALKS}
    return plain_folder(str(bundled.get(model, model)), gguf_file, called="--model")


def check_alone() -> None:
    """Raises `ArgumentError` in one of several processes, each of which would do the whole work and write its files."""
    from sdcore.errors import ArgumentError

    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ArgumentError(f"this command runs in one process, without a launcher, got WORLD_SIZE={processes}")


def config_of(model: str, gguf_file: str | None, *, trust_remote_code: bool) -> tuple[Any, int | None]:
    """Returns a model's configuration, and the rank of its adapter where the folder is of one; weights are not read."""
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    from sdcore.models.gguf import require_there

    name = resolved(model, gguf_file)
    file = find_adapter_config_file(name)
    adapter = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    base = adapter.get("base_model_name_or_path") or name
    require_there(base, called=f"the base model of {name}")
    return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code), adapter.get("r")


def load_model(
    model: str, gguf_file: str | None, *, dtype: str, device: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """Loads a model, in evaluation mode on its device (None: a GPU if there is one), and its tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from sdcore.training.prepare import model_of

    name = resolved(model, gguf_file)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    loaded = model_of(name, dtype=dtype, trust_remote_code=trust_remote_code)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return loaded.to(place).eval(), tokenizer


def settings_of(folder: str) -> dict[str, Any]:
    """Returns what the run that wrote a model's folder says of prompts and sampling, as `ANSWERING`; {} without one."""
    from sdcore.diagnostics.runlog import read_description

    path = Path(folder)
    known = read_description(path.parent if path.name.startswith("checkpoint-") else path)
    values = known | known.get("config", {}) | {"success_threshold": known.get("method", {}).get("success_threshold")}
    return {name: values[name] for name in ANSWERING if values.get(name) is not None}


def lora_config(rank: int | None) -> object:
    """Returns PEFT's configuration for all linear layers but the head; None without a rank."""
    if rank is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("--lora-rank needs PEFT: pip install 'sdcore[peft]'") from error
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def console() -> Console:
    """Returns where a command prints; wide where no terminal sets a width, so that files and pipes are not folded.

    Of several processes the first one prints.
    """
    from rich.console import Console

    quiet = os.environ.get("RANK", "0") != "0"
    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=160, soft_wrap=False, quiet=quiet)
