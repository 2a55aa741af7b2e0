"""`sdcore profile-memory`: predicted memory of a training step, part by part, without loading a model."""

from __future__ import annotations

from typing import Annotated

import typer

from sdcore.cli.running import MODEL_HELP, console, quiet_libraries, readable_errors, resolved


def profile_memory(
    model: Annotated[str, typer.Option(help=MODEL_HELP + " Only its configuration is read.")],
    prompt_tokens: Annotated[int, typer.Option(help="P, of the student's prompt.")] = 1024,
    context_tokens: Annotated[int, typer.Option(help="C, what the teacher's prompt has beyond it.")] = 512,
    completion_tokens: Annotated[int, typer.Option(help="R, of a completion.")] = 512,
    completions: Annotated[int, typer.Option(help="G, completions of a prompt.")] = 8,
    prompts: Annotated[int, typer.Option(help="Prompts in one forward and backward.")] = 1,
    context_per_completion: Annotated[bool, typer.Option(help="Each completion has its own context (SDPO).")] = False,
    teacher: Annotated[
        str, typer.Option(help="live, frozen, ema, periodic, trust_region or adapter_off: does it need a copy?")
    ] = "live",
    lora_rank: Annotated[int | None, typer.Option(help="LoRA on all linear layers; default: train everything.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = False,
    strategy: Annotated[str, typer.Option(help="packed, cached, two_phase or naive.")] = "packed",
    micro_batch: Annotated[int | None, typer.Option(help="Completions in flight at a time; two_phase.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: the configuration's.")] = None,
    workspace_mb: Annotated[float, typer.Option(help="Of the fused loss.")] = 256.0,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the model brings along.")] = False,
) -> None:
    """Predict the peak memory of a training step.

    Part by part, with and without the fused loss and shared prefixes.

    \b
    From the configuration alone, on any machine:
      sdcore profile-memory --model Qwen/Qwen3-8B --teacher ema --completions 8 --context-per-completion
      sdcore profile-memory --model Qwen/Qwen3-8B --lora-rank 16 --teacher adapter_off --checkpointing
    """
    with readable_errors("profile-memory"), quiet_libraries():
        from transformers import AutoConfig

        from sdcore.memory import Load, Setting, compare, memory_table

        load = Load(
            prompt_tokens=prompt_tokens,
            context_tokens=context_tokens,
            completion_tokens=completion_tokens,
            completions=completions,
            prompts=prompts,
            context_per_completion=context_per_completion,
        )
        setting = Setting(
            teacher=teacher,  # type: ignore[arg-type]  # checked there
            strategy=strategy,  # type: ignore[arg-type]
            micro_batch=micro_batch,
            checkpointing=checkpointing,
            lora_rank=lora_rank,
            dtype=dtype,
            workspace_mb=workspace_mb,
        )
        config = AutoConfig.from_pretrained(resolved(model), trust_remote_code=trust_remote_code)
        console().print(memory_table(compare(config, load, setting), f"Predicted peak memory of {model}"))
