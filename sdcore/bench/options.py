"""Says what may be chosen on the command line of a suite, what a choice of sizes means, and where results go.

    Options(suite="prefix", model="qwen3-0.6b", shapes=("L=2,G=4",), quick=False)

Sizes are written as the rest of the package names them: `N` rows, `V` vocabulary, `H` hidden, `P`/`C`/`R` tokens of
prompt, context and completion, `G` completions, `L` layers. What a shape does not say comes from the model, or from the
suite's own sizes.

In a checkout of sdcore, results go to `benchmarks/results/<device>/`, whose newest files benchmarks/README.md shows;
elsewhere to `sdcore-bench/<device>/` of the working directory. A suite that is not `divergence` has a folder there, and
so has a run that is not the suite's own: `quick`, `grid`, or what was chosen on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import ArgumentError
from .models import REAL_MODELS, folder_name

SOURCE: Final = Path(__file__).resolve().parents[2]
ELSEWHERE: Final = "sdcore-bench"
DIVERGENCE: Final = "divergence"
DTYPE_NAMES: Final = ("fp32", "bf16")
DEVICES: Final = ("cpu", "cuda")
LETTERS: Final = {
    DIVERGENCE: "NVH",
    **dict.fromkeys(("prefix", "step", "trainer"), "PCRGL"),
    "scaling": "NVHPRGL",
    "trees": "L",
}
SUITES: Final = tuple(LETTERS)
# Whose `everything` is not the run that benchmarks/README.md shows.
WITH_GRID: Final = ("prefix", "scaling")
# Of the suite `scaling`, by the letter that varies.
SWEEPS: Final = ("N", "V", "G", "P")
# Of the suite `divergence`: what its rows compute, and the real models that `states` brings.
DIVERGENCES: Final = ("forward", "reverse", "jsd", "top-100")
STATES: Final = ("smollm2", "gemma")


# One prompt with its completions, as RL-like methods train on them; on a CPU what takes minutes and not hours.
WORKLOADS: Final = {
    "cuda": {"prompt": 1024, "context": 256, "completion": 512, "completions": 8},
    "cpu": {"prompt": 512, "context": 128, "completion": 64, "completions": 4},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Describes a run of a suite. Raises `ArgumentError`, which names the option."""

    suite: str
    device: str | None = None  # None: cuda where there is one
    quick: bool = False  # tiny sizes: does it all work?
    everything: bool = False  # every combination of the suite's own sizes
    seconds: float | None = None  # to spend on repeating a row; None: the suite's default, 0: each row once
    threads: int | None = None  # of torch; None: its own choice
    output: Path | None = None  # a folder; None: see above
    model: str | None = None  # a key of REAL_MODELS
    shapes: tuple[str, ...] = ()  # "KEY=INT,..."
    dtype: str | None = None  # one of DTYPE_NAMES; None: the suite's own
    peers: tuple[str, ...] | None = None  # None: all
    divergences: tuple[str, ...] | None = None  # of DIVERGENCES; None: the suite's own choice
    states: str | None = None  # of STATES, or a path: hidden states of a real model in the place of random ones

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ArgumentError(f"suite must be one of {', '.join(SUITES)}, got {self.suite!r}")
        for name, chosen, allowed in (
            ("device", self.device, DEVICES),
            ("dtype", self.dtype, DTYPE_NAMES),
            ("model", self.model, tuple(REAL_MODELS)),
        ):
            if chosen is not None and chosen not in allowed:
                raise ArgumentError(f"{name} must be one of {', '.join(allowed)}, got {chosen!r}")
        if self.seconds is not None and not self.seconds >= 0:
            raise ArgumentError(f"seconds must be at least 0, got {self.seconds}")
        if self.threads is not None and self.threads < 1:
            raise ArgumentError(f"threads must be at least 1, got {self.threads}")
        if self.quick and (self.model or self.shapes or self.everything or self.states):
            raise ArgumentError("quick runs have sizes of their own: leave out model, shape, states and everything")
        if self.states and (self.model or self.suite != DIVERGENCE):
            raise ArgumentError(f"states are of {DIVERGENCE} and bring a model: leave out {self.model or self.suite}")
        for shape in self.shapes:
            parse_shape(shape, self.letters)
        if self.suite == "scaling" and len(self.shapes) > 1:
            raise ArgumentError(f"scaling takes one shape, of the sizes that do not vary, got {len(self.shapes)}")

    @property
    def letters(self) -> str:
        return "N" if self.states else LETTERS[self.suite]

    @property
    def sizes(self) -> list[dict[str, int]]:
        """Returns the sizes of each shape, by letter; one empty one where none was given."""
        return [parse_shape(shape, self.letters) for shape in self.shapes] or [{}]

    @property
    def chosen(self) -> bool:
        """True if the sizes are not the suite's own."""
        return bool(self.model or self.shapes)

    @property
    def kind(self) -> str:
        """Names the folder of results of one kind, of which the documents show the newest."""
        return "states" if self.states in STATES and not self.chosen and self.peers is None else self.suite

    @property
    def variant(self) -> str:
        """Names the folder of what is not the suite's own run; empty for that one."""
        if self.quick:
            return "quick"
        parts = [self.model, *self.shapes, self.dtype, *(self.divergences or ()), *(self.peers or ())]
        parts.insert(0, Path(self.states).stem if self.states else None)
        chosen = " ".join(part for part in parts if part)
        return chosen or ("grid" if self.everything and self.suite in WITH_GRID else "")


def parse_shape(text: str, letters: str) -> dict[str, int]:
    """Reads `"N=512,V=32000"` by letter. Raises `ArgumentError`."""
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        letter, equals, number = (part.strip() for part in entry.partition("="))
        if letter not in letters or len(letter) != 1 or not equals or not number.isdecimal() or int(number) < 1:
            raise ArgumentError(
                f"shape must be like {','.join(f'{letter}=1024' for letter in letters[:2])}, of the letters "
                f"{', '.join(letters)}, got {text!r}"
            )
        sizes[letter] = int(number)
    return sizes


def workload(sizes: Mapping[str, int], device: str) -> dict[str, Any]:
    """Returns the sizes of a case: those of a shape, or the device's own where it says nothing."""
    return {
        name: sizes.get(letter, size) for letter, (name, size) in zip("PCRG", WORKLOADS[device].items(), strict=True)
    }


def split_names(text: str | None, allowed: Sequence[str], name: str) -> tuple[str, ...] | None:
    """Splits a comma-separated choice among `allowed`; None stays None. Raises `ArgumentError`."""
    if text is None:
        return None
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    wrong = [part for part in chosen if part not in allowed]
    if wrong or not chosen:
        raise ArgumentError(f"{name} must be of {', '.join(allowed)}, got {', '.join(wrong) or 'nothing'}")
    return chosen


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


def newest_results(results: Path, suite: str = "") -> list[Path]:
    """Finds the newest file of every device; file names are dates. Empty where nothing is committed yet.

    `suite` is the folder of a suite that is not the divergences'.
    """
    newest = {path.parent: path for path in sorted(results.glob(f"*/{suite}/*.json" if suite else "*/*.json"))}
    return list(newest.values())
