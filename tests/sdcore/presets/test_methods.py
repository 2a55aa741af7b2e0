"""A method refuses what makes no sense, a preset is what its publication says, and both build what they name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_origin

import pytest
import torch
from torch import nn

from sdcore.contexts import Demonstration, No, Solution, SuccessOrFeedback, Template
from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.presets import (
    GRPO,
    OPSD,
    PRESETS,
    SDPO,
    SFT,
    ContextDistillation,
    Method,
    RLTilt,
    SDFTAsRun,
    SDFTPaper,
    SDPOCode,
    field_types,
    preset,
)
from sdcore.presets.fields import RANGES, kinds_of
from sdcore.teachers import EMA, AdapterOff, Frozen, Live, PeriodicSync, Snapshot, TrustRegion
from sdkernels import TopK


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_method_that_knows_its_name(name: str) -> None:
    method = preset(name)
    assert (method.name, method.changes()) == (name, {})
    assert "2" in (type(method).__doc__ or "") or name == "sft", "a docstring names the source"


def test_sdpo_is_what_its_authors_run() -> None:
    method = SDPO()
    assert (method.alpha, method.topk, method.topk_of, method.tail) == (0.5, 100, "student", True)
    assert (method.teacher, method.update_rate, method.importance_clip) == ("ema", 0.05, 2.0)
    assert (method.num_generations, method.success_threshold, method.aggregation) == (8, 0.5, "token-mean")
    assert method.dont_reprompt_on_self_success
    assert method.environment_feedback_only_without_solution
    assert method.remove_thinking
    assert SDPOCode().changes() == {}
    assert (SDPOCode().alpha, SDPOCode().topk) == (1.0, 20)


def test_sdft_has_one_preset_for_what_is_written_and_one_for_what_was_run() -> None:
    written, run = SDFTPaper(), SDFTAsRun()
    assert (written.alpha, run.alpha) == (1.0, 0.0)
    assert dataclasses.asdict(written) | {"alpha": 0.0} == dataclasses.asdict(run)
    assert (run.context, run.teacher, run.update_rate, run.skip_first_tokens) == ("demonstration", "ema", 0.01, 3)


def test_the_other_presets_choose_as_their_sources_do() -> None:
    assert (OPSD().context, OPSD().teacher) == ("solution", "frozen")
    assert (ContextDistillation().context, ContextDistillation().alpha) == ("template", 0.0)
    assert (RLTilt().target, RLTilt().logz, RLTilt().context, RLTilt().teacher) == (
        "tilt",
        "group_var",
        "none",
        "frozen",
    )
    assert (GRPO().target, GRPO().kl_anchor) == ("policy_gradient", 0.0)
    assert (SFT().target, SFT().samples) == ("imitation", "dataset")


def test_a_preset_can_be_changed_by_name() -> None:
    method = preset("sdpo", alpha=1.0, topk=20)
    assert method == SDPO(alpha=1.0, topk=20)
    assert method.changes() == {"alpha": 1.0, "topk": 20}


def test_a_wrong_name_gets_the_nearest_one() -> None:
    with pytest.raises(ArgumentError, match=r"method must be one of .*, got 'sdop'; did you mean 'sdpo'\?"):
        preset("sdop")
    with pytest.raises(ArgumentError, match=r"temprature is no field of a method; did you mean 'temperature'\?"):
        preset("sdpo", temprature=2.0)
    with pytest.raises(ArgumentError, match=r"got 'quite-another'$"):
        preset("quite-another")


NUMBERS = [name for name, kind in field_types().items() if {int, float} & set(kinds_of(kind))]
CHOICES = [name for name, kind in field_types().items() if get_origin(kind) is Literal]
FLAGS = [name for name, kind in field_types().items() if kind is bool]


def test_every_field_is_checked() -> None:
    assert set(NUMBERS) == set(RANGES)
    assert {*NUMBERS, *CHOICES, *FLAGS, "template"} == set(field_types())


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_their_range_are_refused(name: str) -> None:
    least, most, above = RANGES[name]
    whole = float not in kinds_of(field_types()[name])
    wrong: list[Any] = [math.nan, math.inf, "1", True]
    if math.isfinite(least):
        wrong += [least if above else least - 1]
    if math.isfinite(most):
        wrong += [most + 1]
    if whole:
        wrong += [1.5]
    for value in wrong:
        with pytest.raises(ArgumentError, match=f"^{name} must be"):
            Method(**{name: value})


@pytest.mark.parametrize("name", CHOICES)
def test_choices_that_there_are_not_are_refused(name: str) -> None:
    for value in ("nothing", None, 1):
        with pytest.raises(ArgumentError, match=f"^{name} must be one of .*, got {value!r}"):
            Method(**{name: value})


@pytest.mark.parametrize("name", [*FLAGS, "template"])
def test_flags_and_text_are_of_their_type(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name} must be "):
        Method(**{name: 1})


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: RLTilt(topk=20), "topk"),
        (lambda: RLTilt(sampled_token=True), "sampled_token"),
        (lambda: RLTilt(teacher="live"), "teacher"),
        (lambda: RLTilt(context="solution"), "context"),
        (lambda: RLTilt(num_generations=1), "num_generations"),
        (lambda: RLTilt(skip_first_tokens=1), "skip_first_tokens"),
        (lambda: RLTilt(teacher="trust_region"), "teacher"),
        (lambda: RLTilt(samples="dataset"), "samples"),
        (lambda: RLTilt(importance_clip=2.0), "importance_clip"),
        (lambda: RLTilt(gradient_tolerance=0.01), "gradient_tolerance"),
        (lambda: GRPO(kl_anchor=0.1), "teacher"),
        (lambda: GRPO(distillation_weight=0.5), "distillation_weight"),
        (lambda: GRPO(entry_clip=0.1), "entry_clip"),
        (lambda: SFT(samples="student"), "samples"),
        (lambda: SFT(num_generations=2), "num_generations"),
        (lambda: SFT(teacher="ema"), "teacher"),
        (lambda: Method(normalize=True, alpha=1.0), "normalize"),
        (lambda: Method(normalize=True, alpha=0.0), "normalize"),
        (lambda: Method(samples="dataset", importance_clip=2.0), "importance_clip"),
        (lambda: Method(context="none"), "teacher"),
        (lambda: Method(context="none", teacher="frozen", template="{{ prompt }}"), "template"),
        (lambda: Method(teacher="ema", update_rate=0.0), "update_rate"),
        (lambda: Method(tail=False), "tail"),
        (lambda: Method(topk_of="teacher"), "topk_of"),
        (lambda: Method(topk=3, sampled_token=True), "topk"),
        (lambda: Method(topk=3, entry_clip=0.1), "entry_clip"),
        (lambda: Method(sampled_token=True, alpha=0.5), "sampled_token"),
        (lambda: Method(kl_anchor=0.1), "kl_anchor"),
        (lambda: Method(ratio_of="completion"), "ratio_of"),
        (lambda: Method(distillation_weight=0.5), "num_generations"),
        (lambda: Method(distillation_weight=0.0, num_generations=2), "distillation_weight"),
        (lambda: Method(overflow="drop_oldest_feedback"), "overflow"),
        (lambda: Method(target="token_tilt", alpha=0.5, num_generations=2), "alpha"),
        (lambda: SDPO(use_solution=False, use_feedback=False), "use_solution"),
        (lambda: SDPO(num_generations=1, use_feedback=False), "num_generations"),
        (lambda: SDPO(samples="dataset", importance_clip=None), "samples"),
        (lambda: ContextDistillation(anchor=True, teacher="live"), "anchor"),
    ],
)
def test_combinations_without_sense_are_refused(make: Callable[[], Method], field: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^(\w+ (and|or) )?{field}\b"):
        make()


# For each what else would have read it. A field at the preset's own default was not asked for, and is no mistake.
IDLE: list[tuple[type[Method], dict[str, Any], dict[str, Any]]] = [
    (SFT, {"overflow": "truncate_context"}, {"target": "divergence", "context": "template"}),
    (GRPO, {"max_teacher_prompt_length": 100}, {"target": "divergence", "context": "template"}),
    (OPSD, {"use_solution": False}, {"context": "feedback"}),
    (OPSD, {"use_feedback": False}, {"context": "feedback", "num_generations": 2}),
    (SDFTPaper, {"dont_reprompt_on_self_success": False}, {"context": "feedback"}),
    (SDFTPaper, {"environment_feedback_only_without_solution": False}, {"context": "feedback"}),
    (ContextDistillation, {"remove_thinking": False}, {"context": "feedback"}),
    (SDPO, {"anchor": True}, {"context": "solution", "importance_clip": None}),
    (GRPO, {"teacher": "ema"}, {"kl_anchor": 0.1}),
    (OPSD, {"update_rate": 0.5}, {"teacher": "ema"}),
    (SDPO, {"sync_every": 10}, {"teacher": "periodic"}),
    (SDPO, {"trust_share": 0.9}, {"teacher": "trust_region"}),
    (GRPO, {"alpha": 0.0}, {"target": "divergence", "context": "template"}),
    (RLTilt, {"temperature": 2.0}, {"target": "divergence", "context": "template"}),
    (OPSD, {"topk_of": "teacher"}, {"topk": 10}),
    (OPSD, {"tail": False}, {"topk": 10}),
    (GRPO, {"inv_temperature": 5.0}, {"target": "tilt", "teacher": "frozen"}),
    (GRPO, {"logz": "exact"}, {"target": "tilt", "teacher": "frozen"}),
    (RLTilt, {"advantages": "dr_grpo"}, {"target": "policy_gradient"}),
    (SDPO, {"clip_low": None}, {"distillation_weight": 0.5}),
    (SDPO, {"clip_high": 0.3}, {"distillation_weight": 0.5}),
    (SDPO, {"ratio_of": "completion"}, {"distillation_weight": 0.5}),
    (SDPO, {"kl_anchor": 0.1}, {"distillation_weight": 0.5}),
    (RLTilt, {"aggregation": "sum-norm"}, {"target": "policy_gradient"}),
]


@pytest.mark.parametrize(("kind", "changes", "with_effect"), IDLE)
def test_a_field_that_nothing_would_read_is_refused(
    kind: type[Method], changes: dict[str, Any], with_effect: dict[str, Any]
) -> None:
    (name,) = changes
    with pytest.raises(ArgumentError, match=rf"^{name} must be left at .*: it has an effect only "):
        kind(**changes)
    assert getattr(kind(**changes | with_effect), name) == changes[name]


@pytest.mark.parametrize(
    "method",
    [
        SDPO(distillation_weight=0.5, kl_anchor=0.1, ratio_of="completion"),
        SDPO(overflow="drop_oldest_feedback"),
        SDPO(teacher="trust_region"),
        SDPO(num_generations=1),
        OPSD(teacher="adapter_off", entry_clip=0.05, alpha=0.0),
        Method(context="none", teacher="frozen"),
        Method(target="token_tilt", num_generations=4, context="solution"),
        ContextDistillation(samples="dataset", topk=50, topk_of="teacher", tail=False),
        GRPO(kl_anchor=0.04, teacher="frozen", clip_low=None, clip_high=None),
        Method(alpha=1, temperature=2),
    ],
)
def test_combinations_with_sense_are_not(method: Method) -> None:
    assert dataclasses.replace(method) == method


def test_what_a_method_needs_follows_from_its_choices() -> None:
    assert [name for name in PRESETS if preset(name).needs_rewards] == ["sdpo", "sdpo_code", "rl_tilt", "grpo"]
    assert [name for name in PRESETS if preset(name).needs_reference] == ["rl_tilt"]
    assert [name for name in PRESETS if not preset(name).has_teacher] == ["rl_tilt", "grpo", "sft"]
    assert OPSD(distillation_weight=0.5, num_generations=2).needs_rewards


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (SDFTPaper(), Demonstration),
        (SDPO(), SuccessOrFeedback),
        (OPSD(), Solution),
        (ContextDistillation(), Template),
        (GRPO(), No),
    ],
)
def test_a_method_builds_its_context(method: Method, kind: type) -> None:
    assert type(method.build_context()) is kind


def test_a_context_gets_every_field_that_is_about_it() -> None:
    fields = {
        "template": "{{ prompt }} {{ attempt }} {{ feedback }}",
        "overflow": "truncate_context",
        "max_teacher_prompt_length": 77,
        "success_threshold": 0.25,
        "dont_reprompt_on_self_success": False,
        "environment_feedback_only_without_solution": False,
        "remove_thinking": False,
    }
    builder = SDPO(**fields).build_context(chat_template_kwargs={"enable_thinking": False})
    wanted = fields | {"use_solution": True, "use_feedback": True, "chat_template_kwargs": {"enable_thinking": False}}
    assert dataclasses.asdict(builder) == wanted  # type: ignore[call-overload]
    shown = Method(template="{{ prompt }}!", max_teacher_prompt_length=5).build_context()
    assert isinstance(shown, Template)
    assert (shown.text, shown.max_teacher_prompt_length) == ("{{ prompt }}!", 5)


def test_a_loss_gets_every_field_that_is_about_it() -> None:
    loss = SDPO(topk_of="teacher", temperature=2.0, normalize=True).build_loss()
    assert loss.importance_clip == 2.0
    assert loss.options.support == TopK(100, of="teacher", tail=True)
    assert (loss.options.alpha, loss.options.temperature, loss.options.normalize) == (0.5, 2.0, True)
    assert Method(sampled_token=True).build_loss().options.support == "sampled"
    full = OPSD(entry_clip=0.05).build_loss()
    assert (full.options.support, full.options.entry_clip, full.importance_clip) == (None, 0.05, None)
    assert Method(gradient_tolerance=0.01).build_loss().options.gradient_tolerance == 0.01


def test_a_method_builds_its_teacher() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert isinstance(Method().build_teacher(model), Live)
    with pytest.raises(UnsupportedModelError, match="Linear has no adapter to switch off"):
        Method(teacher="adapter_off").build_teacher(model)
    average = Method(teacher="ema", update_rate=0.25).build_teacher(model)
    assert isinstance(average, EMA)
    assert average.update_rate == 0.25
    synced = Method(teacher="periodic", sync_every=7).build_teacher(model)
    assert isinstance(synced, PeriodicSync)
    assert synced.every == 7
    assert isinstance(Method(teacher="frozen").build_teacher(model), Snapshot)
    assert Method(teacher="frozen").build_teacher(model, reference=other) == Frozen(other)
    between = Method(teacher="trust_region", trust_share=0.125).build_teacher(model, reference=other)
    assert between == TrustRegion(Frozen(other), 0.125)
    with pytest.raises(ArgumentError, match="reference must be None with teacher='ema'"):
        Method(teacher="ema").build_teacher(model, reference=other)


def test_a_teacher_of_its_own_weights_can_be_kept_elsewhere() -> None:
    teacher = Method(teacher="ema").build_teacher(nn.Linear(2, 2), device="cpu")
    assert isinstance(teacher, EMA)
    assert teacher.device == torch.device("cpu")


def test_the_reference_is_the_teacher_except_in_a_mixture() -> None:
    model = nn.Linear(2, 2)
    assert SDPO().build_reference(model) is None
    assert GRPO().build_reference(model) is None
    assert type(RLTilt().build_reference(model)) is Snapshot
    assert type(GRPO(kl_anchor=0.04, teacher="ema").build_reference(model)) is EMA
    assert type(SDPO(distillation_weight=0.5, kl_anchor=0.1).build_reference(model)) is Snapshot
    lora = SDPO(distillation_weight=0.5, kl_anchor=0.1, teacher="adapter_off")
    assert isinstance(lora.build_reference(model), AdapterOff)


def test_presets_are_listed_without_torch(run_python: Callable[..., str]) -> None:
    code = "import sys; from sdcore.presets import PRESETS, preset; preset('sdpo'); print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"
