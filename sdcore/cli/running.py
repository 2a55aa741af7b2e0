"""Gives all commands what they share: errors in one line, and models by name.

Nothing heavy is imported until a function is called. Exit codes: 1, something went wrong with the data, the model or
the machine; 2, the command was not used as it is meant, an option or an override without meaning. With
SDCORE_TRACEBACK=1 in the environment the whole traceback is shown.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console

WORLD: Final = "world"  # the name of the bundled model
MODEL_HELP: Final = "Path or Hub name of a causal model, or of a .gguf file; `world` is the bundled small one."
GgufFile = Annotated[str | None, typer.Option(help="The .gguf file to take of --model; converted once, beside it.")]


@contextmanager
def readable_errors(command: str) -> Iterator[None]:
    """Turns an error into one line on stderr and an exit code; what would be of no use as one keeps its traceback."""
    from sdcore.errors import ArgumentError, SdcoreError

    try:
        yield
    except (SdcoreError, OSError, ImportError, ValueError) as error:
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
    """Returns the bundled model's path for its name, and for a GGUF file the folder that is made of it."""
    from sdcore.models.gguf import plain_folder
    from sdcore.world import CHECKPOINT

    return plain_folder(str(CHECKPOINT) if model == WORLD else model, gguf_file)


def load_model(
    model: str, gguf_file: str | None, *, dtype: str, device: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """Loads a model, in evaluation mode on its device (None: a GPU if there is one), and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = resolved(model, gguf_file)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return loaded.to(place).eval(), tokenizer


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
    """Returns where a command prints; wide where no terminal sets a width, so that files and pipes are not folded."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160, soft_wrap=False)
