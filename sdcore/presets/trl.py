"""Translates configurations of TRL's SDPO and SDFT trainers to a method and arguments of a run.

    method, arguments = from_trl(SDPOConfig(output_dir="out", distillation_mode="topk_logits", distillation_topk=20))
    trainer = SelfDistillationTrainer(model, SelfDistillationConfig(**arguments), method=method, ...)

Every argument is translated; or refused by name, because it is not known or asks for what is not done here; or is one
of `WITHOUT_EFFECT`, about servers and diagnostics. None is read with a default of ours: where a mapping does not give
one, the default is that of the installed TRL.

What differs from the obvious: TRL counts completions where our `per_device_train_batch_size` counts prompts, and it
divides the logits of the loss by the sampling temperature. It averages over all completions of a batch, we over those
that carry a loss, and it cuts prompts that are too long where we refuse them; `docs/methods.md` has the others too.

Not covered: TRL's other trainers, and its vLLM arguments, which a sampler here has of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ..errors import ArgumentError
from .fields import closest
from .foreign import SHOWN, attempt_template, jinja_of, refuse
from .method import Aggregation, Method
from .methods import GRPO, SDPO

# Of the configurations: their names on the left, ours on the right.
RUN = {
    "max_prompt_length": "max_prompt_length",
    "max_completion_length": "max_completion_length",
    "temperature": "sampling_temperature",
    "top_p": "top_p",
    "num_iterations": "num_iterations",
    "chat_template_kwargs": "chat_template_kwargs",
    "trust_remote_code": "trust_remote_code",
}
# Where our defaults are not transformers': always given, so that ours do not take the place of theirs.
ALWAYS = ("learning_rate", "num_train_epochs", "logging_steps")
# transformers 5.23 has a new name for these.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Where TRL's values have no counterpart: those that are no loss, and what to do otherwise.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_init_kwargs": ((None,), "load the model and give it to the trainer"),
    "disable_dropout": ((True,), "dropout is always off in the passes"),
    "remove_unused_columns": ((False,), "columns are for the reward functions"),
    "min_p": ((None,), "give the trainer a sampler of your own"),
    "generation_kwargs": ((None,), "give the trainer a sampler of your own"),
    "repetition_penalty": ((1.0,), "give the trainer a sampler of your own"),
    "cache_implementation": ((None,), "sampling has its own cache"),
    "use_vllm": ((False,), "give the trainer a sampler, sdcore.rollouts.vllm"),
    "use_teacher_server": ((False,), "the teacher is computed here, with the prefix that it shares"),
    "beta": ((0.0,), "TRL 1.16 stores it and never uses it; an anchor here is kl_anchor"),
    "generate_from_teacher": (
        (False,),
        "TRL draws from the student's weights after the teacher's prompt; teacher_samples=1.0 from the teacher's",
    ),
}
# TRL's own, about its server, its diagnostics and DeepSpeed: no part of what is learned.
WITHOUT_EFFECT = (
    "ds3_gather_for_generation",
    "diagnostics_warning_interval",
    "diagnostics_flat_tolerance",
    "vllm_mode",
    "vllm_model_impl",
    "vllm_enable_sleep_mode",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_group_port",
    "vllm_server_timeout",
    "vllm_tensor_parallel_size",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
)


def from_trl(config: Any, *, kind: Literal["sdpo", "sdft"] | None = None) -> tuple[Method, dict[str, Any]]:
    """Returns the method, and arguments of `SelfDistillationConfig`, that do what a configuration of TRL does.

    `config` is an `SDPOConfig` or `SDFTConfig` of `trl.experimental`, or a mapping of their arguments, which needs
    `kind`; TRL's own defaults fill in the rest. Raises `ArgumentError`.
    """
    given, defaults, is_sdft = _read(config, kind)
    values = defaults | given  # each is taken out once
    arguments: dict[str, Any] = {ours: values.pop(theirs) for theirs, ours in RUN.items()}
    temperature = arguments["sampling_temperature"]
    arguments["top_k"] = values.pop("top_k") or None
    method = _sdft(values, temperature) if is_sdft else _sdpo(values, arguments, temperature)
    arguments |= _batches(values, method.num_generations)
    if not values.pop("shuffle_dataset"):
        arguments["train_sampling_strategy"] = "sequential"
    refuse(values, REFUSED)
    for name in (*REFUSED, *WITHOUT_EFFECT):
        values.pop(name, None)
    for old, new in RENAMED.items():
        either = [values.pop(name) for name in (new, old) if name in defaults]
        arguments[new if new in defaults else old] = next((value for value in either if value is not None), None)
    # TRL's None is on, ours is on where the machine has it.
    half, mixed = values.pop("fp16"), values.pop("bf16")
    arguments |= {"fp16": half, "bf16": not half if mixed is None else mixed}
    arguments |= {name: values.pop(name) for name in ALWAYS}
    arguments |= _rest(values, defaults)
    return method, {name: value for name, value in arguments.items() if value is not None}


def _sdft(values: dict[str, Any], temperature: float) -> Method:
    """Translates SDFT: any context in its template, the divergence averaged per completion."""
    fields = {"prompt": "{{ prompt }}", "privileged_context": "{{ privileged_context }}"}
    return Method(
        context="template",
        template=jinja_of("teacher_prompt_template", values.pop("teacher_prompt_template"), fields),
        temperature=temperature,
        aggregation="seq-mean-token-mean",
        skip_first_tokens=values.pop("num_loss_tokens_to_skip"),
        num_generations=values.pop("num_generations"),
        **_divergence(values),
    )


def _sdpo(values: dict[str, Any], arguments: dict[str, Any], temperature: float) -> Method:
    weight, loss_type, scale = (values.pop(name) for name in ("distillation_weight", "loss_type", "scale_rewards"))
    low, high, level = (values.pop(name) for name in ("epsilon", "epsilon_high", "importance_sampling_level"))
    ratios = {"token": "token", "sequence": "completion"}
    if level not in ratios:
        raise ArgumentError(f"importance_sampling_level={level!r} is not known")
    clips = {"clip_low": low, "clip_high": low if high is None else high}
    policy: dict[str, Any] = {}
    aggregation: Aggregation = "seq-mean-token-mean"
    if weight < 1:
        # What the policy loss alone reads; with pure distillation nobody does.
        scales = {True: "grpo", "group": "grpo", False: "dr_grpo", "none": "dr_grpo"}
        if scale not in scales:
            raise ArgumentError(f"scale_rewards={scale!r} has no counterpart here: rewards are scaled within a group")
        policy = {"advantages": scales[scale], "ratio_of": ratios[level], **clips}
    if weight == 0:
        aggregations: dict[str, Aggregation] = {
            "grpo": "seq-mean-token-mean",
            "dapo": "token-mean",
            "dr_grpo": "sum-norm",
        }
        if loss_type not in aggregations:
            raise ArgumentError(
                f"loss_type={loss_type!r} has no counterpart here: its divisor is that of a micro-batch"
            )
        aggregation = aggregations[loss_type]
    elif weight < 1 and loss_type != "grpo":
        raise ArgumentError(
            f"loss_type={loss_type!r} has no counterpart in a mixture, where TRL aggregates the two losses in "
            "different ways: with 'grpo' both are means over completions"
        )
    shown = {
        "use_solution": values.pop("use_successful_as_teacher"),
        **{ours: values.pop(theirs) for theirs, ours in SHOWN.items()},
        "template": attempt_template(
            *(values.pop(f"{part}_template") for part in ("reprompt", "solution", "feedback"))
        ),
    }
    arguments["mask_truncated_completions"] = values.pop("mask_truncated_completions")
    arguments["reward_weights"] = values.pop("reward_weights")
    count = values.pop("num_generations")
    divergence = _divergence(values)
    if weight == 0:
        return GRPO(num_generations=count, aggregation=aggregation, **policy)
    return SDPO(
        temperature=temperature,
        aggregation=aggregation,
        distillation_weight=weight,
        num_generations=count,
        **shown,
        **policy,
        **divergence,
    )


def _divergence(values: dict[str, Any]) -> dict[str, Any]:
    """Translates teacher and divergence, which both trainers have."""
    mode, topk, tail = (values.pop(f"distillation_{name}") for name in ("mode", "topk", "add_tail"))
    if mode == "topk_logits" and topk is None:
        raise ArgumentError("distillation_topk must be given with distillation_mode='topk_logits', got None")
    if mode not in ("topk_logits", "full_logits", "sampled_token"):
        raise ArgumentError(f"distillation_mode={mode!r} is not known")
    fields: dict[str, Any] = {
        "alpha": values.pop("distillation_alpha"),
        "importance_clip": values.pop("distillation_is_clip"),
        "topk": topk if mode == "topk_logits" else None,
        "tail": tail if mode == "topk_logits" else True,
        "sampled_token": mode == "sampled_token",
    }
    kind, rate, every = (values.pop(f"teacher_{name}") for name in ("model_kind", "update_rate", "sync_steps"))
    teachers = {"base": "frozen", "live": "live", "ema": "ema"}
    if kind not in teachers:
        raise ArgumentError(f"teacher_model_kind={kind!r} is not known")
    fields["teacher"] = teachers[kind]
    if kind != "ema":
        return fields
    if rate == 1.0:
        return fields | {"teacher": "periodic", "sync_every": every}
    if every != 1:
        raise ArgumentError(
            f"teacher_sync_steps={every} has no counterpart here: an average moves after every step; a rate of "
            f"{1 - (1 - rate) ** (1 / every):.3g} forgets as fast as {rate} every {every} steps"
        )
    return fields | ({"teacher": "ema", "update_rate": rate} if rate else {"teacher": "frozen"})


def _batches(values: dict[str, Any], count: int) -> dict[str, Any]:
    """Returns sizes that give the same completions per optimizer step and device, counted in prompts."""
    size, steps = values.pop("per_device_train_batch_size"), values.pop("gradient_accumulation_steps")
    generation_size, per_generation = values.pop("generation_batch_size"), values.pop("steps_per_generation")
    if generation_size is not None and per_generation is None:
        raise ArgumentError("generation_batch_size has no counterpart without its processes: give steps_per_generation")
    if per_generation not in (None, steps):
        raise ArgumentError(
            f"steps_per_generation={per_generation} has no counterpart here, where completions are sampled for each "
            f"optimizer step: it must be gradient_accumulation_steps={steps}"
        )
    if size * steps % count:
        raise ArgumentError(
            f"per_device_train_batch_size·gradient_accumulation_steps = {size * steps} completions must be whole "
            f"groups of num_generations={count}: a group is not divided among devices here"
        )
    evaluated = values.pop("num_generations_eval") or count
    sizes = {
        "eval_generations": evaluated,
        "per_device_eval_batch_size": max(1, values.pop("per_device_eval_batch_size") // evaluated),
    }
    if size % count == 0:
        return sizes | {"per_device_train_batch_size": size // count, "gradient_accumulation_steps": steps}
    # TRL has so many completions in flight.
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": size * steps // count}
    return sizes | alone | ({"micro_batch": size} if count % size == 0 else {})


def _rest(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what nobody took and is no default: arguments of transformers' own. Refuses TRL's."""
    from transformers import TrainingArguments

    left = {name: value for name, value in values.items() if value != defaults[name]}
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    for name, value in left.items():
        if name not in known:
            raise ArgumentError(f"{name}={value!r} is not known here")
    return left


