"""Families whose output, cache, positions or sizes are not Llama's: right as plain PyTorch, or refused by name."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers import AutoModelForCausalLM as Auto
from transformers.pytorch_utils import Conv1D

from sdcore.errors import UnsupportedModelError
from sdcore.memory import Load, predict
from sdcore.models import find_body
from sdcore.prefix import generate, plan
from sdcore.prefix.costs import model_sizes
from sdcore.step import distill_step

VOCAB = 97
# By the names that families have for the same sizes; each takes those that its configuration knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "n_inner"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("state_size", "mamba_d_state", "head_dim", "vocab_size_per_layer_input"), 8),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "attention_window_size": 8,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 4},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_chunk_size": 4},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0],
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "llama4_text": {"attention_chunk_size": 8, "moe_layers": [1], "no_rope_layers": [1, 0]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "moshi": {"sliding_window": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 32},
    "xlm": {"emb_dim": 32, "n_words": VOCAB, "causal": True},
    "xlnet": {"d_head": 8},
}
PROMPTS, TEACHERS = [[5, 9, 3, 44, 17, 8], [30, 11, 12]], [[70, 5, 9, 3, 44, 17, 8], [71, 72, 30, 11, 12]]
COMPLETIONS = [[[7, 13, 21], [40, 41]], [[50, 3, 9, 60]]]
# What takes another output than a mixture's, holds its body elsewhere, or cannot be counted.
TRAINED = [
    *("gpt2", "gpt_bigcode", "biogpt", "xglm", "opt", "bart", "trocr", "whisper", "llama4_text", "xlm", "openai-gpt"),
    *("mamba", "mamba2", "falcon_mamba", "rwkv", "bamba", "jamba", "falcon_h1", "recurrent_gemma", "gemma3n_text"),
    *("doge", "minimax"),
]
SAMPLED = [
    "gpt2",
    "xglm",
    "opt",
    "whisper",
    "llama4_text",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "bamba",
    "jamba",
    "bloom",
]
# Whose prompts must be of one length, because positions are counted from the padding.
EQUAL_ONLY = ["bart", "trocr"]
NOT_SAMPLED = {
    "rwkv": "takes no transformers cache",
    "xlm": "takes no transformers cache",
    "openai-gpt": "takes no transformers cache",
    "minimax": "cannot go on from a cache of transformers: ValueError",
    "recurrent_gemma": "does not go on from its cache as it reads a whole sequence",  # its states are in its modules
    "moshi": "does not go on from its cache as it reads a whole sequence",  # its cache slides and its mask does not
}
UNCOUNTED = {
    "gemma3n_text": "TypeError",
    "bamba": "layers of type linear_attention",
    "jamba": "layers of type linear_attention",
    "minimax": "layers of type linear_attention",
    "falcon_h1": "layers of type hybrid",
    "mamba": "num_attention_heads",
}


def small(name: str) -> PreTrainedModel:
    """A small model of a family in float32, with weights large enough to make its tokens differ."""
    kind = CONFIG_MAPPING[name]
    known = kind()
    sizes = {
        key: value
        for key, value in SIZES.items()
        if hasattr(known, key) and key not in kind.attribute_map and not isinstance(getattr(kind, key, None), property)
    }
    config = kind(**sizes | OWN.get(name, {}))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Auto.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def logprobs(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """(R, V) of one sequence, read from the start."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("strategy", ["naive", "auto"])
@pytest.mark.parametrize("name", TRAINED)
def test_loss_and_gradients_are_plain_pytorchs(name: str, strategy: Any) -> None:
    model, terms = small(name), []
    for prompt, teacher, group in zip(PROMPTS, TEACHERS, COMPLETIONS, strict=True):
        for completion in group:
            student = logprobs(model, prompt, completion)
            with torch.no_grad():
                target = logprobs(model, teacher, completion)
            terms.append((student.exp() * (student - target)).sum(-1))
    expected = torch.cat(terms).mean()
    expected.backward()
    plain = gradients(model)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not shared, or not counted
        out = distill_step(model, plan(PROMPTS, COMPLETIONS, TEACHERS), strategy=strategy)
    torch.testing.assert_close(out.loss, expected.detach(), rtol=1e-3, atol=1e-6)
    own = gradients(model)
    scale = max(float(gradient.norm()) for gradient in plain.values())
    for key, gradient in plain.items():
        # A bias of keys has a gradient of rounding alone.
        assert float((own[key] - gradient).norm()) <= 2e-3 * float(gradient.norm()) + 1e-5 * scale, key


def check_sampled(model: nn.Module, prompts: list[list[int]]) -> None:
    sampled = generate(model, prompts, num_completions=2, max_new_tokens=6, eos_token_id=None, seed=0)
    expected = [
        logprobs(model, prompt, tokens.tolist()).gather(1, tokens[:, None])[:, 0]
        for prompt, group in zip(prompts, sampled.completions, strict=True)
        for tokens in group
    ]
    torch.testing.assert_close(sampled.logprobs, torch.cat(expected).detach(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", SAMPLED)
def test_what_is_sampled_is_as_likely_as_the_whole_sequence_says(name: str, first_use: None) -> None:
    model = small(name)
    check_sampled(model, PROMPTS)
    check_sampled(model, [PROMPTS[0], PROMPTS[0][::-1]])


@pytest.mark.parametrize("name", EQUAL_ONLY)
def test_positions_counted_from_the_padding_are_refused(name: str, first_use: None) -> None:
    model = small(name)
    check_sampled(model, [PROMPTS[0], PROMPTS[0][::-1]])
    with pytest.raises(UnsupportedModelError, match=r"padded on the left.*one length at a time"):
        check_sampled(model, PROMPTS)


@pytest.mark.parametrize("name", NOT_SAMPLED)
def test_a_cache_that_is_not_used_is_refused_by_name(name: str, first_use: None) -> None:
    with pytest.raises(UnsupportedModelError, match=NOT_SAMPLED[name]):
        check_sampled(small(name), [PROMPTS[0], PROMPTS[0][::-1]])


@pytest.mark.parametrize("name", UNCOUNTED)
def test_what_cannot_be_counted_is_refused_by_the_estimate_and_warned_about_once(name: str, first_use: None) -> None:
    model = small(name)
    with pytest.raises(UnsupportedModelError, match=UNCOUNTED[name]):
        predict(model.config, Load(prompt_tokens=10, context_tokens=5, completion_tokens=5))
    planned = plan(PROMPTS, COMPLETIONS, TEACHERS)
    with pytest.warns(UserWarning, match=f"is not counted.*{UNCOUNTED[name]}"):
        out = distill_step(model, planned, strategy="naive")
    assert out.report.speedup is None
    assert math.isfinite(float(out.loss))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        distill_step(model, planned, strategy="naive")


@pytest.mark.parametrize("name", ["gpt2", "opt", "xglm", "gptj", "bloom", "biogpt"])
def test_the_width_of_a_feed_forward_layer_is_counted_by_the_name_that_a_family_has_for_it(name: str) -> None:
    model = small(name)
    matrices = sum(
        module.weight.numel() for module in find_body(model).base.modules() if isinstance(module, nn.Linear | Conv1D)
    )
    assert sum(layer.weights for layer in model_sizes(model.config).layers) == matrices


def test_models_that_see_tokens_ahead_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"XLNetLMHeadModel is configured to see tokens ahead \(attn_type"):
        find_body(small("xlnet"))
