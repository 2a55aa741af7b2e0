"""One step against plain full logits in float64: the loss, every metric, and the gradient of every parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from sdcore.errors import ArgumentError, PlanError
from sdcore.losses import FusedLinearDivergence, PolicyTerm
from sdcore.prefix import Plan, plan
from sdcore.step import StepOutput, distill_step, imitate_step, policy_gradient_step
from sdcore.teachers import EMA, Frozen, Live, Teacher, TrustRegion
from sdkernels import TopK
from tests.sdcore.prefix.models import COMMON, assert_same_gradients, build, gradients, tied, tiny
from tests.sdcore.prefix.trees import Ids, random_ids

pytestmark = pytest.mark.usefixtures("in_double_precision")

SEED = 5
SHARE = 0.3
# strategy and micro_batch
HOW: list[Any] = [
    pytest.param("naive", None, id="naive"),
    pytest.param("cached", None, id="cached"),
    pytest.param("packed", None, id="packed"),
    pytest.param("two_phase", None, id="two_phase"),
    pytest.param("two_phase", 2, id="two_phase-2"),
]
Step = Callable[[PreTrainedModel], StepOutput]


def policy_gradient(model: nn.Module, planned: Plan, **options: Any) -> StepOutput:
    advantages = torch.linspace(-1.0, 1.0, planned.num_rows, dtype=torch.float64)
    return policy_gradient_step(model, planned, PolicyTerm(advantages=advantages), **options)


def full_logits(model: nn.Module, prompts: Sequence[Any], completions: Sequence[Sequence[Tensor]]) -> Tensor:
    """(N, V): one unpadded forward of the whole model per sequence, the logits before each completion token."""
    rows = []
    for group, prompt in zip(completions, prompts, strict=True):
        for i, completion in enumerate(group):
            own = prompt[i] if isinstance(prompt, list) else prompt
            logits = model(input_ids=torch.cat([own, completion])[None], use_cache=False).logits[0]
            rows.append(logits[len(own) - 1 : -1])
    return torch.cat(rows)


def targets_of(ids: Ids) -> Tensor:
    return torch.cat([completion for group in ids.completions for completion in group])


def divergences(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """(N,) as the papers write them; `log_q` without gradient."""
    p, q = log_p.exp(), log_q.exp()
    if alpha in (0.0, 1.0):
        return (p * (log_p - log_q)).sum(-1) if alpha == 1.0 else (q * (log_q - log_p)).sum(-1)
    log_m = ((1 - alpha) * p + alpha * q).log()
    return alpha * (q * (log_q - log_m)).sum(-1) + (1 - alpha) * (p * (log_p - log_m)).sum(-1)


def teacher_logits(kind: str, student: nn.Module, ids: Ids) -> Tensor:
    """(N, V), without gradient."""
    assert ids.teacher_prompts is not None
    with torch.no_grad():
        live, frozen = (
            full_logits(model, ids.teacher_prompts, ids.completions) for model in (student, tiny("llama", seed=1))
        )
    return {"live": live, "frozen": frozen, "trust": (1 - SHARE) * frozen + SHARE * live}[kind]


def teacher_of(kind: str) -> Teacher | TrustRegion:
    frozen = Frozen(tiny("llama", seed=1))
    return {"live": Live(), "frozen": frozen, "trust": TrustRegion(frozen, SHARE)}[kind]


@cache
def expected(name: str, kind: str, teacher: str, alpha: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of plain full logits."""
    model, ids = tiny(name), random_ids(SEED, teacher=teacher)
    assert ids.teacher_prompts is not None
    if kind == "live":
        with torch.no_grad():
            logits = full_logits(model, ids.teacher_prompts, ids.completions)
    else:
        logits = teacher_logits(kind, model, ids)
    log_p = full_logits(model, ids.student_prompts, ids.completions).log_softmax(-1)
    loss = divergences(log_p, logits.log_softmax(-1), alpha).mean()
    loss.backward()
    return loss.detach(), gradients(model)


