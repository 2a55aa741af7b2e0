"""Makes what is run at a point of the suite `scaling`: one size of one sweep, everything else fixed.

A point has N rows or V ids of the output layer with its loss (Jensen–Shannon, forward and backward; ours beside plain
torch), or G completions or P prompt tokens of the student's pass (packed beside the naive batch).

What differs from the other suites: large sizes are made of a few distinct rows, or completions, that repeat. No time
and no byte depends on it, and the right answer is that of the few: the same loss, gradients of the states that repeat,
gradients of the weights in proportion. So every size is checked, also where nothing but ours fits the memory, at a
small price. What such a check cannot see is a mix-up of two rows that are equal.

The points of the output layer need no transformers, which is why what the passes need is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from .. import oracle
from ..limit import HEAD_BYTES, SHARED, Products
from ..measure import FLOAT32, model_bytes, peak_bytes
from ..models import size_of, with_layers
from ..options import LETTERS, SWEEPS, Options, parse_shape
from ..oracle import solve
from ..passes import compare
from ..peers import PLAIN, SDCORE, prepare
from ..rows import Outcome, PassRow, Step
from ..shapes import DTYPES, JSD, MIB, SPEED_NOISE, CaseInputs, Group, Shape, make_case_inputs

if TYPE_CHECKING:
    from ..cases import Case

OF_HEAD: Final = ("N", "V")
NAIVE, PACKED = "naive batch", "packed"
LIMIT: Final = "matmuls alone"
# Distinct rows at most; the others repeat these.
MOST_ROWS: Final = 256
# From here on a row takes a CPU seconds, and is timed once after the run that was checked.
LARGE_ENTRIES, LARGE_TOKENS = 1 << 26, 1 << 13  # N·V; tokens of the naive batch
# Float64 tiles of the oracle, see `oracle`.
ORACLE_BYTES: Final = 640 * MIB


class Sizes(NamedTuple):
    """Holds the sizes of a device's sweeps, and what the other sizes are in each of them."""

    sweeps: dict[str, tuple[int, ...]]
    fixed: dict[str, dict[str, int]]
    model: str  # of the passes, as `size_of` takes it
    dtype: str


