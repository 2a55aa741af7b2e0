"""Steps with rewards in them against plain full logits in float64: mixtures, token tilts, policy gradients, tilts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sdcore.errors import ArgumentError
from sdcore.losses import (
    Aggregation,
    FusedLinearDivergence,
    PolicyTerm,
    Tilted,
    TokenTilt,
    per_completion,
    spread,
    token_weights,
)
from sdcore.prefix import Plan, plan
from sdcore.step import StepOutput, distill_step, policy_gradient_step, tilt_step, token_logprobs
from sdcore.teachers import EMA, Frozen, Live, TrustRegion
from sdkernels import TopK
from tests.sdcore.prefix.models import assert_same_gradients, gradients, tiny
from tests.sdcore.prefix.trees import Ids, random_ids
from tests.sdcore.test_step import (
    HOW,
    SEED,
    SHARE,
    close,
    divergences,
    full_logits,
    targets_of,
    teacher_logits,
    teacher_of,
)

pytestmark = pytest.mark.usefixtures("in_double_precision")

IDS = random_ids(SEED)
LENGTHS = [len(ids) for group in IDS.completions for ids in group]
SIZES = [len(group) for group in IDS.completions]
N, S = sum(LENGTHS), len(LENGTHS)
FEW = [HOW[2], HOW[4]]  # packed, two_phase


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_weights() -> Tensor:
    """(N,) of which some are 0."""
    weights = normal(N, seed=3).abs()
    return torch.where(weights < 0.4, 0.0, weights)


def student_log_p(model: Any, ids: Ids = IDS) -> Tensor:
    """(N, V) in the graph."""
    return full_logits(model, ids.student_prompts, ids.completions).log_softmax(-1)


def of_targets(log_p: Tensor, ids: Ids = IDS) -> Tensor:
    return log_p.gather(1, targets_of(ids)[:, None])[:, 0]


def reference() -> Any:
    return tiny("llama", seed=1)


def reference_log_p() -> Tensor:
    with torch.no_grad():
        return student_log_p(reference())


def agree(
    step: Callable[[Any], StepOutput], loss_of: Callable[[Any], Tensor], *, loss: bool = True
) -> tuple[StepOutput, Any]:
    """A step gives the loss and the gradients of a plain function of the model."""
    model, plain = tiny("llama"), tiny("llama")
    out, expected = step(model), loss_of(plain)
    expected.backward()
    assert not loss or close(out.loss, expected.detach())
    assert not out.loss.requires_grad
    assert_same_gradients(gradients(model), gradients(plain))
    assert not any(value.requires_grad or value.isnan().any() for value in (*out.metrics.values(), *out.rows.values()))
    assert all(value.shape == (N,) for value in out.rows.values())
    return out, plain


# Normalizers


@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
def test_a_normalizer_divides_the_weighted_sum(strategy: Any, micro_batch: int | None) -> None:
    weights = some_weights()
    log_q = teacher_logits("live", tiny("llama"), IDS).log_softmax(-1)
    agree(
        lambda model: distill_step(
            model, plan(*IDS), token_weights=weights, normalizer=7.0, strategy=strategy, micro_batch=micro_batch
        ),
        lambda plain: (weights * divergences(student_log_p(plain), log_q, 1.0)).sum() / 7.0,
    )


def part(groups: Sequence[int]) -> tuple[Plan, Tensor, list[int]]:
    """The plan of some of the groups, which rows of the whole one it has, and the completions' lengths."""
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    first = torch.tensor([0, *SIZES]).cumsum(0).tolist()
    rows = torch.cat([torch.arange(int(starts[first[g]]), int(starts[first[g + 1]])) for g in groups])
    chosen = [[values[g] for g in groups] for values in IDS if values is not None]
    return plan(*chosen), rows, [len(ids) for g in groups for ids in IDS.completions[g]]


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_accumulated_steps_give_the_gradients_of_the_whole_whatever_the_split(aggregation: Any) -> None:
    mask = some_weights() > 0
    whole, model = tiny("llama"), tiny("llama")
    weights, normalizer = token_weights(aggregation, LENGTHS, mask, norm_length=9)
    expected = distill_step(whole, plan(*IDS), token_weights=weights, normalizer=normalizer, strategy="packed")
    parts = [part(groups) for groups in ((0, 3), (1,), (2, 4))]
    of_parts = [token_weights(aggregation, lengths, mask[rows], norm_length=9) for _, rows, lengths in parts]
    total = sum(own for _, own in of_parts)
    losses = [
        distill_step(model, planned, token_weights=own, normalizer=total, micro_batch=1 + number).loss
        for number, ((planned, _, _), (own, _)) in enumerate(zip(parts, of_parts, strict=True))
    ]
    assert torch.allclose(torch.stack(losses).sum(), expected.loss, rtol=1e-6)  # weights are float32
    for (name, mine), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert float((mine.grad - other.grad).norm() / other.grad.norm()) < 1e-6, name


