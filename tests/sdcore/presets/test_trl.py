"""TRL's configurations say the same here: divergences agree with TRL's own, and what has no counterpart is refused."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sdcore.contexts import SuccessOrFeedback
from sdcore.contexts.templates import render
from sdcore.errors import ArgumentError
from sdcore.presets import GRPO, SDPO, Method, from_trl
from sdcore.presets.trl import REFUSED, WITHOUT_EFFECT
from sdcore.training.config import SelfDistillationConfig
from sdkernels import LogitTransform

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sdpo = pytest.importorskip("trl.experimental.sdpo")
    sdft = pytest.importorskip("trl.experimental.sdft")
    from trl.experimental.sdpo import loss_utils

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GROUP = {"num_generations": 4, "per_device_train_batch_size": 4}


def sdpo_config(folder: Path, **arguments: Any) -> Any:
    return sdpo.SDPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, **GROUP | arguments)


def test_trls_sdpo_defaults_are_not_its_authors(tmp_path: Path) -> None:
    method, _ = from_trl(sdpo.SDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    changes = method.changes()
    assert isinstance(method, SDPO)
    assert "{{ attempt }}" in changes.pop("template")
    assert changes == {
        "sampled_token": True,
        "alpha": 1.0,
        "topk": None,
        "success_threshold": 1.0,
        "use_feedback": False,
        "environment_feedback_only_without_solution": False,
        "remove_thinking": False,
        "aggregation": "seq-mean-token-mean",
    }


def test_trls_sdft_defaults(tmp_path: Path) -> None:
    config = sdft.SDFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, num_loss_tokens_to_skip=3)
    method, _ = from_trl(config)
    assert method == Method(
        template="{{ prompt }}\n\n{{ privileged_context }}",
        teacher="frozen",
        alpha=0.5,
        topk=100,
        tail=False,
        importance_clip=2.0,
        aggregation="seq-mean-token-mean",
        skip_first_tokens=3,
        num_generations=8,
    )


@pytest.mark.parametrize("kind", ["sdpo", "sdft"])
def test_a_mapping_says_what_its_configuration_says(kind: Any, tmp_path: Path) -> None:
    made = {"sdpo": sdpo.SDPOConfig, "sdft": sdft.SDFTConfig}[kind]
    given = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 3e-6,
        "distillation_mode": "full_logits",
        "distillation_alpha": 0.25,
        "weight_decay": 0.1,
        **GROUP,
    }
    method, arguments = from_trl(given, kind=kind)
    same, others = from_trl(made(**given))
    assert method == same
    assert arguments == others
    assert (arguments["learning_rate"], arguments["weight_decay"]) == (3e-6, 0.1)


def test_arguments_make_a_configuration_of_ours(tmp_path: Path) -> None:
    _, arguments = from_trl(sdpo_config(tmp_path, temperature=0.5, top_k=20, max_steps=7, shuffle_dataset=False))
    config = SelfDistillationConfig(**arguments)
    assert (config.sampling_temperature, config.top_k, config.max_steps) == (0.5, 20, 7)
    assert (config.max_prompt_length, config.max_completion_length) == (512, 256)
    assert config.train_sampling_strategy == "sequential"
    assert config.learning_rate == 5e-5  # transformers' default, not ours
    assert config.num_train_epochs == 3.0
    assert config.bf16 is False


def test_trls_bf16_of_none_is_on_its_top_k_of_0_is_none_and_its_temperature_is_the_losss_too() -> None:
    plain = from_trl(GROUP, kind="sdpo")[1]
    assert (plain["bf16"], "top_k" in plain) == (True, False)
    method, given = from_trl(GROUP | {"fp16": True, "top_k": 20, "temperature": 0.7}, kind="sdpo")
    assert (given["bf16"], given["top_k"]) == (False, 20)
    assert (method.temperature, given["sampling_temperature"]) == (0.7, 0.7)


MODES = [
    {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
    {"distillation_mode": "full_logits", "distillation_alpha": 0.3},
    {"distillation_mode": "full_logits", "distillation_alpha": 1.0},
    {"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_alpha": 0.5},
    {
        "distillation_mode": "topk_logits",
        "distillation_topk": 5,
        "distillation_alpha": 1.0,
        "distillation_add_tail": True,
    },
    {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(str(value) for value in mode.values()))
def test_divergences_and_gradients_are_trls(mode: dict[str, Any]) -> None:
    method, _ = from_trl(GROUP | mode | {"temperature": 0.8}, kind="sdpo")
    rows, width, vocabulary = 7, 6, 19
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, student, teacher = normal(vocabulary, width), normal(rows, width).requires_grad_(), normal(rows, width)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    old = normal(rows) * 0.3 - 3
    out = method.build_loss()(student, weight, teacher, target_ids=targets, old_logprobs=old)
    (gradient,) = torch.autograd.grad(out.loss, student)

    logits, aims = (student @ weight.T) / 0.8, (teacher @ weight.T) / 0.8
    alpha = {"distillation_alpha": mode["distillation_alpha"]}
    if mode["distillation_mode"] == "topk_logits":
        topk = {"distillation_topk": 5, "distillation_add_tail": "distillation_add_tail" in mode}
        expected = loss_utils.compute_topk_self_distillation_loss(logits, aims, **alpha, **topk)
    elif mode["distillation_mode"] == "full_logits":
        expected = loss_utils.compute_full_logit_self_distillation_loss(logits, aims, **alpha)
    else:
        expected = loss_utils.compute_sampled_token_self_distillation_loss(logits, aims, targets, **alpha)
    now = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = loss_utils.apply_importance_sampling_clipping(expected, now, old, 2.0).mean()
    (wanted,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-10)
    assert LogitTransform().temperature is None  # the method's is used


def test_trls_completions_after_the_teachers_prompt_are_not_the_teachers() -> None:
    with pytest.raises(ArgumentError, match=r"generate_from_teacher=True .* student's weights .*; teacher_samples=1.0"):
        from_trl(GROUP | {"generate_from_teacher": True}, kind="sdft")


def test_ratios_that_nobody_reads_are_whatever_they_are_said_to_be() -> None:
    level = {"importance_sampling_level": "sequence"}
    assert from_trl(GROUP | level, kind="sdpo") == from_trl(GROUP, kind="sdpo")


@pytest.mark.parametrize("attempt", ["x = {1}", None])
@pytest.mark.parametrize("feedback", ["Line 3: {% if", None])
@pytest.mark.parametrize(
    "texts",
    [
        {},
        {
            "reprompt_template": "{prompt} {{braces}} {{% kept %}}{solution}|{feedback}",
            "solution_template": "<{successful_previous_attempt}>\n",
            "feedback_template": "{{ {feedback_raw} }}",
        },
    ],
    ids=["theirs", "own"],
)
def test_templates_give_the_same_text(texts: dict[str, str], attempt: str | None, feedback: str | None) -> None:
    shown = {"include_environment_feedback": True, "environment_feedback_only_without_solution": False}
    method, _ = from_trl(GROUP | shown | texts, kind="sdpo")
    builder = method.build_context()
    assert isinstance(builder, SuccessOrFeedback)
    assert builder.template is not None
    config = {f.name: f.default for f in dataclasses.fields(sdpo.SDPOConfig)} | texts
    wanted = config["reprompt_template"].format(
        prompt="How?",
        solution=config["solution_template"].format(successful_previous_attempt=attempt) if attempt else "",
        feedback=config["feedback_template"].format(feedback_raw=feedback) if feedback else "",
    )
    variables = {"prompt": "How?", "attempt": attempt, "feedback": feedback}
    assert render(builder.template, variables, {}, source="here") == wanted


def test_a_template_of_sdft_gives_the_same_text() -> None:
    text = "Context:\n{privileged_context}\n\n{prompt}\n"
    method, _ = from_trl(GROUP | {"teacher_prompt_template": text}, kind="sdft")
    assert method.template is not None
    variables = {"prompt": "How?", "privileged_context": "So."}
    assert render(method.template, variables, {}, source="here") == text.format(**variables)


@pytest.mark.parametrize(
    "text", ["{prompt!r} {privileged_context}", "{prompt:>9} {privileged_context}", "{question}", "{"]
)
def test_templates_with_formats_or_other_fields_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="teacher_prompt_template"):
        from_trl(GROUP | {"teacher_prompt_template": text}, kind="sdft")


@pytest.mark.parametrize(
    ("size", "steps", "expected"),
    [
        (8, 3, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
        (2, 6, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "micro_batch": 2}),
        (6, 2, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}),
    ],
)
def test_completions_become_prompts(size: int, steps: int, expected: dict[str, int]) -> None:
    given = GROUP | {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    _, arguments = from_trl(given, kind="sdpo")
    assert {name: arguments[name] for name in expected} == expected
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] * 4 == size * steps
    assert ("micro_batch" in arguments) == ("micro_batch" in expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"teacher_model_kind": "base"}, {"teacher": "frozen"}),
        ({"teacher_model_kind": "live"}, {"teacher": "live"}),
        ({"teacher_update_rate": 0.25}, {"teacher": "ema", "update_rate": 0.25}),
        ({"teacher_update_rate": 1.0, "teacher_sync_steps": 9}, {"teacher": "periodic", "sync_every": 9}),
        ({"teacher_update_rate": 0.0}, {"teacher": "frozen"}),
    ],
)
def test_teachers_are_translated(given: dict[str, Any], expected: dict[str, Any]) -> None:
    method, _ = from_trl(GROUP | given, kind="sdpo")
    assert {name: getattr(method, name) for name in expected} == expected


def test_without_distillation_it_is_grpo_and_with_a_part_of_it_a_mixture() -> None:
    policy = {"distillation_weight": 0.0, "epsilon": 0.1, "epsilon_high": 0.3, "scale_rewards": False}
    method, _ = from_trl(GROUP | policy | {"loss_type": "dr_grpo"}, kind="sdpo")
    expected = {"advantages": "dr_grpo", "clip_low": 0.1, "clip_high": 0.3, "aggregation": "sum-norm"}
    assert method == GRPO(num_generations=4, **expected)
    mixed, _ = from_trl(GROUP | policy | {"distillation_weight": 0.5, "loss_type": "grpo"}, kind="sdpo")
    assert (mixed.target, mixed.distillation_weight, mixed.clip_low) == ("divergence", 0.5, 0.1)
    with pytest.raises(ArgumentError, match="loss_type='dapo' has no counterpart in a mixture"):
        from_trl(GROUP | {"distillation_weight": 0.5}, kind="sdpo")
    with pytest.raises(ArgumentError, match="loss_type='bnpo' has no counterpart here"):
        from_trl(GROUP | policy | {"loss_type": "bnpo"}, kind="sdpo")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 1.0}, r"^alpha is no argument of TRL's SDPOConfig"),
        ({"distillation_alfa": 1.0}, r"did you mean 'distillation_alpha'\?"),
        ({"beta": 0.1}, r"^beta=0.1 has no counterpart here"),
        ({"use_vllm": True}, r"^use_vllm=True has no counterpart here"),
        ({"disable_dropout": False}, r"^disable_dropout=False"),
        ({"min_p": 0.1}, r"^min_p=0.1"),
        ({"teacher_sync_steps": 4}, r"^teacher_sync_steps=4 .* a rate of 0.0127 forgets as fast"),
        ({"teacher_model_kind": "other"}, r"^teacher_model_kind='other' is not known$"),
        ({"steps_per_generation": 3}, r"^steps_per_generation=3 has no counterpart here"),
        ({"generation_batch_size": 8}, r"^generation_batch_size has no counterpart"),
        ({"per_device_train_batch_size": 3}, r"must be whole groups of num_generations=4"),
        ({"distillation_mode": "topk_logits"}, r"^distillation_topk must be given"),
        ({"use_successful_as_teacher": False}, r"^use_solution or use_feedback"),
        ({"scale_rewards": "batch", "distillation_weight": 0.0}, r"^scale_rewards='batch'"),
        ({"importance_sampling_level": "word"}, r"^importance_sampling_level='word' is not known$"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        from_trl(GROUP | given, kind="sdpo")


def test_a_configuration_with_a_field_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    config = sdpo_config(tmp_path)
    made = dataclasses.make_dataclass("SDPOConfig", [("newer", int, 0)], bases=(type(config),))
    assert from_trl(made(output_dir=str(tmp_path), use_cpu=True, bf16=False, **GROUP))
    with pytest.raises(ArgumentError, match=r"^newer=1 is not known here$"):
        from_trl(made(output_dir=str(tmp_path), use_cpu=True, bf16=False, newer=1, **GROUP))


def test_whose_configuration_it_is_must_be_clear(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="kind must be 'sdpo' or 'sdft' for a mapping"):
        from_trl(GROUP)
    with pytest.raises(ArgumentError, match="got 'sdft' for a SDPOConfig"):
        from_trl(sdpo_config(tmp_path), kind="sdft")
    with pytest.raises(ArgumentError, match="must be TRL's SDPOConfig or SDFTConfig, or a mapping, got int"):
        from_trl(3)


def test_every_argument_of_trls_own_is_dealt_with() -> None:
    """An argument that TRL adds is refused until somebody has looked at it; one that it drops is not looked for."""
    known = {f.name for made in (sdpo.SDPOConfig, sdft.SDFTConfig) for f in dataclasses.fields(made)}
    assert {*REFUSED, *WITHOUT_EFFECT} <= known
