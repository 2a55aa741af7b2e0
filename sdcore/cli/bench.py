"""`sdcore bench`: what ours and the public peers take on this machine, and two results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

from sdcore.bench.options import SWEEPS
from sdcore.cli.running import console, quiet_libraries, readable_errors

if TYPE_CHECKING:
    from sdcore.bench.options import Options

DEFAULT_SUITE: Final = "divergence"
PEERS: Final = ("naive", "compile", "trl", "liger", "orda", "fla")
TRAINERS: Final = ("sdpo", "sdft", "gkd", "distillation")
PRESETS: Final = "qwen3-0.6b, qwen3-4b, qwen3-8b, llama-3.1-8b, gemma-3-4b or qwen3-30b-a3b"

Model = Annotated[str | None, typer.Option(help=f"Sizes of a real model, random weights: {PRESETS}.")]
PassShape = Annotated[
    list[str] | None,
    typer.Option(help="P, C, R tokens of prompt, context, completion; G completions; L layers: P=512,R=64,G=4."),
]
Dtype = Annotated[str | None, typer.Option(help="fp32 or bf16; default: the suite's own choice.")]
Seconds = Annotated[float | None, typer.Option(help="To spend on repeating a row; 0: each once.")]
Quick = Annotated[bool, typer.Option(help="Tiny sizes, seconds: does it all work?")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
Threads = Annotated[int | None, typer.Option(help="Of torch; default: torch's own choice.")]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Folder for JSON, tables and plots.",
        show_default="benchmarks/results/<device> in a checkout of sdcore, else ./sdcore-bench/<device>",
    ),
]


class SuiteOrCompare(TyperGroup):
    """`sdcore bench --quick` is `sdcore bench divergence --quick`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = [DEFAULT_SUITE, *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(cls=SuiteOrCompare, add_completion=False, rich_markup_mode=None)


@bench.callback()
def suites() -> None:
    """Measure speed, memory and accuracy, ours beside the public peers', on this machine.

    \b
    Without a suite, "divergence". A table has the limit in each row (the matrix products alone, timed in the same
    run), median and spread; nothing is timed before its result was found equal. On a machine that does nothing else:
      sdcore bench --quick                             does it all work? seconds
      sdcore bench                                     the output layer and its loss; ten minutes
      sdcore bench --model qwen3-4b --shape N=512      your sizes
      sdcore bench prefix                              passes that share their prompt; ten minutes
      sdcore bench step                                SDPO's update beside TRL's; half an hour
      sdcore bench trainer                             whole trainers beside TRL's; ten minutes
      sdcore bench scaling                             how time and memory grow with N, V, G, P; ten minutes
      sdcore bench compare before.json after.json      which rows got slower?
    Peers that are not installed keep a row that says what to install; all but fla: pip install "sdcore[bench]"
    """


@bench.command()
def divergence(
    peers: Annotated[str | None, typer.Option(help=f"Of {','.join(PEERS)}; default: all.")] = None,
    model: Model = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="N rows, V vocabulary, H hidden: N=512,V=32000,H=1024; may be repeated.")
    ] = None,
    dtype: Dtype = None,
    seconds: Seconds = None,
    quick: Quick = False,
    everything: Annotated[bool, typer.Option(help="Every divergence and dtype at every shape.")] = False,
    device: Device = None,
    threads: Threads = None,
    output: Output = None,
    readme: Annotated[
        bool, typer.Option(help="Measure nothing, renew the results in README.md; in a checkout of sdcore only.")
    ] = False,
) -> None:
    """The output layer and its divergence, forward and backward, as multiples of the four bare matrix products.

    \b
    Speed, memory, and errors against float64, of plain PyTorch, torch.compile, TRL, Liger, orda-kernel and
    flash-linear-attention beside ours; ten minutes on two cores:
      sdcore bench divergence
    The head of Qwen3-8B with 256 rows, in bfloat16, without what would be compiled:
      sdcore bench divergence --model qwen3-8b --shape N=256 --dtype bf16 --peers naive,trl
    """
    with readable_errors("bench"):
        if readme:
            from sdcore.bench.readme import update

            typer.echo(f"renewed {update()}")
            return
        from sdcore.bench.options import split_names

        options = _options(
            DEFAULT_SUITE,
            model=model,
            shapes=tuple(shape or ()),
            dtype=dtype,
            seconds=seconds,
            quick=quick,
            everything=everything,
            device=device,
            threads=threads,
            output=output,
            peers=split_names(peers, PEERS, "peers"),
        )
        from sdcore.bench.divergence import run

        run(options)


