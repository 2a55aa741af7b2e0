"""Says where results are written and found.

In a checkout of sdcore, results go to `benchmarks/results/<device>/`, whose newest files benchmarks/README.md shows;
elsewhere to `sdcore-bench/<device>/` of the working directory. A suite that is not `divergence` has a folder there, and
so has a run that is not the suite's own: `quick`, `grid`, or what was chosen on the command line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).resolve().parents[2]
ELSEWHERE: Final = "sdcore-bench"
DIVERGENCE: Final = "divergence"


def checkout() -> Path | None:
    """Returns the root of the checkout that this code is part of; None for an installed wheel."""
    return SOURCE if (SOURCE / "pyproject.toml").is_file() and (SOURCE / "benchmarks").is_dir() else None


def results_folder() -> Path:
    """Returns the folder of all devices, for a run in the working directory."""
    root = checkout()
    if root is not None and Path.cwd().resolve().is_relative_to(root):
        return root / "benchmarks" / "results"
    return Path(ELSEWHERE)


def result_path(*, suite: str, device: str, date: str, variant: str = "", output: Path | None = None) -> Path:
    """Returns the JSON of a run, beside which its tables and plots lie; `output`, a folder, takes them instead."""
    if output is not None:
        return output / f"{suite}-{date}.json"
    folder = results_folder() / device
    return folder / ("" if suite == DIVERGENCE else suite) / folder_name(variant) / f"{date}.json"


def folder_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def newest_results(results: Path, suite: str = "") -> list[Path]:
    """Finds the newest file of every device; file names are dates. Empty where nothing is committed yet.

    `suite` is the folder of a suite that is not the divergences'.
    """
    newest = {path.parent: path for path in sorted(results.glob(f"*/{suite}/*.json" if suite else "*/*.json"))}
    return list(newest.values())
