"""The page of estimates for a GPU that is not there: what the kernels are compiled to, and what follows by arithmetic.

    python -m sdkernels.roofline                            # the tables, compiled now (a minute or two on two cores)
    python -m sdkernels.roofline --write docs/roofline.md   # compile, and put them between the page's markers
    python -m sdkernels.roofline --write docs/roofline.md --keep-compiled   # the arithmetic alone, from the page's own

The arithmetic, and what it leaves out, is in `gpu_estimates.py`. Launches are those of `triton_backend/configs.py`, not
of a table that was measured: who has one has measurements, too.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .compile_check import CHIPS, launched_by
from .gpu_estimates import (
    ASSUMED,
    CHUNK,
    GOAL_WORKSPACES,
    GOALS,
    GPUS,
    HIDDEN,
    WORKSPACES,
    Gpu,
    Step,
    entries_of,
    estimate,
    step,
)
from .machine_code import Compiled, as_columns, from_columns, measure_all


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]], numbers_from: int) -> str:
    """A table whose columns from `numbers_from` on are numbers."""
    rule = ["---" if i < numbers_from else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, rule, *rows))


COMPILED_HEAD: tuple[str, ...] = (
    "kernel",
    "variant",
    "block",
    "warps",
    "registers",
    "shared bytes",
    "bytes read",
    "bytes written",
)
COMPILED_HEAD += ("instructions", "special", "multiply-add", "ALU")


def compiled_tables(rows: Mapping[str, Sequence[Compiled]], triton: str) -> str:
    parts = [f"Compiled with Triton {triton}."]
    for arch, found in rows.items():
        parts += [f"### {arch}, compiled", markdown(COMPILED_HEAD, [as_columns(row) for row in found], 2)]
    return "\n\n".join(parts)


def read_compiled(text: str) -> tuple[dict[str, list[Compiled]], str]:
    """What `compiled_tables` wrote, and the version of Triton. Raises ValueError for another text."""
    version = re.search(r"^Compiled with Triton (\S+)\.$", text, re.MULTILINE)
    if version is None:
        raise ValueError("the compiled part must say with which Triton, got a page without")
    found: dict[str, list[Compiled]] = {}
    for line in text.splitlines():
        if heading := re.fullmatch(r"### (\w+), compiled", line):
            found[heading[1]] = []
        elif line.startswith("| ") and not line.startswith(("| kernel", "| ---")):
            found[next(reversed(found))].append(from_columns([cell.strip() for cell in line.strip("| ").split(" | ")]))
    return found, version[1]


def estimate_tables(compiled: Mapping[str, Sequence[Compiled]]) -> str:
    """Everything that follows from the compiled part by arithmetic."""
    parts = ["### Hardware", _hardware_table(), "### Whole steps: what the goals ask", _goal_table(compiled)]
    for gpu in GPUS:
        parts += [f"### Whole steps on {gpu.name}", _step_table(gpu, compiled[gpu.arch])]
    for gpu in GPUS:
        parts += [f"### Kernels on {gpu.name}", _kernel_table(gpu, compiled[gpu.arch])]
    return "\n\n".join(parts)


def _hardware_table() -> str:
    head = ("GPU", "source", "architecture", "multiprocessors", "GHz", "bf16 TFLOP/s", "TB/s", "bytes per clock each")
    rows = [
        (
            *(gpu.name, gpu.source, gpu.arch, gpu.multiprocessors, f"{gpu.clock / 1e9:.2f}", f"{gpu.bf16 / 1e12:.0f}"),
            *(f"{gpu.bandwidth / 1e12:.1f}", f"{gpu.bandwidth / gpu.clock / gpu.multiprocessors:.0f}"),
        )
        for gpu in GPUS
    ]
    return markdown(head, rows, 3)


def _named(rows: Sequence[Compiled]) -> dict[tuple[str, str], Compiled]:
    return {(row.kernel, row.variant): row for row in rows}


def _goal_table(compiled: Mapping[str, Sequence[Compiled]]) -> str:
    rows = [
        _goal_row(gpu, _named(compiled[gpu.arch]), head, hidden)
        for gpu in GPUS
        for head in GOAL_WORKSPACES
        for hidden in GOALS
    ]
    columns: tuple[str, ...] = (
        "GPU",
        "head",
        "H",
        "MB",
        "goal",
        "KL",
        f"KL, chunks of whole {ASSUMED.product_rows} rows",
    )
    columns += ("JSD, the same", "KL, the same, against the goal", "JSD", "of the KL most beside the products")
    return markdown(columns, rows, 2)


def _goal_row(gpu: Gpu, named: Mapping[tuple[str, str], Compiled], head: str, hidden: int) -> list[object]:
    workspace, goal = GOAL_WORKSPACES[head], GOALS[hidden]

    def of(kind: str, multiple: int) -> Step:
        return step(gpu, named, kind, hidden, workspace, frozen=head == "frozen", multiple=multiple)

    as_planned, kl, jsd = of("reverse KL", 1), of("reverse KL", ASSUMED.product_rows), of("JSD", ASSUMED.product_rows)
    shares = [_share(found) for found in (as_planned, kl, jsd)]
    return [
        *(gpu.name, head, hidden, workspace, f"{goal:.0%}", *shares),
        *(_verdict(kl, goal), _verdict(jsd, goal), _most(kl)),
    ]


def _most(found: Step) -> str:
    """What costs most beside the products, and how much of the limit that is."""
    parts = {
        "the kernels": found.kernels,
        "tiles written and read": found.tiles,
        "the head's gradient": found.accumulated,
        "rows rounded up": found.products - found.limit,
    }
    largest = max(parts, key=lambda name: parts[name])
    return f"{largest}, {parts[largest] / found.limit:.0%}"


def _share(found: Step) -> str:
    return f"{found.least_share:.0%} to {found.most_share:.0%}"


def _verdict(found: Step, goal: float) -> str:
    if found.least_share >= goal:
        return "reached, even if nothing hides"
    return "open: depends on what hides" if found.most_share >= goal else "missed, even if all hides"


def _step_table(gpu: Gpu, rows: Sequence[Compiled]) -> str:
    named, lines = _named(rows), []
    for frozen in (False, True):
        for hidden in HIDDEN:
            for workspace in WORKSPACES:
                kl, jsd = (step(gpu, named, kind, hidden, workspace, frozen=frozen) for kind in ("reverse KL", "JSD"))
                parts = (kl.limit, kl.products, kl.tiles, kl.accumulated, kl.kernels, jsd.kernels)
                numbers = [f"{1e3 * seconds:.1f}" for seconds in parts]
                lines.append(
                    ("frozen" if frozen else "trained", hidden, workspace, kl.chunk, *numbers, _share(kl), _share(jsd))
                )
    head = ("head", "H", "MB", "rows a chunk", "limit ms", "products ms", "tiles ms", "head's gradient ms")
    return markdown((*head, "KL kernels ms", "JSD kernels ms", "KL of the limit", "JSD of the limit"), lines, 1)


def _kernel_table(gpu: Gpu, rows: Sequence[Compiled]) -> str:
    lines = []
    for row in rows:
        found, entries = estimate(row, gpu, CHUNK), entries_of(row)
        lines.append(
            (
                *(row.kernel, row.variant, f"{row.read * entries / 1e3:.4g}", f"{row.written * entries / 1e3:.4g}"),
                *(found.programs, found.programs * row.warps, f"{found.in_flight / 1024:.0f}"),
                *(f"{1e6 * s:.1f}" for s in (found.memory, found.issue, found.special, found.alu, found.seconds)),
                found.bound,
            )
        )
    head = ("kernel", "variant", "kB read a row", "kB written", "programs", "warps", "KiB in flight", "memory µs")
    return markdown((*head, "instructions µs", "special µs", "ALU µs", f"{CHUNK} rows µs", "bound by"), lines, 2)


def between(page: str, name: str) -> str:
    """What a page has between the markers of that name. Raises ValueError where it has none."""
    return _split(page, name)[1].strip("\n")


def with_text(page: str, name: str, text: str) -> str:
    """The page with another text between the markers of that name."""
    before, _, after = _split(page, name)
    return f"{before}\n\n{text}\n\n{after}"


def _split(page: str, name: str) -> tuple[str, str, str]:
    found = re.fullmatch(f"(.*<!-- {name} -->)(.*)(<!-- /{name} -->.*)", page, re.DOTALL)
    if found is None:
        raise ValueError(f"the page must have the markers <!-- {name} --> and <!-- /{name} -->, got neither or one")
    return found[1], found[2], found[3]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdkernels.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the markers of this page")
    parser.add_argument(
        "--keep-compiled", action="store_true", help="take the compiled part from the page: no compiler"
    )
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.keep_compiled and options.write is None:
        parser.error("--keep-compiled needs --write, the page that has the compiled part")
    if not options.keep_compiled and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, under which nothing is compiled; unset it")
    page = "" if options.write is None else options.write.read_text(encoding="utf-8")
    if options.write is not None:
        between(page, "estimates")  # before a minute of compiling
    if options.keep_compiled:
        rows, version = read_compiled(between(page, "compiled"))
    else:
        rows, version = compiled_now(options.jobs)
    tables = {"compiled": compiled_tables(rows, version), "estimates": estimate_tables(rows)}
    if options.write is None:
        sys.stdout.write("\n\n".join(tables.values()) + "\n")
        return 0
    for name, text in tables.items():
        page = with_text(page, name, text)
    options.write.write_text(page, encoding="utf-8")
    return 0


def compiled_now(jobs: int) -> tuple[dict[str, list[Compiled]], str]:
    """Every kernel in every variant for every architecture, and the version of Triton."""
    from importlib.metadata import version

    from .triton_backend.configs import TABLE

    return {arch: list(measure_all(arch, launched_by(TABLE[arch]), jobs)) for arch in CHIPS}, version("triton")


if __name__ == "__main__":
    sys.exit(main())
