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
from sdkernels.driver.call import _memory_of, objective_of, setting_of, workspace_bytes_for
from sdkernels.tile.head import left_to_onednn
from sdkernels.tile.triton_backend import divergence_tile, logprob_tile
from sdkernels.types import ImportanceClip, Objective, Operands, Options, TileRows, TopK, TopKLogprobs
from tests.sdkernels.launches import HostReads, Indexing, Launch, recorded

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


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize(("memory", "expected"), [(141 << 30, 1536 << 20), (24 << 30, int(0.04 * (24 << 30)))])
def test_a_gpus_workspace_is_a_small_share_of_it_also_under_compile(memory: int, expected: int, trained: bool) -> None:
    with FakeTensorMode(), recorded(memory):
        weight = torch.empty(32_000, 64, device="cuda:1", dtype=torch.bfloat16, requires_grad=trained)
        assert workspace_bytes_for(None, weight) == expected
        assert workspace_bytes_for(256, weight) == 256 << 20
    with recorded(memory):
        # What a traced call asks of the device must be no break of the graph.
        torch._dynamo.reset()
        asked = torch.compile(lambda x: x + _memory_of(torch.device("cuda:1")) % 7, fullgraph=True, backend="eager")
        assert asked(torch.zeros(())) == memory % 7


def test_chunks_on_a_gpu_have_multiples_of_256_rows_where_they_fit() -> None:
    for rows, budget, expected in (
        (3000, 9, [768, 768, 768, 696]),
        (700, 30, [512, 188]),
        (700, 2, None),
        (90, 30, None),
    ):
        options = {"alpha": 1.0, "workspace_mb": budget}
        _, launches = fake_call(options, rows=rows, hidden=32, vocab=1024, dtype=torch.bfloat16)
        chunks = [launch.grid[0] for launch in launches if launch.name == "divergence_kernel"]
        assert sum(chunks) == rows
        if expected is None:
            assert max(chunks) < min(rows, 256)
            assert max(chunks) - min(chunks) < len(chunks)
        else:
            assert chunks == expected


OPTIONAL = {
    "nothing": {},
    "targets": {"target_ids": torch.arange(40)},
    "weights": {"token_weights": torch.arange(40) % 3.0},
    "weights and targets": {"token_weights": torch.arange(40) % 3.0, "target_ids": torch.arange(40)},
    "all": {
        "token_weights": torch.arange(40) % 3.0,
        "target_ids": torch.arange(40),
        "old_logprobs": -torch.ones(40),
        "teacher_ids": torch.arange(3).expand(40, 3),
        "teacher_logprobs": torch.full((40, 3), -2.0),
    },
}


@pytest.mark.usefixtures("mixed_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONAL)
def test_the_host_reads_at_most_two_numbers_a_call_and_none_without_need(name: str, dtype: torch.dtype) -> None:
    """One read for all that values say, and one for the range of float16; chunks read nothing."""
    given = OPTIONAL[name]
    sides = {"student_hidden": torch.randn(40, 8).to(dtype), "student_weight": torch.randn(300, 8).to(dtype)}
    if "teacher_ids" not in given:
        sides["teacher_hidden"] = sides["student_hidden"].flip(0)
    operands = Operands(**sides, **given)
    importance = ImportanceClip(given["old_logprobs"], clip=2.0) if "old_logprobs" in given else None
    cached = TopKLogprobs(given["teacher_ids"], given["teacher_logprobs"]) if "teacher_ids" in given else None
    options = Options(alpha=0.5, backend="triton", importance=importance, teacher=cached, workspace_mb=0.02)
    left_to_onednn()  # tries a product once in a process
    with recorded() as launches, torch.no_grad():
        objective = objective_of(options, None)
        setting = setting_of(operands, options, objective.topk)
        with HostReads() as host:
            operators._divergence(operands, objective, setting, "hw")
        with HostReads() as backward:
            operators._divergence_backward(operands, objective, setting, "hw", torch.ones(()))
    assert len({launch.grid[0] for launch in launches}) <= 2 < len(launches) // 4, "one chunk shows little"
    range_of_float16 = ["tolist"] * (dtype == torch.float16)
    assert host.reads == ["tolist"] * (name != "nothing") + range_of_float16
    assert backward.reads == ["tolist"] * ("token_weights" in given) + range_of_float16


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