@bench.command()
def prefix(
    model: Model = None,
    shape: PassShape = None,
    dtype: Dtype = None,
    seconds: Seconds = None,
    quick: Quick = False,
    everything: Annotated[bool, typer.Option(help="The grid of sizes; an hour on a CPU with --seconds 0.")] = False,
    device: Device = None,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """The passes of student and teacher, and the whole step, naive and with the prompt computed once.

    \b
    Beside what the FLOPs that are left allow; ten minutes on two cores:
      sdcore bench prefix
    Two layers of Qwen3-0.6B and four completions:
      sdcore bench prefix --model qwen3-0.6b --shape L=2,G=4
    """
    with readable_errors("bench"), quiet_libraries():
        options = _options(
            "prefix",
            model=model,
            shapes=tuple(shape or ()),
            dtype=dtype,
            seconds=seconds,
            quick=quick,
            everything=everything,
            device=device,
            threads=threads,
            output=output,
        )
        from sdcore.bench.prefix import run

        run(options)


@bench.command()
def step(
    model: Model = None,
    shape: PassShape = None,
    dtype: Dtype = None,
    seconds: Seconds = None,
    quick: Quick = False,
    device: Device = None,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """The update phase of a step of SDPO, ours beside TRL's on the same tokens.

    \b
    Loss and gradients are compared before anything is timed; half an hour on two cores:
      sdcore bench step
    """
    with readable_errors("bench"), quiet_libraries():
        options = _options(
            "step",
            model=model,
            shapes=tuple(shape or ()),
            dtype=dtype,
            seconds=seconds,
            quick=quick,
            device=device,
            threads=threads,
            output=output,
        )
        from sdcore.bench.step import run

        run(options)


@bench.command()
def trainer(
    trainers: Annotated[
        str | None, typer.Option("--trainers", "--peers", help=f"Of {','.join(TRAINERS)}; default: all.")
    ] = None,
    model: Model = None,
    shape: PassShape = None,
    dtype: Dtype = None,
    seconds: Seconds = None,
    quick: Quick = False,
    device: Device = None,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """One optimizer step's update by TRL's SDPO, SDFT, GKD and Distillation trainers, and by the fused ones.

    \b
    Sampling left out, vocabulary 151,936; ten minutes on two cores:
      sdcore bench trainer
    One of them, smaller:
      sdcore bench trainer --trainers sdpo --shape P=256,G=4
    """
    with readable_errors("bench"), quiet_libraries():
        from sdcore.bench.options import split_names

        options = _options(
            "trainer",
            model=model,
            shapes=tuple(shape or ()),
            dtype=dtype,
            seconds=seconds,
            quick=quick,
            device=device,
            threads=threads,
            output=output,
            peers=split_names(trainers, TRAINERS, "trainers"),
        )
        from sdcore.bench.trainer import run

        run(options)


@bench.command()
def scaling(
    sweeps: Annotated[
        str | None, typer.Option(help=f"Which size varies, of {','.join(SWEEPS)}; default: one after the other.")
    ] = None,
    model: Model = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="What the other sizes are: N rows, V vocabulary, H hidden of the output layer; P, R tokens of prompt "
            "and completion, G completions, L layers of the passes: V=128256,H=1024."
        ),
    ] = None,
    dtype: Dtype = None,
    seconds: Seconds = None,
    quick: Quick = False,
    everything: Annotated[bool, typer.Option(help="Larger sizes too, in both dtypes; an hour and more.")] = False,
    device: Device = None,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """How time and peak memory grow with N rows, V ids, G completions and P prompt tokens, one of them at a time.

    \b
    The fused loss beside plain torch (N, V), the packed pass beside a batch that repeats the prompt (G, P), and the
    bare matrix products; what would not fit the memory says so. One picture; ten minutes on two cores:
      sdcore bench scaling
    Rows of the loss only, at the output layer of Qwen3-0.6B:
      sdcore bench scaling --sweeps N --model qwen3-0.6b
    """
    with readable_errors("bench"), quiet_libraries():
        from sdcore.bench.options import split_names

        options = _options(
            "scaling",
            model=model,
            shapes=(shape,) if shape else (),
            dtype=dtype,
            seconds=seconds,
            quick=quick,
            everything=everything,
            device=device,
            threads=threads,
            output=output,
            peers=split_names(sweeps, SWEEPS, "sweeps"),
        )
        from sdcore.bench.scaling import run

        run(options)


@bench.command()
def compare(
    before: Annotated[Path, typer.Argument(help="JSON of a suite.")],
    after: Annotated[Path, typer.Argument(help="JSON of the same suite.")],
    threshold: Annotated[float, typer.Option(help="A row is slower from this ratio of medians on.")] = 1.1,
) -> None:
    """Which rows got slower from one result to the other? Exit code 1 if any did.

    \b
    Both from one quiet machine; how far two runs of the same code are apart says what threshold makes sense:
      sdcore bench compare before.json after.json --threshold 1.1
    """
    with readable_errors("bench compare"):
        from sdcore.bench.compare import compare as compared
        from sdcore.bench.compare import comparison_table
        from sdcore.errors import ArgumentError

        if not threshold >= 1:
            raise ArgumentError(f"threshold must be at least 1, got {threshold}")
        found = compared(before, after)
        slower = found.slower(threshold)
        console().print(comparison_table(found, threshold))
        typer.echo(f"{len(slower)} of {len(found.rows)} rows are slower than {threshold:g} times")
    if slower:
        raise typer.Exit(code=1)


def _options(suite: str, **chosen: Any) -> Options:
    from sdcore.bench.options import Options

    return Options(suite=suite, **chosen)


__all__ = ["bench"]