def close(value: Tensor, wanted: Tensor) -> bool:
    return bool(torch.allclose(value.double(), wanted.double(), rtol=1e-9, atol=1e-12))


@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_distilling_is_the_divergence_of_the_full_distributions(
    alpha: float, strategy: Any, micro_batch: int | None
) -> None:
    model = tiny("llama")
    out = distill_step(
        model,
        plan(*random_ids(SEED)),
        loss=FusedLinearDivergence(alpha=alpha),
        strategy=strategy,
        micro_batch=micro_batch,
    )
    loss, grads = expected("llama", "live", "one", alpha)
    assert close(out.loss, loss)
    assert not out.loss.requires_grad
    assert_same_gradients(gradients(model), grads)


@pytest.mark.parametrize(("strategy", "micro_batch"), [HOW[1], HOW[2], HOW[4]])
@pytest.mark.parametrize("teacher", ["one", "each"])
@pytest.mark.parametrize("kind", ["live", "frozen", "trust"])
def test_every_teacher_reads_its_own_prompts(kind: str, teacher: str, strategy: Any, micro_batch: int | None) -> None:
    model, other = tiny("llama"), teacher_of(kind)
    out = distill_step(
        model,
        plan(*random_ids(SEED, teacher=teacher)),
        loss=FusedLinearDivergence(alpha=0.5),
        teacher=other,
        strategy=strategy,
        micro_batch=micro_batch,
    )
    loss, grads = expected("llama", kind, teacher, 0.5)
    assert close(out.loss, loss)
    assert_same_gradients(gradients(model), grads)
    reference = other.reference if isinstance(other, TrustRegion) else other
    if isinstance(reference, Frozen):
        assert all(weight.grad is None and weight.requires_grad for weight in reference.model.parameters())


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere2"])
def test_soft_capped_and_scaled_heads_are_the_models_own(name: str, micro_batch: int | None) -> None:
    model = tiny(name)
    out = distill_step(model, plan(*random_ids(SEED)), micro_batch=micro_batch)
    loss, grads = expected(name, "live", "one", 1.0)
    assert close(out.loss, loss)
    assert_same_gradients(gradients(model), grads)


def test_a_frozen_teachers_head_is_transformed_as_its_own_model_does() -> None:
    model, other, ids = tiny("llama"), tiny("granite"), random_ids(SEED)
    assert ids.teacher_prompts is not None
    with torch.no_grad():
        log_p = full_logits(model, ids.student_prompts, ids.completions).log_softmax(-1)
        log_q = full_logits(other, ids.teacher_prompts, ids.completions).log_softmax(-1)
    out = distill_step(model, plan(*ids), teacher=Frozen(other))
    assert close(out.loss, divergences(log_p, log_q, 1.0).mean())


@pytest.mark.parametrize("logits", [58, 61, 70])
def test_a_teacher_may_pad_its_vocabulary_otherwise(logits: int) -> None:
    model, given = tiny("llama"), random_ids(SEED)
    other = build(LlamaConfig(**COMMON | {"vocab_size": logits}))
    teacher_prompts: Any = given.teacher_prompts
    completions = [[completion % 50 for completion in group] for group in given.completions]
    ids = Ids([prompt % 50 for prompt in given.student_prompts], completions, [p % 50 for p in teacher_prompts])
    with torch.no_grad():
        student = full_logits(model, ids.student_prompts, completions)[..., :57]
        teacher = full_logits(other, [p % 50 for p in teacher_prompts], completions)[..., :57]
    loss = FusedLinearDivergence(alpha=1.0, vocab_size=57)
    out = distill_step(model, plan(*ids), teacher=Frozen(other), loss=loss)
    assert close(out.loss, divergences(student.log_softmax(-1), teacher.log_softmax(-1), 1.0).mean())
    assert (model.lm_head.weight.grad[57:] == 0).all()


