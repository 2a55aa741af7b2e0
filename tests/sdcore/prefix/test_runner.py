"""Which strategy is taken and why, under whose weights, that nothing is left behind, and that faults are noticed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, LlamaConfig, MambaConfig, MambaForCausalLM, PreTrainedModel

from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.models import Body, find_body
from sdcore.prefix import Plan, cached, caches, packed, plan, runner
from sdcore.prefix.caches import PrefixCache, TrunkStates
from sdcore.prefix.checks import agrees, forget
from sdcore.prefix.runner import STRATEGIES, passes, run
from sdcore.prefix.segments import Block, Row, pack
from sdcore.step import distill_step
from sdcore.teachers import Frozen, Live, TrustRegion
from tests.sdcore.prefix.models import COMMON, HYBRIDS, TINY, VOCAB, build, tiny
from tests.sdcore.prefix.trees import random_plan

SHARING = ["packed", "cached", "two_phase"]


@pytest.fixture(autouse=True)
def first_use() -> Iterator[None]:
    """Nothing was verified and nobody warned."""
    forget()
    runner._WARNED.clear()
    yield
    forget()


def short_plan(*, teacher: bool = True) -> Plan:
    """One group, three completions of one length, and a context that comes late."""
    prompt = list(range(1, 20))
    completions = [[[21, 22, 23], [24, 25, 26], [27, 28, 29]]]
    return plan([prompt], completions, [[*prompt[:-2], 50, 51, *prompt[-2:]]] if teacher else None)


def checkpointed(model: PreTrainedModel, *, reentrant: bool = False) -> PreTrainedModel:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


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
    monkeypatch.setattr(runner, "_free_bytes", lambda device: 1)
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
    ours = [str(one.message) for one in caught if "without sharing prefixes" in str(one.message)]
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


# --- what the teacher reads ---


def tokens_of(model: nn.Module) -> list[int]:
    """How many tokens each later forward embeds."""
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    return seen


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
    found: dict[str, Any] = {"implementation": model.config._attn_implementation, "rng": torch.get_rng_state().tolist()}
    for name, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if not key.startswith("_parameters")}
        found[name] = sorted(attributes), module.training, len(module._forward_hooks), len(module._forward_pre_hooks)
        found[name + ":function"] = attributes.get("_gradient_checkpointing_func")
    for name, weight in model.named_parameters():
        found[name] = weight.requires_grad, weight._backward_hooks
    return found


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
    found = distill_step(model, short_plan(), strategy=strategy, verify="off")
    times = len(runs)
    expected = distill_step(calm, short_plan(), strategy="naive")
    assert torch.allclose(found.loss, expected.loss, rtol=1e-9)
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
    found, expected = (run(tiny("llama"), short_plan(), Frozen(one)).teacher_hidden for one in (teacher, calm))
    assert found is not None
    assert torch.equal(found, expected)
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


# --- planted faults ---


def position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    original, of_row = caches.positions, packed._row_of

    def positions(start: int, tokens: Tensor) -> Tensor:
        return original(start + (start > 0), tokens)

    def row_of(*args: Any) -> Any:
        row = of_row(*args)
        for group in row.row.groups:
            row.position_ids[group.all_branches.start : group.all_branches.stop] += 1
        return row

    patch.setattr(caches, "positions", positions)
    patch.setattr(packed, "_row_of", row_of)


def first_prefix_token_missing(patch: pytest.MonkeyPatch) -> None:
    blocks = Row.blocks

    def run_reading(body: Body, tokens: Tensor, prefix: TrunkStates) -> Tensor:
        short = replace(prefix.map(lambda state: state[:, :, 1:]), length=prefix.length - 1)
        return caches._run(body, tokens, PrefixCache(body, short, batch=len(tokens), recording=False), prefix.length)

    def without_first(self: Row, *args: Any, **kwargs: Any) -> list[Block]:
        trunks = {group.trunk.start for group in self.groups if group.trunk.length > 1}
        return [
            block._replace(key=block.key + 1, keys=block.keys - 1, offset=block.offset - 1)
            if block.key in trunks and block.query not in trunks and block.source < 0
            else block
            for block in blocks(self, *args, **kwargs)
        ]

    patch.setattr(cached, "run_reading", run_reading)
    patch.setattr(Row, "blocks", without_first)


def completions_not_isolated(patch: pytest.MonkeyPatch) -> None:
    of_row = packed._row_of

    def run_reading(body: Body, tokens: Tensor, prefix: TrunkStates) -> Tensor:
        """All branches in one row, each after those before it, at the right positions."""
        places = caches.positions(prefix.length, tokens).reshape(1, -1)
        states = PrefixCache(body, prefix, batch=1, recording=False)
        with body.keeping_caches():
            hidden = body(tokens.reshape(1, -1), position_ids=places, past_key_values=states)
        return hidden.reshape(*tokens.shape, -1)

    def row_of(*args: Any) -> Any:
        row = of_row(*args)
        shapes = [(group.prefix, group.trunk.length, [group.all_branches.length]) for group in row.row.groups]
        return row._replace(row=pack(shapes))

    patch.setattr(cached, "run_reading", run_reading)
    patch.setattr(packed, "_row_of", row_of)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gemma3", torch.bfloat16),
        ("qwen3_moe", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", ["packed", "cached"])
@pytest.mark.parametrize("plant", [position_off_by_one, first_prefix_token_missing, completions_not_isolated])
def test_planted_faults_are_caught_on_first_use(
    plant: Callable[[pytest.MonkeyPatch], None],
    strategy: str,
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(name).to(dtype)
    body = find_body(model)
    assert agrees(body, STRATEGIES[strategy], short_plan(), "once") is None
    forget()
    plant(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=f"strategy '{strategy}' disagrees with naive: .* differ by"):
        run(model, short_plan(), strategy=strategy)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="strategy naive.*differ by"):
        report = run(model, short_plan()).report
    assert report.student.strategy == "naive"
    assert [fallback.strategy for fallback in report.fallbacks] == ["packed", "cached"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_what_is_right_passes_the_check(name: str, dtype: torch.dtype) -> None:
    body = find_body(tiny(name).to(dtype))
    for strategy in ("cached", *(() if name in HYBRIDS else ("packed",))):
        assert agrees(body, STRATEGIES[strategy], short_plan(), "once") is None
        assert agrees(body, STRATEGIES[strategy], random_plan(3), "always") is None


def long_trunks_go_wrong(patch: pytest.MonkeyPatch) -> None:
    """A fault that the sequences of the first use are too short for."""
    original = packed.hidden_states

    def hidden_states(body: Body, trees: Any, **kwargs: Any) -> Any:
        states, prompts = original(body, trees, **kwargs)
        return states * (2.0 if len(trees[0].trunk) > 18 else 1.0), prompts

    patch.setattr(packed, "hidden_states", hidden_states)


def test_always_verifies_every_plan_once_the_first_and_off_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    forwards = tokens_of(model)

    def count(verify: Any) -> int:
        forwards.clear()
        run(model, short_plan(), verify=verify)
        return len(forwards)

    assert count("off") == 2
    assert count("once") > 2
    assert count("once") == 2
    assert count("always") == count("always") > 2
    long_trunks_go_wrong(monkeypatch)
    assert run(model, short_plan(), verify="once").report.student.strategy == "packed"
    with pytest.raises(UnsupportedModelError, match="disagrees with naive"):
        run(model, short_plan(), strategy="packed", verify="always")
    assert run(model, short_plan(), verify="always").report.student.strategy == "cached"


def test_a_teachers_own_model_is_verified_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original = packed.hidden_states

    def hidden_states(body: Body, trees: Any, **kwargs: Any) -> Any:
        states, prompts = original(body, trees, **kwargs)
        return states * (2.0 if body.name == "Qwen2ForCausalLM" else 1.0), prompts

    monkeypatch.setattr(packed, "hidden_states", hidden_states)
    teacher = Frozen(tiny("qwen2", seed=1))
    with pytest.warns(UserWarning, match="Qwen2ForCausalLM .*differ by"):
        report = run(tiny("llama"), short_plan(), teacher).report
    assert report.teacher is not None
    assert (report.student.strategy, report.teacher.strategy) == ("packed", "naive")


def test_a_plan_without_teacher_runs_the_student_alone() -> None:
    out = run(tiny("llama"), short_plan(teacher=False))
    assert out.teacher_hidden is None
    assert out.report.teacher is None
    parts, _ = passes(tiny("llama"), short_plan(teacher=False), micro_batch=1)
    for part in parts:
        assert part.teachers == ()
        part.attach(part.student_hidden.sum()).backward()
