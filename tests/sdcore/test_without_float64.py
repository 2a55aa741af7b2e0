"""Training on a device without float64, as Apple's GPUs are, imitated by `tests/apple.py`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from sdcore.integrations.verl import compute_self_distillation_loss
from sdcore.losses.token_weighting import over_ranks
from sdcore.models import heads
from sdcore.prefix.verification import _difference
from sdcore.presets import SFT, Method
from sdcore.teachers.weights import fingerprint
from sdcore.training.config import SelfDistillationConfig
from sdcore.training.trainer import SelfDistillationTrainer
from sdcore.world.data import fraction
from tests.apple import MPS, OnGpu, apple_gpu
from tests.sdcore.trainer_runs import SDFT_METHOD, lines, trainer

B, T, K, VOCAB = 3, 5, 4, 30


@pytest.mark.parametrize(("method", "kind"), [(SDFT_METHOD, "sdft"), (SFT(), "sft")], ids=["sdft", "sft"])
def test_a_run_on_the_device_says_what_a_run_on_the_cpu_says(
    method: Method, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the probes, which have sums of their own."""
    probes = {"overlap_probe_every": 1, "leak_probe_every": 1} if method.has_teacher else {}
    options = {"method": method, "kind": kind, "reward_funcs": [fraction], "max_steps": 1, **probes}

    def run(folder: str) -> SelfDistillationTrainer:
        made = trainer(tmp_path / folder, **options)
        made.train()
        return made

    run("cpu")
    monkeypatch.setattr(SelfDistillationConfig, "device", property(lambda args: (args._setup_devices, MPS)[1]))
    monkeypatch.setattr(Accelerator, "device", MPS)
    monkeypatch.setattr(heads, "_require_matrix", lambda layer, name: None)  # knows the device's class for none of ours
    with apple_gpu():
        assert {type(weight.data) for weight in run("mps").model.parameters()} == {OnGpu}
    for line, other in zip(lines(tmp_path / "mps"), lines(tmp_path / "cpu"), strict=True):
        assert line.keys() == other.keys()
        told = [name for name in line if not name.startswith("time") and isinstance(line[name], float)]
        assert len(told) > 10
        assert [line[name] for name in told] == pytest.approx([other[name] for name in told], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("form", ["sampled", "topk", "all"])
def test_lasgroups_loss_and_its_gradient_are_the_cpus(form: str) -> None:
    config = SimpleNamespace(
        alpha=1.0 if form == "sampled" else 0.5,
        full_logit_distillation=form != "sampled",
        distillation_topk=K if form == "topk" else None,
        distillation_add_tail=True,
        is_clip=None,
    )

    def results(device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        student, teacher = torch.randn(2, B, T, VOCAB, generator=generator).log_softmax(-1).to(device)
        student = student.detach().requires_grad_()
        loss, _ = compute_self_distillation_loss(
            student[..., 0],
            teacher[..., 0],
            torch.ones(B, T, dtype=torch.int64, device=device),
            config,
            student_all_log_probs=student if form == "all" else None,
            teacher_all_log_probs=teacher if form == "all" else None,
            student_topk_log_probs=student[..., :K] if form == "topk" else None,
            teacher_topk_log_probs=teacher[..., :K] if form == "topk" else None,
        )
        loss.backward()
        assert loss.device.type == student.grad.device.type == device
        return [loss.detach().cpu(), student.grad.cpu()]

    expected = results("cpu")
    with apple_gpu():
        actual = results("mps")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_what_is_compared_or_summed_is_the_cpus() -> None:
    rows, exact = torch.randn(2, 6, 8)
    module = nn.Linear(8, 6)
    expected = _difference(rows, exact, 0.0), fingerprint(module)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with apple_gpu(), pytest.MonkeyPatch.context() as patch:
            assert (_difference(rows.to("mps"), exact.to("mps"), 0.0), fingerprint(module.to("mps"))) == expected
            patch.setattr(dist, "get_world_size", lambda: 2)  # else there is nothing to sum
            assert over_ranks(0.1, "mps") == 0.05
    finally:
        dist.destroy_process_group()
