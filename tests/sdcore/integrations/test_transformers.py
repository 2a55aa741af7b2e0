"""A patched model returns the states it would have put through its output layer, and is itself again afterwards."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import sdcore
from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.integrations.transformers import StatesOutput, patch
from sdcore.losses import FusedLinearDivergence
from sdcore.models import find_body, head_of
from sdcore.models.names import CACHE_OUTPUT
from sdcore.prefix import plan
from sdkernels import linear_logprobs
from sdkernels.live_bytes import LiveBytes
from tests.processes import assert_right, run_cases, verdicts_of
from tests.sdcore.prefix.models import CONFIGS, HEADS, VOCAB, tiny

B, L = 2, 7


def batch() -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (B, L), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def last_states(model: Any, **kwargs: Any) -> Tensor:
    return model(**batch(), output_hidden_states=True, **kwargs).hidden_states[-1]


def adapted(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).double()
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return adapter


def assert_plain(model: Any) -> None:
    assert "forward" not in vars(model)
    assert "generate" not in vars(model)
    assert model(**batch()).logits.shape == (B, L, VOCAB)


@pytest.mark.parametrize("name", [*CONFIGS, *HEADS])
def test_the_states_are_the_last_hidden_states_bit_for_bit(name: str) -> None:
    model = tiny(name)
    expected = last_states(model)
    with patch(model):
        states = model(**batch()).last_hidden_state
    assert torch.equal(states, expected)
    assert states.requires_grad
    assert_plain(model)


@pytest.mark.parametrize(
    "wrap", [adapted, pytest.param(lambda model: torch.compile(model, backend="eager"), marks=pytest.mark.slow)]
)
def test_wrapped_models_give_the_wrapped_models_states(wrap: Any) -> None:
    model = wrap(tiny("llama"))
    expected = last_states(model)
    with sdcore.patch(model):
        assert torch.equal(model(**batch()).last_hidden_state, expected)
    assert model(**batch()).logits.shape == (B, L, VOCAB)


def test_a_loss_of_the_states_has_the_gradients_of_the_logits() -> None:
    model, labels = tiny("llama"), batch()["input_ids"]
    nn.functional.cross_entropy(model(**batch()).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    with patch(model):
        states = model(**batch()).last_hidden_state[:, :-1].flatten(0, 1)
        logprobs, _ = linear_logprobs(states, model.lm_head.weight, labels[:, 1:].flatten())
        (-logprobs.mean()).backward()
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.grad, expected[name], rtol=1e-9, atol=1e-12), name


def test_no_logits_are_computed() -> None:
    model = tiny("llama").float()
    with torch.no_grad(), patch(model), LiveBytes() as probe:
        model(**batch())
    with torch.no_grad(), LiveBytes() as control:
        model(**batch())
    assert probe.largest_numel < B * L * VOCAB <= control.largest_numel
    assert not [product for product in probe.matmuls if VOCAB in (product.m, product.n) and product.m * product.n]


@pytest.mark.parametrize("kept", [0, 1, 3, torch.tensor([1, 4, 5])])
def test_logits_to_keep_keeps_states(kept: Any) -> None:
    model = tiny("qwen3")
    logits = model(**batch(), logits_to_keep=kept).logits
    with patch(model):
        states = model(**batch(), logits_to_keep=kept).last_hidden_state
    assert torch.allclose(model.lm_head(states), logits, rtol=1e-12)


def test_everything_but_logits_and_loss_comes_as_the_family_gives_it() -> None:
    model = tiny("qwen3_moe", attn_implementation="eager")
    asked = {"output_router_logits": True, "output_attentions": True, "output_hidden_states": True, "use_cache": True}
    plain = model(**batch(), **asked)
    with patch(model):
        out = model(**batch(), **asked)
    assert set(out) == set(plain) - {"logits"} | {"last_hidden_state", "empty_logits"}
    assert torch.equal(out.aux_loss, plain.aux_loss)
    assert all(torch.equal(a, b) for a, b in zip(out.router_logits, plain.router_logits, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, plain.hidden_states, strict=True))
    assert getattr(out, CACHE_OUTPUT).get_seq_length() == L


def test_a_cache_is_read_on() -> None:
    """Code that samples by hand does so."""
    model = tiny("llama")
    expected = last_states(model)[:, -1:]
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    with patch(model):
        first = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        given = {CACHE_OUTPUT: getattr(first, CACHE_OUTPUT)}
        then = model(input_ids=ids[:, -1:], attention_mask=mask, **given)
    assert torch.allclose(then.last_hidden_state, expected, rtol=1e-9)


def test_what_expects_logits_stops_with_the_reason() -> None:
    model = tiny("llama")
    with patch(model):
        out = model(**batch(), use_cache=False)
    assert not hasattr(out, "logits")
    assert getattr(out, CACHE_OUTPUT) is None
    assert "logits" not in out
    with pytest.raises(AttributeError, match=r"logits is not there.*sdcore\.patch.*[Uu]ndo"):
        _ = out.logits
    with pytest.raises(AttributeError, match="'logit'"):
        _ = out.logit
    with pytest.raises(KeyError, match=r"sdcore\.patch"):
        out["loss"]
    with pytest.raises(TypeError, match="by name"):
        out[0]


def test_labels_and_tuples_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    with patch(model):
        monkeypatch.setattr(model.model, "forward", None)
        with pytest.raises(ArgumentError, match=r"labels must not.*linear_logprobs"):
            model(**batch(), labels=batch()["input_ids"])
        position = list(inspect.signature(model.forward).parameters).index("labels")
        with pytest.raises(ArgumentError, match="labels must not"):
            model(batch()["input_ids"], *[None] * (position - 1), batch()["input_ids"])
        with pytest.raises(ArgumentError, match="return_dict must be True"):
            model(**batch(), return_dict=False)


def test_generate_works_while_patched() -> None:
    plain = tiny("llama").eval()
    asked = {"input_ids": batch()["input_ids"], "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for model in (plain, adapted(tiny("llama")).eval()):
        expected = model.generate(**asked)
        with patch(model):
            assert torch.equal(model.generate(**asked), expected)
            assert "last_hidden_state" in model(**batch())


def test_a_failing_generate_leaves_the_patch_as_it_was() -> None:
    model = tiny("llama")
    with patch(model):
        with pytest.raises(ValueError, match="no_such_argument"):
            model.generate(**batch(), no_such_argument=1)
        assert "last_hidden_state" in model(**batch())
    assert_plain(model)


def test_an_exception_undoes_the_patch_and_leaves_no_hook() -> None:
    model = tiny("llama")
    with pytest.raises(IndexError), patch(model):
        model(input_ids=torch.tensor([[VOCAB + 7]]))
    assert_plain(model)
    assert not model.model._forward_hooks


def test_patches_count() -> None:
    model = tiny("llama")
    outer, inner = patch(model), patch(model)
    outer.undo()
    outer.undo()
    assert "last_hidden_state" in model(**batch())
    with patch(adapted(model)):
        inner.undo()
        assert "last_hidden_state" in model(**batch())
    assert_plain(model)
    with patch(model):
        assert "last_hidden_state" in model(**batch())
    assert_plain(model)


def test_a_forward_that_somebody_replaced_before_is_called_and_put_back() -> None:
    """accelerate's autocast does so."""
    model, calls = tiny("llama"), []
    original = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = counted
    with patch(model):
        model(**batch())
    assert calls == [1]
    assert vars(model)["forward"] is counted


