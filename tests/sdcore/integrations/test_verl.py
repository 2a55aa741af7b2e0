"""verl's losses against plain PyTorch on logits, on batches of the shapes that verl's actors make; verl is not run."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from sdcore.errors import ArgumentError
from sdcore.integrations.verl import (
    Hidden,
    Responses,
    Scored,
    collect,
    compute_forward_kl_topk,
    compute_self_distillation_loss,
    distillation_loss,
    loss_weights,
    patch_forward,
    register,
    self_distillation_loss,
)
from sdcore.losses import FusedLinearDivergence
from sdkernels import TopK

V, H, K, B = 37, 12, 4, 3
PROMPTS, REPLIES, TEACHER_PROMPTS = [3, 1, 5], [4, 2, 6], [6, 4, 7]
T, WIDEST = max(REPLIES), max(PROMPTS)
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


class Batch(NamedTuple):
    """One batch in both layouts, with the same rows."""

    ids: list[Tensor]  # B of (prompt + response,)
    states: list[Tensor]  # B of (prompt + response, H)
    teacher_states: list[Tensor]  # B of (longer prompt + response, H)
    weight: Tensor  # (V, H)
    mask: Tensor  # (B, T) bool, within the responses


def make_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    lengths = [p + r for p, r in zip(PROMPTS, REPLIES, strict=True)]
    longer = [p + r for p, r in zip(TEACHER_PROMPTS, REPLIES, strict=True)]
    mask = torch.arange(T) < torch.tensor(REPLIES)[:, None]
    mask[0, 1] = mask[2, 4] = False  # such as tool output
    return Batch(
        [torch.randint(0, V, (n,), generator=generator) for n in lengths],
        [normal(n, H) for n in lengths],
        [normal(n, H) for n in longer],
        normal(V, H) / 2,
        mask,
    )


def offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def nested(parts: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(torch.cat(parts), offsets([len(p) for p in parts]))


def pad_rows(parts: list[Tensor], prompts: list[int]) -> Tensor:
    """(B, widest prompt + T, ...): prompts padded on the left, responses on the right, with NaN or -1."""
    widest = max(prompts)
    rows = []
    for part, before in zip(parts, prompts, strict=True):
        fill = float("nan") if part.is_floating_point() else -1
        left, right = widest - before, T - (len(part) - before)
        rows.append(F.pad(part, (*[0, 0] * (part.dim() - 1), left, right), value=fill))
    return torch.stack(rows)


def attention_mask(prompts: list[int]) -> Tensor:
    widest = max(prompts)
    left = torch.arange(widest) >= widest - torch.tensor(prompts)[:, None]
    return torch.cat([left, torch.arange(T) < torch.tensor(REPLIES)[:, None]], 1).long()


def reply_rows(parts: list[Tensor]) -> list[Tensor]:
    return [part[-reply - 1 : -1] for part, reply in zip(parts, REPLIES, strict=True)]


def padded_logits(parts: list[Tensor], weight: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, T, V), as verl slices them: of the rows that predict the responses."""
    logits = [rows @ weight.T / temperature for rows in reply_rows(parts)]
    return torch.stack([F.pad(one, (0, 0, 0, T - len(one))) for one in logits])


def replies(batch: Batch) -> Tensor:
    """(B, T)"""
    parts = [ids[-n:] for ids, n in zip(batch.ids, REPLIES, strict=True)]
    return torch.stack([F.pad(one, (0, T - len(one))) for one in parts])


def plain_agg(losses: Tensor, mask: Tensor, mode: str, old: bool = False, **info: Any) -> Tensor:
    """What verl's `agg_loss` says it computes, sequence by sequence; `old`: up to 0.7."""
    dp_size, scale = info.get("dp_size", 1), info.get("loss_scale_factor") or losses.shape[1]
    sums = [(row * m).sum() for row, m in zip(losses, mask, strict=True) if m.any()]
    means = [(row * m).sum() / m.sum() for row, m in zip(losses, mask, strict=True) if m.any()]
    sequences = info.get("global_batch_size") or len(sums)
    if mode == "token-mean":
        return sum(sums) / (info.get("batch_num_tokens") or mask.sum()) * dp_size
    if mode == "token-sum":
        return sum(sums) * dp_size
    if mode == "seq-mean-token-sum":
        return sum(sums) / sequences * dp_size
    if mode == "seq-mean-token-sum-norm":
        return sum(sums) / scale / (1 if old else sequences) * dp_size
    return sum(means) / sequences * dp_size


