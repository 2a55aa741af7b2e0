"""Output layers of every kind: their logits are the model's own, and their gradients reach what is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import PhiConfig

from sdcore.errors import UnsupportedModelError
from sdcore.models import Head, find_body, head_of, without_dropout
from sdcore.prefix import Plan, run
from sdcore.step import distill_step
from sdcore.step.rewards import token_logprobs
from sdcore.teachers import EMA, AdapterOff, Frozen, Live, Snapshot, TrustRegion
from tests.sdcore.prefix.models import (
    COMMON,
    VOCAB,
    adapted,
    assert_same_gradients,
    build,
    double_precision,
    gradients,
    plain_rows,
    reverse_kl,
    shaken,
    tied,
    tiny,
)
from tests.sdcore.prefix.trees import random_plan

peft = pytest.importorskip("peft")

TOKENS = torch.tensor([[5, 9, 2, 44, 17, 8], [30, 1, 12, 7, 3, 3]])
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(autouse=True)
def in_double_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if "in_single_precision" in request.fixturenames else double_precision():
        yield


@pytest.fixture
def in_single_precision() -> None:
    """For what has no float64."""


def small_plan() -> Plan:
    return random_plan(4, prompts=(6, 4), sizes=((3, 2), (2,)))


def two_adapters() -> Any:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj", "lm_head"]))
    model.add_adapter("idle", peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    return shaken(model)


def logits_of(head: Head, hidden: Tensor) -> Tensor:
    """What a head says, in plain torch."""
    logits = head.states(hidden) @ head.weight.T
    return logits if head.transform.bias is None else logits + head.transform.bias


def require_step(
    make: Callable[[], Any], teacher_logits: Callable[[nn.Module, Plan], Tensor], *, teacher: Any, strategy: Any
) -> None:
    """A step is that of plain forwards, in its loss and in the gradient of every weight."""
    planned, plain, model = small_plan(), make(), make()
    with torch.no_grad():
        taught = teacher_logits(make(), planned)
    loss = reverse_kl(plain_rows(plain, planned.student)[1], taught)
    loss.backward()
    out = distill_step(model, planned, teacher=teacher(model), strategy=strategy, verify="off")
    assert torch.allclose(out.loss, loss.detach(), rtol=1e-9)
    assert_same_gradients(gradients(model), gradients(plain))
    assert all(bool(grad.abs().max() > 0) for grad in gradients(plain).values())


LORA: dict[str, Callable[[], Any]] = {
    "one adapter": adapted,
    "rank-stabilised": lambda: adapted(use_rslora=True),
    "two adapters": two_adapters,
    "a bias of the adapter": lambda: adapted(lora_bias=True),
    "a bias of both": lambda: adapted(build(PhiConfig(**COMMON)), lora_bias=True),
    "on the output layer alone": lambda: adapted(target_modules=["lm_head"]),
    "dropout": lambda: adapted(lora_dropout=0.5),
    "tied, on the output layer": lambda: adapted(tied()),
    "tied, on the embeddings": lambda: adapted(tied(), target_modules=["q_proj", "embed_tokens"]),
    "tied, on both as one": lambda: adapted(
        tied(), target_modules=["q_proj", "embed_tokens", "lm_head"], ensure_weight_tying=True
    ),
    "trained copy": lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trained copy, tied": lambda: adapted(
        tied(), target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:`lora_bias=True`")
@pytest.mark.parametrize("kind", LORA)
def test_the_logits_are_the_models_own(kind: str) -> None:
    model = LORA[kind]()
    with without_dropout(model, training=False):
        assert torch.allclose(logits_of(head_of(model), find_body(model)(TOKENS)), model(TOKENS).logits, **EXACT)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:`lora_bias=True`")
@pytest.mark.parametrize("strategy", ["packed", "two_phase"])
@pytest.mark.parametrize("kind", [kind for kind in LORA if kind != "dropout"])
def test_every_trained_weight_gets_the_gradient_of_plain_forwards(kind: str, strategy: Any) -> None:
    def teacher_logits(model: nn.Module, planned: Plan) -> Tensor:
        return plain_rows(model, planned.teacher)[1]

    require_step(LORA[kind], teacher_logits, teacher=lambda model: Live(), strategy=strategy)


def test_an_adapters_columns_are_what_peft_adds_to_the_weight() -> None:
    model = two_adapters()
    layer, head = model.get_base_model().lm_head, head_of(model)
    assert head.lift is not None
    whole = head.weight @ torch.cat([torch.eye(32), head.lift])
    delta = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    assert head.weight.shape == (VOCAB, 32 + 3 + 2)
    assert torch.allclose(whole, layer.base_layer.weight + delta, **EXACT)


def test_dropout_of_an_adapter_is_off_in_a_step() -> None:
    losses = [distill_step(adapted(lora_dropout=rate), small_plan()).loss for rate in (0.0, 0.5)]
    assert torch.equal(*losses)


def test_adapters_that_are_off_are_not_there() -> None:
    model = adapted()
    with model.disable_adapter():
        head = head_of(model)
        assert (head.weight is model.get_base_model().lm_head.base_layer.weight, head.lift) == (True, None)
        assert torch.allclose(logits_of(head, find_body(model)(TOKENS)), model(TOKENS).logits, **EXACT)
    assert head_of(model).lift is not None


@pytest.mark.parametrize("off", [False, True], ids=["on", "off"])
def test_merged_adapters_are_in_the_weight(off: bool) -> None:
    model = adapted()
    expected = tiny("llama")(TOKENS).logits if off else model(TOKENS).logits
    model.merge_adapter()
    if off:
        with model.disable_adapter():  # takes them out again, as PEFT's own forward does
            head = head_of(model)
            assert torch.allclose(logits_of(head, find_body(model)(TOKENS)), expected, **EXACT)
        assert not model.get_base_model().lm_head.merged
    else:
        head = head_of(model)
        assert head.lift is None
        assert torch.allclose(logits_of(head, find_body(model)(TOKENS)), expected, **EXACT)


def test_a_young_adapter_is_not_lost_in_bfloat16() -> None:
    """What it adds is far below the last digit of the weight that it is on."""
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["lm_head"])
    model: Any = peft.get_peft_model(tiny("llama").bfloat16(), config)
    layer = model.get_base_model().lm_head
    for part in (layer.lora_A, layer.lora_B):
        part.float()  # as PEFT makes them, unless another dtype is the default, as here
    nn.init.normal_(layer.lora_B["default"].weight, std=1e-5)
    delta = layer.get_delta_weight("default").detach().double()
    weight = layer.base_layer.weight
    assert float((weight + delta.bfloat16() == weight).float().mean()) > 0.9  # what adding it would leave of it
    hidden = torch.randn(7, 32, dtype=torch.float64).bfloat16()
    head = head_of(model)
    assert (head.weight.dtype, head.states(hidden).dtype) == (torch.bfloat16, torch.bfloat16)
    weight = head.weight.detach().double()
    added = head.states(hidden).detach().double() @ weight.T - hidden.double() @ weight[:, :32].T
    expected = hidden.double() @ delta.T
    assert float((added - expected).norm() / expected.norm()) < 2**-8


OTHER = 9


def other() -> Any:
    return adapted(seed=OTHER)


def moved(model: Any) -> Any:
    """The student after a step, which a teacher of its past does not follow."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.mul_(0.5)
    return model


