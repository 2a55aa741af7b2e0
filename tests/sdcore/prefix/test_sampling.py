"""Sampling with the prompt prefilled once, against Hugging Face `generate` on repeated prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdcore.errors import ArgumentError, PlanError, PlanTypeError, UnsupportedModelError
from sdcore.models.names import set_checkpointing
from sdcore.prefix.sampling import Kept, Sampled, generate
from tests.sdcore.prefix.models import VOCAB, tiny

FAMILIES = ["llama", "mistral", "gemma2", "gemma3", "gpt_neox", "qwen3_moe", "qwen3_next", "qwen3_5"]
# Longer than the window of the families that have one; of unequal lengths, one of a single token.
PROMPTS = [[5, 9, 2, 44, 17, 8, 30, 1, 12], [7, 3, 3, 20], [11]]
EQUAL = [[5, 9, 2, 44, 17, 8, 30], [7, 3, 3, 20, 1, 2, 60]]
EOS = [4, 8, 15, 16, 23, 42]  # a tenth of the vocabulary, so that rows end at different steps


def confident(name: str) -> PreTrainedModel:
    """A tiny model whose next-token distributions are far from uniform, so that a wrong state shows."""
    model = tiny(name).float()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)
    return model


def plain(model: PreTrainedModel, prompts: list[list[int]], count: int, **options: Any) -> tuple[Tensor, Any]:
    """(rows, steps) tokens of `model.generate` on left-padded prompts repeated `count` times, and its output."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts]).repeat_interleave(count, 0)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]).repeat_interleave(count, 0)
    options = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": EOS, "pad_token_id": 0} | options
    model = copy.deepcopy(model).eval()
    out = model.generate(
        input_ids=padded,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return out.sequences[:, longest:], out


def ragged(tokens: Tensor, count: int) -> list[list[list[int]]]:
    """Rows cut behind their first end-of-sequence token, by prompt."""
    rows = []
    for row in tokens.tolist():
        ends = [step for step, token in enumerate(row) if token in EOS]
        rows.append(row[: ends[0] + 1] if ends else row)
    return [rows[start : start + count] for start in range(0, len(rows), count)]


def as_lists(sampled: Sampled) -> list[list[list[int]]]:
    return [[completion.tolist() for completion in group] for group in sampled.completions]


@pytest.mark.parametrize("prompts", [PROMPTS, EQUAL], ids=["padded", "equal"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_seed_samples_the_same_tokens_as_plain_generate(name: str, prompts: list[list[int]]) -> None:
    model = confident(name)
    torch.manual_seed(3)
    expected, out = plain(model, prompts, 4, do_sample=True, max_new_tokens=12)
    sampled = generate(model, prompts, num_completions=4, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0, seed=3)
    assert as_lists(sampled) == ragged(expected, 4)
    lengths = [len(completion) for group in sampled.completions for completion in group]
    steps = torch.stack([scores.log_softmax(-1) for scores in out.scores], 1)  # (rows, steps, V)
    theirs = steps.gather(2, expected[..., None])[..., 0]
    wanted = torch.cat([row[:length] for row, length in zip(theirs, lengths, strict=True)])
    torch.testing.assert_close(sampled.logprobs, wanted, atol=2e-4, rtol=0)
    if name == "llama":
        assert len(set(lengths)) > 2, "the test is to see rows that end at different steps"


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_completions_are_those_of_plain_generate(name: str) -> None:
    model = confident(name)
    expected, _ = plain(model, PROMPTS, 2, do_sample=False, max_new_tokens=10)
    sampled = generate(model, PROMPTS, num_completions=2, max_new_tokens=10, eos_token_id=EOS, temperature=0.0)
    assert as_lists(sampled) == ragged(expected, 2)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 1.4, "top_k": 9, "top_p": 0.8}]
)
def test_options_shape_the_distribution_as_in_plain_generate(options: dict[str, Any]) -> None:
    model = confident("llama")
    torch.manual_seed(3)
    expected, out = plain(model, PROMPTS, 4, do_sample=True, max_new_tokens=6, **options)
    sampled = generate(model, PROMPTS, num_completions=4, max_new_tokens=6, eos_token_id=EOS, seed=3, **options)
    assert as_lists(sampled) == ragged(expected, 4)
    first = out.scores[0].log_softmax(-1).gather(1, expected[:, :1])[:, 0]
    starts = torch.tensor([0] + [len(c) for group in sampled.completions for c in group]).cumsum(0)[:-1]
    torch.testing.assert_close(sampled.logprobs[starts], first, atol=2e-4, rtol=0)


