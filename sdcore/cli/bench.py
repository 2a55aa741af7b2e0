"""Answers `sdcore bench`: what ours and the public peers take on this machine, and two results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from sdcore.bench.options import DIVERGENCES, STATES, SUITES, SWEEPS
from sdcore.cli.running import console, quiet_libraries, readable_errors

DEFAULT_SUITE: Final = "divergence"
COMPARE: Final = "compare"
PEERS: Final = ("naive", "compile", "torch", "trl", "liger", "orda", "fla")
TRAINERS: Final = ("sdpo", "sdft", "gkd", "distillation")
PRESETS: Final = "qwen3-0.6b, qwen3-4b, qwen3-8b, llama-3.1-8b, gemma-3-4b or qwen3-30b-a3b"
# Options that not every suite has, and which do.
ONLY: Final = {
    "peers": ("divergence", "trainer"),
    "trainers": ("trainer",),
    "sweeps": ("scaling",),
    "divergences": (DEFAULT_SUITE,),
    "states": (DEFAULT_SUITE,),
    "everything": ("divergence", "prefix", "scaling"),
    "readme": (DEFAULT_SUITE,),
    "threshold": (COMPARE,),
    "files": (COMPARE,),
}


def bench(
    suite: Annotated[str, typer.Argument(help=f"Of {', '.join(SUITES)}; or {COMPARE}.")] = DEFAULT_SUITE,
    files: Annotated[list[Path] | None, typer.Argument(help="Of compare: two JSON files of one suite.")] = None,
    peers: Annotated[str | None, typer.Option(help=f"divergence: of {','.join(PEERS)}; default: all.")] = None,
    trainers: Annotated[str | None, typer.Option(help=f"trainer: of {','.join(TRAINERS)}; default: all.")] = None,
    sweeps: Annotated[
        str | None, typer.Option(help=f"scaling: which size varies, of {','.join(SWEEPS)}; default: one by one.")
    ] = None,
    states: Annotated[
        str | None,
        typer.Option(
            help=f"divergence: hidden states and head of a trained model at its own answers ({' or '.join(STATES)}; "
            "made once), or a file of them. Default: random ones."
        ),
    ] = None,
    divergences: Annotated[
        str | None, typer.Option(help=f"divergence: of {','.join(DIVERGENCES)}; default: all but forward.")
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"Sizes of a real model, random weights: {PRESETS}.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Sizes. divergence: N rows, V vocabulary, H hidden (N=512,V=32000). The others: P, C, R tokens of "
            "prompt, context, completion; G completions; L layers (P=512,G=4). trees: L alone. scaling: what does not "
            "vary, of all but C, once; elsewhere it may be repeated."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; default: the suite's own choice.")] = None,
    seconds: Annotated[float | None, typer.Option(help="To spend on repeating a row; 0: each once.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, seconds: does it all work?")] = False,
    everything: Annotated[
        bool, typer.Option(help="divergence, prefix, scaling: all sizes; on a CPU an hour and more.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch; default: torch's own choice.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for JSON, tables and plots.",
            show_default="benchmarks/results/<device> in a checkout of sdcore, else ./sdcore-bench/<device>",
        ),
    ] = None,
    readme: Annotated[
        bool,
        typer.Option(help="Measure nothing, renew the results in a checkout's benchmarks/README.md."),
    ] = False,
    threshold: Annotated[
        float | None, typer.Option(help="compare: a row is slower from this ratio of medians on; default: 1.1.")
    ] = None,
) -> None:
    """Measure speed, memory and accuracy, ours beside the public peers', on this machine.

    \b
    A table has the limit in each row (the matrix products alone, timed in the same run), median and spread; nothing is
    timed before its result was found equal. On a machine that does nothing else, minutes on two cores:
      sdcore bench --quick                             does it all work? seconds
      sdcore bench                                     the output layer and its loss; ten minutes
      sdcore bench --model qwen3-8b --shape N=256 --dtype bf16 --peers naive,trl
      sdcore bench --states smollm2                    the same on a real model's states and head
      sdcore bench --states gemma --dtype bf16 --divergences jsd     V=262,144: one at a time
      sdcore bench prefix                              passes that share their prompt; ten minutes
      sdcore bench prefix --model qwen3-0.6b --shape L=2,G=4
      sdcore bench trees                               conversations: views of turns, searches, forks; 40 minutes
      sdcore bench step                                SDPO's update beside TRL's; half an hour
      sdcore bench trainer                             whole trainers beside TRL's; ten minutes
      sdcore bench trainer --trainers sdpo --shape P=256,G=4
      sdcore bench scaling                             how time and memory grow with N, V, G, P; ten minutes
      sdcore bench scaling --sweeps N --model qwen3-0.6b
      sdcore bench compare before.json after.json      which rows got slower? exit code 1 if any did
    Peers that are not installed keep a row that says what to install; all but fla: pip install "sdcore[bench]"
    """
    with readable_errors("bench"):
        sizes = {"model": model, "states": states, "shapes": tuple(shape or ()), "dtype": dtype, "seconds": seconds}
        sizes |= {"quick": quick, "everything": everything}
        chosen = {**sizes, "device": device, "threads": threads, "output": output}
        names = {"peers": peers, "trainers": trainers, "sweeps": sweeps, "divergences": divergences}
        own = {**names, "readme": readme, "threshold": threshold}
        _refuse(suite, {**chosen, **own, "files": files})
        if suite == COMPARE:
            _compare(files or [], 1.1 if threshold is None else threshold)
        elif readme:
            from sdcore.bench.readme import update

            typer.echo(f"renewed {', '.join(map(str, update()))}")
        else:
            _run(suite, names, chosen)


def _refuse(suite: str, given: dict[str, Any]) -> None:
    """Raises `ArgumentError` for an option that the suite does not have."""
    from sdcore.errors import ArgumentError

    if suite not in (*SUITES, COMPARE):
        raise ArgumentError(f"suite must be one of {', '.join((*SUITES, COMPARE))}, got {suite!r}")
    for name, value in given.items():
        suites = ONLY.get(name, SUITES)
        if suite not in suites and value not in (None, False, ()):
            raise ArgumentError(
                f"{name.removesuffix('s') if name == 'shapes' else name} is for {', '.join(suites)}, not for {suite}"
            )


def _run(suite: str, names: dict[str, str | None], chosen: dict[str, Any]) -> None:
    from contextlib import nullcontext

    from sdcore.bench.options import Options, split_names

    kind, allowed = {"trainer": ("trainers", TRAINERS), "scaling": ("sweeps", SWEEPS)}.get(suite, ("peers", PEERS))
    text = names[kind] if names[kind] is not None else names["peers"]
    divergences = split_names(names["divergences"], DIVERGENCES, "divergences")
    options = Options(suite=suite, peers=split_names(text, allowed, kind), divergences=divergences, **chosen)
    # The output layer needs no transformers.
    with nullcontext() if suite == DEFAULT_SUITE and options.states not in STATES else quiet_libraries():
        from sdcore.bench.suite import run
        from sdcore.bench.suites import suite_named

        run(suite_named(suite), options)


def _compare(files: list[Path], threshold: float) -> None:
    """Prints which rows got slower; exit code 1 if any did.

    How far two runs of the same code are apart says what threshold makes sense.
    """
    from sdcore.bench.compare import compare, comparison_table
    from sdcore.errors import ArgumentError

    if len(files) != 2:
        raise ArgumentError(f"compare takes two files, before and after, got {len(files)}")
    if not threshold >= 1:
        raise ArgumentError(f"threshold must be at least 1, got {threshold}")
    comparison = compare(*files)
    slower = comparison.slower(threshold)
    console().print(comparison_table(comparison, threshold))
    typer.echo(f"{len(slower)} of {len(comparison.rows)} rows are slower than {threshold:g} times")
    if slower:
        raise typer.Exit(code=1)