def _read(config: Any, kind: str | None) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Returns what is given, all defaults, and whether it is SDFT's."""
    from transformers import TrainingArguments

    if kind not in (None, "sdpo", "sdft"):
        raise ArgumentError(f"kind must be 'sdpo' or 'sdft', got {kind!r}")
    if isinstance(config, Mapping):
        if kind is None:
            raise ArgumentError("kind must be 'sdpo' or 'sdft' for a mapping, which does not say whose it is, got None")
        defaults = _defaults(_class(kind))
        for name in config:
            if name not in defaults:
                raise ArgumentError(f"{name} is no argument of TRL's {kind.upper()}Config{closest(name, defaults)}")
        return dict(config), defaults, kind == "sdft"
    names = [base.__name__ for base in type(config).__mro__]
    if "SDPOConfig" not in names and "SDFTConfig" not in names:
        raise ArgumentError(f"config must be TRL's SDPOConfig or SDFTConfig, or a mapping, got {type(config).__name__}")
    is_sdft = "SDFTConfig" in names
    if kind not in (None, "sdft" if is_sdft else "sdpo"):
        raise ArgumentError(f"kind must be left out or be the config's own, got {kind!r} for a {type(config).__name__}")
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    # What transformers makes of its own defaults (lists, enumerations, paths) is not what somebody asked for.
    made = TrainingArguments(output_dir=given["output_dir"], use_cpu=given["use_cpu"])
    asked = ("output_dir", "use_cpu")
    plain = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.init and f.name not in asked}
    return given, _defaults(type(config)) | plain, is_sdft


def _class(kind: str) -> Any:
    try:
        from trl.experimental.sdft import SDFTConfig
        from trl.experimental.sdpo import SDPOConfig
    except ImportError as error:
        raise ImportError("the defaults of TRL's arguments are TRL's to say: pip install 'sdcore[trl]'") from error
    return {"sdft": SDFTConfig, "sdpo": SDPOConfig}[kind]


def _defaults(configuration: Any) -> dict[str, Any]:
    arguments = [f for f in dataclasses.fields(configuration) if f.init]
    made = {f.name: f.default_factory() for f in arguments if f.default_factory is not dataclasses.MISSING}
    return {f.name: None if f.default is dataclasses.MISSING else f.default for f in arguments} | made
