"""Assembles the `sdcore` command: an app that knows its commands and nothing about what they do.

Commands import torch inside their bodies, so that every `--help` answers at once.
"""

from __future__ import annotations

import typer

from sdcore.cli.bench import bench
from sdcore.cli.conform import conform
from sdcore.cli.demo import demo
from sdcore.cli.evaluate import evaluate
from sdcore.cli.memory import profile_memory
from sdcore.cli.report import report
from sdcore.cli.solve import solve
from sdcore.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def sdcore() -> None:
    """Self-distillation of language models: train a model on what it says with more context in view.

    \b
    First steps, without a GPU:
      sdcore demo                      a minute: what self-distillation does, and what it costs
      sdcore train --help              rows, rewards and settings of every method
      sdcore train ... --dry-run       look at prompts, loss tokens and memory before you train
      sdcore bench --quick             speed and memory beside TRL's and Liger's, on this machine
    """


app.command()(demo)
app.command()(train)
app.command("eval")(evaluate)
app.command()(solve)
app.command()(report)
app.command("profile-memory")(profile_memory)
app.command()(bench)
app.command()(conform)