CPU: Final = Sizes(
    {
        # In 24 GB plain torch ends at 8192 rows of a vocabulary of 32,000, the naive batch at some 200 completions.
        "N": (128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        "V": (8192, 16384, 32768, 65536, 131072, 262144),
        "G": (1, 2, 4, 8, 16, 32, 512),
        "P": (256, 512, 1024, 2048, 4096, 8192),
    },
    {"N": {"V": 32000, "H": 512}, "V": {"N": 512, "H": 512}, "G": {"P": 512, "R": 64}, "P": {"R": 64, "G": 4}},
    "h512, 2 layers",
    "fp32",
)
CUDA: Final = Sizes(
    {
        "N": (1024, 2048, 4096, 8192, 16384, 32768, 65536),
        "V": (16384, 32768, 65536, 131072, 262144),
        "G": (1, 2, 4, 8, 16, 32, 64, 256),
        "P": (512, 1024, 2048, 4096, 8192, 16384),
    },
    {"N": {"V": 128256, "H": 4096}, "V": {"N": 4096, "H": 4096}, "G": {"P": 2048, "R": 256}, "P": {"R": 256, "G": 8}},
    "h2048, heads of 128",
    "bf16",
)
QUICK: Final = Sizes(
    {"N": (8, 64, 512), "V": (300, 600), "G": (1, 3, 8), "P": (24, 48)},
    {"N": {"V": 500, "H": 32}, "V": {"N": 24, "H": 32}, "G": {"P": 48, "R": 8}, "P": {"R": 8, "G": 3}},
    "quick",
    "fp32",
)
# What `everything` has beyond these, in both dtypes.
FURTHER: Final = {"N": (32768, 65536), "V": (524288, 1048576), "G": (128, 256, 1024), "P": (16384, 32768)}


@dataclass(frozen=True, kw_only=True)
class Point:
    """Is one size of one sweep."""

    sweep: str  # the letter that varies, of SWEEPS
    sizes: str  # all of them, as `--shape` writes them
    dtype: str  # a key of DTYPES
    model: str = ""  # as `size_of` takes it; empty for the output layer alone

    @property
    def by_letter(self) -> dict[str, int]:
        return parse_shape(self.sizes, LETTERS["scaling"])

    def of(self, letter: str) -> int:
        return self.by_letter[letter]

    @property
    def size(self) -> int:
        """Returns the one that varies."""
        return self.of(self.sweep)

    @property
    def fixed(self) -> str:
        """Names the others."""
        text = " ".join(f"{letter}={size}" for letter, size in self.by_letter.items() if letter != self.sweep)
        return f"{text} {self.dtype}, {self.model}" if self.model else f"{text} {self.dtype}"

    @property
    def is_large(self) -> bool:
        """True if a row takes a CPU seconds."""
        if self.sweep in OF_HEAD:
            return self.of("N") * self.of("V") >= LARGE_ENTRIES
        return self.of("G") * (self.of("P") + self.of("R")) >= LARGE_TOKENS

    def __str__(self) -> str:
        return f"{self.sweep}={self.size}, {self.fixed}"


def points(options: Options, device: str) -> list[Point]:
    """Lists the sweeps that were asked for, smallest size first; a shape says what the others are meanwhile."""
    own = QUICK if options.quick else CPU if device == "cpu" else CUDA
    (chosen,) = options.sizes
    of_model = None if options.model is None else size_of(options.model)
    dtypes = (options.dtype,) if options.dtype else tuple(DTYPES) if options.everything else (own.dtype,)
    planned = []
    for sweep in options.peers or SWEEPS:
        fixed = own.fixed[sweep]
        if of_model is not None and sweep in OF_HEAD:
            fixed = fixed | (
                {"H": of_model.hidden} if sweep == "V" else {"V": of_model.step_vocab, "H": of_model.hidden}
            )
        fixed = {letter: chosen.get(letter, number) for letter, number in fixed.items()}
        model = "" if sweep in OF_HEAD else with_layers(options.model or own.model, chosen.get("L"))
        sizes = sorted({*own.sweeps[sweep], *(FURTHER[sweep] if options.everything else ())})
        for dtype in dtypes:
            for number in sizes:
                text = ",".join(f"{letter}={size}" for letter, size in ({sweep: number} | fixed).items())
                planned.append(Point(sweep=sweep, sizes=text, dtype=dtype, model=model))
    return planned


class Way(NamedTuple):
    """Is a contender, which the job of a point knows how to build."""

    name: str
    ours: bool = True

    def build(self, this: Job, way: Way) -> Step:
        return this.builds[self.name]()


@dataclass(frozen=True)
class Job:
    """Holds what is run at a point: its contenders by name, the right answer, the limit."""

    case: Point
    builds: dict[str, Callable[[], Step]]
    needed: dict[str, float]  # bytes beyond weights and inputs, by estimate
    exact: Outcome
    products: Products

    @property
    def device(self) -> torch.device:
        return self.products.device


def names(point: Point) -> tuple[str, str]:
    """Names the plain way and ours."""
    return (PLAIN.name, SDCORE.name) if point.sweep in OF_HEAD else (NAIVE, PACKED)


def resident_bytes(point: Point) -> float:
    """Estimates what is there whoever runs: inputs or weights, the right answer and what finds it, the limit."""
    if point.sweep not in OF_HEAD:
        from .prefix import config_of

        few = _few(point)
        kept = _kept_bytes(point, few.completions, "naive")
        # Weights, the reference's gradients and those of the right answer.
        return model_bytes(config_of(few), point.dtype, gradients=True, copies=1) + kept
    rows, vocab, hidden = _shape(point)
    inputs = DTYPES[point.dtype].itemsize * (2 * rows + vocab) * hidden
    reference = 2 * FLOAT32 * (2 * distinct_rows(rows) + vocab) * hidden  # widened inputs, and their gradients
    return inputs + reference + FLOAT32 * rows * hidden + max(ORACLE_BYTES, 2 * HEAD_BYTES)


def job(point: Point, device: str) -> Job:
    """Makes inputs, the right answer and the contenders of a point."""
    return _head_job(point, device) if point.sweep in OF_HEAD else _pass_job(point, device)


def distinct_rows(rows: int) -> int:
    """Says how many are made, of which the others are repetitions: the largest divisor up to `MOST_ROWS`."""
    return next(few for few in range(min(rows, MOST_ROWS), 0, -1) if rows % few == 0)


def distinct_completions(completions: int) -> int:
    """Returns two or three where that divides them: the naive pass of these is the price of the right answer."""
    return next((few for few in (2, 3) if completions % few == 0), 1)


def _shape(point: Point) -> Shape:
    return Shape(point.of("N"), point.of("V"), point.of("H"))


def _head_job(point: Point, device: str) -> Job:
    shape = _shape(point)
    few = make_case_inputs(
        shape._replace(rows=distinct_rows(shape.rows)), point.dtype, noise=SPEED_NOISE, device=device
    )
    times = shape.rows // few.shape.rows
    exact = solve(few, (JSD,))[JSD]
    exact.gradients["hidden"] = exact.gradients["hidden"].repeat(times, 1).div_(times)
    inputs = CaseInputs(
        few.student_hidden.detach().repeat(times, 1).requires_grad_(),
        few.student_weight,
        few.teacher_hidden.repeat(times, 1),
    )
    group = Group(shape, point.dtype, JSD)
    return Job(
        point,
        {contender.name: partial(prepare, contender, inputs, JSD) for contender in (PLAIN, SDCORE)},
        {contender.name: peak_bytes(contender.name, group, device) for contender in (PLAIN, SDCORE)},
        exact,
        Products((), (shape.hidden, shape.vocab), 0, 0, shape.rows, DTYPES[point.dtype], torch.device(device)),
    )


def judge(row: PassRow, outcome: Outcome, exact: Outcome) -> str | None:
    """Notes how far an outcome is from the right answer, and says so if that is more than rounding."""
    if row.group.sweep in OF_HEAD:
        errors = oracle.compare(outcome, exact)
        row.values_error, row.gradient_error = errors.loss, errors.gradient
        return oracle.difference(errors, row.group.dtype)
    from .prefix import EQUAL

    row.values_error, row.gradient_error = compare(outcome, exact)
    for name, error in (("states", row.values_error), ("gradients", row.gradient_error)):
        if not error <= EQUAL[row.group.dtype]:
            return f"{name} off by {error:.1e}"
    return None


def _few(point: Point) -> Case:
    """Returns the distinct completions of a point of the passes."""
    from ..cases import Case
    from .prefix import STUDENT

    return Case(
        model=point.model,
        work=STUDENT,
        prompt=point.of("P"),
        context=0,
        completion=point.of("R"),
        completions=distinct_completions(point.of("G")),
        dtype=point.dtype,
    )


def _kept_bytes(point: Point, completions: int, strategy: str) -> int:
    """Estimates what a pass keeps for its backward."""
    from ...prefix import cost_of_sizes
    from .prefix import config_of

    return cost_of_sizes(
        config_of(_few(point)),
        prompt_tokens=point.of("P"),
        context_tokens=0,
        completion_tokens=point.of("R"),
        completions=completions,
        strategy=strategy,
        dtype_bytes=DTYPES[point.dtype].itemsize,
    ).student.kept_bytes


def _pass_job(point: Point, device: str) -> Job:
    from ..cases import Setup
    from .prefix import SUITE, contenders, make_setup

    few = make_setup(_few(point), device)
    chosen = {contender.name: contender for contender in contenders(few.case) if contender.name in names(point)}
    right = chosen[NAIVE].build(few, chosen[NAIVE])()
    times = point.of("G") // few.case.completions
    gradients = {name: times * gradient for name, gradient in right.gradients.items()}
    exact = Outcome(right.values.repeat(times, 1), gradients)
    few.model.zero_grad()
    case = replace(few.case, completions=point.of("G"))
    direction = few.direction.repeat(times, 1)
    setup = Setup(case, few.model, few.prompt, few.completions * times, [], direction)
    weights = model_bytes(setup.body.config, point.dtype, gradients=False)  # as many bytes as gradients
    return Job(
        point,
        {name: partial(contender.build, setup, contender) for name, contender in chosen.items()},
        {name: _kept_bytes(point, case.completions, way.strategy) + weights for name, way in chosen.items()},
        exact,
        dict(SUITE.limits(setup))[SHARED],
    )
