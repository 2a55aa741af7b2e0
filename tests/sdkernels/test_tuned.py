"""Tables of launches: what is read is checked, what is launched follows it, and no result depends on it.

The kernels run in Triton's interpreter, in a process of its own as in test_triton_interpret.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdkernels.driver.call import workspace_bytes_for
from sdkernels.tile import tuned
from sdkernels.tile.tiling import DEFAULT_WORKSPACE_MB, MIB
from sdkernels.tile.tuned import KernelRow, Table, WorkspaceRow

TABLE = Table(
    architecture="sm_80",
    device="a card",
    torch="2.11.0",
    triton="3.6.0",
    date="2026-01-02",
    kernels={"divergence": (KernelRow(32_000, 1024, 4, 2), KernelRow(150_000, 4096, 16, 1))},
    workspace=(WorkspaceRow(150_000, 1024, 700), WorkspaceRow(150_000, 4096, 1300)),
)
ROOT = Path(__file__).resolve().parents[2]


def test_a_table_survives_being_written(tmp_path: Path) -> None:
    path = tuned.write(TABLE, tmp_path / "tables")
    assert path.name == "sm_80.json"
    assert tuned.read(path) == TABLE


def test_every_table_of_the_package_can_be_read() -> None:
    for path in tuned.FOLDER.glob("*.json"):
        tuned.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hopper"}, r"architecture must be sm_ and a compute capability, .* got 'hopper'"),
        ({"architecture": "sm_90"}, r"it is of sm_90, so its name must be sm_90.json"),
        ({"device": 3}, r"device must be a text, got 3"),
        ({"kernels": {"softmax": []}}, r"kernels must be an object by row_statistics, .* got \{'softmax': \[\]\}"),
        ({"kernels": {"divergence": {}}}, r"kernels.divergence must be a list, got \{\}"),
        (
            {"kernels": {"divergence": [{"vocab": 1, "block": 0, "warps": 4, "stages": 1}]}},
            r"kernels.divergence must have positive integers vocab, block, warps, stages a row",
        ),
        (
            {"kernels": {"divergence": [{"vocab": 1, "block": 1000, "warps": 4, "stages": 1}]}},
            r"block of kernels.divergence must be a power of two, got 1000",
        ),
        ({"workspace": [{"vocab": 1, "hidden": 2}]}, r"workspace must have positive integers vocab, hidden, megabytes"),
        ({"more": 1}, r"it must be an object with architecture, .* got \['architecture'"),
    ],
)
def test_a_malformed_table_is_refused_by_its_path_and_the_reason(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tuned.write(TABLE, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as raised:
        tuned.read(path)
    assert str(raised.value).startswith(f"{path} is not a table of sdkernels.tuning: ")


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sm_80.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="it is not JSON"):
        tuned.read(path)


def test_a_launch_is_that_of_the_nearest_vocabulary() -> None:
    assert TABLE.launch("divergence", 50_000) == KernelRow(32_000, 1024, 4, 2)
    assert TABLE.launch("divergence", 90_000) == KernelRow(150_000, 4096, 16, 1)
    assert TABLE.launch("row_statistics", 50_000) is None


def test_a_workspace_is_that_of_a_near_head_and_of_no_other() -> None:
    assert TABLE.workspace_mb(151_936, 896) == 700
    assert TABLE.workspace_mb(128_256, 5120) == 1300
    assert TABLE.workspace_mb(32_000, 1024) is None
    assert TABLE.workspace_mb(150_000, 256) is None


def test_the_measured_workspace_takes_the_place_of_the_rule_for_a_trained_head_only() -> None:
    # No CUDA device is needed: what is no CPU and has no capability reads sm_80.
    trained = torch.empty(150_000, 1024, device="meta", requires_grad=True)
    by_rule = workspace_bytes_for(None, trained)
    assert by_rule == DEFAULT_WORKSPACE_MB * MIB
    with tuned.using(TABLE):
        assert workspace_bytes_for(None, trained) == 700 * MIB != by_rule
        assert workspace_bytes_for(512, trained) == 512 * MIB
        assert workspace_bytes_for(None, trained.detach()) == DEFAULT_WORKSPACE_MB * MIB
        assert workspace_bytes_for(None, trained, 75_001) == 700 * MIB  # of a slice
    assert workspace_bytes_for(None, trained) == by_rule


def test_tables_hold_inside_the_block_only() -> None:
    with tuned.using(TABLE):
        with tuned.using(replace(TABLE, architecture="sm_90")):
            assert tuned.table_of("sm_80") is None
            assert tuned.table_of("sm_90") is not None
        assert tuned.table_of("sm_80") is TABLE


@pytest.mark.parametrize(
    ("capability", "launched_as", "reads"),
    [
        ((8, 0), "sm_80", "sm_80"),
        ((8, 6), "sm_80", "sm_80"),
        ((9, 0), "sm_90", None),
        ((10, 0), "sm_100", "sm_100"),
        ((10, 3), "sm_100", "sm_103"),
        ((12, 0), "sm_100", None),  # half of the shared memory: what a data centre's card measured is not for it
    ],
)
def test_a_chip_reads_its_own_table_or_one_of_its_generation(
    capability: tuple[int, int], launched_as: str, reads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda:1")
    assert tuned.architecture(device) == launched_as
    assert tuned.chip(device) == f"sm_{capability[0]}{capability[1]}"
    with tuned.using(TABLE, replace(TABLE, architecture="sm_100"), replace(TABLE, architecture="sm_103")):
        table = tuned.table_for(device)
        assert (table and table.architecture) == reads


INTERPRETED = """
import torch
from sdkernels.tile import tuned
from sdkernels.tile.triton_backend import divergence, divergence_tile, softmax_gradient, statistics
from sdkernels.tile.triton_backend.configs import Config, config, untuned
from sdkernels.tile.tuned import KERNELS, KernelRow
from sdkernels.tuning import Trial, as_json, choose, chosen_of, merged, tune
from sdkernels.types import Objective, TileRows

