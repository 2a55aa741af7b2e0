"""Finding a model's body and output layer, through wrappers, and refusing by name what is not understood."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    PhiConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.models import Body, Head, find_body, head_of
from tests.sdcore.prefix.models import COMMON, CONFIGS, HEADS, SLIDING, VOCAB, WINDOW, build, tiny

peft = pytest.importorskip("peft")

TOKENS = torch.tensor([[5, 9, 2, 44, 17, 8], [30, 1, 12, 7, 3, 3]])


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def logits_of(head: Head, states: Tensor) -> Tensor:
    """What a head says, in plain torch."""
    logits = states @ head.weight.T
    if head.transform.bias is not None:
        logits = logits + head.transform.bias
    logits = logits * head.transform.scale
    softcap = head.transform.softcap
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def lora(model: PreTrainedModel, **options: Any) -> Any:
    """The model with adapters that are not zero."""
    config = peft.LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], **options)
    wrapped = peft.get_peft_model(model, config).double().train()
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return wrapped


@pytest.mark.parametrize("name", [*CONFIGS, *HEADS])
def test_body_and_head_give_the_models_own_logits(name: str) -> None:
    model = tiny(name)
    body, head = find_body(model), head_of(model)
    assert torch.allclose(logits_of(head, body(TOKENS)), model(TOKENS).logits, rtol=1e-6, atol=1e-8)


def test_a_heads_bias_is_part_of_it() -> None:
    model = build(PhiConfig(**COMMON))
    head = head_of(model)
    assert head.transform.bias is model.lm_head.bias
    assert torch.allclose(logits_of(head, find_body(model)(TOKENS)), model(TOKENS).logits)


def test_scale_and_softcap_are_the_configurations() -> None:
    transforms = {name: head_of(tiny(name)).transform for name in ("llama", "gemma2", "granite", "cohere")}
    assert {name: (transform.scale, transform.softcap) for name, transform in transforms.items()} == {
        "llama": (1.0, None),
        "gemma2": (1.0, 1.5),
        "granite": (1 / 3, None),
        "cohere": (0.25, None),
    }


@pytest.mark.parametrize("name", [*CONFIGS, *HEADS])
def test_windows_are_those_of_the_layers(name: str) -> None:
    body = find_body(tiny(name))
    windows = {"mistral": (WINDOW, WINDOW), "gemma2": (WINDOW, None), "gemma3": (WINDOW, WINDOW, None)}
    expected = windows.get(name, (WINDOW, None) if name == "cohere2" else (None,) * len(body.layer_types))
    assert body.windows == expected
    assert (name in SLIDING | {"cohere2"}) == any(body.windows)
    assert body.recurrent == (name in {"qwen3_next", "qwen3_5"})


def test_sizes_are_those_of_the_model() -> None:
    body = find_body(tiny("llama"))
    assert (body.vocab_size, body.hidden_size, body.max_positions) == (VOCAB, 32, 256)
    assert (body.device, body.dtype) == (torch.device("cpu"), torch.float64)


def test_the_output_layer_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: pytest.fail("lm_head was called"))
    find_body(model)(TOKENS)


def test_through_distributed_data_parallel_the_output_layer_sees_no_rows(one_process: None) -> None:
    model = tiny("llama")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    expected = find_body(model)(TOKENS)
    body = find_body(DistributedDataParallel(model))
    assert body.causal_lm is model
    assert torch.equal(body(TOKENS), expected)
    assert seen == [0]
    with torch.no_grad():
        assert torch.equal(body(TOKENS), expected)
    assert seen == [0]  # without gradient there is nothing for the wrapper to arm


def test_through_fully_shard_the_states_are_the_same(one_process: None) -> None:
    model = tiny("llama")
    expected = find_body(model)(TOKENS)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    body = find_body(model)
    assert body.through is model
    assert torch.equal(body(TOKENS), expected)
    with torch.no_grad():
        assert torch.equal(body(TOKENS), expected)


@pytest.mark.parametrize("gathered", [True, False], ids=["before", "after"])
def test_a_sharded_heads_gradient_reaches_its_parameter(one_process: None, gathered: bool) -> None:
    """Before the root's forward the weight is a shard and is gathered; after it, it is there."""
    plain, model = tiny("llama"), tiny("llama")
    logits_of(head_of(plain), find_body(plain)(TOKENS)).sum().backward()
    fully_shard(model)
    early = head_of(model)
    states = find_body(model)(TOKENS)
    head = early if gathered else head_of(model)
    logits_of(head, states).sum().backward()
    for (name, weight), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(weight.grad.full_tensor(), expected.grad), name