def plain_kl_with_tail(logits: Tensor, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL over k tokens and the rest (...), and the part of the rest (...)."""
    listed = logits.log_softmax(-1).gather(-1, ids)
    inside = (logprobs.exp() * (logprobs - listed)).sum(-1)
    q, p = 1 - logprobs.exp().sum(-1), 1 - listed.exp().sum(-1)
    tail = q * (q.log() - p.log())
    return inside + tail, tail


def server_rows(batch: Batch) -> Scored:
    """Of the teacher's logits over the student's sequences, as verl lays them: shifted, with a filler at the end."""
    generator = torch.Generator().manual_seed(5)
    ids, logprobs = [], []
    for states in batch.states:
        logits = torch.randn(len(states), V, generator=generator, dtype=torch.float64)
        top = logits.log_softmax(-1).topk(K)
        top.indices[-1], top.values[-1] = 0, 0.0
        ids.append(top.indices.int())
        logprobs.append(top.values.float())
    return Scored(nested(ids), nested(logprobs))


def replies_of(scored: Scored) -> tuple[Tensor, Tensor]:
    """(B, T, K) each, harmless where there is no response."""
    rows = Responses.packed(scored.ids.offsets(), REPLIES).rows
    ids, logprobs = scored.ids.values()[rows].long(), scored.logprobs.values()[rows].double()
    whole_ids = torch.arange(K).repeat(B, T, 1)
    whole = torch.full((B, T, K), -9.0, dtype=torch.float64)
    inside = torch.arange(T) < torch.tensor(REPLIES)[:, None]
    whole_ids[inside], whole[inside] = ids, logprobs
    return whole_ids, whole


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def assert_same(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 1e-8, "atol": 1e-10}))


def laid_out(batch: Batch, layout: str) -> dict[str, Any]:
    """The arguments that depend on the layout."""
    sizes = [len(ids) for ids in batch.ids]
    if layout == "padded":
        return {
            "student_hidden": pad_rows(batch.states, PROMPTS),
            "input_ids": pad_rows(batch.ids, PROMPTS),
            "responses": Responses.padded(attention_mask(PROMPTS), T),
        }
    states, ids = torch.cat(batch.states), torch.cat(batch.ids)
    return {
        "student_hidden": nested(batch.states) if layout == "nested" else states[None] if layout == "rmpad" else states,
        "input_ids": nested(batch.ids) if layout == "nested" else ids[None] if layout == "rmpad" else ids,
        "responses": Responses.packed(offsets(sizes), REPLIES, width=T),
    }


layouts = pytest.mark.parametrize("layout", ["padded", "packed", "rmpad", "nested"])


@layouts
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_loss_of_teacher_states_is_that_of_plain_logits(layout: str, mode: str, alpha: float) -> None:
    batch = make_batch()
    weight = batch.weight.requires_grad_()
    states = [one.requires_grad_() for one in batch.states]
    given = laid_out(batch, layout)
    teacher_rows = Responses.packed(offsets([len(one) for one in batch.teacher_states]), REPLIES)
    teacher = Hidden(torch.cat(batch.teacher_states), teacher_rows, batch.weight.detach() * 1.1)
    if layout == "padded":
        padded = Responses.padded(attention_mask(TEACHER_PROMPTS), T)
        teacher = Hidden(pad_rows(batch.teacher_states, TEACHER_PROMPTS), padded, batch.weight.detach() * 1.1)
    loss, metrics = distillation_loss(
        given["student_hidden"], weight, given["responses"], batch.mask, teacher=teacher, input_ids=given["input_ids"],
        loss=FusedLinearDivergence(alpha=alpha, temperature=1.7), loss_agg_mode=mode,
    )  # fmt: skip
    log_p = padded_logits(states, weight, 1.7).log_softmax(-1)
    log_q = padded_logits(batch.teacher_states, batch.weight.detach() * 1.1, 1.7).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if alpha in (0.0, 1.0):
        losses = (q * (log_q - log_p) if alpha == 0 else p * (log_p - log_q)).sum(-1)
    else:
        log_m = (0.5 * p + 0.5 * q).log()
        losses = (0.5 * q * (log_q - log_m) + 0.5 * p * (log_p - log_m)).sum(-1)
    expected = plain_agg(losses, batch.mask, mode)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    assert_same(gradients(loss, weight, *states), gradients(expected, weight, *states), rtol=1e-6, atol=1e-8)
    assert metrics["distillation/active_tokens"] == batch.mask.sum()
    assert metrics["distillation/loss_max"] == pytest.approx(float(losses.detach()[batch.mask].max()), rel=1e-5)


@layouts
def test_the_loss_of_a_servers_rows_is_verls_sum_over_k_tokens_and_the_rest(layout: str) -> None:
    batch = make_batch()
    weight = batch.weight.requires_grad_()
    scored = server_rows(batch)
    given = laid_out(batch, layout)
    teacher = scored
    if layout == "padded":
        parts = [[*one.unbind()] for one in scored]
        teacher = Scored(*(pad_rows(part, PROMPTS) for part in parts))
    elif layout == "packed":
        teacher = Scored(*(one.values() for one in scored))
    elif layout == "rmpad":
        teacher = Scored(*(one.values()[None] for one in scored))
    loss, metrics = distillation_loss(
        given["student_hidden"], weight, given["responses"], nested_mask(batch) if layout == "nested" else batch.mask,
        teacher=teacher, input_ids=given["input_ids"],
    )  # fmt: skip
    ids, logprobs = replies_of(scored)
    losses, tail = plain_kl_with_tail(padded_logits(batch.states, weight), ids, logprobs)
    expected = plain_agg(losses, batch.mask, "token-mean")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    assert_same(gradients(loss, weight), gradients(expected, weight), rtol=1e-6, atol=1e-8)
    assert (tail[batch.mask] != 0).all()
    mass = logprobs.exp().sum(-1)[batch.mask].mean()
    assert metrics["distillation/teacher_mass"] == pytest.approx(float(mass), rel=1e-6)


def nested_mask(batch: Batch) -> Tensor:
    return nested([row[:n] for row, n in zip(batch.mask, REPLIES, strict=True)])


def test_importance_and_rollout_weights_multiply_the_tokens() -> None:
    batch = make_batch()
    given = laid_out(batch, "packed")
    log_p = padded_logits(batch.states, batch.weight).log_softmax(-1)
    chosen = log_p.gather(-1, replies(batch)[..., None])[..., 0]
    old, rollout = chosen + torch.linspace(-1.5, 1.5, T), torch.linspace(0.5, 2.0, B * T).view(B, T)
    rows = Responses.packed(offsets([len(one) for one in batch.teacher_states]), REPLIES)
    loss, _ = distillation_loss(
        given["student_hidden"], batch.weight, given["responses"], batch.mask,
        teacher=Hidden(torch.cat(batch.teacher_states), rows), input_ids=given["input_ids"],
        loss=FusedLinearDivergence(alpha=1.0, importance_clip=2.0), old_log_probs=old, rollout_is_weights=rollout,
    )  # fmt: skip
    log_q = padded_logits(batch.teacher_states, batch.weight).log_softmax(-1)
    losses = (log_p.exp() * (log_p - log_q)).sum(-1) * (chosen - old).exp().clamp(max=2.0) * rollout
    torch.testing.assert_close(loss, plain_agg(losses, batch.mask, "token-mean"), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "info",
    [
        {},
        {"dp_size": 4, "batch_num_tokens": 50, "global_batch_size": 9},
        {"global_batch_size": 9, "batch_num_tokens": 31, "loss_scale_factor": 16},
    ],
    ids=["local", "ranks", "scale"],
)
@pytest.mark.parametrize("old", [False, True])
def test_the_weights_of_tokens_are_verls_aggregation(mode: str, info: dict[str, Any], old: bool) -> None:
    mask = make_batch().mask.clone()
    mask[1] = False  # a sequence without a token is not counted
    responses = Responses.packed(offsets([p + r for p, r in zip(PROMPTS, REPLIES, strict=True)]), REPLIES)
    losses = torch.rand(B, T)
    options = {} if old is False else {"norm_counts_sequences": False}
    weights = loss_weights(mode, responses, responses.take("mask", mask), **info, **options)
    found = (weights * responses.take("losses", losses)).sum()
    torch.testing.assert_close(found, plain_agg(losses, mask, mode, old, **info))


@given(sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=5))
def test_packed_and_padded_responses_are_the_same_rows(sizes: list[tuple[int, int]]) -> None:
    width, widest = max(1, *(r for _, r in sizes)), max(p for p, _ in sizes)
    mask = torch.stack(
        [
            torch.cat([torch.arange(widest) >= widest - p, torch.arange(width) < r]).long()  # left, right padding
            for p, r in sizes
        ]
    )
    places = torch.arange(mask.numel()).view_as(mask)
    packed = Responses.packed(offsets([p + r for p, r in sizes]), [r for _, r in sizes], width=width)
    padded = Responses.padded(mask, width)
    assert torch.equal(places[mask.bool()][packed.rows], padded.rows)
    assert packed.lengths == padded.lengths == tuple(r for _, r in sizes)
    rows = torch.rand(len(packed.rows))
    assert torch.equal(packed.take("rows", packed.pad(rows)), rows)


def test_the_logits_processor_has_verls_arguments_and_result() -> None:
    """`compute_topk_loss` calls it by these keywords, and wants entries of `student_logits.shape[:2]`."""
    batch = make_batch()
    scored = server_rows(batch)
    logits = (torch.cat(batch.states) @ batch.weight.T)[None].float().requires_grad_()
    out = compute_forward_kl_topk(
        student_logits=logits, teacher_topk_log_probs=scored.logprobs, teacher_topk_ids=scored.ids, config=object(),
        data_format="thd",
    )  # fmt: skip
    assert {name: value.shape for name, value in out.items()} == dict.fromkeys(
        ("distillation_losses", "student_mass", "teacher_mass"), logits.shape[:2]
    )
    last = scored.ids.offsets()[1:] - 1
    others = torch.ones(logits.shape[1], dtype=torch.bool).scatter(0, last, False)
    losses, _ = plain_kl_with_tail(logits[0].double(), scored.ids.values().long(), scored.logprobs.values().double())
    torch.testing.assert_close(out["distillation_losses"][0][others].double(), losses[others], rtol=1e-4, atol=1e-5)
    assert (out["distillation_losses"][0][last] == 0).all()
    mass = logits[0].softmax(-1).gather(-1, scored.ids.values().long()).sum(-1)
    torch.testing.assert_close(out["student_mass"][0][others], mass[others])
    torch.testing.assert_close(out["teacher_mass"][0][others], scored.logprobs.values().exp().sum(-1)[others])
    found, expected = gradients(out["distillation_losses"].sum(), logits), gradients(losses[others].sum(), logits)
    assert_same(found, expected, rtol=1e-4, atol=1e-5)


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(3)
    common: dict[str, Any] = {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.4, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "gemma2":  # soft-capped logits
        return Gemma2ForCausalLM(Gemma2Config(**common, final_logit_softcapping=5.0, sliding_window=8)).eval()
    return LlamaForCausalLM(LlamaConfig(**common)).eval()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("policy", [True, False])
def test_a_patched_forward_gives_what_verls_engine_reads(kind: str, policy: bool) -> None:
    model, batch = model_of(kind), make_batch(dtype=torch.float32)
    scored = server_rows(batch)
    ids = torch.cat(batch.ids)[None]
    positions = torch.cat([torch.arange(len(one)) for one in batch.ids])[None]
    rolled = torch.roll(ids, -1, dims=1)
    plain = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    undo = patch_forward(model, policy=policy)
    out = model(
        input_ids=ids, attention_mask=None, position_ids=positions, use_cache=False, temperature=1.3, return_dict=True,
        shift_labels=rolled, teacher_topk_ids=scored.ids.values()[None],
        teacher_topk_log_probs=scored.logprobs.values()[None],
    )  # fmt: skip
    log_p = (plain / 1.3).log_softmax(-1)
    torch.testing.assert_close(
        out.log_probs, log_p.gather(-1, rolled[..., None])[..., 0] * mask_of(out, policy, scored)
    )
    expected_entropy = -(log_p.exp() * log_p).sum(-1) * mask_of(out, policy, scored)
    torch.testing.assert_close(out.entropy, expected_entropy, rtol=1e-4, atol=1e-5)
    assert out.log_probs.requires_grad is policy
    last = scored.ids.offsets()[1:] - 1
    others = torch.ones(ids.shape[1], dtype=torch.bool).scatter(0, last, False)
    losses, _ = plain_kl_with_tail(
        (plain / 1.3)[0].double(), scored.ids.values().long(), scored.logprobs.values().double()
    )
    aux = out.fused_linear_aux
    torch.testing.assert_close(aux.distillation_losses[0][others].double(), losses[others], rtol=1e-4, atol=1e-5)
    mass = log_p[0].exp().gather(-1, scored.ids.values().long()).sum(-1)
    torch.testing.assert_close(aux.student_mass[0][others], mass[others], rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    found = torch.autograd.grad(aux.distillation_losses.sum(), parameters)
    expected = torch.autograd.grad(losses[others].sum(), parameters)
    assert_same(list(found), list(expected), rtol=1e-3, atol=1e-4)
    undo()
    assert "forward" not in vars(model)
    assert torch.equal(model(input_ids=ids, position_ids=positions, use_cache=False).logits, plain)


def mask_of(out: Any, policy: bool, scored: Scored) -> Tensor:
    """By-products of the divergence are 0 in the fillers' rows, which it leaves out."""
    mask = torch.ones_like(out.log_probs)
    if not policy:
        mask[0, scored.ids.offsets()[1:] - 1] = 0
    return mask


def test_a_patched_forward_without_a_teacher_gives_log_probabilities_of_the_next_tokens() -> None:
    model = model_of("llama")
    ids = torch.randint(0, V, (1, 9))
    log_p = model(input_ids=ids).logits.log_softmax(-1)
    patch_forward(model, policy=False)
    out = model(input_ids=ids)
    torch.testing.assert_close(out.log_probs, log_p.gather(-1, torch.roll(ids, -1, 1)[..., None])[..., 0])
    assert out.fused_linear_aux is None
    with pytest.raises(ArgumentError, match="loss must have no importance_clip in a forward, got 2"):
        patch_forward(model, loss=FusedLinearDivergence(importance_clip=2.0))


def micro_batch(batch: Batch, layout: str) -> dict[str, Any]:
    """What verl's `no_padding_2_padding` reads."""
    if layout == "nested":
        prompts = nested([ids[:-n] for ids, n in zip(batch.ids, REPLIES, strict=True)])
        answers = nested([ids[-n:] for ids, n in zip(batch.ids, REPLIES, strict=True)])
        return {"prompts": prompts, "responses": answers, "response_mask": nested_mask(batch)}
    padded = pad_rows(batch.ids, PROMPTS)
    return {
        "prompts": padded[:, :WIDEST], "responses": padded[:, WIDEST:], "response_mask": batch.mask.long(),
        "attention_mask": attention_mask(PROMPTS),
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["nested", "padded"])
def test_the_collector_aligns_the_losses_with_the_responses(layout: str) -> None:
    batch = make_batch()
    cu_seqlens = offsets([len(ids) for ids in batch.ids])
    rows = torch.rand(int(cu_seqlens[-1]), requires_grad=True)
    output = {
        name: torch.nested.nested_tensor_from_jagged(rows * factor, cu_seqlens)
        for name, factor in (("distillation_losses", 1.0), ("student_mass", 0.5), ("teacher_mass", 0.25))
    }
    losses, metrics = collect(
        config=None, distillation_config=None, model_output=output, data=micro_batch(batch, layout)
    )
    expected = torch.zeros(B, T)
    for b, (end, reply) in enumerate(zip(cu_seqlens[1:].tolist(), REPLIES, strict=True)):
        expected[b, :reply] = rows.detach()[end - reply - 1 : end - 1]
    assert torch.equal(losses, expected)
    assert losses.requires_grad
    assert metrics["distillation/student_mass_max"] == pytest.approx(float(0.5 * expected[batch.mask].max()))
    assert metrics["distillation/teacher_mass"] == pytest.approx(float(0.25 * expected[batch.mask].mean()))


class Settings(NamedTuple):
    alpha: float = 0.5
    full_logit_distillation: bool = True
    distillation_topk: int | None = 6
    distillation_add_tail: bool = True
    is_clip: float | None = 2.0


SETTINGS = [
    Settings(),
    Settings(alpha=0.0),
    Settings(alpha=1.0, distillation_add_tail=False, is_clip=None),
    Settings(alpha=0.25, distillation_topk=None),
    Settings(alpha=1.0, full_logit_distillation=False),
]


def sdpo_plain(log_p: Tensor, log_q: Tensor, ids: Tensor, config: Settings, old: Tensor) -> Tensor:
    """(B, T) token losses of SDPO's formulas, on full log-probabilities."""
    chosen, other = (one.gather(-1, ids[..., None])[..., 0] for one in (log_p, log_q))
    if not config.full_logit_distillation:
        losses = (chosen - other).detach() * chosen
    else:
        if config.distillation_topk is not None:
            top = log_p.topk(config.distillation_topk, -1).indices
            log_p, log_q = log_p.gather(-1, top), log_q.gather(-1, top)
            if config.distillation_add_tail:
                log_p, log_q = (
                    torch.cat([one, (1 - one.exp().sum(-1, keepdim=True)).log()], -1) for one in (log_p, log_q)
                )
            log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        p, q, a = log_p.exp(), log_q.exp(), config.alpha
        if a in (0.0, 1.0):
            losses = (q * (log_q - log_p) if a == 0.0 else p * (log_p - log_q)).sum(-1)
        else:
            log_m = ((1 - a) * p + a * q).log()
            losses = (a * q * (log_q - log_m) + (1 - a) * p * (log_p - log_m)).sum(-1)
    if config.is_clip is not None:
        losses = losses * (chosen - old).exp().clamp(max=config.is_clip).detach()
    return losses


@pytest.mark.parametrize("config", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_sdpos_loss_is_its_formulas_from_log_probabilities_and_from_states(config: Settings, mode: str) -> None:
    batch = make_batch()
    weight = batch.weight.requires_grad_()
    log_p = padded_logits(batch.states, weight, 0.9).log_softmax(-1)
    log_q = padded_logits(batch.teacher_states, weight, 0.9).log_softmax(-1).detach()
    ids, target = replies(batch), torch.tensor([True, False, True])
    old = log_p.gather(-1, ids[..., None])[..., 0].detach() + torch.linspace(-1, 1, T)
    rollout = torch.linspace(0.5, 1.5, B * T).view(B, T)
    mask = batch.mask & target[:, None]
    expected = plain_agg(sdpo_plain(log_p, log_q, ids, config, old) * rollout, mask, mode, old=True)
    (gradient,) = torch.autograd.grad(expected, weight, retain_graph=True)

    top = log_p.topk(config.distillation_topk or 1, -1).indices
    use_all, use_topk = config.distillation_topk is None, config.distillation_topk is not None
    common: dict[str, Any] = {
        "old_log_probs": old, "self_distillation_mask": target.float(), "loss_agg_mode": mode,
        "rollout_is_weights": rollout,
    }  # fmt: skip
    found, metrics = compute_self_distillation_loss(
        student_log_probs=log_p.gather(-1, ids[..., None])[..., 0],
        teacher_log_probs=log_q.gather(-1, ids[..., None])[..., 0],
        response_mask=batch.mask.long(),
        self_distillation_config=SimpleNamespace(**config._asdict()),
        student_all_log_probs=log_p if use_all else None,
        teacher_all_log_probs=log_q if use_all else None,
        student_topk_log_probs=log_p.gather(-1, top) if use_topk else None,
        teacher_topk_log_probs=log_q.gather(-1, top) if use_topk else None,
        **common,
    )
    assert metrics == {}
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert_same(gradients(found, weight), [gradient], rtol=1e-5, atol=1e-7)

    given = laid_out(batch, "packed")
    rows = Responses.packed(offsets([len(one) for one in batch.teacher_states]), REPLIES)
    fused, _ = self_distillation_loss(
        given["student_hidden"], weight, given["responses"], batch.mask, config,
        teacher=Hidden(torch.cat(batch.teacher_states), rows), input_ids=given["input_ids"], temperature=0.9, **common,
    )  # fmt: skip
    torch.testing.assert_close(fused, expected, rtol=1e-6, atol=1e-8)
    assert_same(gradients(fused, weight), [gradient], rtol=1e-5, atol=1e-7)


def test_a_batch_without_a_target_has_loss_0_and_gradients_0() -> None:
    batch = make_batch()
    states = torch.cat(batch.states).requires_grad_()
    given, none = laid_out(batch, "packed"), torch.zeros(B)
    rows = Responses.packed(offsets([len(one) for one in batch.teacher_states]), REPLIES)
    loss, metrics = self_distillation_loss(
        states, batch.weight, given["responses"], batch.mask, Settings(is_clip=None),
        teacher=Hidden(torch.cat(batch.teacher_states), rows), input_ids=given["input_ids"],
        self_distillation_mask=none,
    )  # fmt: skip
    assert loss == 0
    assert not gradients(loss, states)[0].any()
    assert metrics == {"distillation/active_tokens": 0.0}


def test_register_puts_the_losses_where_verl_looks_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with verl's names; the real registry was read, not run."""
    registered: dict[str, Any] = {}
    losses, fsdp = ModuleType("verl.trainer.distillation.losses"), ModuleType("verl.trainer.distillation.fsdp.losses")
    losses.DistillationLossSettings = lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]

    def register_distillation_loss(settings: Any) -> Any:
        def decorate(function: Any) -> Any:
            registered.update(dict.fromkeys(settings.names, (function, settings.use_topk)))
            return function

        return decorate

    losses.register_distillation_loss = register_distillation_loss  # type: ignore[attr-defined]
    parents = ["verl", "verl.trainer", "verl.trainer.distillation", "verl.trainer.distillation.fsdp"]
    for module in (*map(ModuleType, parents), losses, fsdp):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    register()
    assert registered == {"forward_kl_topk_tail": (collect, True)}
    assert fsdp.compute_forward_kl_topk is compute_forward_kl_topk  # type: ignore[attr-defined]


def test_without_verl_registering_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"pip install 'verl>=0\.9'"):
        register()


