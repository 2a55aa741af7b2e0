"""Runs `sdcore profile-memory`: what a training step takes, predicted, measured, or turned round: what fits a card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcore.cli.running import MODEL_HELP, GgufFile, config_of, console, quiet_libraries, readable_errors

if TYPE_CHECKING:
    from sdcore.memory import Load, Setting


def profile_memory(
    model: Annotated[str, typer.Option(help=MODEL_HELP + " Only its configuration is read.")],
    gguf_file: GgufFile = None,
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
    accumulates: Annotated[
        bool, typer.Option("--accumulates", help="Gradients of an earlier batch of the step are there.")
    ] = False,
    strategy: Annotated[str, typer.Option(help="packed, cached, two_phase or naive.")] = "packed",
    micro_batch: Annotated[int | None, typer.Option(help="Completions in flight at a time; two_phase.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: the configuration's.")] = None,
    workspace_mb: Annotated[float | None, typer.Option(help="Of the fused loss; default: its own on a GPU.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the model brings along.")] = False,
    what_fits: Annotated[bool, typer.Option("--what-fits", help="The largest R, G, B, P and C on a card.")] = False,
    device_memory: Annotated[str | None, typer.Option(help="A card (H100, RTX 4090, ...) or a size (80GB).")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run a step of a scaled-down model here.")] = False,
    contenders: Annotated[str, typer.Option(help="What is measured: of ours, naive, trl, liger.")] = "ours,naive,trl",
    scale_layers: Annotated[int, typer.Option(help="Layers that are left to measure; 0: all.")] = 2,
    scale_width: Annotated[int, typer.Option(help="Widths and vocabulary are divided by it.")] = 8,
    scale_tokens: Annotated[int, typer.Option(help="P, C and R are divided by it.")] = 8,
    device: Annotated[str, typer.Option(help="Where it is measured.")] = "cpu",
    output: Annotated[str, typer.Option(help="Directory for what is measured: JSON, PNG, snapshots.")] = "memory",
) -> None:
    """Predict the peak memory of a training step, say what fits a card, or measure a step.

    Part by part, with and without the fused loss and shared prefixes.

    \b
    From the configuration alone, on any machine:
      sdcore profile-memory --model Qwen/Qwen3-8B --teacher ema --completions 8 --context-per-completion
      sdcore profile-memory --model Qwen/Qwen3-8B --lora-rank 16 --what-fits --device-memory H100
    A step of random weights, scaled down, every live byte by category:
      sdcore profile-memory --model Qwen/Qwen3-8B --measure --output memory
    """
    with readable_errors("profile-memory"), quiet_libraries():
        from sdcore.errors import ArgumentError
        from sdcore.memory import Load, Setting, compare, memory_table

        if what_fits and device_memory is None:
            raise ArgumentError("--device-memory must be given with --what-fits, a card or a size such as 80GB")
        load = Load(
            prompt_tokens=prompt_tokens,
            context_tokens=context_tokens,
            completion_tokens=completion_tokens,
            completions=completions,
            prompts=prompts,
            context_per_completion=context_per_completion,
        )
        config, rank = config_of(model, gguf_file, trust_remote_code=trust_remote_code)
        setting = Setting(
            teacher=teacher,  # type: ignore[arg-type]  # checked there
            strategy=strategy,  # type: ignore[arg-type]
            micro_batch=micro_batch,
            checkpointing=checkpointing,
            accumulates=accumulates,
            lora_rank=rank if lora_rank is None else lora_rank,
            dtype=dtype,
            workspace_mb=workspace_mb,
        )
        if what_fits:
            _show_what_fits(config, load, setting, str(device_memory), model)
        if measure:
            scale = (scale_layers or None, scale_width, scale_tokens)
            _measure(config, load, setting, model, contenders.split(","), scale, device, output)
        if not what_fits and not measure:
            console().print(memory_table(compare(config, load, setting), f"Predicted peak memory of {model}"))


def _show_what_fits(config: Any, load: Load, setting: Setting, device_memory: str, model: str) -> None:
    from sdcore.memory import device_bytes, fits_table, what_fits
    from sdcore.memory.fits import HEADROOM

    size = device_bytes(device_memory)
    title = (
        f"What fits {device_memory} with {model}: {size * (1 - HEADROOM) / 2**30:.1f} GiB, {HEADROOM:.0%} left alone"
    )
    console().print(fits_table(what_fits(config, load, setting, device_bytes=size), load, title))


def _measure(
    config: Any,
    load: Load,
    setting: Setting,
    model: str,
    contenders: list[str],
    scale: tuple[int | None, int, int],
    device: str,
    output: str,
) -> None:
    import json
    from pathlib import Path

    from sdcore.memory import measure, measured_table, save_plot, shrunk
    from sdcore.memory.measured import predictions
    from sdcore.memory.plot import as_json

    layers, width, tokens = scale
    small = shrunk(config, load, layers=layers, width=width, tokens=tokens)
    folder = Path(output)
    steps = measure(
        small.config,
        small.load,
        setting,
        contenders=contenders,
        tiles=small.tiles,
        device=device,
        snapshots=str(folder),
    )
    folder.mkdir(parents=True, exist_ok=True)
    screen = console()
    screen.print(f"Measured on {device}, random weights. Scaled down: " + ("; ".join(small.changes) or "nothing"))
    screen.print(
        measured_table(steps, predictions(small.config, small.load, setting, small.tiles), f"A step of {model}")
    )
    for step in steps.values():
        if step.reason:
            screen.print(f"{step.contender} did not run: {step.reason}")
    about = {"model": model, "device": device, "scaled": list(small.changes), "load": vars(small.load)}
    (folder / "memory.json").write_text(json.dumps(about | {"contenders": as_json(steps)}) + "\n")
    written = [str(folder / "memory.json")]
    try:
        written.append(str(save_plot(steps, folder / "memory.png", title=f"{model}, scaled down, on {device}")))
    except ImportError as error:
        screen.print(str(error))
    screen.print("Written: " + ", ".join(written))
