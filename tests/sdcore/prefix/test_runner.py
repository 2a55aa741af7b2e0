"""Which strategy is taken and why, under whose weights, that nothing is left behind, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, LlamaConfig, MambaConfig, MambaForCausalLM, PreTrainedModel

from sdcore.errors import ArgumentError, PlanError, UnsupportedModelError
from sdcore.models import find_body
from sdcore.prefix import Plan, choice, plan
from sdcore.prefix.runner import passes, run
from sdcore.step import distill_step
from sdcore.teachers import Frozen, Live, TrustRegion
from tests.sdcore.prefix.models import COMMON, VOCAB, build, checkpointed, tiny, tokens_of
from tests.sdcore.prefix.trees import short_plan

pytestmark = pytest.mark.usefixtures("first_use")

SHARING = ["packed", "cached", "two_phase"]


def mamba() -> PreTrainedModel:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2)
    return MambaForCausalLM(config)


# --- what auto chooses ---


def test_a_plan_with_nothing_to_share_is_run_naively() -> None:
    alone = plan([[1, 2, 3]], [[[4, 5, 6]]], [[7, 1, 2, 3]])
    report = run(tiny("llama"), alone).report
    assert (report.student.strategy, report.student.reason) == ("naive", "sharing would save 0% of the tokens")
    assert report.fallbacks == ()
    # One completion, but a live teacher whose prompt begins as the student's.
    assert run(tiny("llama"), plan([[1, 2, 3]], [[[4, 5]]], [[1, 2, 7, 3]])).report.student.strategy == "packed"
    frozen = run(tiny("llama"), plan([[1, 2, 3]], [[[4, 5]]], [[1, 2, 7, 3]]), Frozen(tiny("llama", seed=1)))
    assert frozen.report.student.strategy == "naive"


class Operators(TorchDispatchMode):
    """Every operator that is run, in order, with the shapes of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(value.shape) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self.calls.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5"])
def test_where_nothing_is_shared_auto_runs_what_naive_runs_and_no_operator_more(name: str, checkpointing: bool) -> None:
    """So it costs what naive costs, on any machine: not even a first use is checked, for nothing is to be checked."""
    alone = plan([[1, 2, 3], [4, 5]], [[[4, 5, 6]], [[7] * 9]], [[7, 1, 2, 3], [8, 9, 4, 5]])
    model = checkpointed(tiny(name)) if checkpointing else tiny(name)

    def step(**options: Any) -> list[tuple[str, Any]]:
        with Operators() as operators:
            distill_step(model, alone, **options)
        model.zero_grad()
        return operators.calls

    # Tables that the loss keeps are made by whichever step is the first.
    expected = [step(strategy="naive") for _ in range(2)][1]
    assert len(expected) > 100
    assert step() == expected


def test_one_sequence_alone_costs_one_forward_and_backward_of_it() -> None:
    model, ids = tiny("llama"), torch.tensor([[1, 2, 3, 4, 5]])
    with FlopCounterMode(display=False) as plain:
        find_body(model)(ids)[0, 2:].sum().backward()
    with FlopCounterMode(display=False) as counter:
        run(model, plan([[1, 2, 3]], [[[4, 5, 6]]])).student_hidden.sum().backward()
    assert counter.get_total_flops() == plain.get_total_flops() > 0


def test_what_can_be_packed_is_packed() -> None:
    report = run(tiny("llama"), short_plan()).report
    assert (report.student.strategy, report.student.reason) == ("packed", "no token twice and no padding")
    assert report.fallbacks == ()
    assert "Student pass: packed (no token twice and no padding)" in str(report)


def test_hybrids_are_cached_and_the_report_says_why_not_packed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run(tiny("qwen3_5"), short_plan()).report
    assert report.student.strategy == "cached"
    assert [(fallback.strategy, "linear_attention" in fallback.reason) for fallback in report.fallbacks] == [
        ("packed", True)
    ]
    assert "Not packed: Qwen3_5ForCausalLM has layers of type linear_attention" in str(report)


def test_a_micro_batch_asks_for_two_phase() -> None:
    report = distill_step(tiny("llama"), short_plan(), micro_batch=2).report
    assert (report.student.strategy, report.student.reason) == ("two_phase", "micro_batch=2 bounds the memory")


def test_too_little_memory_asks_for_two_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "free_bytes", lambda device: 1)
    report = distill_step(tiny("llama"), short_plan()).report
    assert report.student.strategy == "two_phase"
    assert "GiB are free" in report.student.reason
    # Whoever wants all rows at once gets them.
    assert run(tiny("llama"), short_plan()).report.student.strategy == "packed"


# --- what does not work ---


@pytest.mark.parametrize(
    ("make", "reason"),
    [(mamba, "MambaForCausalLM"), (lambda: checkpointed(tiny("llama"), reentrant=True), "use_reentrant=True")],
    ids=["mamba", "reentrant"],
)
def test_unsupported_models_fall_back_to_naive_with_one_warning_that_says_why(
    make: Callable[[], PreTrainedModel], reason: str
) -> None:
    model = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reports = [run(model, short_plan()).report for _ in range(2)]
    ours = [str(warning.message) for warning in caught if "without sharing prefixes" in str(warning.message)]
    assert len(ours) == 1
    assert reason in ours[0]
    for report in reports:
        assert report.student.strategy == "naive"
        assert [fallback.strategy for fallback in report.fallbacks] == ["packed", "cached"]
        assert all(reason in fallback.reason for fallback in report.fallbacks)