def test_arguments_that_do_not_fit_are_refused() -> None:
    batch = make_batch()
    sizes = offsets([len(ids) for ids in batch.ids])
    responses = Responses.packed(sizes, REPLIES)
    with pytest.raises(
        ArgumentError, match=r"lengths must be .* each of 3 sequences, shorter than \[7, 3, 11\], got \[7"
    ):
        Responses.packed(sizes, [7, 1, 1])
    with pytest.raises(ArgumentError, match="width must be at least that of the longest response, 6, got 5"):
        Responses.packed(sizes, REPLIES, width=5)
    with pytest.raises(ArgumentError, match=r"width must be in \[1, 10\]"):
        Responses.padded(attention_mask(PROMPTS), 11)
    with pytest.raises(ArgumentError, match="each response's tokens before its padding"):
        Responses.padded(torch.tensor([[1, 1, 0, 1]]), 2)
    with pytest.raises(ArgumentError, match=r"response_mask must have shape \(B=3, T=6\), got \(3, 4\)"):
        responses.take("response_mask", batch.mask[:, :4])
    with pytest.raises(ArgumentError, match=r"loss_agg_mode must be one of 'token-mean', .*got 'mean'"):
        loss_weights("mean", responses, torch.ones(12, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="batch_num_tokens must be given for 'token-mean' where dp_size is 2"):
        loss_weights("token-mean", responses, torch.ones(12, dtype=torch.bool), dp_size=2)
    with pytest.raises(ArgumentError, match=r"teacher must have the student's responses, .* got \[1, 1, 1\]"):
        distillation_loss(
            torch.cat(batch.states), batch.weight, responses, batch.mask, input_ids=torch.cat(batch.ids),
            teacher=Hidden(torch.cat(batch.states), Responses.packed(sizes, [1, 1, 1])),
        )  # fmt: skip
    with pytest.raises(ArgumentError, match="student_hidden must be nested or have 2 or 3 dimensions, got"):
        distillation_loss(
            torch.rand(5),
            batch.weight,
            responses,
            batch.mask,
            input_ids=torch.cat(batch.ids),
            teacher=server_rows(batch),
        )
    with pytest.raises(ArgumentError, match=r"old_log_probs must be given for is_clip=2\.0, got None"):
        compute_self_distillation_loss(torch.zeros(B, T), torch.zeros(B, T), batch.mask, Settings())
    with pytest.raises(ArgumentError, match="student_topk_log_probs must be given"):
        compute_self_distillation_loss(torch.zeros(B, T), torch.zeros(B, T), batch.mask, Settings(is_clip=None))


def test_the_support_of_the_loss_may_be_stated() -> None:
    batch, given = make_batch(), laid_out(make_batch(), "packed")
    arguments: Any = (given["student_hidden"], batch.weight, given["responses"], batch.mask)
    keywords: dict[str, Any] = {"teacher": server_rows(batch), "input_ids": given["input_ids"]}
    stated, _ = distillation_loss(
        *arguments, **keywords, loss=FusedLinearDivergence(alpha=0.0, support=TopK(K, of="teacher"))
    )
    assert torch.equal(stated, distillation_loss(*arguments, **keywords)[0])
