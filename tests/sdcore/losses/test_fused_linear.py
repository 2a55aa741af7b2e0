"""The fused divergence against TRL's definitions of SDPO's loss, on random hidden states: value and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdcore.losses import FusedLinearDivergence
from sdkernels import TopK, linear_divergence

trl = pytest.importorskip("trl.experimental.sdpo.loss_utils")

N, H, V, K = 23, 16, 97, 11


class Inputs:
    """Random states of both sides and one head, float64."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=draw)

        self.student, self.weight = normal(N, H).requires_grad_(), normal(V, H).requires_grad_()
        self.teacher = 0.7 * self.student.detach() + 0.5 * normal(N, H)
        self.targets = torch.randint(V, (N,), generator=draw)
        self.token_weights = (torch.rand(N, generator=draw) < 0.8).double()
        with torch.no_grad():
            log_p = (self.student @ self.weight.T).log_softmax(-1).gather(1, self.targets[:, None])[:, 0]
        self.old_logprobs = log_p + 0.8 * normal(N)

    def logits(self) -> tuple[Tensor, Tensor]:
        return self.student @ self.weight.T, (self.teacher @ self.weight.detach().T)

    def gradients_of(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [self.student, self.weight]))

    def assert_same(self, loss: FusedLinearDivergence, per_token: Tensor, **options: Any) -> None:
        """`per_token` (N,) is TRL's, which the trainer averages over the mask."""
        weights = self.token_weights
        expected = (per_token * weights).sum() / weights.sum()
        out = loss(self.student, self.weight, self.teacher, target_ids=self.targets, token_weights=weights, **options)
        assert torch.allclose(out.loss, expected.double(), rtol=1e-6)
        for mine, wanted in zip(self.gradients_of(out.loss), self.gradients_of(expected), strict=True):
            assert float((mine - wanted).norm() / wanted.norm()) < 1e-6


ALPHAS = [0.0, 0.3, 0.5, 1.0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_full_logits_agree_with_trl(alpha: float) -> None:
    inputs = Inputs()
    per_token = trl.compute_full_logit_self_distillation_loss(*inputs.logits(), distillation_alpha=alpha)
    inputs.assert_same(FusedLinearDivergence(alpha=alpha), per_token)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_students_top_k_agrees_with_trl(alpha: float, tail: bool) -> None:
    inputs = Inputs()
    per_token = trl.compute_topk_self_distillation_loss(
        *inputs.logits(), distillation_topk=K, distillation_alpha=alpha, distillation_add_tail=tail
    )
    inputs.assert_same(FusedLinearDivergence(alpha=alpha, support=TopK(K, tail=tail)), per_token)


def test_the_sampled_token_agrees_with_trl() -> None:
    inputs = Inputs()
    logits = [row[None] for row in inputs.logits()]
    per_token = trl.compute_sampled_token_self_distillation_loss(*logits, inputs.targets[None], distillation_alpha=1.0)
    inputs.assert_same(FusedLinearDivergence(support="sampled"), per_token[0])


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_importance_clip_agrees_with_trl(alpha: float) -> None:
    inputs = Inputs()
    student, teacher = inputs.logits()
    log_p = student.log_softmax(-1).gather(1, inputs.targets[:, None])[:, 0]
    clip = 1.3
    clipped = int(((log_p - inputs.old_logprobs).exp() > clip).sum())
    assert 0 < clipped < N
    per_token = trl.apply_importance_sampling_clipping(
        trl.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha),
        log_p,
        inputs.old_logprobs,
        clip,
    )
    inputs.assert_same(
        FusedLinearDivergence(alpha=alpha, importance_clip=clip), per_token, old_logprobs=inputs.old_logprobs
    )


def test_alpha_1_is_the_kl_from_the_student_and_alpha_0_from_the_teacher() -> None:
    """The direction: a student that leaves out what the teacher does costs nothing in reverse KL, and much forward."""
    teacher, narrow = torch.tensor([[4.0, 4.0, -4.0]]), torch.tensor([[4.0, -9.0, -9.0]])
    head = torch.eye(3)
    reverse, forward = (float(FusedLinearDivergence(alpha=alpha)(narrow, head, teacher).loss) for alpha in (1.0, 0.0))
    assert reverse == pytest.approx(0.693, abs=0.01)  # log 2
    assert forward == pytest.approx(5.8, abs=0.1)


BAD: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"alpha": 7}, ValueError, ["alpha", "[0, 1]", "7"]),
    ({"alpha": "0.5"}, TypeError, ["alpha", "number", "str"]),
    ({"normalize": 1}, TypeError, ["normalize", "bool", "int"]),
    ({"temperature": 0.0}, ValueError, ["temperature", "(0", "0.0"]),
    ({"temperature": -1.0}, ValueError, ["temperature", "(0", "-1.0"]),
    ({"support": "top"}, ValueError, ["support", "'sampled'", "'top'"]),
    ({"support": 20}, ValueError, ["support", "TopK", "20"]),
    ({"support": TopK(0)}, ValueError, ["support.k", "[1, V", "0"]),
    ({"support": TopK(2.0)}, TypeError, ["support.k", "int", "float"]),  # type: ignore[arg-type]
    ({"support": TopK(9), "vocab_size": 8}, ValueError, ["support.k", "[1, V=8]", "9"]),
    ({"support": TopK(2, of="both")}, ValueError, ["support.of", "'student'", "'both'"]),  # type: ignore[arg-type]
    ({"support": "sampled", "alpha": 0.5}, ValueError, ["support='sampled'", "alpha=0.5"]),
    ({"support": "sampled", "normalize": True}, ValueError, ["support='sampled'", "normalize=True"]),
    ({"entry_clip": 0.0}, ValueError, ["entry_clip", "(0", "0.0"]),
    ({"entry_clip": 1.0, "support": TopK(2)}, ValueError, ["entry_clip", "full vocabulary", "TopK"]),
    ({"vocab_size": 0}, ValueError, ["vocab_size", "[1, V", "0"]),
    ({"vocab_size": 3.0}, TypeError, ["vocab_size", "int", "float"]),
    ({"backend": "cuda"}, ValueError, ["backend", "'triton'", "'cuda'"]),
    ({"gradient": "forward"}, ValueError, ["gradient", "'in_forward'", "'forward'"]),
    ({"workspace_mb": -5}, ValueError, ["workspace_mb", "-5"]),
    ({"on_nonfinite": "ignore"}, ValueError, ["on_nonfinite", "'propagate'", "'ignore'"]),
    ({"importance_clip": 0.0}, ValueError, ["importance_clip", "(0", "0.0"]),
    ({"importance_clip": "2"}, TypeError, ["importance_clip", "number", "str"]),
]


@pytest.mark.parametrize(("options", "kind", "words"), BAD)
def test_bad_options_are_refused_when_it_is_made(options: Any, kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        FusedLinearDivergence(**options)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("options", "kind"), [(options, kind) for options, kind, _ in BAD if "importance_clip" not in options]
)
def test_what_is_said_then_is_what_the_operation_says(options: Any, kind: type[Exception]) -> None:
    """Word for word, but for the vocabulary's size, which is not known before there is a head."""
    inputs = Inputs()
    with pytest.raises(kind) as made:
        FusedLinearDivergence(**options)
    with pytest.raises(kind) as called:
        linear_divergence(inputs.student, inputs.weight, inputs.teacher, target_ids=inputs.targets, **options)
    assert str(called.value).replace(f"V={V}]", "V]") == str(made.value)