@pytest.mark.parametrize("strategy", ["packed", "two_phase"])
def test_tied_embeddings_gather_both_gradients(strategy: Any) -> None:
    model, ids = tied(), random_ids(SEED)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = copy.deepcopy(model)
    assert ids.teacher_prompts is not None
    with torch.no_grad():
        log_q = full_logits(plain, ids.teacher_prompts, ids.completions).log_softmax(-1)
    log_p = full_logits(plain, ids.student_prompts, ids.completions).log_softmax(-1)
    divergences(log_p, log_q, 1.0).mean().backward()
    distill_step(model, plan(*ids), strategy=strategy)
    assert_same_gradients(gradients(model), gradients(plain))


@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
def test_a_tokens_weight_multiplies_its_loss_and_the_mean_is_over_the_weights(
    strategy: Any, micro_batch: int | None
) -> None:
    model, plain, ids = tiny("llama"), tiny("llama"), random_ids(SEED)
    weights = torch.rand(len(targets_of(ids)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights[weights < 0.4] = 0.0
    log_q = teacher_logits("live", plain, ids).log_softmax(-1)
    log_p = full_logits(plain, ids.student_prompts, ids.completions).log_softmax(-1)
    loss = (weights * divergences(log_p, log_q, 1.0)).sum() / weights.sum()
    loss.backward()
    out = distill_step(model, plan(*ids), token_weights=weights, strategy=strategy, micro_batch=micro_batch)
    assert close(out.loss, loss.detach())
    assert_same_gradients(gradients(model), gradients(plain))


@pytest.mark.parametrize("strategy", ["packed", "two_phase"])
def test_options_of_the_loss_reach_it(strategy: Any) -> None:
    """A support of k ids with a tail, and importance weights of the sampled tokens."""
    model, plain, ids = tiny("llama"), tiny("llama"), random_ids(SEED)
    targets, clip = targets_of(ids), 1.1
    log_q = teacher_logits("live", plain, ids).log_softmax(-1)
    log_p = full_logits(plain, ids.student_prompts, ids.completions).log_softmax(-1)
    chosen = log_p.detach().topk(4).indices

    def bucketed(logprobs: Tensor) -> Tensor:
        kept = logprobs.gather(1, chosen)
        return torch.cat([kept, (1 - kept.exp().sum(-1, keepdim=True)).log()], dim=-1)

    sampled = log_p.detach().gather(1, targets[:, None])[:, 0]
    old = sampled + torch.linspace(-0.5, 0.5, len(targets), dtype=torch.float64)
    importance = (sampled - old).exp().clamp(max=clip)
    assert 0 < int((importance == clip).sum()) < len(targets)
    loss = (importance * divergences(bucketed(log_p), bucketed(log_q), 1.0)).mean()
    loss.backward()
    out = distill_step(
        model,
        plan(*ids),
        loss=FusedLinearDivergence(support=TopK(4), importance_clip=clip),
        old_logprobs=old,
        strategy=strategy,
        micro_batch=2 if strategy == "two_phase" else None,
    )
    assert close(out.loss, loss.detach())
    assert_same_gradients(gradients(model), gradients(plain))


@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
def test_a_backward_that_scales_scales_the_gradients_exactly(strategy: Any, micro_batch: int | None) -> None:
    """As accelerator.backward does in mixed precision and in gradient accumulation."""
    plain, scaled, seen = tiny("llama"), tiny("llama"), []

    def backward(loss: Tensor) -> None:
        seen.append(loss.detach())
        (loss * 1024.0).backward()

    planned = plan(*random_ids(SEED))
    distill_step(plain, planned, strategy=strategy, micro_batch=micro_batch)
    out = distill_step(scaled, planned, strategy=strategy, micro_batch=micro_batch, backward=backward)
    for (name, weight), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(weight.grad * 1024.0, other.grad), name  # a power of two rounds nothing
    assert all(loss.shape == () for loss in seen)
    assert close(torch.stack(seen).sum(), out.loss)
    # Groups with 2, 1, 0, 0, and 3 completions that read a token; group 2 has rows without, group 3 has none.
    assert len(seen) == {("two_phase", None): 7, ("two_phase", 2): 5}.get((strategy, micro_batch), 1)


@pytest.mark.parametrize("strategy", ["auto", "naive", "cached", "packed"])
@pytest.mark.parametrize("step", [distill_step, policy_gradient], ids=["distill", "policy_gradient"])
def test_without_a_backward_the_loss_comes_back_in_the_graph(step: Callable[..., StepOutput], strategy: Any) -> None:
    eager, later = tiny("llama"), tiny("llama")
    planned = plan(*random_ids(SEED))
    whole = step(eager, planned, strategy=strategy)
    out = step(later, planned, strategy=strategy, backward=None)
    assert all(weight.grad is None for weight in later.parameters())
    assert not whole.loss.requires_grad
    assert torch.equal(out.loss.detach(), whole.loss)
    (3.0 * out.loss).backward()
    assert_same_gradients(gradients(later), {name: 3.0 * grad for name, grad in gradients(eager).items()})


@pytest.mark.parametrize("strategy", ["packed", "two_phase"])
def test_gradients_accumulate_over_steps(strategy: Any) -> None:
    model, planned = tiny("llama"), plan(*random_ids(SEED))
    distill_step(model, planned, strategy=strategy)
    once = gradients(model)
    distill_step(model, planned, strategy=strategy)
    assert_same_gradients(gradients(model), {name: 2 * grad for name, grad in once.items()})


@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
def test_the_models_own_output_layer_is_never_run(strategy: Any, micro_batch: int | None) -> None:
    model, other = tiny("llama"), tiny("llama", seed=1)

    def refuse(*_: Any) -> None:
        raise AssertionError("lm_head was run")

    for either in (model, other):
        either.lm_head.register_forward_pre_hook(refuse)
    planned = plan(*random_ids(SEED))
    distill_step(
        model, planned, teacher=TrustRegion(Frozen(other)), strategy=strategy, micro_batch=micro_batch, verify="always"
    )
    imitate_step(model, plan([[1, 2, 3]], [[[4, 5]]]))


@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
def test_the_first_completion_token_is_supervised(strategy: Any, micro_batch: int | None) -> None:
    """Of completions of one token there is nothing else: a loss without it would be 0."""
    model, other = tiny("llama"), tiny("llama", seed=1)
    planned = plan([[5, 9, 2]], [[[7], [8]]], [[5, 9, 4, 2]])
    out = distill_step(model, planned, teacher=Frozen(other), strategy=strategy, micro_batch=micro_batch)
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([[5, 9, 2]])).logits[0, -1:].log_softmax(-1)
        log_q = other(input_ids=torch.tensor([[5, 9, 4, 2]])).logits[0, -1:].log_softmax(-1)
    assert close(out.loss, divergences(log_p, log_q, 1.0)[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("strategy", "micro_batch"), HOW[2:])
def test_metrics_are_means_over_the_tokens_with_a_weight(
    strategy: Any, micro_batch: int | None, weighted: bool
) -> None:
    model, ids = tiny("llama"), random_ids(SEED)
    targets = targets_of(ids)
    weights = torch.arange(len(targets), dtype=torch.float64) % 3 if weighted else None
    active = torch.ones(len(targets), dtype=torch.bool) if weights is None else weights != 0
    with torch.no_grad():
        log_p = full_logits(model, ids.student_prompts, ids.completions).log_softmax(-1)[active]
    log_q = teacher_logits("frozen", model, ids).log_softmax(-1)[active]
    out = distill_step(
        model,
        plan(*ids),
        teacher=teacher_of("frozen"),
        token_weights=weights,
        strategy=strategy,
        micro_batch=micro_batch,
    )
    wanted = {"loss/active_tokens": active.sum()}
    for side, logprobs in (("student", log_p), ("teacher", log_q)):
        wanted[f"{side}/entropy"] = -(logprobs.exp() * logprobs).sum(-1).mean()
        wanted[f"{side}/logprob"] = logprobs.gather(1, targets[active, None]).mean()
    assert out.metrics.keys() == wanted.keys()
    assert {name for name, value in out.metrics.items() if not close(value, wanted[name])} == set()
    assert not any(value.requires_grad or value.dim() for value in out.metrics.values())
    assert out.report.student.strategy == strategy


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
def test_imitating_is_the_cross_entropy_of_the_completions(
    strategy: Any, micro_batch: int | None, weighted: bool
) -> None:
    model, plain = tiny("gemma2"), tiny("gemma2")
    prompts, completions = [[1, 7, 8], [1, 9], [1, 5, 6, 7, 8]], [[10, 11, 2], [2], [12, 13]]
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 0.25], dtype=torch.float64) if weighted else None
    out = imitate_step(
        model,
        plan(prompts, [[completion] for completion in completions]),
        token_weights=weights,
        normalizer=7.0 if weighted else None,
        strategy=strategy,
        micro_batch=micro_batch,
    )
    log_p = full_logits(plain, list(map(torch.tensor, prompts)), [[torch.tensor(c)] for c in completions])
    log_p = log_p.log_softmax(-1)
    surprise = -log_p.gather(1, torch.tensor([10, 11, 2, 2, 12, 13])[:, None])[:, 0]
    loss = surprise.mean() if weights is None else (weights * surprise).sum() / 7
    loss.backward()
    assert close(out.loss, loss.detach())
    assert close(out.rows["per_token"], (surprise if weights is None else weights * surprise).detach())
    entropy = -(log_p.exp() * log_p).sum(-1)
    active = slice(None) if weights is None else weights != 0
    assert close(out.metrics["student/entropy"], entropy[active].mean().detach())
    assert close(out.metrics["student/logprob"], -surprise[active].mean().detach())
    assert_same_gradients(gradients(model), gradients(plain))