@pytest.mark.parametrize("strategy", SHARING)
@pytest.mark.parametrize("verify", ["once", "off"])
def test_an_explicit_strategy_never_falls_back(strategy: Any, verify: Any) -> None:
    for model in (mamba(), checkpointed(tiny("llama"), reentrant=True)):
        with pytest.raises(UnsupportedModelError):
            distill_step(model, short_plan(), strategy=strategy, verify=verify)
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        distill_step(tiny("qwen3_5"), short_plan(), strategy="packed", verify=verify)


def test_a_teacher_of_another_architecture_is_run_as_its_model_allows() -> None:
    with pytest.warns(UserWarning, match="Qwen3_5ForCausalLM is run without sharing .* linear_attention"):
        out = run(tiny("llama"), short_plan(), Frozen(tiny("qwen3_5", seed=1)), strategy="packed")
    assert out.report.teacher is not None
    assert (out.report.student.strategy, out.report.teacher.strategy) == ("packed", "naive")
    assert "linear_attention" in out.report.teacher.reason
    expected = run(tiny("qwen3_5", seed=1), short_plan(), strategy="naive")
    assert out.teacher_hidden is not None
    assert torch.allclose(out.teacher_hidden, expected.teacher_hidden, rtol=1e-5, atol=1e-6)


def test_run_refuses_what_only_a_step_can_do() -> None:
    with pytest.raises(ArgumentError, match=r"two_phase.*distill_step"):
        run(tiny("llama"), short_plan(), strategy="two_phase")
    with pytest.raises(ArgumentError, match=r"TrustRegion.*distill_step"):
        run(tiny("llama"), short_plan(), TrustRegion(Frozen(tiny("llama"))))  # type: ignore[arg-type]


def on_meta(name: str = "llama", **options: Any) -> PreTrainedModel:
    return tiny(name, **options).to("meta")


@pytest.mark.parametrize("strategy", ["auto", "naive", *SHARING])
@pytest.mark.parametrize(
    ("make", "planned", "message"),
    [
        (tiny, plan([[1, VOCAB]], [[[3], [4]]]), r"student_prompts\[0\] must be in \[0, V=61\).* got id 61"),
        (tiny, plan([[1]], [[[3], [4, 99]]]), r"completions\[0\]\[1\] must be in \[0, V=61\).* got id 99"),
        (tiny, plan([[1]], [[[3]]], [[1, 70]]), r"teacher_prompts\[0\] must be in \[0, V=61\).* got id 70"),
        (tiny, plan([[1] * 255], [[[3] * 3]]), r"student_prompts\[0\] and its .* at most 256 tokens.* got 257"),
        (tiny, plan([[1]], [[[3]]], [[1] * 257]), r"teacher_prompts\[0\] and its .* at most 256 tokens.* got 257"),
        (on_meta, short_plan(), "the plan's ids must be on the model's device, meta, got ids on cpu"),
    ],
    ids=["student_id", "completion_id", "teacher_id", "student_length", "teacher_length", "device"],
)
def test_a_plan_that_does_not_fit_the_model_is_refused_before_any_pass(
    make: Callable[..., PreTrainedModel], planned: Plan, message: str, strategy: Any
) -> None:
    model = make("llama")
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was run"))
    with pytest.raises(PlanError, match=message):
        passes(model, planned, strategy=strategy)
    if strategy != "two_phase":
        with pytest.raises(PlanError, match=message):
            run(model, planned, strategy=strategy)


def test_a_teacher_on_another_device_than_the_plan_is_refused_before_any_pass() -> None:
    student, teacher = tiny("llama"), on_meta(seed=1)
    for model in (student, teacher):
        model.model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was run"))
    for weights in (Frozen(teacher), TrustRegion(Frozen(teacher))):
        with pytest.raises(PlanError, match="must be on the model's device, meta, got ids on cpu"):
            distill_step(student, short_plan(), teacher=weights)


# --- what the teacher reads ---


@pytest.mark.parametrize("strategy", SHARING)
def test_a_live_teacher_reads_the_students_states_and_another_computes_its_own(strategy: Any) -> None:
    planned = short_plan()
    prompt, completions, context = 19, 3 * 2, 2
    student, other = tiny("llama"), tiny("llama", seed=1)
    counts, other_counts = tokens_of(student), tokens_of(other)
    distill_step(student, planned, teacher=Live(), strategy=strategy, verify="off")
    # Of the teacher's prompt: the context and the student's last two tokens.
    assert sum(counts) == prompt + completions + (context + 2) + completions
    counts.clear()
    out = distill_step(student, planned, teacher=Frozen(other), strategy=strategy, verify="off")
    assert (sum(counts), sum(other_counts)) == (prompt + completions, prompt + context + completions)
    assert out.report.teacher is not None
    assert (sum(counts), sum(other_counts)) == (out.report.student.tokens, out.report.teacher.tokens)
    counts.clear()
    other_counts.clear()
    distill_step(student, planned, teacher=TrustRegion(Frozen(other)), strategy=strategy, verify="off")
    assert sum(counts) == prompt + completions + (context + 2) + completions
    assert sum(other_counts) == prompt + context + completions


