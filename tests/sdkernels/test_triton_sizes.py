"""The Triton kernels at the vocabularies of real models, on a GPU; in the interpreter the same at a hundredth of them.

What sizes bring: loops that turn many times, whose running maximum rises late, a last block that is short, rows that
lie apart by multiples of 16 and by other numbers, 16-bit gradients that overwrite what they are made of, products with
a 16-bit head, a device that is not the current one. The blocks of the interpreter have 256 entries, so that its rows
take as many turns. As test_triton_interpret.py this file runs itself once more in a process with TRITON_INTERPRET=1
where there is no GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdkernels import LogitTransform, TopK, linear_divergence, linear_logprobs, linear_topk
from sdkernels.testing import assert_within_reference_error, make_inputs, relative_error, run_operation, run_reference
from sdkernels.types import Objective, TileRows
from tests.sdkernels.test_triton_interpret import (
    COMPILED,
    DEVICE,
    INTERPRETED,
    OBJECTIVES,
    assert_tile_is_exact,
    for_vocabulary,
    in_this_process,
    make_tile,
    run_tile,
)

if INTERPRETED or COMPILED:
    from sdkernels.tile.triton_backend import divergence_tile

# V: a power of two; odd; a multiple of 16 and of no block; many blocks.
VOCABULARIES = [4096, 50_257, 151_936, 262_144] if COMPILED else [512, 785, 1200, 2048]
NAMES = ["forward KL", "reverse KL", "JSD", "JSD, clipped", "sampled", "reverse KL, teacher top-k"]
# In which many programs overwrite at once what others might still read.
ROWS, REPETITIONS = (264, 20) if COMPILED else (2, 2)
SANITIZER = shutil.which("compute-sanitizer")
DEVICES = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if COMPILED else ["cpu"]


def rising(count: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, TileRows]:
    """A tile whose maximum is a new one in nearly every block: in one row rising, in the next falling."""
    student, teacher, rows = make_tile(count, vocab, noise=0.3, bias=True, seed=seed)
    slope = torch.linspace(-8.0, 8.0, vocab, device=DEVICE)
    up = (torch.arange(count, device=DEVICE) % 2 * 2 - 1)[:, None]
    return student + slope * up, teacher + slope * up, rows


def spaced(tile: Tensor, columns: int) -> Tensor:
    """The same rows, so many entries apart; what lies between is NaN."""
    buffer = torch.full((tile.shape[0], columns), torch.nan, device=DEVICE)
    buffer[:, : tile.shape[1]] = tile
    return buffer[:, : tile.shape[1]]


@in_this_process
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("name", NAMES)
def test_tiles_of_many_blocks_match_the_definition(name: str, vocab: int) -> None:
    head = (1.2, 30.0, 0.9) if vocab % 2 else (1.0, None, 1.0)
    student, teacher, rows = rising(2, vocab)
    assert_tile_is_exact(student, teacher, rows, for_vocabulary(OBJECTIVES[name], vocab, head))


@in_this_process
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("name", ["reverse KL", "JSD", "sampled", "reverse KL, teacher top-k"])
def test_rows_apart_by_any_number_give_the_same(name: str, vocab: int) -> None:
    student, teacher, rows = rising(3, vocab, seed=1)
    values, gradient = run_tile(student, teacher, rows, OBJECTIVES[name])
    sixteens = -(-vocab // 16) * 16
    for columns in (sixteens, sixteens + 16, vocab + 1, vocab + 7):
        sides = spaced(student, columns), spaced(teacher, columns)
        same, its_gradient = divergence_tile(*sides, rows, OBJECTIVES[name], want_gradient=True)
        assert relative_error(same.loss, values.loss) < 1e-6, columns
        assert relative_error(its_gradient, gradient) < 1e-6, columns


@in_this_process
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES[:3])
@pytest.mark.parametrize("name", ["reverse KL", "JSD", "JSD, clipped", "sampled"])
def test_a_gradient_in_place_is_the_same_every_time(name: str, vocab: int, dtype: torch.dtype) -> None:
    """Where a store came before another program's or warp's load, some repetition would show it."""
    student, teacher, rows = rising(ROWS, vocab, seed=2)
    columns = -(-vocab // 16) * 16
    _, wide = run_tile(student, teacher, rows, OBJECTIVES[name])
    first: Tensor | None = None
    for _ in range(REPETITIONS):
        sides = spaced(student, columns), spaced(teacher, columns)
        options: dict[str, Any] = {"want_gradient": True, "gradient_dtype": dtype}
        _, gradient = divergence_tile(*sides, rows, OBJECTIVES[name], **options)
        assert gradient.untyped_storage().data_ptr() == sides[0].untyped_storage().data_ptr()
        if first is None:
            first = gradient.clone()
            # The interpreter cuts bits off where a GPU rounds; below float16's range both lose what is left.
            smallest = torch.finfo(dtype).smallest_normal
            torch.testing.assert_close(gradient.float(), wide, rtol=torch.finfo(dtype).eps, atol=smallest)
        assert torch.equal(gradient, first)


@in_this_process
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_whole_operation_matches_float64(alpha: float, dtype: torch.dtype, trained: bool, device: str) -> None:
    """With bias, weights, more columns than the vocabulary has, and several chunks; on every device there is."""
    rows, hidden, vocab = (96, 256, 50_257) if COMPILED else (6, 16, 785)
    inputs = make_inputs(rows, hidden, vocab, noise=0.1, masked=0.2, dtype=dtype, device=device)
    weight = inputs.student_weight.requires_grad_(trained)
    bias = torch.linspace(-1, 1, vocab, device=device, dtype=dtype).requires_grad_(trained)
    arguments: dict[str, Any] = {
        "student_hidden": inputs.student_hidden,
        "student_weight": weight,
        "teacher_hidden": inputs.teacher_hidden,
        "token_weights": inputs.token_weights,
        "student_head": LogitTransform(bias=bias),
        "alpha": alpha,
        "vocab_size": vocab - 14,
    }
    workspace = 40 if COMPILED else 0.5
    actual = run_operation(linear_divergence, **arguments, backend="triton", workspace_mb=workspace)
    exact, naive = run_reference(**arguments), run_reference(**arguments, naive=True)
    for name in ("hidden_gradient", "weight_gradient", "bias_gradient") if trained else ("hidden_gradient",):
        assert_within_reference_error(*(getattr(run, name) for run in (actual, exact, naive)), name=name)
    assert relative_error(actual.output.loss, exact.output.loss) < 1e-3


@in_this_process
@pytest.mark.skipif(len(DEVICES) < 2, reason="there is one device")
def test_a_device_that_is_not_the_current_one_gives_the_same() -> None:
    found = []
    for device in DEVICES[:2]:
        inputs = make_inputs(64, 128, 4099, dtype=torch.bfloat16, device=device)
        sides = inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden
        output = linear_divergence(*sides, support=TopK(20), backend="triton")
        gradients = torch.autograd.grad(output.loss, sides[:2])
        logprobs = linear_logprobs(*sides[:2], inputs.target_ids, backend="triton").logprobs
        ids = linear_topk(*sides[:2], 20, backend="triton").ids
        found.append([tensor.cpu() for tensor in (output.loss, *gradients, logprobs, ids)])
    for one, other in zip(*found, strict=True):
        assert relative_error(other, one) < 1e-5


@in_this_process
def test_offsets_beyond_two_to_the_31_are_right() -> None:
    """The last rows of a tile of more than 2^31 entries."""
    rows, vocab = (8200, 262_144) if COMPILED else (3, 512)
    if COMPILED and torch.cuda.mem_get_info()[0] < 3 * rows * vocab * 4:
        pytest.skip("three such tiles do not fit this device")
    ends = make_tile(2, vocab, seed=3)
    student, teacher = (torch.zeros(rows, vocab, device=DEVICE) for _ in range(2))
    for whole, few in zip((student, teacher), ends[:2], strict=True):
        whole[-2:] = few
    expected = run_tile(ends[0], ends[1], TileRows(), Objective(alpha=0.5))
    values, gradient = divergence_tile(student, teacher, TileRows(), Objective(alpha=0.5), want_gradient=True)
    torch.testing.assert_close(values.loss[-2:], expected[0].loss)
    torch.testing.assert_close(gradient[-2:], expected[1])


@pytest.mark.skipif(not COMPILED or SANITIZER is None, reason="needs a GPU and compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.timeout(1200)
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    selected = "many_blocks and (50257 or 4096)"
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    run = subprocess.run(
        [*command, sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", selected, __file__],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(INTERPRETED or COMPILED, reason="runs with the tests above")
def test_in_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