def test_imitating_without_a_backward_gives_its_loss_in_the_graph() -> None:
    model, other = tiny("llama"), tiny("llama")
    planned = plan([[1, 7, 8]], [[[10, 11], [2]]])
    imitate_step(model, planned, backward=None).loss.backward()
    imitate_step(other, planned)
    assert_same_gradients(gradients(model), gradients(other))


def test_a_teacher_that_is_the_student_gives_the_students_gradient_only() -> None:
    live, student = tiny("llama"), tiny("llama")
    planned = plan(*random_ids(SEED))
    out = distill_step(live, planned)
    other = distill_step(student, planned, teacher=Frozen(copy.deepcopy(student)))
    assert close(out.loss, other.loss)
    assert_same_gradients(gradients(live), gradients(student))


def good() -> Plan:
    return plan([[1, 2, 3]], [[[4, 5], [6]]], [[1, 2, 9, 3]])


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (good, {"token_weights": torch.ones(2)}, ArgumentError, r"token_weights must be .* \(N=3,\), got .* \(2,\)"),
        (good, {"token_weights": torch.ones(3, 1)}, ArgumentError, r"token_weights must be .* got .* \(3, 1\)"),
        (good, {"token_weights": torch.ones(3).long()}, ArgumentError, "token_weights must be a float tensor"),
        (good, {"token_weights": [1.0, 1.0, 1.0]}, ArgumentError, "token_weights must be a float tensor .* got list"),
        (good, {"token_weights": torch.tensor([1.0, torch.nan, 1.0])}, ArgumentError, "token_weights must be finite"),
        (good, {"token_weights": torch.tensor([1.0, -2.0, 0.0])}, ArgumentError, "token_weights .* sum"),
        (good, {"token_weights": torch.tensor([1.0, -1.0, 0.0])}, ArgumentError, "token_weights .* sum"),
        (good, {"old_logprobs": torch.zeros(4)}, ArgumentError, r"old_logprobs must be .* got .* \(4,\)"),
        (good, {"old_logprobs": torch.zeros(3)}, ArgumentError, "old_logprobs must be given where importance_clip is"),
        (
            good,
            {"loss": FusedLinearDivergence(importance_clip=2.0)},
            ArgumentError,
            "old_logprobs must be given where importance_clip is",
        ),
        (lambda: plan([[1, 2]], [[[3]]]), {}, ArgumentError, "plan must have teacher prompts"),
        (
            good,
            {"micro_batch": 1, "strategy": "packed"},
            ArgumentError,
            "micro_batch must be positive, for 'two_phase'",
        ),
        (good, {"micro_batch": 0}, ArgumentError, "micro_batch must be positive, .* got 0"),
        (good, {"micro_batch": 1, "backward": None}, ArgumentError, "micro_batch .* where the states outlive the call"),
        (good, {"strategy": "two_phase", "backward": None}, ArgumentError, "strategy must not be 'two_phase'"),
        (good, {"strategy": "fastest"}, ArgumentError, "strategy must be one of .*'fastest'"),
        (good, {"verify": "never"}, ArgumentError, "verify must be one of .*'never'"),
        (lambda: plan([[1, 61]], [[[3]]], [[1]]), {}, PlanError, r"student_prompts\[0\] .* V=61.* got id 61"),
        (lambda: plan([[1]], [[[3, 99]]], [[1]]), {}, PlanError, r"completions\[0\]\[0\] .* V=61.* got id 99"),
        (lambda: plan([[1]], [[[3]]], [[1, 70]]), {}, PlanError, r"teacher_prompts\[0\] .* V=61.* got id 70"),
        (lambda: plan([[1]], [[[3] * 257]], [[1]]), {}, PlanError, r"student_prompts\[0\] .* 256 tokens.* got 257"),
        (lambda: plan([[1]], [[[3]]], [[1] * 257]), {}, PlanError, r"teacher_prompts\[0\] .* 256 tokens.* got 257"),
    ],
)
def test_bad_arguments_are_refused_by_name_before_any_pass(
    make: Callable[[], Plan], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny("llama")
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was run"))
    with pytest.raises(error, match=message):
        distill_step(model, make(), **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda model: Frozen(model), ArgumentError, "model must be another module than the student"),
        (
            lambda _: Frozen(build(LlamaConfig(**COMMON | {"max_position_embeddings": 4}))),
            PlanError,
            r"teacher_prompts\[0\] .* at most 4 tokens",
        ),
        (
            lambda _: Frozen(build(LlamaConfig(**COMMON | {"vocab_size": 8}))),
            ArgumentError,
            r"teacher .* 61 .* got 8",
        ),
        (
            lambda _: Frozen(build(LlamaConfig(**COMMON | {"vocab_size": 64}))),
            ArgumentError,
            r"teacher .* 61 .* got 64",
        ),
        (lambda _: "Qwen/Qwen3-0.6B", ArgumentError, r"must be a teacher such as Live\(\), .* got 'Qwen/Qwen3-0.6B'"),
        (lambda model: model, ArgumentError, r"must be a teacher such as .* Frozen\(another model\), got LlamaForC"),
        (lambda _: EMA, ArgumentError, "must be a teacher such as .* got <class 'sdcore.teachers.ema.EMA'>"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_any_pass(
    make: Callable[[Any], Teacher], error: type[Exception], message: str
) -> None:
    model = tiny("llama")
    teacher = make(model)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was run"))
    with pytest.raises(error, match=message):
        distill_step(model, good(), teacher=teacher)
    with pytest.raises(error, match=message):
        distill_step(model, good(), teacher=TrustRegion(teacher))  # type: ignore[arg-type]
