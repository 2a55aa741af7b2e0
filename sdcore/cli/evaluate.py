"""Runs `sdcore eval`: sampled answers of a model to a data file, judged by reward functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sdcore.cli.running import MODEL_HELP, GgufFile, console, load_model, quiet_libraries, readable_errors

SAVED = ("text", "finished", "reward", "feedback")  # of each answer


def evaluate(
    data: Annotated[str, typer.Option(help="Questions: .jsonl, .json, .parquet, a folder or a Hub id.")],
    reward: Annotated[list[str], typer.Option(help="module:function or file.py:function; may be given several times.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "world",
    gguf_file: GgufFile = None,
    generations: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 1,
    max_completion_length: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")] = 1.0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions at a time; another number draws other answers.")
    ] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions, from the first.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same answers.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers and every answer.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto, the file's.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Torch device; default: a GPU if there is one.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the model brings along.")] = False,
) -> None:
    """Measure a model: sample answers and judge them.

    \b
    Two models on the same questions and seeds:
      sdcore eval --model run --data eval.jsonl --reward rewards.py:check --generations 4
      sdcore eval --model Qwen/Qwen3-0.6B --data eval.jsonl --reward rewards.py:check --generations 4
    Without a GPU, on the bundled small world:
      python -m sdcore.world.data --kind rl --split eval --rows 200 --output eval.jsonl
      sdcore eval --model run --data eval.jsonl --reward sdcore.world.data:exact --max-completion-length 11
    """
    with readable_errors("eval"), quiet_libraries():
        from rich.progress import Progress
        from rich.table import Table

        from sdcore.data import read_examples
        from sdcore.rollouts.rewards import prepare
        from sdcore.training.evaluation import evaluate as measure

        examples, rewards, screen = read_examples(data, limit=limit), prepare(reward), console()
        loaded, tokenizer = load_model(
            model, gguf_file, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
            bar = progress.add_task("sampling", total=len(examples))
            result = measure(
                loaded,
                tokenizer,
                examples,
                rewards,
                num_generations=generations,
                max_completion_length=max_completion_length,
                temperature=temperature,
                batch_size=batch_size,
                seed=seed,
                advance=lambda count: progress.advance(bar, count),
            )
        table = Table("measure", "value", title=f"{model} on {data}", title_justify="left")
        for name, value in result.metrics.items():
            table.add_row(name, f"{value:.4f}" if value != int(value) else f"{value:g}")
        screen.print(table)
        if output is not None:
            answers = [
                {
                    "source": group.example.source,
                    "prompt": group.example.prompt,
                    "answers": [{name: getattr(rollout, name) for name in SAVED} for rollout in group.rollouts],
                }
                for group in result.groups
            ]
            text = json.dumps({"model": model, "data": data, "metrics": result.metrics, "samples": answers}, indent=1)
            output.write_text(text, encoding="utf-8")
            screen.print(f"answers: {output}")
