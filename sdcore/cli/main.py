"""The `sdcore` command: an app that knows its commands and nothing about what they do.

Commands import torch inside their bodies, so that every `--help` answers at once.
"""

from __future__ import annotations

import typer

from sdcore.cli.demo import demo

app = typer.Typer(
    help="Self-distillation of language models.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


@app.callback()
def sdcore() -> None:
    """Self-distillation of language models."""


app.command()(demo)