def with_past(teacher: Any) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        of_past = teacher(shaken(model))  # the student as it was
        moved(model)
        return of_past

    return make


TEACHERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[Any], Any]]] = {
    # student, the plain model that the teacher is, the teacher
    "adapter off": (adapted, lambda: tiny("llama"), lambda model: AdapterOff()),
    "frozen": (adapted, other, lambda model: Frozen(other())),
    "frozen, without adapter": (adapted, lambda: tiny("llama", seed=1), lambda _: Frozen(tiny("llama", seed=1))),
    "frozen, of a plain student": (lambda: tiny("llama"), other, lambda _: Frozen(other())),
    "snapshot": (lambda: moved(adapted()), adapted, with_past(Snapshot)),
    "average": (lambda: moved(adapted()), adapted, with_past(lambda model: EMA(model, update_rate=0.1))),
}


@pytest.mark.parametrize("strategy", ["packed", "two_phase"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teachers_output_layer_is_its_own(kind: str, strategy: Any) -> None:
    student, teacher_model, teacher = TEACHERS[kind]
    require_step(
        student,
        lambda _, planned: plain_rows(teacher_model(), planned.teacher)[1],
        teacher=teacher,
        strategy=strategy,
    )


@pytest.mark.parametrize("strategy", ["packed", "two_phase"])
def test_a_trust_region_mixes_the_logits_of_both_output_layers(strategy: Any) -> None:
    def teacher_logits(model: nn.Module, planned: Plan) -> Tensor:
        base = plain_rows(tiny("llama"), planned.teacher)[1]
        return 0.7 * base + 0.3 * plain_rows(model, planned.teacher)[1]

    require_step(adapted, teacher_logits, teacher=lambda _: TrustRegion(AdapterOff(), share=0.3), strategy=strategy)


def test_a_part_of_the_teachers_states_stays_what_the_body_says() -> None:
    """`run` gives (N, H) whatever is on the output layer."""
    out = run(adapted(), small_plan(), Frozen(other()))
    assert out.teacher_hidden is not None
    assert out.student_hidden.shape == out.teacher_hidden.shape == (len(out.student_hidden), 32)


def test_log_probabilities_are_those_of_the_adapted_output_layer() -> None:
    planned, model = small_plan(), adapted()
    expected = plain_rows(model, planned.student)[1].log_softmax(-1).gather(1, planned.target_ids[:, None])[:, 0]
    assert torch.allclose(token_logprobs(model, planned), expected, **EXACT)


def test_a_frozen_weight_under_an_adapter_gets_no_gradient() -> None:
    model = adapted()
    distill_step(model, small_plan())
    assert model.get_base_model().lm_head.base_layer.weight.grad is None


def test_a_weight_that_is_trained_beside_its_adapter_gets_its_gradient() -> None:
    def make() -> Any:
        model = adapted()
        model.get_base_model().lm_head.base_layer.weight.requires_grad_(True)
        return model

    require_step(
        make,
        lambda model, planned: plain_rows(model, planned.teacher)[1],
        teacher=lambda _: Live(),
        strategy="packed",
    )


def test_tied_embeddings_get_the_gradient_of_both_uses() -> None:
    require_step(
        tied, lambda model, planned: plain_rows(model, planned.teacher)[1], teacher=lambda _: Live(), strategy="packed"
    )


def token_indices() -> Any:
    return adapted(tied(), target_modules=["q_proj"], trainable_token_indices=[1, 2])


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dora": (lambda: adapted(use_dora=True), r"adapter 'default' on its output layer .* \(DoraLinearVariant\)"),
    "token indices": (token_indices, r"type peft\..*TrainableTokensWrapper"),
    "other methods": (
        lambda: peft.get_peft_model(
            tiny("llama"), peft.IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[])
        ),
        r"type peft\.tuners\.ia3\.layer\.Linear, which is not one plain matrix \(with PEFT, put lm_head into",
    ),
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_one_matrix_is_refused_by_name(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(UnsupportedModelError, match=f"LlamaForCausalLM has an .*{message}"):
        head_of(make())


def test_dora_on_the_output_layer_is_no_obstacle_while_it_is_off() -> None:
    model = adapted(use_dora=True)
    with model.disable_adapter():
        assert torch.allclose(logits_of(head_of(model), find_body(model)(TOKENS)), model(TOKENS).logits, **EXACT)


class Packed(Tensor):
    """Stands for the weights of torchao: a subclass of Tensor inside of a plain nn.Linear."""


def test_a_weight_of_an_unknown_type_is_refused_by_name() -> None:
    model = tiny("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Packed), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"weight is of type tests\..*Packed.*modules_to_not_convert"):
        head_of(model)


def test_a_layer_of_an_unknown_type_is_refused_by_name() -> None:
    class QuantLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qweight = nn.Parameter(torch.zeros(4, VOCAB, dtype=torch.int32), requires_grad=False)

    model = tiny("llama")
    model.lm_head = QuantLinear()
    with pytest.raises(UnsupportedModelError, match=r"type tests\..*QuantLinear.*llm_int8_skip_modules"):
        head_of(model)


def quantised(kind: str, *, bias: bool = False) -> Any:
    """A float32 model whose output layer bitsandbytes has quantised, frozen."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny("llama").to(torch.float32)
    options: dict[str, Any] = {"bias": bias}
    if kind == "4bit":
        layer = bitsandbytes.nn.Linear4bit(32, VOCAB, compute_dtype=torch.float32, quant_type="nf4", **options)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(32, VOCAB, has_fp16_weights=False, **options)
    weights = {"weight": model.lm_head.weight.detach()} | ({"bias": torch.linspace(-1, 1, VOCAB)} if bias else {})
    layer.load_state_dict(weights)
    model.lm_head = layer.to("cpu").requires_grad_(False)
    return model


QUANTISED = ("4bit", "8bit")


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_output_layer_is_dequantised(kind: str, bias: bool, in_single_precision: None) -> None:
    model = quantised(kind, bias=bias)
    for _ in range(2):  # the first forward may move the weight
        head, expected = head_of(model), model(TOKENS).logits.detach()
        logits = logits_of(head, find_body(model)(TOKENS)).detach()
        assert head.weight.dtype == torch.float32
        assert head.weight.shape == (VOCAB, 32)
        assert not head.weight.requires_grad
        assert float((logits - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_step_through_a_quantised_output_layer_trains_the_body(kind: str, in_single_precision: None) -> None:
    model, plain = quantised(kind), tiny("llama").to(torch.float32)
    with torch.no_grad():
        plain.lm_head.weight.copy_(head_of(model).weight)
    plain.lm_head.requires_grad_(False)
    taught = tiny("llama", seed=1).to(torch.float32)
    for student in (model, plain):
        distill_step(student, small_plan(), teacher=Frozen(taught))
    expected, grads = gradients(plain), gradients(model)
    assert expected.keys() == grads.keys()
    assert {name for name, grad in expected.items() if not torch.allclose(grads[name], grad, rtol=1e-4, atol=1e-7)} == (
        set()
    )


def test_a_quantised_teacher_is_dequantised(in_single_precision: None) -> None:
    taught = quantised("4bit")
    same = tiny("llama").to(torch.float32)
    with torch.no_grad():
        same.lm_head.weight.copy_(head_of(taught).weight)
    student = tiny("llama", seed=1).to(torch.float32)
    losses = [distill_step(student, small_plan(), teacher=Frozen(weights)).loss for weights in (taught, same)]
    assert float(losses[0]) > 0.01
    assert torch.allclose(*losses)


def test_an_adapter_on_a_quantised_output_layer_keeps_its_own_columns(in_single_precision: None) -> None:
    model = quantised("4bit")
    model.is_loaded_in_4bit = True  # as from_pretrained says
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=4, target_modules=["lm_head"]))
    layer = wrapped.get_base_model().lm_head
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    expected = wrapped(TOKENS).logits
    logits = logits_of(head_of(wrapped), find_body(wrapped)(TOKENS))
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
    distill_step(wrapped, small_plan(), teacher=AdapterOff())
    assert sorted(name.split(".")[-3] for name in gradients(wrapped)) == ["lora_A", "lora_B"]


def test_reading_a_head_changes_nothing() -> None:
    model = two_adapters()
    before = copy.deepcopy(model.state_dict())
    head_of(model)
    after = model.state_dict()
    assert {name for name, tensor in before.items() if not torch.equal(after[name], tensor)} == set()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda model: model, "has its embeddings offloaded by accelerate.*keep them on a device"),
        (lambda model: model.lm_head, "has its output layer offloaded by accelerate"),
        (lambda model: model.model.layers, "has weights that are trained offloaded by accelerate"),
        (lambda model: model.model.norm, "has weights that are trained offloaded by accelerate"),
    ],
)
def test_what_accelerate_has_offloaded_is_refused_where_it_is_needed(part: Any, message: str) -> None:
    model, plan = tiny("llama"), random_plan(0)
    cpu_offload(part(model), torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=message):
        distill_step(model, plan, teacher=Live(), strategy="naive")


def test_a_teacher_whose_layers_are_offloaded_is_the_teacher() -> None:
    student, teacher, plan = tiny("llama"), tiny("llama", seed=1), random_plan(0)
    expected = distill_step(student, plan, teacher=Frozen(teacher)).loss
    cpu_offload(teacher.model.layers, torch.device("cpu"))
    assert torch.equal(distill_step(student, plan, teacher=Frozen(teacher)).loss, expected)