# Token tilts


@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["frozen", "trust"])
def test_a_token_tilt_is_the_divergence_to_the_tilted_teacher(
    kind: str, alpha: float, strategy: Any, micro_batch: int | None
) -> None:
    weights, exponents = some_weights(), normal(N, seed=4)
    tilt = torch.zeros(N, 61, dtype=torch.float64).scatter(1, targets_of(IDS)[:, None], exponents[:, None])
    log_q = (teacher_logits(kind, tiny("llama"), IDS).log_softmax(-1) + tilt).log_softmax(-1)
    out, _ = agree(
        lambda model: distill_step(
            model,
            plan(*IDS),
            loss=FusedLinearDivergence(alpha=alpha),
            teacher=teacher_of(kind),
            token_weights=weights,
            tilt=TokenTilt(exponents=exponents),
            strategy=strategy,
            micro_batch=micro_batch,
        ),
        lambda plain: (weights * divergences(student_log_p(plain), log_q, alpha)).sum() / weights.sum(),
    )
    assert close(out.rows["per_token"].sum() / weights.sum(), out.loss)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_tilt_has_the_temperature_of_its_loss(alpha: float) -> None:
    exponents = normal(N, seed=4)
    tilt = torch.zeros(N, 61, dtype=torch.float64).scatter(1, targets_of(IDS)[:, None], exponents[:, None])
    log_q = ((teacher_logits("frozen", tiny("llama"), IDS) / 1.7).log_softmax(-1) + tilt).log_softmax(-1)
    agree(
        lambda model: distill_step(
            model,
            plan(*IDS),
            loss=FusedLinearDivergence(alpha=alpha, temperature=1.7),
            teacher=teacher_of("frozen"),
            tilt=TokenTilt(exponents=exponents),
        ),
        lambda plain: divergences((student_log_p(plain) / 1.7).log_softmax(-1), log_q, alpha).mean(),
    )


def test_a_tilt_by_nothing_is_no_tilt() -> None:
    model, other = tiny("llama"), tiny("llama")
    out = distill_step(model, plan(*IDS), tilt=TokenTilt(exponents=torch.zeros(N)))
    expected = distill_step(other, plan(*IDS))
    assert torch.allclose(out.loss, expected.loss, rtol=1e-6)
    assert_same_gradients(gradients(model), gradients(other))


# Policy gradients


