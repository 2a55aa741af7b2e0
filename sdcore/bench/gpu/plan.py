"""The steps of a run, their parts, and how long each may take; read without importing torch.

A part is a process of its own that leaves its results in a folder of its own, so that neither a crashed driver nor an
interruption costs the others. The seconds of a step are shared by its parts in their order; those of a GPU come to half
an hour, each below the ten minutes that one command may take on a lent machine. Their sizes are estimates (matrix
products at 790 TFLOP/s take 13, 32 and 52 ms at H = 1024, 2560 and 4096): none was measured.

On a CPU the same steps run with tiny sizes, the kernels in Triton's interpreter: proof that the way is free, no figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from ...errors import ArgumentError

CUDA, CPU = "cuda", "cpu"
MODES: Final = (CUDA, CPU)
# What has to be done again whenever another part of its step was.
TABLE: Final = "table"


class Step(NamedTuple):
    """`parts` by mode, each the name of a folder."""

    name: str
    about: str
    seconds: int  # on a GPU
    cpu_seconds: int
    parts: tuple[str, ...]
    cpu_parts: tuple[str, ...] = ("quick",)

    def limit(self, mode: str) -> int:
        return self.seconds if mode == CUDA else self.cpu_seconds

    def parts_in(self, mode: str) -> tuple[str, ...]:
        return self.parts if mode == CUDA else self.cpu_parts


# The tuned launches and the workspace come first: what follows is measured with them.
STEPS: Final = (
    Step("tests", "the kernels against float64, compiled", 240, 300, ("kernels",)),
    Step(
        "tune",
        "block sizes, warps and stages, for the table that backend='auto' reads",
        270,
        300,
        ("row_statistics", "divergence", "softmax_gradient", "divergence_clipped", TABLE),
        ("row_statistics", "divergence", TABLE),
    ),
    Step(
        "workspace",
        "speed against workspace, trained and frozen head",
        210,
        300,
        ("h4096", "h2560", "h1024", TABLE),
        ("quick", TABLE),
    ),
    Step(
        "divergence",
        "the output layer beside the peers and the matrix products",
        480,
        300,
        (
            *("h4096-trained", "h2560-trained", "h1024-trained", "h4096-frozen", "h2560-frozen", "h1024-frozen"),
            *("accuracy", "small"),
        ),
    ),
    Step(
        "prefix",
        "passes that share their prompt",
        240,
        300,
        ("qwen3-0.6b-p1024", "qwen3-4b-p1024", "qwen3-0.6b-p3072", "qwen3-4b-p2048"),
    ),
    Step("memory", "every live byte of a training step, by category", 120, 300, ("qwen3-0.6b", "qwen3-4b")),
    Step("step", "one SDPO step, naive beside ours", 240, 300, ("qwen3-0.6b", "qwen3-4b")),
)
SECONDS: Final = {mode: sum(step.limit(mode) for step in STEPS) for mode in MODES}


def chosen_steps(names: Sequence[str]) -> tuple[Step, ...]:
    """Those of these names, in the order of the plan; all for none. Raises `ArgumentError`."""
    known = [step.name for step in STEPS]
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ArgumentError(f"a step must be one of {', '.join(known)}, got {', '.join(wrong)}")
    return tuple(step for step in STEPS if not names or step.name in names)


__all__ = ["CPU", "CUDA", "MODES", "SECONDS", "STEPS", "TABLE", "Step", "chosen_steps"]
