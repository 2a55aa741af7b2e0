"""Runs `sdcore train`: a method, a model, a data file, and reward functions where the method needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdcore.cli.running import (
    MODEL_HELP,
    Environment,
    GgufFile,
    Tools,
    config_of,
    console,
    lora_config,
    quiet_libraries,
    readable_errors,
    resolved,
)
from sdcore.presets import PRESETS

# What transformers' arguments say to scripts: here options of the command line say it.
SCRIPTS = ("do_train", "do_eval", "do_predict")


def train(
    data: Annotated[str, typer.Option(help="Rows to learn from: .jsonl, .json, .parquet, a folder or a Hub id.")],
    method: Annotated[str | None, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = None,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "world",
    gguf_file: GgufFile = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="module:function or file.py:function; may be given several times.")
    ] = None,
    tools: Tools = None,
    environment: Environment = None,
    eval_data: Annotated[str | None, typer.Option(help="Rows to be measured on, after training.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with fields of the method and the run.")] = None,
    output: Annotated[Path, typer.Option(help="Directory for the trained model, its checkpoints and logs.")] = Path(
        "sdcore-run"
    ),
    lora_rank: Annotated[int | None, typer.Option(help="Train LoRA adapters on all linear layers; needs peft.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output directory.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check rows, show prompts, predict memory; train nothing.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Over the configuration file.")
    ] = None,
) -> None:
    """Teach a model what it says with more context.

    \b
    Rows have `prompt` or `messages`, and what the method needs:
      sdft_paper, sdft_as_run, opsd   privileged_context (or solution): a demonstration, a reference solution
      context_distillation            privileged_context: an instruction, a document
      sdpo, sdpo_code                 --reward that returns a number, or (number, feedback text)
      turn_hindsight                  --environment or --tools: the teacher of each turn reads what they say of it
      rl_tilt, grpo                   --reward that returns a number
      sft                             completion

    \b
    Look before you run: what both will read, what carries a loss, how much memory it takes:
      sdcore train --method sdft_paper --model Qwen/Qwen3-0.6B --data train.jsonl --dry-run
    Then train. Every field of the method and of the run can be set as key=value, or in a YAML file:
      sdcore train --method sdpo --model Qwen/Qwen3-0.6B --data train.jsonl --reward rewards.py:check \\
        --output run max_completion_length=512 learning_rate=1e-5 max_steps=200 teacher=frozen
      sdcore train --config run.yaml --data train.jsonl --reward rewards.py:check topk=20
      sdcore train --method sft --model path/to/model.gguf --data train.jsonl
    Completions that are Python, judged by the rows' column `tests` in a sandbox, with the error text as feedback:
      sdcore train --method sdpo_code --data train.jsonl --reward sdcore.rollouts.sandbox:python_tests
    In several turns, with tools that the student calls, or an environment that answers and judges:
      sdcore train --method sdpo --data train.jsonl --reward rewards.py:check --tools tools.py max_turns=4
      sdcore train --method grpo --data train.jsonl --environment game.py:WordGame
    Without a GPU, on the bundled small world:
      python -m sdcore.world.data --kind sdft --rows 500 --output train.jsonl --config world.yaml
      sdcore train --data train.jsonl --config world.yaml --output run max_steps=40
    """
    with readable_errors("train"), quiet_libraries():
        from transformers import AutoTokenizer

        from sdcore.data import read_examples
        from sdcore.errors import ArgumentError
        from sdcore.presets import dump_config, load_config, types_of
        from sdcore.rollouts.rewards import prepare
        from sdcore.rollouts.samplers import ModelSampler
        from sdcore.training import dry_run as looking
        from sdcore.training.checkpoints import start_of
        from sdcore.training.config import SelfDistillationConfig
        from sdcore.training.prepare import agent_of, check

        if method is None and config is None:
            raise ArgumentError("a method must be named, by --method or in the file of --config, got none")
        known = types_of(SelfDistillationConfig)
        chosen, arguments = load_config(
            config,
            [*([] if method is None else [f"method={method}"]), *(overrides or [])],
            trainer_fields={name: kind for name, kind in known.items() if name not in SCRIPTS},
        )
        gguf_file = gguf_file or arguments.get("gguf_file")
        arguments.pop("gguf_file", None)  # the trainer gets the folder that is made of it
        defaults: dict[str, Any] = {"output_dir": str(output), "disable_tqdm": False}
        args = SelfDistillationConfig(**defaults | arguments)
        agent = agent_of(args, tools or [], environment)
        check(args, chosen, prepare(reward or [], args.reward_weights), ModelSampler(), agent)
        screen = console()
        if dry_run:
            refused: list[str] = []
            examples = read_examples(data, refused=refused if args.on_bad_row == "skip" else None)
            if refused:
                screen.print(f"{len(refused)} rows are left out, such as {refused[0]}", highlight=False, markup=False)
            remote = args.trust_remote_code
            model_config, rank = config_of(model, gguf_file, trust_remote_code=remote)
            preview = looking.dry_run(
                examples,
                AutoTokenizer.from_pretrained(resolved(model, gguf_file), trust_remote_code=remote),
                chosen,
                model_config,
                reward_functions=reward or [],
                agent=agent,
                chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]  # an object, once checked
                max_prompt_length=args.max_prompt_length,
                max_completion_length=args.max_completion_length,
                prompts=args.per_device_train_batch_size,
                setting=looking.setting_of_run(args, chosen, lora_rank=rank if lora_rank is None else lora_rank),
            )
            looking.show(preview, screen)
            return

        asked = resume or args.resume_from_checkpoint
        start_of(args.output_dir, asked)  # before a model is loaded
        from sdcore.training.trainer import SelfDistillationTrainer

        trainer = SelfDistillationTrainer(
            resolved(model, gguf_file),
            args,
            method=chosen,
            train_dataset=data,
            eval_dataset=eval_data,
            reward_funcs=reward or [],
            # Loaded once: a file is run each time.
            tools=() if agent is None else agent.tools,
            environment_factory=None if agent is None else agent.environment_factory,
            peft_config=lora_config(lora_rank),
        )
        trainer.start(asked)  # may refuse, before anything is written
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        dump_config(chosen, arguments, Path(args.output_dir) / "config.yaml")
        trainer.train()
        trainer.save_model()
        if eval_data is not None:
            measured = trainer.evaluate()
            screen.print(f"eval: reward {measured.get('eval_reward_mean', float('nan')):.4f}")
        if (step := trainer.state.global_step) < trainer.state.max_steps:  # a signal, with enable_jit_checkpoint
            screen.print(f"stopped after step {step} of {trainer.state.max_steps}; --resume goes on from a checkpoint")
        trainer.accelerator.end_training()  # of several processes, none ends under the others' feet
        screen.print(f"model: {args.output_dir}   next: sdcore eval, sdcore report {args.output_dir}")