# --- no trace ---


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a pass could leave behind, but for the student's gradients."""
    traces: dict[str, Any] = {"implementation": model.config._attn_implementation}
    traces["rng"] = torch.get_rng_state().tolist()
    for name, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if not key.startswith("_parameters")}
        traces[name] = sorted(attributes), module.training, len(module._forward_hooks), len(module._forward_pre_hooks)
        traces[name + ":function"] = attributes.get("_gradient_checkpointing_func")
    for name, weight in model.named_parameters():
        traces[name] = weight.requires_grad, weight._backward_hooks
    return traces


@pytest.mark.parametrize("fails", [False, True], ids=["", "after an error"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("strategy", ["naive", *SHARING])
def test_a_step_leaves_no_trace(strategy: Any, checkpointing: bool, fails: bool) -> None:
    models = [tiny("gemma2"), tiny("gemma2", seed=1)]
    for model in models:
        # Some modules in training mode and some not; some weights with gradients and some not.
        model.model.layers[1].mlp.eval()
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        if checkpointing:
            checkpointed(model)
    student, other = models
    other.model.norm.weight.grad = torch.ones_like(other.model.norm.weight)
    before = [state_of(model) for model in models]

    def backward(loss: Tensor) -> None:
        if fails:
            raise RuntimeError("out of memory")
        loss.backward()

    def step() -> None:
        distill_step(student, short_plan(), teacher=TrustRegion(Frozen(other)), strategy=strategy, backward=backward)

    kept: list[Any] = []
    if fails:
        # Who keeps the error keeps all that its traceback refers to.
        with pytest.raises(RuntimeError, match="out of memory") as error:
            step()
        kept.append(error)
    else:
        step()
        assert student.model.layers[0].mlp.up_proj.weight.grad is None
    after = [state_of(model) for model in models]
    for old, new in zip(before, after, strict=True):
        assert {name: (value, new.get(name)) for name, value in old.items() if new.get(name) != value} == {}
        assert old.keys() == new.keys()
    assert {name for name, weight in other.named_parameters() if weight.grad is not None} == {"model.norm.weight"}
    assert bool((other.model.norm.weight.grad == 1).all())


# --- dropout ---


def with_dropout() -> PreTrainedModel:
    """Dropout as a module in the layers and as a number in their attention."""
    model = build(GPTNeoXConfig(**COMMON | {"attention_dropout": 0.5, "hidden_dropout": 0.5}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("strategy", ["naive", *SHARING])
def test_dropout_is_off_in_both_passes_and_in_what_backward_runs_again(strategy: Any, checkpointing: bool) -> None:
    model = with_dropout()
    calm = copy.deepcopy(model).eval()
    ids = torch.arange(9)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    runs: list[bool] = []
    model.gpt_neox.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    if checkpointing:
        checkpointed(model)
    out = distill_step(model, short_plan(), strategy=strategy, verify="off")
    times = len(runs)
    expected = distill_step(calm, short_plan(), strategy="naive")
    assert torch.allclose(out.loss, expected.loss, rtol=1e-9)
    for (name, weight), other in zip(model.named_parameters(), calm.parameters(), strict=True):
        assert float((weight.grad - other.grad).norm()) <= 1e-9 * float(other.grad.norm()), name
    assert model.training
    runs.clear()
    model.gradient_checkpointing_disable()
    distill_step(model, short_plan(), strategy=strategy, verify="off")
    assert (times > len(runs)) == checkpointing  # it did run layers again


def test_dropout_of_another_teacher_is_off_too() -> None:
    teacher = with_dropout()
    calm = copy.deepcopy(teacher).eval()
    hidden, expected = (run(tiny("llama"), short_plan(), Frozen(model)).teacher_hidden for model in (teacher, calm))
    assert hidden is not None
    assert torch.equal(hidden, expected)
    assert teacher.training


def test_run_refuses_dropout_in_layers_that_backward_runs_again() -> None:
    dropped = checkpointed(build(LlamaConfig(**COMMON | {"attention_dropout": 0.1})))
    for model in (dropped, checkpointed(with_dropout())):
        with pytest.raises(UnsupportedModelError, match=r"has dropout, and checkpoints its layers.*use distill_step"):
            run(model, short_plan())
        with torch.no_grad():
            run(model, short_plan())
        run(model.eval(), short_plan())
    run(checkpointed(tiny("llama")), short_plan())


def test_a_plan_without_teacher_runs_the_student_alone() -> None:
    out = run(tiny("llama"), short_plan(teacher=False))
    assert out.teacher_hidden is None
    assert out.report.teacher is None
    parts, _ = passes(tiny("llama"), short_plan(teacher=False), micro_batch=1)
    for part in parts:
        assert part.teachers == ()
        part.attach(part.student_hidden.sum()).backward()
