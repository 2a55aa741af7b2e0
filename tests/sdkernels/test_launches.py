"""How the Triton backend is launched on a GPU, as far as that can be known without one (launches.py)."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sdkernels.driver import operators
from sdkernels.driver.call import objective_of, setting_of
from sdkernels.tile.triton_backend import divergence_tile, logprob_tile
from sdkernels.types import Objective, Operands, Options, TileRows, TopK
from tests.sdkernels.launches import Indexing, Launch, recorded

pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")

OPTIONS: dict[str, dict[str, Any]] = {
    "reverse KL": {"alpha": 1.0},
    "JSD": {"alpha": 0.5},
    "JSD, clipped": {"alpha": 0.5, "entry_clip": 0.1},
    "forward KL, top-k": {"alpha": 0.0, "support": TopK(8, of="teacher")},
}


def fake_call(
    options: dict[str, Any], *, rows: int, hidden: int, vocab: int, dtype: torch.dtype, wanted: str = "hw"
) -> tuple[tuple[Tensor, ...], list[Launch]]:
    """The operator's results and the launches of a call on a second GPU."""
    given = Options(**options)
    with FakeTensorMode(), recorded() as launches, Indexing():
        states = torch.empty(2, rows, hidden, dtype=dtype, device="cuda:1")
        weight = torch.empty(vocab, hidden, dtype=dtype, device="cuda:1", requires_grad="w" in wanted)
        operands = Operands(student_hidden=states[0], student_weight=weight, teacher_hidden=states[1])
        objective = objective_of(given, None)
        setting = setting_of(operands, given, objective.topk)
        assert setting.backend == "triton"
        with torch.no_grad():
            return operators._divergence(operands, objective, setting, wanted), launches


@pytest.mark.parametrize("vocab", [1024, 1003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_row_is_launched_once_on_its_own_device_with_padded_rows(
    name: str, dtype: torch.dtype, vocab: int
) -> None:
    options = OPTIONS[name] | {"workspace_mb": 2.5}
    results, launches = fake_call(options, rows=700, hidden=32, vocab=vocab, dtype=dtype)
    assert all(launch.device == torch.device("cuda:1") for launch in launches)
    assert [tensor.dtype for tensor in results[-3:-1]] == [dtype, dtype]
    for kernel in {launch.name for launch in launches}:
        rows = sum(launch.grid[0] for launch in launches if launch.name == kernel)
        assert rows % 700 == 0, kernel
        assert len([launch for launch in launches if launch.name == kernel]) > rows // 700, "one chunk shows little"
    for launch in launches:
        strides = {name: size for name, size in launch.arguments.items() if name.startswith("stride_")}
        assert all(stride % 16 == 0 for stride in strides.values()), launch
        assert launch.arguments.get("PADDED", vocab % 16 != 0) == (vocab % 16 != 0)
        gradient = launch.arguments.get("p_gradient")
        if gradient is not None:
            assert gradient.dtype == dtype
            assert gradient.shape[1] == vocab


def specialisations(count: int, objective: Objective) -> set[tuple[Any, ...]]:
    """Of a chunk of so many rows, which begin anywhere in what the call was given."""
    row_wise = torch.arange(4 * 64 * 8).view(-1, 8) % 300
    tiles = torch.zeros(3, count, 304)[:, :, :300].unbind()
    begin = count // 2
    cached = objective.alpha == 0.25
    rows = TileRows(
        target_ids=row_wise.flatten()[begin : begin + count],
        teacher_ids=row_wise[begin : begin + count, :7] if cached else None,
        teacher_logprobs=torch.zeros(256, 7)[begin : begin + count] if cached else None,
    )
    with recorded() as launches:
        teacher = None if cached else tiles[1]
        divergence_tile(tiles[0], teacher, rows, objective, want_gradient=True, gradient_dtype=torch.bfloat16)
        upstream = torch.zeros(256)[begin : begin + count]
        logprob_tile(tiles[2], rows, Objective(), grad_logprobs=upstream, grad_entropy=upstream)
    return {launch.specialisation() for launch in launches}


@pytest.mark.parametrize(
    "objective",
    [
        Objective(alpha=0.5),
        Objective(alpha=1.0, support="sampled"),
        Objective(alpha=1.0, support="topk", topk=7),
        Objective(alpha=0.25, support="topk", topk=7),
    ],
    ids=["full", "sampled", "top-k", "cached"],
)
def test_chunks_of_any_number_of_rows_launch_the_same_program(objective: Objective) -> None:
    expected = specialisations(32, objective)
    for count in (1, 15, 16, 33):
        assert specialisations(count, objective) == expected, count