def test_a_forward_that_somebody_wrapped_since_passes_on_after_undo() -> None:
    model = tiny("llama")
    handle = patch(model)
    wrapped = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)

    model.forward = counted
    assert "last_hidden_state" in model(**batch())
    handle.undo()
    assert vars(model)["forward"] is counted
    assert model(**batch()).logits.shape == (B, L, VOCAB)
    with patch(model):
        assert "last_hidden_state" in model(**batch())
    assert model(**batch()).logits.shape == (B, L, VOCAB)


def test_copies_and_pickles_of_a_patched_model_are_plain() -> None:
    model = tiny("llama")
    expected = model(**batch()).logits
    with patch(model):
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
            assert torch.equal(other(**batch()).logits, expected)
            with torch.no_grad():
                other.lm_head.weight.zero_()  # it runs on its own weights
            assert not other(**batch()).logits.any()
            with patch(other):
                assert torch.equal(other(**batch()).last_hidden_state, model(**batch()).last_hidden_state)
            assert other(**batch()).logits.shape == (B, L, VOCAB)
            generated = other.eval().generate(batch()["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)
            assert generated[:, L:].eq(0).all()
        assert "last_hidden_state" in model(**batch())


def test_save_pretrained_saves_a_patched_model(tmp_path: Path) -> None:
    model = tiny("llama")
    with patch(model):
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded(**batch()).logits.shape == (B, L, VOCAB)
    saved = model.state_dict()
    assert {name for name, weight in loaded.state_dict().items() if not torch.equal(weight, saved[name])} == set()


def test_an_output_survives_what_training_code_does_to_outputs() -> None:
    out = StatesOutput(torch.ones(1, 2, 3), attentions=(torch.zeros(1),), router_logits=torch.zeros(2))
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    for again in (
        torch.utils._pytree.tree_unflatten(leaves, spec),
        StatesOutput(dict(out.items())),
        pickle.loads(pickle.dumps(out)),
        copy.copy(out),
    ):
        assert type(again) is StatesOutput
        assert set(again) == set(out)
        assert torch.equal(again.last_hidden_state, out.last_hidden_state)
        assert again.hidden_states is None


def test_a_step_on_a_patched_model_is_the_step_on_the_model() -> None:
    model = tiny("llama").float()
    planned = plan([[1, 2, 3]], [[[4, 5], [6, 7, 8]]], [[9, 9, 1, 2, 3]])
    expected = sdcore.distill_step(model, planned, backward=None).loss
    with patch(model):
        assert torch.equal(sdcore.distill_step(model, planned, backward=None).loss, expected)


def test_the_signature_is_the_models_own() -> None:
    """Trainers take the columns of a data set from it."""
    model = tiny("llama")
    expected = inspect.signature(model.forward)
    with patch(model):
        assert inspect.signature(model.forward) == expected


def test_what_find_body_refuses_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="model must be"):
        patch("gpt")  # type: ignore[arg-type]


def test_a_model_that_cannot_leave_out_its_logits_is_refused() -> None:
    class Whole(type(tiny("llama"))):  # type: ignore[misc]
        def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    model = tiny("llama")
    model.__class__ = Whole
    with pytest.raises(UnsupportedModelError, match="logits_to_keep"):
        patch(model)
    assert "forward" not in vars(model)


def labelled_rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": list(row), "labels": [-100, *row[1:]]} for row in batch()["input_ids"].tolist()]


class Distilling(Trainer):
    """Is the subclass of the documentation."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.loss = teacher, FusedLinearDivergence(alpha=1.0)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        active = inputs.pop("labels")[:, 1:] != -100
        student = model(**inputs).last_hidden_state[:, :-1][active]
        with torch.no_grad():
            teacher = self.teacher(**inputs).last_hidden_state[:, :-1][active]
        loss = self.loss(student, self.model.lm_head.weight, teacher, self.teacher.lm_head.weight).loss
        return (loss, {}) if return_outputs else loss


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_trainers_steps_are_those_of_a_loop_on_logits(when: str, bf16: bool, tmp_path: Path) -> None:
    """It does not matter whether accelerate prepares the model before; with bf16 it replaces `forward` itself."""

    def arguments() -> TrainingArguments:
        return TrainingArguments(
            str(tmp_path), max_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, bf16=bf16,
            use_cpu=True, report_to=[], save_strategy="no", per_device_train_batch_size=2, max_grad_norm=0.0,
            optim="sgd", disable_tqdm=True,
        )  # fmt: skip

    class Plain(Distilling):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            active = inputs.pop("labels")[:, 1:] != -100
            p = model(**inputs).logits[:, :-1][active].log_softmax(-1)
            with torch.no_grad():
                q = self.teacher(**inputs).logits[:, :-1][active].log_softmax(-1)
            return (p.exp() * (p - q)).sum(-1).mean()

    def losses(kind: Any, patched: bool) -> list[float]:
        model, teacher = tiny("llama").float(), tiny("llama", seed=1).float().eval()
        handles = [patch(model), patch(teacher)] if patched and when == "before" else []
        trainer = kind(model, arguments(), train_dataset=labelled_rows(), teacher=teacher)
        handles += [patch(model), patch(teacher)] if patched and when == "after" else []
        trainer.train()
        for handle in handles:
            handle.undo()
        assert model(**batch()).logits.shape == (B, L, VOCAB)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    states, expected = losses(Distilling, True), losses(Plain, False)
    assert len(states) == 3
    assert states[0] != states[2]
    assert states == pytest.approx(expected, rel=3e-2 if bf16 else 1e-4)


def test_evaluation_of_such_a_trainer_has_a_loss(tmp_path: Path) -> None:
    model, teacher = tiny("llama").float(), tiny("llama", seed=1).float().eval()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    with patch(model), patch(teacher):
        metrics = Distilling(model, arguments, eval_dataset=labelled_rows(), teacher=teacher).evaluate()
    assert metrics["eval_loss"] > 0


def test_the_body_of_a_patched_model_is_found() -> None:
    model = tiny("llama")
    with patch(model):
        assert torch.equal(find_body(model)(batch()["input_ids"]), model(batch()["input_ids"]).last_hidden_state)


@pytest.mark.parametrize("asked", ["patched", "body"])
def test_threads_that_share_a_model_get_the_states_of_their_own_ids(asked: str) -> None:
    """As transformers' issue 42673 has it: each waits, before its states and after them, for the other one."""
    model, ids = tiny("llama"), batch()["input_ids"]
    expected = [model.model(input_ids=row[None]).last_hidden_state for row in ids]
    barrier = threading.Barrier(len(ids), timeout=60)

    def wait(*_: Any) -> None:
        barrier.wait()

    for module in (model.model.norm, model.lm_head):
        module.register_forward_pre_hook(wait)
    if asked == "body":
        model.forward = model.forward  # somebody's own, which has to be called
    body = find_body(model)
    with patch(model) if asked == "patched" else nullcontext(), ThreadPoolExecutor(len(ids)) as pool:
        call = (lambda row: model(input_ids=row).last_hidden_state) if asked == "patched" else body
        got = list(pool.map(lambda row: call(row[None]), ids))
    for states, wanted in zip(got, expected, strict=True):
        assert torch.equal(states, wanted)


# Two ranks.

RANKS, SECONDS = 2, 240  # a hang is a failure within this time


def fsdp(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {
    "ddp": lambda model: DistributedDataParallel(model),
    "ddp-looking": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "ddp-static": lambda model: DistributedDataParallel(model, static_graph=True),
    "fsdp": fsdp,
}
CASES = [f"{name} {when}" for name in WRAPPERS for when in ("patched before", "patched after")]


def rank_loss(model: Any, rank: int) -> Tensor:
    """Makes a patched model's loss: each rank has rows of its own, and another number of them."""
    ids = batch()["input_ids"][rank : rank + 1, : L - rank]
    states = model(input_ids=ids).last_hidden_state[0, :-1]
    head = head_of(model)
    logprobs, _ = linear_logprobs(states, head.weight, ids[0, 1:], head=head.transform)
    return -logprobs.mean()  # type: ignore[union-attr]


def check_case(case: str, rank: int, wanted: dict[str, Tensor]) -> None:
    wrap, _, when = case.split()
    model = tiny("llama")
    handle = patch(model) if when == "before" else None
    model = WRAPPERS[wrap](model)
    with handle or patch(model):
        rank_loss(model, rank).backward()
    errors = {}
    for name, weight in model.named_parameters():
        grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
        expected = wanted[name.removeprefix("module.")]
        errors[name.removeprefix("module.")] = float((grad - expected).norm() / expected.norm())
    assert errors.keys() == wanted.keys()
    assert {name: error for name, error in errors.items() if not error < 1e-9} == {}
    assert model(input_ids=batch()["input_ids"]).logits.shape == (B, L, VOCAB)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    model = tiny("llama")
    with patch(model):
        torch.stack([rank_loss(model, other) for other in range(RANKS)]).mean().backward()
    wanted = {name: weight.grad for name, weight in model.named_parameters()}
    run_cases(rank, folder, {case: partial(check_case, case, rank, wanted) for case in CASES}, ranks=RANKS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ranks")
    return verdicts_of(work, folder, str(folder), ranks=RANKS, seconds=SECONDS)


@pytest.mark.parametrize("case", CASES)
def test_ranks_get_the_gradients_of_one_process(case: str, ranks: list[dict[str, str]]) -> None:
    assert_right(case, ranks)
