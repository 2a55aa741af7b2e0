"""Runs `sdcore solve`: test-time discovery on one question with a verifier command."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sdcore.cli.running import (
    MODEL_HELP,
    TURNS,
    Environment,
    GgufFile,
    Tools,
    check_alone,
    console,
    load_model,
    quiet_libraries,
    readable_errors,
    settings_of,
)

# Fields of a run that are about who answers.
ANSWERED = ("reward_timeout", "reward_on_error", *TURNS)
# What is read of a run's fields, in YAML, as overrides, and of the run that wrote the model.
FIELDS = (
    *("learning_rate", "max_completion_length", "sampling_temperature", "top_p", "top_k"),
    *("stop_token_ids", "chat_template_kwargs", *ANSWERED),
)


def solve(
    verifier: Annotated[str, typer.Option(help="Shell command that reads an answer and exits with 0 if it is right.")],
    question: Annotated[str | None, typer.Option(help="The question, as text.")] = None,
    question_file: Annotated[Path | None, typer.Option(help="Or a file: its text, or of .jsonl the first row.")] = None,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "world",
    gguf_file: GgufFile = None,
    tools: Tools = None,
    environment: Environment = None,
    method: Annotated[str, typer.Option(help="sdpo or sdpo_code.")] = "sdpo",
    config: Annotated[
        Path | None, typer.Option(help=f"YAML as for `train`; of a run's fields, {', '.join(FIELDS)} are read.")
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer, at most.", show_default="256")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Of AdamW.", show_default="1e-5")] = None,
    max_samples: Annotated[int, typer.Option(min=1, help="Give up after so many answers.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="Of sampling.", show_default="1")] = None,
    update: Annotated[bool, typer.Option(help="Learn from failures; without it this is best-of-k.")] = True,
    verifier_seconds: Annotated[float, typer.Option(help="Time limit of each check.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Of every sample.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the answer and every round.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto, the file's.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Torch device; default: a GPU if there is one.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the model brings along.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the method.")
    ] = None,
) -> None:
    """Find an answer that a verifier accepts.

    The model learns, for this question alone, from what the verifier says about its wrong answers.

    \b
    The verifier reads an answer from its input. Exit code 0: it is right. What it prints is shown to the teacher; a
    first line that is a number is the reward. It runs with limits on time and memory, from an empty directory, which is
    no security boundary. Exit code of this command: 0 solved, 1 not solved.
      sdcore solve --model Qwen/Qwen3-0.6B --question-file question.txt --verifier "python $PWD/check.py"
    The baseline at as many answers, best-of-k:
      sdcore solve ... --no-update
    In several turns, of which the verifier reads the last:
      sdcore solve ... --tools tools.py max_turns=4
    """
    with readable_errors("solve"), quiet_libraries():
        from sdcore.data import example_of, read_examples
        from sdcore.errors import ArgumentError
        from sdcore.presets import load_config, types_of
        from sdcore.presets.configure import overridden
        from sdcore.training.config import SelfDistillationConfig
        from sdcore.training.prepare import agent_of
        from sdcore.training.solve import Round, SolveConfig, command_verifier
        from sdcore.training.solve import solve as search

        check_alone()
        if (question is None) == (question_file is None):
            raise ArgumentError("one of --question and --question-file must be given")
        if question_file is not None and question_file.suffix == ".jsonl":
            (example,) = read_examples(question_file, limit=1)
        else:
            text = question if question_file is None else question_file.read_text(encoding="utf-8")
            example = example_of({"messages": [{"role": "user", "content": text}]}, str(question_file or "--question"))
        known = types_of(SelfDistillationConfig)
        of_run = [text for text in overrides or [] if text.partition("=")[0] in known]
        overridden(of_run, {name: known[name] for name in FIELDS}, "a search")
        chosen, run = load_config(config, [f"method={method}", *(overrides or [])], trainer_fields=known)
        options = {
            "max_completion_length": max_completion_length,
            "learning_rate": learning_rate,
            "sampling_temperature": temperature,
        }
        given = settings_of(model) | run | {name: value for name, value in options.items() if value is not None}
        read = {name: given[name] for name in FIELDS if name in given}
        of_turns = {name: read.pop(name) for name in ANSWERED if name in read}
        agent = agent_of(SelfDistillationConfig(**of_turns), tools or [], environment)
        settings = SolveConfig(
            max_samples=max_samples,
            temperature=read.pop("sampling_temperature", 1.0),
            update=update,
            seed=seed,
            **read,
        )
        screen = console()

        def show(last: Round) -> None:
            learned = "" if last.loss is None else f", loss {last.loss:.4g} on {last.active}"
            screen.print(f"round {last.number}: {last.samples} answers, best reward {last.best_reward:g}{learned}")

        loaded, tokenizer = load_model(
            model, gguf_file, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        verify = command_verifier(verifier, wall_seconds=verifier_seconds)
        ended = search(loaded, tokenizer, example, verify, chosen, settings, agent=agent, on_round=show)
        if output is not None:
            output.write_text(json.dumps(asdict(ended), indent=1), encoding="utf-8")
        tokens = f"{ended.sampled_tokens} tokens sampled, {ended.trained_tokens} trained on, {ended.seconds:.0f} s"
        if not ended.solved:
            typer.echo(f"sdcore solve: not solved after {ended.samples} answers ({tokens})", err=True)
            raise typer.Exit(code=1)
        screen.print(f"solved after {ended.samples} answers ({tokens}):", highlight=False)
        typer.echo(ended.answer)