def clipped(logprobs: Tensor, advantages: Tensor, old: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    return (reference - logprobs).exp() - (reference - logprobs) - 1


def old_logprobs(weights: Tensor) -> Tensor:
    """Near the student's; of rows without weight nonsense."""
    with torch.no_grad():
        old = of_targets(student_log_p(tiny("llama"))) + 0.3 * normal(N, seed=6)
    return torch.where(weights == 0, torch.tensor(-1e4, dtype=torch.float64), old)


@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
@pytest.mark.parametrize("anchor", [None, "k3", "exact"])
def test_a_policy_gradient_step_is_that_of_the_full_distributions(
    anchor: Any, strategy: Any, micro_batch: int | None
) -> None:
    weights, advantages = some_weights(), normal(N, seed=5)
    old, log_ref = old_logprobs(weights), reference_log_p()

    def loss_of(plain: Any) -> Tensor:
        log_p = student_log_p(plain)
        used = weights != 0
        per_token = torch.zeros(N, dtype=torch.float64).index_copy(
            0, used.nonzero()[:, 0], clipped(of_targets(log_p)[used], advantages[used], old[used])
        )
        if anchor == "k3":
            per_token = per_token + 0.3 * k3(of_targets(log_p), of_targets(log_ref))
        if anchor == "exact":
            per_token = per_token + 0.3 * divergences(log_p, log_ref, 1.0)
        return (weights * per_token).sum() / 11.0

    out, plain = agree(
        lambda model: policy_gradient_step(
            model,
            plan(*IDS),
            PolicyTerm(
                advantages=advantages,
                old_logprobs=old,
                token_weights=weights,
                normalizer=11.0,
                kl_anchor=0.3 if anchor else 0.0,
            ),
            reference=Frozen(reference()) if anchor else None,
            kl_estimator=anchor or "k3",
            strategy=strategy,
            micro_batch=micro_batch,
        ),
        loss_of,
    )
    assert close(out.rows["per_token"].sum() / 11.0, out.loss)
    used = weights != 0
    with torch.no_grad():
        log_p = student_log_p(plain)
    ratio = (of_targets(log_p) - old).exp()[used]
    outside = ((ratio > 1.2) & (advantages[used] > 0)) | ((ratio < 0.8) & (advantages[used] < 0))
    assert 0 < int(outside.sum()) < int(used.sum())
    assert close(out.metrics["policy/clipped_fraction"], outside.double().mean())
    assert close(out.metrics["policy/ratio"], ratio.mean())
    assert close(out.metrics["student/entropy"], -(log_p.exp() * log_p).sum(-1)[used].mean())
    if anchor:
        wanted = k3(of_targets(log_p), of_targets(log_ref)) if anchor == "k3" else divergences(log_p, log_ref, 1.0)
        assert close(out.metrics["policy/anchor"], wanted[used].mean())


@pytest.mark.parametrize("strategy", ["naive", "two_phase"])
def test_the_reference_may_be_an_average_of_the_student_itself(strategy: Any) -> None:
    advantages, log_ref = normal(N, seed=5), of_targets(reference_log_p())

    def step(model: Any) -> StepOutput:
        own = [weight.detach().clone() for weight in model.parameters()]
        for weight, other in zip(model.parameters(), reference().parameters(), strict=True):
            weight.data.copy_(other.data)
        average = EMA(model, 0.0)
        for weight, before in zip(model.parameters(), own, strict=True):
            weight.data.copy_(before)
        term = PolicyTerm(advantages=advantages, kl_anchor=0.3)
        return policy_gradient_step(model, plan(*IDS), term, reference=average, strategy=strategy)

    def loss_of(plain: Any) -> Tensor:
        logprobs = of_targets(student_log_p(plain))
        return (clipped(logprobs, advantages, logprobs.detach()) + 0.3 * k3(logprobs, log_ref)).mean()

    agree(step, loss_of)


def test_a_policy_has_the_temperature_that_sampled() -> None:
    advantages = normal(N, seed=5)
    log_ref = (reference_log_p() / 0.7).log_softmax(-1)

    def loss_of(plain: Any) -> Tensor:
        logprobs = of_targets((student_log_p(plain) / 0.7).log_softmax(-1))
        return (-(logprobs - logprobs.detach()).exp() * advantages + 0.3 * k3(logprobs, of_targets(log_ref))).mean()

    term = PolicyTerm(advantages=advantages, kl_anchor=0.3, temperature=0.7)
    agree(lambda model: policy_gradient_step(model, plan(*IDS), term, reference=Frozen(reference())), loss_of)


@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
def test_a_mixture_is_both_losses_each_with_its_share_and_normalizer(strategy: Any, micro_batch: int | None) -> None:
    """Distillation on some tokens, the policy gradient on others."""
    of_divergence, of_policy = some_weights(), some_weights().roll(1)
    advantages, old, log_ref = normal(N, seed=5), old_logprobs(of_policy), of_targets(reference_log_p())
    log_q = teacher_logits("frozen", tiny("llama"), IDS).log_softmax(-1)

    def loss_of(plain: Any) -> Tensor:
        log_p = student_log_p(plain)
        logprobs, used = of_targets(log_p), of_policy != 0
        policy = clipped(logprobs[used], advantages[used], old[used]) + 0.2 * k3(logprobs, log_ref)[used]
        divergence = (of_divergence * divergences(log_p, log_q, 0.5)).sum() / 5.0
        return 0.7 * divergence + 0.3 * (of_policy[used] * policy).sum() / of_policy.sum()

    out, _ = agree(
        lambda model: distill_step(
            model,
            plan(*IDS),
            loss=FusedLinearDivergence(alpha=0.5),
            teacher=teacher_of("frozen"),
            token_weights=of_divergence,
            normalizer=5.0,
            policy=PolicyTerm(
                advantages=advantages,
                old_logprobs=old,
                token_weights=of_policy,
                kl_anchor=0.2,
                reference_logprobs=log_ref,
                distillation_weight=0.7,
            ),
            strategy=strategy,
            micro_batch=micro_batch,
        ),
        loss_of,
    )
    assert close(0.7 * out.metrics["loss/distillation"] + 0.3 * out.metrics["loss/policy"], out.loss)
    assert int(out.metrics["loss/active_tokens"]) == int((of_divergence != 0).sum())


def test_a_share_of_1_is_distillation_alone() -> None:
    model, other = tiny("llama"), tiny("llama")
    term = PolicyTerm(advantages=normal(N), distillation_weight=1.0)
    distill_step(model, plan(*IDS), policy=term)
    distill_step(other, plan(*IDS))
    assert_same_gradients(gradients(model), gradients(other))


# Tilts of whole responses


def some_mask() -> Tensor:
    """(N,) bool; the last completion, which is not judged, has no token that counts."""
    mask = normal(N, seed=8) > -1.2
    mask[-LENGTHS[-1] :] = False
    return mask


REWARDS = normal(S, seed=9)
LOG_Z = normal(len(SIZES), seed=10)


@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
@pytest.mark.parametrize("logz", ["group_var", "leave_one_out", "exact", "mean_reward"])
def test_a_tilt_step_is_the_loss_of_the_full_distributions(logz: Any, strategy: Any, micro_batch: int | None) -> None:
    mask, log_ref = some_mask(), of_targets(reference_log_p())
    rewards = REWARDS.clone()
    rewards[-1] = torch.nan

    def loss_of(plain: Any) -> Tensor:
        logprobs, losses = of_targets(student_log_p(plain)), []
        ratios_S = zip((logprobs - log_ref).split(LENGTHS), mask.split(LENGTHS), strict=True)
        ratios = [own[kept].sum() for own, kept in ratios_S]
        counts = [int(kept.sum()) for kept in mask.split(LENGTHS)]
        start = 0
        for group, size in enumerate(SIZES):
            used = [i for i in range(start, start + size) if counts[i]]
            start += size
            if len(used) < (1 if logz == "exact" else 2):
                continue
            gap = torch.stack([ratios[i] - 0.8 * rewards[i] for i in used])
            count = len(used)
            if logz == "group_var":
                losses.append(0.5 * gap.var())
                continue
            log_z = {
                "leave_one_out": (gap - gap.sum()).detach() / (count - 1),
                "exact": LOG_Z[group],
                "mean_reward": 0.8 * rewards[used].mean(),
            }[logz]
            losses.append(0.5 * (gap + log_z).square().mean())
        assert losses
        return torch.stack(losses).mean()

    out, _ = agree(
        lambda model: tilt_step(
            model,
            plan(*IDS),
            rewards,
            target=Tilted(inv_temperature=0.8, logz=logz),
            reference=Frozen(reference()),
            completion_mask=mask,
            log_z=LOG_Z if logz == "exact" else None,
            strategy=strategy,
            micro_batch=micro_batch,
        ),
        loss_of,
    )
    assert out.report.student.strategy == strategy
    assert float(out.metrics["tilt/reused_logprobs"]) == 0.0
    assert not out.rows["per_token"][~mask].any()


def test_given_log_probabilities_save_a_forward_of_micro_batches_and_nothing_else_changes() -> None:
    model, other, planned = tiny("llama"), tiny("llama"), plan(*IDS)
    options: dict[str, Any] = {"target": Tilted(inv_temperature=0.8), "verify": "off", "micro_batch": 2}
    runs: list[int] = []
    for either in (model, other):
        either.model.register_forward_hook(lambda module, *_: runs.append(id(module)))
    reference_logprobs = token_logprobs(model, planned, teacher=Frozen(reference()))
    expected = tilt_step(model, planned, REWARDS, reference_logprobs=reference_logprobs, **options)
    own = token_logprobs(tiny("llama"), planned)
    out = tilt_step(other, planned, REWARDS, reference_logprobs=reference_logprobs, student_logprobs=own, **options)
    assert 0 < runs.count(id(other.model)) < runs.count(id(model.model))
    assert float(out.metrics["tilt/reused_logprobs"]) == 1.0
    assert close(out.loss, expected.loss)
    assert_same_gradients(gradients(other), gradients(model))


def test_tilt_steps_of_parts_add_up_to_the_whole() -> None:
    whole, model = tiny("llama"), tiny("llama")
    target, active = Tilted(inv_temperature=0.8), torch.tensor(LENGTHS) > 0
    options: dict[str, Any] = {"target": target, "reference": Frozen(reference())}
    expected = tilt_step(whole, plan(*IDS), REWARDS, **options)
    normalizer = target.num_groups(SIZES, active)
    assert normalizer == 3
    of_groups = REWARDS.split(SIZES)
    losses = []
    for groups in ((0, 3), (1,), (2, 4)):
        rewards = torch.cat([of_groups[g] for g in groups])
        losses.append(tilt_step(model, part(groups)[0], rewards, normalizer=normalizer, **options).loss)
    assert close(torch.stack(losses).sum(), expected.loss)
    assert_same_gradients(gradients(model), gradients(whole))


def test_the_gap_of_a_student_that_is_the_reference_is_the_reward() -> None:
    out = tilt_step(reference(), plan(*IDS), REWARDS, target=Tilted(inv_temperature=0.8), reference=Frozen(reference()))
    active = (torch.tensor(LENGTHS) > 0) & (spread(torch.tensor([3, 1, 2, 0, 3]), SIZES) > 1)
    assert int(out.metrics["tilt/completions"]) == int(active.sum())
    assert close(out.metrics["tilt/gap"], -0.8 * REWARDS[active].mean())
    assert abs(float(out.metrics["tilt/reference_kl"])) < 1e-9


def test_a_tilt_makes_the_better_completion_more_likely() -> None:
    model, planned = reference(), plan([[1, 2, 3]], [[[4, 5], [6, 7, 8]]])
    before = token_logprobs(model, planned)
    tilt_step(
        model, planned, torch.tensor([1.0, 0.0]), target=Tilted(inv_temperature=1.0), reference=Frozen(reference())
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.01 * weight.grad
    first, second = per_completion(token_logprobs(model, planned) - before, [2, 3]).tolist()
    assert first > 0 > second


# All of them


@pytest.mark.parametrize("strategy", ["naive", "packed", "cached", "two_phase"])
@pytest.mark.parametrize("teacher", [None, Live(), "frozen"])
def test_log_probabilities_are_those_after_the_students_prompt(teacher: Any, strategy: Any) -> None:
    teacher = Frozen(reference()) if teacher == "frozen" else teacher
    logprobs = token_logprobs(tiny("llama"), plan(*IDS), teacher=teacher, strategy=strategy)
    with torch.no_grad():
        expected = of_targets(student_log_p(reference() if isinstance(teacher, Frozen) else tiny("llama")))
    assert torch.allclose(logprobs, expected, rtol=1e-9)
    assert not logprobs.requires_grad


def steps(planned: Plan, **how: Any) -> dict[str, Callable[[Any], StepOutput]]:
    count, completions = planned.num_rows, sum(len(tree.counts) for tree in planned.student)
    zeros = torch.zeros(count)
    term = PolicyTerm(advantages=torch.ones(count), token_weights=zeros)
    return {
        "divergence": lambda model: distill_step(model, planned, token_weights=zeros, **how),
        "mixture": lambda model: distill_step(
            model, planned, token_weights=zeros, policy=replace(term, distillation_weight=0.5), **how
        ),
        "token tilt": lambda model: distill_step(
            model, planned, token_weights=zeros, tilt=TokenTilt(exponents=torch.ones(count)), **how
        ),
        "policy": lambda model: policy_gradient_step(model, planned, term, **how),
        "exact": lambda model: policy_gradient_step(
            model,
            planned,
            replace(term, kl_anchor=0.1),
            reference=Frozen(reference()),
            kl_estimator="exact",
            **how,
        ),
        "tilt": lambda model: tilt_step(
            model,
            planned,
            torch.full((completions,), torch.nan),
            target=Tilted(inv_temperature=1.0),
            reference=Frozen(reference()),
            completion_mask=torch.zeros(count, dtype=torch.bool),
            **how,
        ),
    }


@pytest.mark.parametrize(("strategy", "micro_batch"), HOW)
@pytest.mark.parametrize("nothing", ["weights", "rows"])
@pytest.mark.parametrize("kind", ["divergence", "mixture", "token tilt", "policy", "exact", "tilt"])
def test_a_step_without_any_weight_or_row_is_zero_everywhere(
    kind: str, nothing: str, strategy: Any, micro_batch: int | None
) -> None:
    """And connected to every parameter, so that ranks do not wait for each other."""
    planned = plan(*IDS) if nothing == "weights" else plan([[1, 2], [3]], [[[], []], [[]]], [[1, 2, 4], [5, 3]])
    model = tiny("llama")
    out = steps(planned, strategy=strategy, micro_batch=micro_batch)[kind](model)
    values = {"loss": out.loss, **out.metrics, **out.rows, **gradients(model)}
    assert {name for name, value in values.items() if value.any()} == set()  # NaN is not zero either
    assert {name for name, _ in model.named_parameters()} <= values.keys()


@pytest.mark.parametrize(("strategy", "micro_batch"), FEW)
@pytest.mark.parametrize("kind", ["mixture", "token tilt", "policy", "exact", "tilt"])
def test_the_models_own_output_layer_is_never_run(kind: str, strategy: Any, micro_batch: int | None) -> None:
    model = tiny("llama")

    def refuse(*_: Any) -> None:
        raise AssertionError("lm_head was run")

    model.lm_head.register_forward_pre_hook(refuse)
    steps(plan(*IDS), strategy=strategy, micro_batch=micro_batch)[kind](model)


def good() -> Plan:
    return plan([[1, 2, 3]], [[[4, 5], [6]]], [[1, 2, 9, 3]])


TERM = PolicyTerm(advantages=torch.ones(3))
TILT = TokenTilt(exponents=torch.ones(3))
TARGET = Tilted(inv_temperature=1.0)


def tilting(**options: Any) -> Callable[[Any], StepOutput]:
    given = {"rewards": torch.ones(2), "target": TARGET, "reference": Frozen(reference())} | options
    return lambda model: tilt_step(model, good(), **given)


def distilling(**options: Any) -> Callable[[Any], StepOutput]:
    return lambda model: distill_step(model, good(), **options)


def learning(term: PolicyTerm = TERM, **options: Any) -> Callable[[Any], StepOutput]:
    return lambda model: policy_gradient_step(model, good(), term, **options)


ANCHORED = replace(TERM, kl_anchor=0.1)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (distilling(normalizer=-1.0), "normalizer must be finite and at least 0, got -1.0"),
        (distilling(normalizer=float("nan")), "normalizer must be finite"),
        (distilling(policy=PolicyTerm(advantages=torch.ones(2))), r"policy must have advantages of shape \(N=3,\)"),
        (distilling(policy=ANCHORED), "policy must have reference_logprobs for its kl_anchor"),
        (distilling(tilt=TokenTilt(exponents=torch.ones(2))), r"tilt must have exponents of shape \(N=3,\), got 2"),
        (distilling(tilt=TILT, loss=FusedLinearDivergence(alpha=0.5)), "loss must have alpha 0 or 1"),
        (distilling(tilt=TILT, loss=FusedLinearDivergence(support=TopK(3))), "loss must have alpha 0 or 1, the full"),
        (distilling(tilt=TILT, loss=FusedLinearDivergence(entry_clip=1.0)), "loss must have .* no entry_clip"),
        (
            distilling(tilt=TILT, loss=FusedLinearDivergence(importance_clip=2.0), old_logprobs=torch.zeros(3)),
            "loss must have no importance_clip",
        ),
        (
            distilling(tilt=TokenTilt(exponents=torch.full((3,), -11.0)), loss=FusedLinearDivergence(alpha=0.0)),
            "tilt must have exponents of at least -10 .* got -11",
        ),
        (learning(replace(TERM, distillation_weight=0.5)), "policy must have distillation_weight 0, got 0.5"),
        (learning(ANCHORED), "either reference or policy.reference_logprobs must be given"),
        (learning(ANCHORED, reference=Live()), "reference must be a teacher with weights of its own.* got Live"),
        (learning(ANCHORED, reference=TrustRegion(Frozen(reference()), SHARE)), "reference must be a teacher"),
        (
            learning(replace(ANCHORED, reference_logprobs=torch.zeros(3)), kl_estimator="exact"),
            "reference must be a teacher with weights of its own",
        ),
        (learning(kl_estimator="k2"), "kl_estimator must be 'k3' or 'exact', got 'k2'"),
        (
            tilting(rewards=torch.ones(3)),
            r"rewards must be a float tensor of shape \(S=2,\), got torch.float\d+ \(3,\)",
        ),
        (tilting(rewards=[1.0, 2.0]), "rewards must be a float tensor .* got list"),
        (tilting(rewards=torch.tensor([1.0, torch.nan])), "rewards must be finite where a completion is active"),
        (tilting(reference=None), "either reference or reference_logprobs must be given"),
        (tilting(reference=Live()), "reference must be a teacher with weights of its own"),
        (tilting(completion_mask=torch.ones(3)), r"completion_mask must be bool of shape \(N=3,\)"),
        (tilting(student_logprobs=torch.ones(2)), r"student_logprobs must be a float tensor of shape \(N=3,\)"),
        (tilting(normalizer=-1.0), "normalizer must be finite"),
        (tilting(log_z=torch.zeros(1)), "log_z must be given for logz='exact', and only there"),
    ],
)
def test_bad_arguments_are_refused_by_name_before_any_pass(step: Callable[[Any], StepOutput], message: str) -> None:
    model = tiny("llama")
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was run"))
    with pytest.raises(ArgumentError, match=message):
        step(model)
