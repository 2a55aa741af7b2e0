"""Tiny random models of every family that the shared-prefix strategies are tested on, in float64.

Weights are drawn with std 0.08, and norms and biases are shaken too: with the usual 0.02 a model is nearly the identity
and an off-by-one position hides in rounding. Dimensions are chosen to be unequal (heads, head size, hidden, window), so
that a transposed axis is an error and not a coincidence.

Float64 weights alone do not make a float64 model: transformers computes norms, routers and linear attention in float32
whatever the weights are. `double_precision()` turns those casts into float64 while it is entered; only then do two
correct strategies agree to 1e-10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from sdcore.models import Body
from sdcore.models.names import set_checkpointing
from sdcore.prefix.tree import Tree

VOCAB = 61
WINDOW = 6  # shorter than most sequences of the tests, longer than some
STD = 0.08
# head_dim × heads is not the hidden size where the family has a head_dim of its own.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": STD,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
    "head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # Half of every head turns: with the default, a quarter of 12, the rotated part would be odd.
    "partial_rotary_factor": 0.5,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def build(config: Any, *, seed: int = 0, attn_implementation: str | None = None) -> PreTrainedModel:
    """A model of this configuration in float64 and training mode, dropout off, every parameter away from 0 and 1.

    `attn_implementation` None is sdpa, but eager where scores are soft-capped (Gemma 2): sdpa cannot, and transformers
    5.17 takes it all the same and leaves the cap out.
    """
    if attn_implementation is None:
        attn_implementation = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    # The grouped matrix product of the experts has no float64 kernel.
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Auto.from_config(config, attn_implementation=attn_implementation, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3 * STD)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def sliding(count: int, *, full: int = 1) -> list[str]:
    return ["sliding_attention"] * (count - full) + ["full_attention"] * full


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON | {"head_dim": 12}),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON | EXPERTS | {"head_dim": 12}),
    "mistral": lambda: MistralConfig(**COMMON | {"sliding_window": WINDOW, "head_dim": 12}),
    "gemma2": lambda: Gemma2Config(
        **COMMON
        | {
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "layer_types": sliding(2),
            # Low enough to bend scores and logits of this size.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
            "hidden_activation": "gelu_pytorch_tanh",
        }
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON
        | {
            "num_hidden_layers": 3,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "layer_types": sliding(3),
        }
    ),
    "phi3": lambda: Phi3Config(**COMMON | {"original_max_position_embeddings": 256}),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON | {"rotary_pct": 0.5, "attention_bias": True}),
    "qwen3_next": lambda: Qwen3NextConfig(**COMMON | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_5": lambda: Qwen3_5TextConfig(**COMMON | LINEAR),
}
# Families whose output layer scales its logits; their attention is that of a family above.
HEADS: dict[str, Callable[[], Any]] = {
    "granite": lambda: GraniteConfig(**COMMON | {"logits_scaling": 3.0}),
    "cohere": lambda: CohereConfig(**COMMON | {"logit_scale": 0.25}),
    "cohere2": lambda: Cohere2Config(
        **COMMON | {"logit_scale": 0.25, "head_dim": 8, "sliding_window": WINDOW, "layer_types": sliding(2)}
    ),
}


def tiny(name: str, *, seed: int = 0, attn_implementation: str | None = None) -> PreTrainedModel:
    """The tiny model of this name; another seed gives other weights."""
    return build((CONFIGS | HEADS)[name](), seed=seed, attn_implementation=attn_implementation)


def tied() -> PreTrainedModel:
    return build(LlamaConfig(**COMMON | {"tie_word_embeddings": True}))


def checkpointed(model: PreTrainedModel, *, reentrant: bool = False) -> PreTrainedModel:
    set_checkpointing(model, True, use_reentrant=reentrant)
    return model


def shaken(model: nn.Module, seed: int = 1) -> Any:
    """The model with adapters that are not zero: what they add is about as large as the logits."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.double().train().named_parameters():
        if "lora_" in name:
            weight.data = 0.3 * torch.randn(weight.shape, dtype=weight.dtype, generator=draw)
    return model


def adapted(model: PreTrainedModel | None = None, *, seed: int = 1, **options: Any) -> Any:
    """A model with LoRA, by default on the output layer and on one projection of the body."""
    import peft

    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "lm_head"]} | options)
    return shaken(peft.get_peft_model(model or tiny("llama"), config), seed)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every weight that has one, whole where it is sharded. To be called by all ranks."""
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {
        name.removeprefix("module."): (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        for name, grad in grads.items()
    }


def assert_same_gradients(grads: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert grads.keys() == expected.keys()
    errors = {name: float((grads[name] - grad).norm() / grad.norm()) for name, grad in expected.items()}
    assert {name: error for name, error in errors.items() if not error < tolerance} == {}


def assert_trained_have_gradients(model: nn.Module) -> None:
    """Every weight that is trained has a gradient, and none that is frozen."""
    wrong = [name for name, weight in model.named_parameters() if weight.requires_grad != (weight.grad is not None)]
    assert wrong == []


def tokens_of(model: nn.Module) -> list[int]:
    """How many tokens each later forward embeds."""
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    return seen


def one_by_one(body: Body, trees: Sequence[Tree]) -> Tensor:
    """(N, H) by definition: each completion a sequence alone, without padding."""
    rows = []
    for tree in trees:
        for i in tree.active:
            rows.append(body(tree.sequence(i)[None])[0][tree.positions[tree.slices[i]]])
    return torch.cat(rows)[in_places(trees)]


def in_places(trees: Sequence[Tree]) -> Tensor:
    """(N,) how the rows of trees, one tree after the other, are put in the plan's order."""
    return torch.cat([tree.places for tree in trees]).argsort()


def plain_rows(model: nn.Module, trees: Sequence[Tree]) -> tuple[Tensor, Tensor]:
    """(N, H) last hidden states and (N, V) logits of the whole model, one sequence at a time."""
    hidden, logits = [], []
    for tree in trees:
        for i in tree.active:
            out = model(input_ids=tree.sequence(i)[None], output_hidden_states=True, use_cache=False)
            positions = tree.positions[tree.slices[i]]
            hidden.append(out.hidden_states[-1][0, positions])
            logits.append(out.logits[0, positions])
    return torch.cat(hidden)[in_places(trees)], torch.cat(logits)[in_places(trees)]


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss () of (N, V) logits, as the papers write it."""
    log_p, log_q = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# Recurrent layers cannot be packed into one row.
HYBRIDS = frozenset({"qwen3_next", "qwen3_5"})
# Some layers see the last WINDOW tokens only.
SLIDING = frozenset({"mistral", "gemma2", "gemma3"})


@contextmanager
def double_precision() -> Iterator[None]:
    """While entered, who asks for float32 gets float64: `x.float()`, `x.to(torch.float32)`, `dtype=torch.float32`.

    Patches torch rather than enter a mode: a mode is left in backward, where checkpointed layers are run again.
    """

    def widened(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        for owner, name in (
            (torch.Tensor, "to"),
            (nn.functional, "softmax"),
            (torch, "softmax"),
            (torch, "zeros"),
            (torch, "ones"),
        ):
            stack.enter_context(mock.patch.object(owner, name, widened(getattr(owner, name))))
        yield
