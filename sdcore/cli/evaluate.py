"""Runs `sdcore eval`: sampled answers of a model to a data file, judged by reward functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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

# Of a run, what an evaluation reads beside its own options.
FIELDS = (
    *("chat_template_kwargs", "top_p", "top_k", "stop_token_ids", "on_bad_row"),
    *("reward_weights", "reward_timeout", "reward_on_error", "reward_workers", *TURNS),
)
SAVED = ("text", "finished", "reward", "feedback")  # of each answer


def evaluate(
    data: Annotated[str, typer.Option(help="Questions: .jsonl, .json, .parquet, a folder or a Hub id.")],
    reward: Annotated[
        list[str] | None, typer.Option(help="module:function or file.py:function; may be given several times.")
    ] = None,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "world",
    gguf_file: GgufFile = None,
    tools: Tools = None,
    environment: Environment = None,
    method: Annotated[
        str | None,
        typer.Option(help="Ask again as this method's teacher is asked, with its context in view, and without."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of a run that is to be: its method's teacher is asked, and as it will sample."),
    ] = None,
    generations: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 1,
    like: Annotated[
        str | None,
        typer.Option(help="Folder of the run whose prompts and sampling are used.", show_default="the model's own"),
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer, at most.", show_default="the run's, or 256")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of sampling; 0: the likeliest token.", show_default="the run's, or 1"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions at a time; another number draws other answers.")
    ] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions, from the first.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same answers.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers and every answer.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto, the file's.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Torch device; default: a GPU if there is one.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the model brings along.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help=f"Over the run's: {', '.join(FIELDS)}. With --method, also its fields."
        ),
    ] = None,
) -> None:
    """Measure a model: sample answers and judge them.

    A model that `sdcore train` wrote is asked as it was trained, by the chat template's arguments and the sampling in
    its folder's run.json; what is given here comes first.

    \b
    Two models on the same questions and seeds, asked in the same way:
      sdcore eval --model run --data eval.jsonl --reward rewards.py:check --generations 4
      sdcore eval --model Qwen/Qwen3-0.6B --like run --data eval.jsonl --reward rewards.py:check --generations 4
    In several turns, as the run was trained. Tools are code, so they are named again, not read from a folder:
      sdcore eval --model run --data eval.jsonl --reward rewards.py:check --tools tools.py
      sdcore eval --model run --data eval.jsonl --environment game.py:WordGame
    Before training: what the teacher knows with its context in view is what a method can teach:
      sdcore eval --model Qwen/Qwen3-0.6B --data train.jsonl --reward rewards.py:check --method sdpo --output seen.json
      sdcore eval --model model.gguf --data facts.jsonl --reward rewards.py:check --config examples/facts.yaml
    Without a GPU, on the bundled small world:
      python -m sdcore.world.data --kind rl --split eval --rows 200 --output eval.jsonl
      sdcore eval --model run --data eval.jsonl --reward sdcore.world.data:exact --max-completion-length 11
    """
    with readable_errors("eval"), quiet_libraries():
        from rich.progress import Progress
        from rich.table import Table

        from sdcore.data import read_examples
        from sdcore.errors import ArgumentError
        from sdcore.presets import load_config, types_of
        from sdcore.presets.configure import overridden
        from sdcore.presets.method import field_types
        from sdcore.rollouts.rewards import prepare
        from sdcore.training.config import SelfDistillationConfig
        from sdcore.training.evaluation import evaluate as measure
        from sdcore.training.prepare import agent_of, check_tools

        check_alone()
        if not reward and environment is None:
            raise ArgumentError("--reward must be given where no --environment judges, got neither")
        known = types_of(SelfDistillationConfig)
        chosen, words = None, overrides or []
        if method is not None or config is not None:
            own = [word for word in words if word.partition("=")[0] in field_types()]
            words = [word for word in words if word not in own]
            chosen, run = load_config(config, [*([f"method={method}"] if method else []), *own], trainer_fields=known)
        given = overridden(words, {name: known[name] for name in FIELDS}, "an evaluation")
        options = {"max_completion_length": max_completion_length, "sampling_temperature": temperature}
        given |= {name: value for name, value in options.items() if value is not None}
        taken, screen = settings_of(like or model), console()
        if chosen is not None:
            taken |= {name: value for name, value in run.items() if name in (*FIELDS, *options, "eval_temperature")}
        for values in (taken, given):  # an evaluation has one temperature
            if "sampling_temperature" in values:
                values.setdefault("eval_temperature", values.pop("sampling_temperature"))
        threshold = taken.pop("success_threshold", 0.5)
        had = [str(value) for name in ("tools", "environment") if (value := taken.pop(name, None))]
        args = SelfDistillationConfig(
            eval_generations=generations, eval_seed=seed, per_device_eval_batch_size=batch_size, **taken | given
        )
        settings = args.evaluation_options() | {"rank": 0, "world_size": 1}
        agent = agent_of(args, tools or [], environment)
        if agent is None:
            taken = {name: value for name, value in taken.items() if name not in TURNS}
            if had:
                note = f"the run in {like or model} had tools or an environment ({', '.join(had)}); here nobody answers"
                screen.print(note, highlight=False, markup=False)
        kwargs: Any = args.chat_template_kwargs
        context = None if chosen is None else chosen.build_context(chat_template_kwargs=kwargs)
        examples, rewards = read_examples(data, limit=limit), prepare(reward or [], args.reward_weights)
        loaded, tokenizer = load_model(
            model, gguf_file, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        check_tools(tokenizer, agent)
        with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
            bar = progress.add_task("sampling", total=len(examples))
            result = measure(
                loaded,
                tokenizer,
                examples,
                rewards,
                success_threshold=threshold,
                agent=agent,
                context=context,
                advance=lambda count: progress.advance(bar, count),
                **settings,
            )
        table = Table("measure", "value", title=f"{model} on {data}", title_justify="left")
        for name, value in result.metrics.items():
            table.add_row(name, f"{value:.4f}" if value != int(value) else f"{value:g}")
        screen.print(table)
        said = ", ".join(f"{name}={value!r}" for name, value in taken.items() if name not in given)
        if said:
            screen.print(f"as the run in {like or model}: {said}", highlight=False, markup=False)
        if output is not None:
            answers = [
                {
                    "source": group.example.source,
                    "prompt": group.example.prompt,
                    "answers": [
                        {name: getattr(rollout, name) for name in SAVED} | ({} if agent is None else _turns(rollout))
                        for rollout in group.rollouts
                    ],
                }
                for group in result.groups
            ]
            if agent is not None:
                settings |= agent.summary | {name: getattr(args, name) for name in TURNS}
            seen = [
                {"source": group.example.source, "prompt": tokenizer.decode(group.prompt_ids)}
                | {name: getattr(group.rollouts[0], name) for name in SAVED}
                for group in result.in_view
            ]
            about = {"model": model, "data": data, "settings": settings, "metrics": result.metrics}
            text = json.dumps(about | {"samples": answers} | ({"in_view": seen} if seen else {}), indent=1)
            output.write_text(text, encoding="utf-8")
            screen.print(f"answers: {output}")


def _turns(rollout: Any) -> dict[str, Any]:
    """Returns what is saved of a trajectory beside what is saved of an answer."""
    from sdcore.contexts.overflow import plain_feedback

    said = {"transcript": rollout.transcript(str), "feedback": plain_feedback(rollout.feedback)}
    return {"outcome": rollout.outcome, "turns": len(rollout.own)} | said
