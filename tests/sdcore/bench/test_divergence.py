"""The suite of the output layer checks what it times, and says why what is not timed is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdcore.bench import compare, peers, shapes
from sdcore.bench.measure import MOST_OF_FREE, group_bytes, peak_bytes, repetitions
from sdcore.bench.options import Options, checkout, newest_results
from sdcore.bench.oracle import solve
from sdcore.bench.peers import CONTENDERS, PLAIN, SDCORE, Contender
from sdcore.bench.rows import MemoryRow, Report, SpeedRow
from sdcore.bench.shapes import CaseInputs, Divergence, Group, Shape, make_case_inputs
from sdcore.bench.suite import run
from sdcore.bench.suites import divergence
from sdcore.bench.suites.divergence import SUITE, measure_group
from sdcore.bench.tables import ratio_table, speed_table

QuickJson = Callable[[str], Path]


def test_a_quick_run_has_every_row_and_a_reason_for_each_that_is_not_timed(quick_json: QuickJson) -> None:
    report = SUITE.load(quick_json("divergence"))
    groups = {row.group for row in report.speed}
    assert len(groups) == 5
    for group in groups:
        rows = {row.contender: row for row in report.speed if row.group == group}
        assert {"sdcore", "sdcore, recompute", "plain torch", "torch.compile"} <= set(rows)
        assert f"{'three' if group.frozen_head else 'four'} matmuls fp32" in rows
        assert {one.name for one in CONTENDERS} <= set(rows)
        for name in ("sdcore", "sdcore, recompute", "plain torch"):
            assert rows[name].reason is None
        for row in rows.values():
            assert bool(row.seconds) == (row.reason is None)


def test_what_a_quick_run_timed_was_equal_to_the_oracle(quick_json: QuickJson) -> None:
    rows = [row for row in SUITE.load(quick_json("divergence")).speed if row.seconds and "matmuls" not in row.contender]
    assert rows
    for row in rows:
        assert row.errors is not None
        assert row.errors.gradient < {"fp32": 1e-5, "bf16": 0.05}[row.group.dtype]


def test_a_quick_run_counts_memory_and_errors_of_both_of_our_paths(quick_json: QuickJson) -> None:
    report = SUITE.load(quick_json("divergence"))
    for name in ("sdcore", "sdcore, recompute"):
        memory = [row for row in report.memory if row.contender == name]
        assert len(memory) == 5
        assert all(row.live_bytes and row.live_bytes >= row.gradient_bytes > 0 for row in memory)
        errors = [row.errors for row in report.accuracy if row.contender == name]
        assert len(errors) == 18  # 3 noises, 6 divergences
        assert all(error is not None and math.isfinite(error.gradient) for error in errors)


def _measured(
    divergence: Divergence, *contenders: Contender, frozen: bool = False
) -> tuple[list[SpeedRow], list[MemoryRow]]:
    """The rows of a small group, each timed once."""
    inputs = make_case_inputs(shapes.QUICK_SHAPE, "fp32", noise=1.0, frozen_head=frozen)
    group = Group(shapes.QUICK_SHAPE, "fp32", divergence, frozen)
    return measure_group(group, contenders, inputs, solve(inputs, (divergence,))[divergence], seconds_per_row=0.0)


def _wrong(name: str, factor: float) -> Contender:
    def build(inputs: CaseInputs, divergence: Divergence) -> Callable[[], torch.Tensor]:
        return lambda: factor * peers.plain_loss(*inputs, divergence, upcast=True)

    return Contender(name, build)


def test_a_contender_that_computes_something_else_is_not_timed() -> None:
    contenders = (_wrong("half", 0.5), _wrong("right", 1.0), peers.skipped(PLAIN, "no reason"))
    speed, _ = _measured(shapes.REVERSE_KL, *contenders)
    half, right, left_out = speed[1:]
    assert half.reason is not None
    assert half.reason.startswith("loss off by 5.0e-01")
    assert not half.seconds
    assert right.reason is None
    assert right.seconds
    assert left_out.reason == "no reason"
    assert "half: not timed, loss off by 5.0e-01" in speed_table(speed).notes


def test_a_contender_that_fails_gets_its_error_as_the_reason() -> None:
    def build(inputs: CaseInputs, divergence: Divergence) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            raise RuntimeError("out of luck\nsecond line")

        return loss

    speed, memory = _measured(shapes.TOP_K, Contender("broken", build), SDCORE)
    assert speed[1].reason == memory[0].reason == "RuntimeError: out of luck"
    assert speed[2].reason is None


def test_fast_rows_are_repeated_more_often_and_slow_ones_at_least_twice() -> None:
    assert repetitions(0.5, 0.5, seconds_per_row=3.0) == 6
    assert repetitions(0.01, 0.01, seconds_per_row=3.0) == 15
    assert repetitions(5.0, 4.0, seconds_per_row=3.0) == 3
    assert repetitions(50.0, 4.0, seconds_per_row=3.0) == 2


def test_a_frozen_head_has_three_products_no_gradient_and_is_compared_without_it() -> None:
    inputs = make_case_inputs(shapes.QUICK_SHAPE, "fp32", noise=1.0, frozen_head=True)
    exact = solve(inputs, (shapes.REVERSE_KL,))[shapes.REVERSE_KL]
    trained = make_case_inputs(shapes.QUICK_SHAPE, "fp32", noise=1.0)
    whole = solve(trained, (shapes.REVERSE_KL,))[shapes.REVERSE_KL]
    assert torch.equal(exact.gradients["hidden"], whole.gradients["hidden"])
    assert "weight" not in exact.gradients
    assert whole.gradients["weight"].shape == (1500, 32)
    speed, memory = _measured(shapes.REVERSE_KL, SDCORE, _wrong("half", 0.5), frozen=True)
    assert [row.contender for row in speed] == ["three matmuls fp32", "sdcore", "half"]
    assert speed[1].errors is not None
    assert 0 < speed[1].errors.gradient < 1e-5
    assert speed[1].errors.weight_gradient == 0
    assert memory[0].gradient_bytes == 4 * 24 * 32
    assert str(speed[2].reason).startswith("loss off by")


@pytest.mark.parametrize(("frozen", "products"), [(False, 4), (True, 3)])
def test_the_floor_makes_the_products_that_a_head_needs(
    frozen: bool, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    floor = peers.bare_matmuls(make_case_inputs(shapes.QUICK_SHAPE, "fp32", noise=1.0, frozen_head=frozen), "fp32")
    monkeypatch.setattr(torch, "mm", lambda *arguments, out: calls.append(out.shape))
    floor()
    assert len(calls) == products


def test_a_gpu_measures_the_goals_shapes_with_both_kinds_of_head() -> None:
    found = divergence.planned_groups(Options(suite="divergence"), "cuda")
    for hidden in (1024, 2560, 4096):
        for frozen in (False, True):
            wanted = [Group(Shape(8192, 151936, hidden), "bf16", one, frozen) for one in shapes.ALL]
            assert [group for group in found if group in wanted] == wanted


def test_a_row_of_a_frozen_head_keeps_it_on_disk_and_in_a_comparison(tmp_path: Path) -> None:
    rows = [
        SpeedRow(
            group=Group(shapes.QUICK_SHAPE, "bf16", shapes.REVERSE_KL, frozen),
            contender="sdcore",
            seconds=[1.0 + frozen],
        )
        for frozen in (False, True)
    ]
    SUITE.save(Report(machine={"name": "a", "date": "b"}, speed=rows), tmp_path / "a.json")
    assert [row.group for row in SUITE.load(tmp_path / "a.json").speed] == [row.group for row in rows]
    found = compare.compare(tmp_path / "a.json", tmp_path / "a.json")
    assert [row.before for row in found.rows] == [1.0, 2.0]


def test_ratios_are_taken_to_the_faster_of_the_bare_products() -> None:
    group = Group(shapes.QUICK_SHAPE, "bf16", shapes.REVERSE_KL)
    rows = [
        SpeedRow(group=group, contender="four matmuls fp32", seconds=[2.0, 2.0, 9.0]),
        SpeedRow(group=group, contender="four matmuls bf16", seconds=[4.0]),
        SpeedRow(group=group, contender="sdcore", seconds=[3.0, 3.0]),
    ]
    assert ratio_table(shapes.QUICK_SHAPE, rows).rows[0] == ["sdcore", "1.50"]


def test_a_peer_that_is_not_installed_keeps_a_row_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    speed, _ = _measured(shapes.REVERSE_KL, *(one for one in CONTENDERS if one.peer in ("trl", "liger", "orda", "fla")))
    reasons = {row.contender: row.reason for row in speed}
    assert reasons["TRL chunked"] == "not installed: pip install trl"
    assert reasons["flash-linear-attention"] == "not installed: pip install flash-linear-attention"
    assert "TRL chunked: not installed: pip install trl" in speed_table(speed).notes


def test_a_contender_that_would_not_fit_the_memory_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(shapes.QUICK_SHAPE, "fp32", shapes.REVERSE_KL)
    least = peak_bytes("plain torch", group, "cpu")
    monkeypatch.setattr(divergence, "free_bytes", lambda device: (least - 1) / MOST_OF_FREE)
    speed, _ = _measured(shapes.REVERSE_KL, SDCORE, PLAIN)
    reasons = {row.contender: row.reason for row in speed}
    assert reasons["sdcore"] is None
    assert str(reasons["plain torch"]).startswith("not run: needs 0.0 GiB")


def test_a_shape_that_would_not_fit_the_memory_keeps_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(divergence, "free_bytes", lambda device: 1e9)
    options = Options(suite="divergence", device="cpu", model="qwen3-8b", peers=("naive",), output=tmp_path)
    report = SUITE.load(run(SUITE, options))
    assert {row.contender for row in report.speed} == {*(one.name for one in peers.OURS), "plain torch"}
    assert {row.group.shape for row in report.speed} == {Shape(256, 151936, 4096)}
    assert all(str(row.reason).startswith("not run: needs") for row in report.speed)


@pytest.mark.parametrize("contender", [SDCORE, PLAIN, *(one for one in CONTENDERS if one.peer in ("trl", "orda"))])
def test_the_estimates_of_memory_are_near_the_committed_measurements(contender: Contender) -> None:
    root = checkout()
    assert root is not None
    rows = [row for path in newest_results(root / "benchmarks" / "results") for row in SUITE.load(path).memory]
    measured = [row for row in rows if row.contender == contender.name and row.live_bytes]
    assert measured
    for row in measured:
        assert 0.85 < peak_bytes(row.contender, row.group, "cpu") / (row.live_bytes or 0) < 1.7, row


def test_the_memory_of_a_group_grows_with_every_size() -> None:
    least = group_bytes(Group(Shape(64, 1000, 64), "fp32", shapes.REVERSE_KL), shapes.ALL)
    for shape in (Shape(640000, 1000, 64), Shape(64, 1000000, 64), Shape(64, 1000, 64000)):
        assert group_bytes(Group(shape, "fp32", shapes.REVERSE_KL), shapes.ALL) > least


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"model": "qwen3-4b", "shapes": ("N=512",)}, [Shape(512, 151936, 2560)]),
        ({"model": "gemma-3-4b"}, [Shape(256, 262208, 2560)]),
        ({"shapes": ("N=8,V=100,H=16", "H=32")}, [Shape(8, 100, 16), Shape(256, 32000, 32)]),
    ],
)
def test_a_model_or_a_shape_takes_the_place_of_the_suites_own(options: dict[str, Any], shapes: list[Shape]) -> None:
    found = divergence.planned_groups(Options(suite="divergence", **options), "cpu")
    assert list(dict.fromkeys(group.shape for group in found)) == shapes
    assert {group.dtype for group in found} == {"fp32", "bf16"}
    only = divergence.planned_groups(Options(suite="divergence", dtype="bf16", **options), "cpu")
    assert only == [group for group in found if group.dtype == "bf16"]


def test_a_choice_of_peers_keeps_ours() -> None:
    kept = [one.name for one in CONTENDERS if peers.wanted(one, ("naive", "fla"))]
    assert kept == [*(one.name for one in peers.OURS), "plain torch", "flash-linear-attention"]


def test_the_kernels_that_are_asked_for_are_there_in_the_installed_liger() -> None:
    dispatch = pytest.importorskip("liger_kernel.backends.dispatch")
    import liger_kernel.functional  # noqa: F401  # says where the implementations are

    for operation in ("fused_linear_jsd", "jsd_loss_and_grad"):
        found = set(dispatch.all_impls(operation))
        assert peers.LIGER_TRITON_KERNEL in found
    # Its inner kernel is registered where CUTLASS can be imported only.
    assert peers.LIGER_CUTE_KERNEL in dispatch.all_impls("fused_linear_jsd")


@pytest.mark.parametrize("contender", [peers.LIGER_TRITON, peers.LIGER_CUTE], ids=lambda one: one.name)
@pytest.mark.parametrize(("divergence", "reason"), [(shapes.JSD, "needs a GPU"), (shapes.TOP_K, "no top-k")], ids=str)
def test_without_a_gpu_the_rows_say_so(contender: Contender, divergence: Divergence, reason: str) -> None:
    pytest.importorskip("liger_kernel")
    with pytest.raises(peers.Unavailable, match=reason):
        peers.prepare(contender, make_case_inputs(shapes.QUICK_SHAPE, "fp32", noise=1.0), divergence)


def test_every_contender_has_a_colour_and_a_marker_of_its_own() -> None:
    assert len({(one.colour, one.marker) for one in divergence.COLOURED}) == len(divergence.COLOURED)
    assert {one.name for one in CONTENDERS} <= set(divergence.COLOURS)
