"""Operands of any strides: a transposed matrix, every other entry of a vector, one entry that stands for all.

Kernels in Triton and C take addresses. Triton runs in its interpreter, which has to be chosen before triton is
imported: without a GPU this file runs itself once more in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdkernels import (
    ImportanceClip,
    LogitTransform,
    TeacherMix,
    TopK,
    TopKLogprobs,
    linear_divergence,
    linear_logprobs,
    linear_topk,
    logit_divergence,
)
from sdkernels.testing import make_inputs, relative_error
from sdkernels.tile import native_backend
from sdkernels.tile.native_backend import products

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
N, H, HT, V = 9, 16, 24, 301


def operands() -> dict[str, Tensor]:
    inputs = make_inputs(N, H, V, teacher_size=HT)
    generator = torch.Generator().manual_seed(1)
    return {
        "student_hidden": inputs.student_hidden,
        "student_weight": inputs.student_weight,
        "student_bias": torch.randn(V, generator=generator),
        "teacher_hidden": inputs.teacher_hidden,
        "teacher_weight": inputs.teacher_weight,
        "teacher_bias": torch.randn(V, generator=generator),
        "mix_hidden": inputs.teacher_hidden.flip(0),
        "mix_weight": inputs.teacher_weight.flip(0),
        "token_weights": inputs.token_weights,
        "target_ids": inputs.target_ids,
        "old_logprobs": -torch.rand(N, generator=generator),
        "teacher_ids": (torch.randint(V, (N, 1), generator=generator) + torch.arange(4)) % V,
        "teacher_logprobs": torch.randn(N, 5, generator=generator).log_softmax(-1)[:, :4].contiguous(),
        "upstream": torch.rand(N, generator=generator),
    }


def spread(tensor: Tensor) -> Tensor:
    """The same values, no two neighbours in memory next to each other; what lies between is another valid value."""
    if tensor.dim() == 2:
        return tensor.t().contiguous().t()
    return torch.stack([tensor, tensor.flip(0)], 1)[:, 0]


def expanded(tensor: Tensor) -> Tensor:
    """The first entry, or row, for all."""
    return tensor[:1].expand(tensor.shape)


def run(call: str, backend: str, given: dict[str, Tensor]) -> list[Tensor]:
    """Values and gradients of one of the operations, with all operands that it takes."""
    of = {name: tensor.detach().to(DEVICE) if COMPILED else tensor.detach() for name, tensor in given.items()}
    leaves = [of[name].requires_grad_() for name in ("student_hidden", "student_weight", "student_bias")]
    hidden, weight, bias = leaves
    head = LogitTransform(bias=bias)
    if call == "topk":
        return list(linear_topk(hidden, weight, 5, head=head, backend=backend))
    if call == "logprobs":
        output: Any = linear_logprobs(hidden, weight, of["target_ids"], head=head, backend=backend)
        torch.autograd.backward([output.logprobs, output.entropy], [of["upstream"], of["upstream"]])
        return [output.logprobs, output.entropy, *(leaf.grad for leaf in leaves)]
    options: dict[str, Any] = {
        "token_weights": of["token_weights"],
        "target_ids": of["target_ids"],
        "importance": ImportanceClip(of["old_logprobs"], clip=2.0),
        "backend": backend,
        "alpha": 0.5,
    }
    if call == "logits":
        del options["importance"]
        z = [of[f"{side}_hidden"].detach()[:, :8] for side in ("student", "teacher")]
        options |= {"target_ids": of["target_ids"] % 8, "reduction": "none"}
        output = logit_divergence(z[0].requires_grad_(), z[1], **options)
        output.loss.backward(of["upstream"])
        return [output.loss, z[0].grad]
    teacher = [of["teacher_hidden"], of["teacher_weight"]]
    heads = {"student_head": head, "teacher_head": LogitTransform(bias=of["teacher_bias"])}
    if call == "cached":
        teacher, heads = [None, None], {"student_head": head}
        options["teacher"] = TopKLogprobs(of["teacher_ids"], of["teacher_logprobs"])
    elif call == "mix":
        options["teacher"] = TeacherMix(of["mix_hidden"], of["mix_weight"], share=0.3)
    elif call == "top-k":
        options["support"] = TopK(5, of="teacher")
    elif call == "sampled":
        options |= {"support": "sampled", "alpha": 1.0}
    elif call == "reduction none":
        options["reduction"] = "none"
    output = linear_divergence(hidden, weight, *teacher, **heads, **options)
    output.loss.backward(of["upstream"] if output.loss.dim() else None)
    return [output.loss, output.student_entropy, *(leaf.grad for leaf in leaves)]


CALLS = ["full", "reduction none", "top-k", "cached", "mix", "sampled", "logits", "logprobs", "topk"]


@pytest.mark.parametrize("backend", ["torch", "native", "native products", "triton"])
@pytest.mark.parametrize("form", [spread, expanded])
@pytest.mark.parametrize("call", CALLS)
def test_operands_of_any_strides_give_what_contiguous_ones_give(
    call: str, form: Callable[[Tensor], Tensor], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (backend == "triton") != (INTERPRETED or COMPILED):
        pytest.skip("Triton has a process of its own, or a GPU")
    if backend.startswith("native") and not native_backend.is_available():
        pytest.skip("this machine has no C compiler")
    if backend == "native products":
        if products.compiled() is None:
            pytest.skip("this CPU has no compiled products")
        monkeypatch.setattr(products, "_tried", lambda dtype, names: names[-1])
        monkeypatch.setattr(products, "LEAST_HEAD", 0)
    given = operands()
    # Each operand by itself would be the better test; in the interpreter it takes minutes.
    kept = set() if form is spread else {"teacher_ids", "token_weights"}
    if backend == "native products":  # which other weights are not for
        kept |= {"student_weight", "teacher_weight", "mix_weight"}
    changed = given | {name: form(tensor.detach()) for name, tensor in given.items() if name not in kept}
    assert not any(tensor.is_contiguous() for name, tensor in changed.items() if name not in kept)
    wanted = run(call, backend.split()[0], {name: tensor.contiguous() for name, tensor in changed.items()})
    for i, pair in enumerate(zip(run(call, backend.split()[0], changed), wanted, strict=True)):
        assert relative_error(*pair) < 1e-5, i


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(INTERPRETED or COMPILED, reason="runs with the tests above")
def test_triton_in_its_interpreter() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