CPU = torch.device("cpu")
OTHER = KernelRow(600, 128, 2, 1)
table = merged([(kernel, (OTHER,)) for kernel in KERNELS], [], CPU)
student = 3 * torch.randn(3, 600)
teacher = student + torch.randn(3, 600)
rows = TileRows(target_ids=torch.tensor([0, 5, 599]))
launched = []

def watched(kernel, device, vocab):
    launched.append(config(kernel, device, vocab))
    return launched[-1]

for module in (divergence, softmax_gradient, statistics):
    module.config = watched

for objective in (Objective(alpha=0.0), Objective(alpha=0.5, entry_clip=0.01), Objective(support="sampled")):
    def results():
        launched.clear()
        values, gradient = divergence_tile(student.clone(), teacher.clone(), rows, objective, want_gradient=True)
        return values.loss, gradient, values.student_entropy
    before = results()
    assert launched and set(launched) == {Config(256, 4, 1)}, launched
    with tuned.using(table):
        after = results()
    assert len(launched) == 2 and set(launched) == {Config(128, 2, 1)}, launched
    for one, other in zip(before, after):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
assert config("divergence", CPU, 600) == untuned("divergence", CPU)

# A launch that computes something else is not timed; what was timed gives a table.
def wrong(student, *arguments, **options):
    real = statistics.row_statistics
    found, groups = real(student, *arguments, **options)
    if tuned.table_of("interpreter") and tuned.table_of("interpreter").launch("row_statistics", 600).block == 512:
        found.array[0] *= 1.01
    return found, groups

import sdkernels.tuning as tuning
tuning.row_statistics = wrong
found = tune("row_statistics", [(2, 600)], CPU, tried=[Config(256, 4, 1), Config(128, 4, 1), Config(512, 4, 1)])
problems = {trial.config.block: trial.problem for trial in found.trials}
assert problems[256] == problems[128] == "", problems
assert problems[512].startswith("its results differ by 1.0e-02"), problems
assert chosen_of(as_json(found)) == ("row_statistics", found.chosen)
late = tune("row_statistics", [(2, 600)], CPU, tried=[Config(256, 4, 1), Config(128, 4, 1)], seconds=0.0)
assert [trial.problem for trial in late.trials] == ["", "not reached"]
assert late.chosen == (KernelRow(600, 256, 4, 1),)

# The faster launch is chosen, over all chunks of a vocabulary, if by more than noise, and timed at all of them.
present, fast, partial = Config(256, 4, 1), Config(512, 4, 1), Config(128, 4, 1)
def chosen(seconds):
    trials = [Trial(1, 600, present, 1.0), Trial(2, 600, present, 2.0)]
    trials += [Trial(1, 600, partial, 0.1), Trial(2, 600, partial)]
    return choose(trials + [Trial(1, 600, fast, seconds), Trial(2, 600, fast, 2 * seconds)], present)
assert chosen(0.5) == ((KernelRow(600, *fast),), (2.0,))
assert chosen(0.99) == ((KernelRow(600, *present),), (1.0,))
print("all of it")
"""


def test_a_table_changes_the_launches_and_no_result(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.stdout.strip() == "all of it", run.stderr[-3000:]


def test_what_spills_in_a_variant_is_not_tried_on_a_gpu() -> None:
    pytest.importorskip("triton")
    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("the interpreter compiles nothing")
    from sdkernels.tile.triton_backend.configs import TABLE as UNTUNED
    from sdkernels.tile.triton_backend.configs import Config
    from sdkernels.tuning import problems

    present = UNTUNED["sm_90"]["softmax_gradient"]
    found = problems("softmax_gradient", [present, Config(32768, 4, 1)], "sm_90", jobs=1)
    assert found[present] == ""
    assert "spills" in found[Config(32768, 4, 1)]


def test_what_the_compiler_does_not_reach_in_time_is_not_tried() -> None:
    pytest.importorskip("triton")
    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("the interpreter compiles nothing")
    from sdkernels.tile.triton_backend.configs import TABLE as UNTUNED
    from sdkernels.tuning import problems

    present = UNTUNED["sm_90"]["softmax_gradient"]
    others = [present._replace(warps=4), present._replace(warps=16)]
    found = problems("softmax_gradient", [present, *others], "sm_90", jobs=1, seconds=0.0)
    assert found == {present: ""} | dict.fromkeys(others, "not reached")


def test_programs_that_differ_are_tuned_and_equal_ones_are_not_tuned_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from sdkernels import tuning

    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    # A barrier keeps the compiler from prefetching, so that stages change nothing.
    tried = [tuple(config)[:2] for config in tuning.candidates("divergence", torch.device("cuda"))]
    assert len(tried) == len(set(tried)) > 5
    assert any(vocab % 16 for _, vocab in tuning.SHAPES)
    assert tuning.padded(torch.empty(3, 50_257, device="meta")).stride(0) == 50_272


def test_a_malformed_table_in_the_package_says_so_when_it_is_imported(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels" / "sdkernels", tmp_path / "sdkernels")
    (tmp_path / "sdkernels" / "tables").mkdir(exist_ok=True)
    (tmp_path / "sdkernels" / "tables" / "sm_90.json").write_text("[]")
    run = subprocess.run(
        [sys.executable, "-c", "import sdkernels"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 1
    assert "sm_90.json is not a table of sdkernels.tuning: it must be an object with" in run.stderr
