"""Says what is measured of the output layer: shapes, divergences, inputs, and which combinations a full run covers.

The inputs of a float32 case are those of the bfloat16 case, widened: one oracle then serves both, and a product of two
entries is exact in float32. No time depends on it. The teacher of a speed case is far from the student (noise 1), so
that every contender gets the answer to within its rounding; the accuracy table is where the teacher comes near.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sdkernels.testing import make_inputs

MIB = 1 << 20
SPEED_NOISE = 1.0
ACCURACY_NOISES = (0.3, 0.03, 0.003)


class Shape(NamedTuple):
    """Holds N rows, V vocabulary, H hidden."""

    rows: int
    vocab: int
    hidden: int

    def __str__(self) -> str:
        return f"N={self.rows} V={self.vocab} H={self.hidden}"


@dataclass(frozen=True)
class Divergence:
    """Has `alpha` as docs/divergences.md; `topk` is None for the full vocabulary, else it has a tail."""

    name: str
    alpha: float
    topk: int | None = None

    def __str__(self) -> str:
        return self.name


FORWARD_KL = Divergence("forward KL", 0.0)
REVERSE_KL = Divergence("reverse KL", 1.0)
JSD = Divergence("JSD", 0.5)
TOP_K = Divergence("JSD, top-100 + tail", 0.5, 100)
FULL_VOCABULARY = (FORWARD_KL, REVERSE_KL, JSD)
TOP_K_FORWARD = Divergence("forward KL, top-100 + tail", 0.0, 100)
TOP_K_REVERSE = Divergence("reverse KL, top-100 + tail", 1.0, 100)
ALL = (*FULL_VOCABULARY, TOP_K)
WITHOUT_FORWARD_KL = (REVERSE_KL, JSD, TOP_K)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Group(NamedTuple):
    """Is one table: contenders that compute the same thing on the same inputs."""

    shape: Shape
    dtype: str  # a key of DTYPES
    divergence: Divergence
    frozen_head: bool = False  # no gradient of the head
    states: str = ""  # of which real model, see `states`; empty: random

    @property
    def of(self) -> str:
        return f"{self.states} {self.shape}".lstrip()

    @property
    def work(self) -> str:
        return f"{self.divergence}, frozen head" if self.frozen_head else str(self.divergence)

    def __str__(self) -> str:
        return f"{self.of} {self.dtype} {self.work}"


class CaseInputs(NamedTuple):
    """Holds leaves of the student (its head is one only if it is trained) and the teacher's states.

    The teacher's head is the student's, detached.
    """

    student_hidden: Tensor  # (N, H)
    student_weight: Tensor  # (V, H)
    teacher_hidden: Tensor  # (N, H)

    @property
    def shape(self) -> Shape:
        return Shape(self.student_hidden.shape[0], *self.student_weight.shape)

    @property
    def device(self) -> torch.device:
        return self.student_hidden.device


def make_case_inputs(
    shape: Shape, dtype: str, *, noise: float, device: str = "cpu", seed: int = 0, frozen_head: bool = False
) -> CaseInputs:
    """Makes seeded inputs of standard deviation 1 whose logits have a standard deviation of 3."""
    made = make_inputs(
        shape.rows, shape.hidden, shape.vocab, noise=noise, dtype=torch.bfloat16, device=device, seed=seed
    )
    return leaves(made.student_hidden, made.student_weight, made.teacher_hidden, dtype=dtype, frozen_head=frozen_head)


def leaves(student: Tensor, weight: Tensor, teacher: Tensor, *, dtype: str, frozen_head: bool) -> CaseInputs:
    """Makes a case of tensors of whatever dtype."""
    student, weight, teacher = (tensor.detach().to(DTYPES[dtype]) for tensor in (student, weight, teacher))
    return CaseInputs(student.requires_grad_(), weight.requires_grad_(not frozen_head), teacher)


def _product(
    shape: Shape, dtypes: tuple[str, ...], divergences: tuple[Divergence, ...], *, frozen_head: bool = False
) -> list[Group]:
    return [Group(shape, dtype, divergence, frozen_head) for dtype in dtypes for divergence in divergences]


BOTH = ("fp32", "bf16")
SMALL, MEDIUM = Shape(512, 32000, 512), Shape(384, 50257, 1024)
LONG, WIDE = Shape(1024, 32000, 1024), Shape(256, 151936, 896)
CPU_SHAPES = (SMALL, MEDIUM, LONG, WIDE)
CUDA_SHAPES = (LONG, Shape(4096, 32000, 4096), Shape(4096, 151936, 2048))
# What the goals of docs/gpu.md are said of; the largest first.
GOAL_SHAPES = tuple(Shape(8192, 151936, hidden) for hidden in (4096, 2560, 1024))
QUICK_SHAPE = Shape(24, 1500, 32)
ACCURACY_SHAPE = Shape(64, 8192, 512)
QUICK_ACCURACY_SHAPE = Shape(8, 600, 32)


def groups(device: str, *, quick: bool = False, everything: bool = False) -> list[Group]:
    """Lists the groups of a run, in the order in which they are measured.

    On a CPU it is what two cores do in ten minutes: the largest vocabulary with one divergence, no forward KL, which
    costs what a reverse KL does, and not the long shape. `everything` measures all combinations. A GPU has the shapes
    of the goals, in bfloat16, with a trained and with a frozen head.
    """
    if quick:
        return [
            *_product(QUICK_SHAPE, BOTH, (REVERSE_KL, TOP_K)),
            *_product(QUICK_SHAPE, ("bf16",), (REVERSE_KL,), frozen_head=True),
        ]
    if device != "cpu":
        own = CUDA_SHAPES if everything else (LONG,)
        return [
            *(group for shape in own for group in _product(shape, BOTH, ALL)),
            *(
                group
                for shape in GOAL_SHAPES
                for frozen in (False, True)
                for group in _product(shape, ("bf16",), ALL, frozen_head=frozen)
            ),
        ]
    if everything:
        return [group for shape in CPU_SHAPES for group in _product(shape, BOTH, ALL)]
    return [
        *_product(SMALL, ("fp32",), WITHOUT_FORWARD_KL),
        *_product(SMALL, ("bf16",), (REVERSE_KL, JSD)),
        *_product(MEDIUM, BOTH, WITHOUT_FORWARD_KL),
        *_product(WIDE, ("bf16",), (REVERSE_KL,)),
    ]


def chosen_groups(shape: Shape, *, everything: bool = False, states: str = "") -> list[Group]:
    """Lists the groups of a shape that somebody asked for, or of a real model's states.

    Without `everything` there is no forward KL, which costs what the reverse KL does.
    """
    chosen = _product(shape, BOTH, ALL if everything else WITHOUT_FORWARD_KL)
    return [group._replace(states=states) for group in chosen]