def test_log_probabilities_are_those_of_the_model_on_the_whole_sequence() -> None:
    """Without truncation: what a training step computes for the same tokens."""
    model = tiny("llama")
    sampled = generate(model, PROMPTS, num_completions=3, max_new_tokens=8, eos_token_id=EOS, seed=0)
    expected = []
    for prompt, group in zip(PROMPTS, sampled.completions, strict=True):
        for completion in group:
            logits = model(input_ids=torch.cat([torch.tensor(prompt), completion])[None], use_cache=False).logits[0]
            logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            expected.append(logprobs.gather(1, completion[:, None])[:, 0])
    assert sampled.logprobs.dtype == torch.float32
    torch.testing.assert_close(sampled.logprobs, torch.cat(expected).float(), atol=1e-5, rtol=0)


def test_greedy_log_probabilities_are_those_of_temperature_one() -> None:
    model = tiny("llama")
    sampled = generate(model, EQUAL, num_completions=1, max_new_tokens=1, eos_token_id=None, temperature=0.0)
    logits = model(input_ids=torch.tensor(EQUAL), use_cache=False).logits[:, -1]
    torch.testing.assert_close(sampled.logprobs, logits.log_softmax(-1).amax(-1).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_next"])
def test_every_prompt_token_is_read_once(name: str) -> None:
    model = confident(name)
    generate(model, EQUAL, num_completions=1, max_new_tokens=1, eos_token_id=None, seed=0)  # compares, the first time
    read: list[tuple[int, ...]] = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate(model, EQUAL, num_completions=8, max_new_tokens=3, eos_token_id=None, seed=0)
    handle.remove()
    assert read == [(2, 7), (16, 1), (16, 1)]


def test_completions_end_with_the_first_end_of_sequence_token_or_are_cut() -> None:
    model = confident("llama")
    sampled = generate(model, PROMPTS, num_completions=32, max_new_tokens=9, eos_token_id=EOS, seed=0)
    assert [len(group) for group in sampled.completions] == [32, 32, 32]
    flat = [completion.tolist() for group in sampled.completions for completion in group]
    assert all(1 <= len(row) <= 9 and not set(row[:-1]) & set(EOS) for row in flat)
    assert all(row[-1] in EOS for row in flat if len(row) < 9)
    lengths = {len(row) for row in flat}
    assert 9 in lengths
    assert len(lengths) > 4
    one = generate(model, PROMPTS, num_completions=2, max_new_tokens=9, eos_token_id=flat[0][0], seed=0)
    assert one.completions[0][0].tolist() == flat[0][:1]
    assert sampled.logprobs.shape == (sum(map(len, flat)),)
    cut = generate(model, PROMPTS, num_completions=2, max_new_tokens=5, eos_token_id=None, seed=0)
    assert {len(completion) for group in cut.completions for completion in group} == {5}


def test_the_padding_token_is_seen_by_nobody() -> None:
    model = confident("gemma3")
    samples = [
        generate(model, PROMPTS, num_completions=4, max_new_tokens=8, eos_token_id=EOS, pad_token_id=pad, seed=1)
        for pad in (None, 0, 50)
    ]
    assert as_lists(samples[0]) == as_lists(samples[1]) == as_lists(samples[2])
    assert torch.equal(samples[0].logprobs, samples[2].logprobs)


def test_sampling_leaves_no_trace() -> None:
    model = confident("llama").train()
    model.config.use_cache = False
    set_checkpointing(model, True)
    model.model.layers[0].eval()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    sampled = generate(model, PROMPTS, num_completions=3, max_new_tokens=6, eos_token_id=EOS, seed=2)
    again = generate(model, PROMPTS, num_completions=3, max_new_tokens=6, eos_token_id=EOS, seed=2)
    assert as_lists(sampled) == as_lists(again)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert model.config.use_cache is False
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert all(p.grad is None for p in model.base_model.parameters())
    assert not sampled.logprobs.requires_grad
    expected, _ = plain(confident("llama"), PROMPTS, 3, do_sample=False, max_new_tokens=6)
    greedy = generate(model, PROMPTS, num_completions=3, max_new_tokens=6, eos_token_id=EOS, temperature=0.0)
    assert as_lists(greedy) == ragged(expected, 3), "dropout or checkpointing was on"


def test_modes_are_restored_after_an_error() -> None:
    model = confident("llama").train()
    model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        generate(model, PROMPTS, num_completions=3, max_new_tokens=6, eos_token_id=EOS)
    assert all(module.training for module in model.modules())


def test_random_numbers_come_from_where_the_caller_says() -> None:
    model = confident("llama")
    options: dict[str, Any] = {"num_completions": 3, "max_new_tokens": 6, "eos_token_id": EOS}
    seeded = generate(model, PROMPTS, seed=5, **options)
    own = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    from_global = generate(model, PROMPTS, **options)
    assert as_lists(seeded) == as_lists(generate(model, PROMPTS, generator=own, **options)) == as_lists(from_global)
    following = generate(model, PROMPTS, generator=own, **options)
    assert as_lists(following) != as_lists(seeded)
    assert as_lists(generate(model, PROMPTS, **options)) == as_lists(following)


def test_the_models_generation_config_changes_nothing() -> None:
    model = confident("llama")
    options: dict[str, Any] = {"num_completions": 3, "max_new_tokens": 6, "eos_token_id": EOS, "seed": 5}
    before = as_lists(generate(model, PROMPTS, **options))
    model.generation_config.update(repetition_penalty=5.0, top_k=1, do_sample=False, eos_token_id=0)
    assert as_lists(generate(model, PROMPTS, **options)) == before


def call(prompts: Any = None, **changed: Any) -> Callable[[], Sampled]:
    good: dict[str, Any] = {"num_completions": 2, "max_new_tokens": 4, "eos_token_id": EOS}
    return lambda: generate(tiny("llama"), PROMPTS if prompts is None else prompts, **(good | changed))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (call(num_completions=0), ArgumentError, "num_completions must be at least 1, got 0"),
        (call(max_new_tokens=0), ArgumentError, "max_new_tokens must be at least 1, got 0"),
        (call(top_k=0), ArgumentError, "top_k must be at least 1, got 0"),
        (call(top_p=0.0), ArgumentError, r"top_p must be in \(0, 1\], got 0.0"),
        (call(top_p=1.1), ArgumentError, r"top_p must be in \(0, 1\], got 1.1"),
        (call(temperature=-1.0), ArgumentError, "temperature must be at least 0 and finite, got -1.0"),
        (call(temperature=float("nan")), ArgumentError, "temperature must be at least 0 and finite, got nan"),
        (call(eos_token_id=[3, VOCAB]), ArgumentError, r"eos_token_id must be in \[0, V=61\), got 61"),
        (call(pad_token_id=-1), ArgumentError, r"pad_token_id must be in \[0, V=61\), got -1"),
        (call(seed=1, generator=torch.Generator()), ArgumentError, "seed and generator must not both be given"),
        (call([]), ArgumentError, "prompts must have at least one prompt, got none"),
        (call([[1], [2, VOCAB]]), ArgumentError, r"prompts\[1\] must be in \[0, V=61\), .*, got id 61"),
        (call(torch.ones(2, 3, dtype=torch.int64)), PlanTypeError, "prompts must be a list, got a tensor of shape"),
        (call([[1], []]), PlanError, r"prompts\[1\] must have at least one token, got none"),
        (call([[1], [-1]]), PlanError, r"prompts\[1\] must have no negative ids .*, got -1"),
        (call([[1], torch.ones(2)]), PlanTypeError, r"prompts\[1\] must be int64 or int32 ids, got torch.float32"),
        (
            call(max_new_tokens=249),
            ArgumentError,
            "max_new_tokens must be at most 248, what the model's 256 positions leave after .* 9 tokens, got 249",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Callable[[], Sampled], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_positions_that_depend_on_the_length_are_refused_where_they_change() -> None:
    model = tiny("phi3")
    model.config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 20,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    with pytest.raises(UnsupportedModelError, match=r"Phi3ForCausalLM encodes positions otherwise .* longer than 20"):
        generate(model, PROMPTS, num_completions=2, max_new_tokens=13, eos_token_id=None)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_talk_that_goes_on_reads_what_is_new_and_samples_the_same(name: str, temperature: float) -> None:
    """Rows of several lengths, of which one stops and another one hears more; against reading all anew."""
    model = tiny(name)
    options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": [1, 2, 3], "temperature": temperature}
    prompts = [torch.arange(4, 13), torch.arange(6, 15)]
    read: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    kept = Kept()
    first = generate(model, prompts, num_completions=2, seed=3, kept=kept, **options)
    assert as_lists(first) == as_lists(generate(model, prompts, num_completions=2, seed=3, **options))
    rows = [torch.cat([prompts[b], ids]) for b, group in enumerate(first.completions) for ids in group]
    for turn, replies in enumerate(([5, 1, 3, 2], [2, 4, 1])):
        rows = [torch.cat([row, torch.arange(4, 4 + more)]) for row, more in zip(rows, replies, strict=False)]
        rows = rows[1:] if turn else rows  # the first one has ended
        generate(model, rows, num_completions=1, seed=turn, **options)  # the first-use check is done
        read.clear()
        gone_on = generate(model, rows, num_completions=1, seed=turn, kept=kept, **options)
        most_new = max(replies) + 2  # the reply, and what was sampled and not read
        assert (read[0] <= most_new + 4) is (name not in ("gemma3", "qwen3_next"))
        anew = generate(model, rows, num_completions=1, seed=turn, **options)
        assert as_lists(gone_on) == as_lists(anew)
        torch.testing.assert_close(gone_on.logprobs, anew.logprobs, rtol=1e-5, atol=1e-5)
        rows = [torch.cat([row, ids]) for row, (ids,) in zip(rows, gone_on.completions, strict=True)]
    # What it did not read before, it reads as a whole.
    other = [torch.arange(7, 20)]
    assert as_lists(generate(model, other, num_completions=1, seed=9, kept=kept, **options)) == as_lists(
        generate(model, other, num_completions=1, seed=9, **options)
    )
    hook.remove()