def test_a_compiled_model_is_looked_into() -> None:
    model = tiny("llama")
    assert find_body(torch.compile(model)).causal_lm is model


def test_a_forward_that_was_replaced_is_called() -> None:
    """accelerate puts autocast around a model by replacing its forward."""
    model = tiny("llama")
    calls: list[str] = []
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append("called")
        return original(*args, **kwargs)

    model.forward = forward
    find_body(model)(TOKENS)
    assert calls == ["called"]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_are_part_of_the_body_until_they_are_turned_off(dora: bool) -> None:
    plain = find_body(tiny("llama"))(TOKENS)
    model = lora(tiny("llama"), use_dora=dora)
    body = find_body(model)
    assert torch.allclose(logits_of(head_of(model), body(TOKENS)), model(TOKENS).logits)
    assert float((body(TOKENS) - plain).abs().max()) > 0.1
    with model.disable_adapter():
        assert torch.allclose(body(TOKENS), plain)


def test_a_head_in_modules_to_save_is_the_trained_copy_until_adapters_are_off() -> None:
    model = lora(tiny("llama"), modules_to_save=["lm_head"])
    wrapper = model.get_base_model().lm_head
    assert head_of(model).weight is wrapper.modules_to_save["default"].weight
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(2.0)
    assert torch.allclose(logits_of(head_of(model), find_body(model)(TOKENS)), model(TOKENS).logits)
    with model.disable_adapter():
        assert head_of(model).weight is wrapper.original_module.weight


def test_soft_prompts_are_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING adds soft prompts"):
        find_body(peft.get_peft_model(tiny("llama"), config))


class HalvedLogits(LlamaForCausalLM):
    """A model with a transformation of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


def test_logits_that_are_not_what_the_configuration_says_are_refused() -> None:
    model = tiny("llama")
    head_of(model)
    model.config.logit_scale = 2.0  # Llama does not know it
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM changes .* with scale 2 and soft-cap None"):
        head_of(model)
    with pytest.raises(UnsupportedModelError, match="HalvedLogits changes"):
        head_of(HalvedLogits(tiny("llama").config))


def test_hidden_states_changed_before_the_head_are_refused() -> None:
    class Scaled(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = self.lm_head(self.model(*args, **kwargs).last_hidden_state / 2)
            return output

    with pytest.raises(UnsupportedModelError, match="Scaled changes its hidden states"):
        head_of(Scaled(tiny("llama").config))


def test_verifying_a_head_leaves_the_model_as_it_was() -> None:
    model = tiny("gemma2")
    before = dict(model.named_modules())
    head_of(model)
    assert dict(model.named_modules()) == before


def encoder_decoder() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def with_vision() -> nn.Module:
    with torch.device("meta"):
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=dict(COMMON, head_dim=8),
                vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
            )
        )


def seeing_ahead() -> nn.Module:
    model = tiny("llama")
    model.config.is_causal = False
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder"),
        (with_vision, "Gemma3ForConditionalGeneration reads more than text"),
        (seeing_ahead, "LlamaForCausalLM is configured to see tokens ahead"),
        (lambda: tiny("llama").base_model, "LlamaModel has no base model under a language-model head"),
        (lambda: nn.Linear(2, 2), "Linear is not a transformers model"),
        (lambda: DataParallel(tiny("llama")), "DataParallel is not supported"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(make: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        find_body(make())


def test_fsdp1_is_refused_by_name(one_process: None) -> None:
    with pytest.raises(UnsupportedModelError, match="FullyShardedDataParallel is not supported"):
        find_body(FullyShardedDataParallel(tiny("llama"), device_id=torch.device("cpu")))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ArgumentError, match="got str"):
        find_body("meta-llama/Llama-3.1-8B")  # type: ignore[arg-type]


def test_a_model_without_position_ids_is_called_without(monkeypatch: pytest.MonkeyPatch) -> None:
    body = find_body(tiny("llama"))
    given: list[Any] = []

    def forward(input_ids: Tensor, use_cache: bool, **kwargs: Any) -> Any:
        given.append(kwargs)
        return type("Output", (), {"last_hidden_state": input_ids})

    monkeypatch.setattr(body.base, "forward", forward)
    body = Body(body.model, body.causal_lm, body.base, None)
    body(TOKENS, position_ids=torch.arange(6)[None], cache=(cache := DynamicCache()))
    assert [list(kwargs.values()) for kwargs in given] == [[cache]]
    assert given[0].keys() <= {"cache", "past_key_values"}


def test_a_decoder_made_of_an_encoder_is_refused() -> None:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        is_decoder=True,
    )
    with pytest.raises(UnsupportedModelError, match=r"BertLMHeadModel .*output layer"):
        head_of(BertLMHeadModel(config))
