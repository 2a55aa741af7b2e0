"""Reads the options of `sdcore demo`: self-distillation, fine-tuning and an oracle on one small task, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcore.cli.running import readable_errors


def demo(
    model: Annotated[
        str | None, typer.Option(help="Path or Hub name of a causal model.", show_default="the bundled small world")
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory for report.json and curves.png.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Seed of the task, the questions and every sample.")] = 0,
    alpha: Annotated[float, typer.Option(help="1: reverse KL, 0: forward KL, between: Jensen-Shannon.")] = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, for every method.")] = 1e-4,
    steps: Annotated[int, typer.Option(help="Training steps of SDFT and of the oracle.")] = 60,
    sft_steps: Annotated[int, typer.Option(help="Training steps of SFT, which learns the task later.")] = 300,
    threads: Annotated[int, typer.Option(help="Torch threads; one is fastest for the bundled model.")] = 1,
    device: Annotated[str, typer.Option(help="Torch device to run on.")] = "cpu",
    plot: Annotated[bool, typer.Option(help="Draw the curves; needs matplotlib.")] = True,
) -> None:
    """Teach a model a new task three ways and show what each costs: about a minute on one core.

    The model distils its own answers with a demonstration in view (SDFT), imitates the demonstrations (SFT), or
    imitates the same answers in its own style (the oracle). Prints accuracies before and after, and sampled answers.
    """
    from rich.console import Console
    from transformers.utils import logging

    from sdcore.demo import DemoConfig, run_demo

    try:
        config = DemoConfig(
            model=model,
            output=output,
            seed=seed,
            alpha=alpha,
            learning_rate=learning_rate,
            steps=steps,
            sft_steps=sft_steps,
            threads=threads,
            device=device,
            plot=plot,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    logging.disable_progress_bar()  # a bar for loading 30 tensors
    with readable_errors("demo"):
        run_demo(config, Console())
