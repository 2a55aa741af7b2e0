"""Translates configurations of the SDPO authors' code, github.com/lasgroup/SDPO, to a method and arguments of a run.

    method, arguments = from_lasgroup("sdpo.yaml", "user.yaml", overrides=["actor_rollout_ref.rollout.n=4"])

Every key is translated; or refused by name, because it is not known or asks for what is not done here; or is one of
`NOT_TRANSLATED`, about machines, files and logs. A key that is not given has the value of its `actor.yaml` and
`rollout.yaml`, which `LASGROUP` repeats (commit 0e6d510).

What differs from the obvious: the logits of the loss are divided by the sampling temperature there, and so they are
here. A prompt that is too long loses its end there, the generation prompt first; here its context is cut.

Not covered: other losses of verl than SDPO's and GRPO's; Hydra's compositions and interpolations (`${...}`); several
optimizer steps on parts of one batch of completions (a `ppo_mini_batch_size` below `train_batch_size`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .fields import closest, parse_yaml, read_yaml
from .foreign import SHOWN, attempt_template, refuse
from .method import Method
from .methods import GRPO, SDPO

Source = str | Path | Mapping[str, Any]

# Of the SDPO authors' configurations.
NOT_TRANSLATED: dict[str, str] = {
    "defaults": "Hydra's composition; give the files in their order",
    "vars": "the authors' paths",
    "max_model_len": "of their server",
    "data.train_files": "the trainer's train_dataset",
    "data.val_files": "the trainer's eval_dataset",
    "data.filter_overlong_prompts": "prompts that are too long are errors with file and line",
    "custom_reward_function": "the trainer's reward_funcs",
    "critic": "there is none",
    "reward_model": "the trainer's reward_funcs",
    "actor_rollout_ref.model": "the trainer's model",
    "actor_rollout_ref.ref": "of their workers",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "micro_batch bounds the memory",
    "actor_rollout_ref.rollout.name": "the trainer's sampler",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "the sampler's",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": "log-probabilities come with the samples",
    "actor_rollout_ref.rollout.calculate_log_probs": "log-probabilities come with the samples",
    "actor_rollout_ref.rollout.max_num_batched_tokens": "the sampler's",
    "actor_rollout_ref.rollout.max_model_len": "the sampler's",
    "actor_rollout_ref.rollout.val_kwargs": "the evaluation's own arguments",
    "trainer.project_name": "report_to's own settings",
    "trainer.group_name": "report_to's own settings",
    "trainer.experiment_name": "run_name",
    "trainer.logger": "report_to",
    "trainer.n_gpus_per_node": "the launcher's",
    "trainer.nnodes": "the launcher's",
    "trainer.save_freq": "save_steps",
    "trainer.test_freq": "eval_steps",
    "trainer.val_before_train": "eval_on_start",
    "trainer.max_actor_ckpt_to_keep": "save_total_limit",
    "trainer.default_local_dir": "output_dir",
}
ACTOR, ROLLOUT, ALGORITHM = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm"
DISTILLATION = f"{ACTOR}.self_distillation"
# Where its values have no counterpart: those that are no loss, and what to do otherwise.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    f"{ACTOR}.use_kl_loss": ((False,), "an anchor here is kl_anchor, of a policy gradient"),
    f"{ACTOR}.entropy_coeff": ((0,), "there is no entropy bonus"),
    f"{ALGORITHM}.use_kl_in_reward": ((False,), "there is no KL in the reward"),
    f"{ALGORITHM}.adv_estimator": (("grpo",), "the group's mean is the baseline"),
    f"{ALGORITHM}.rollout_correction.rollout_is": ((None, "token"), "ratios of whole sequences are not covered"),
    "data.shuffle": ((True,), "use train_sampling_strategy='sequential'"),
    "data.trust_remote_code": ((False, True), "say so where the model is loaded"),
}
# What its `actor.yaml` and `rollout.yaml` say, for every key that is read here. None where something must be given, or
# where None means what it says.
LASGROUP: dict[str, Any] = {
    f"{ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{ACTOR}.loss_agg_mode": "token-mean",
    f"{ACTOR}.ppo_mini_batch_size": None,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": None,
    f"{ACTOR}.ppo_epochs": 1,
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.2,
    f"{ACTOR}.grad_clip": 1.0,
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.entropy_coeff": 0,
    f"{ACTOR}.optim.lr": 1e-6,
    f"{ACTOR}.optim.lr_warmup_steps": -1,
    f"{ACTOR}.optim.weight_decay": 0.01,
    f"{DISTILLATION}.full_logit_distillation": True,
    f"{DISTILLATION}.distillation_topk": 100,
    f"{DISTILLATION}.distillation_add_tail": True,
    f"{DISTILLATION}.alpha": 0.5,
    f"{DISTILLATION}.success_reward_threshold": 0.5,
    f"{DISTILLATION}.teacher_regularization": "ema",
    f"{DISTILLATION}.teacher_update_rate": 0.05,
    f"{DISTILLATION}.max_reprompt_len": 10240,
    f"{DISTILLATION}.reprompt_truncation": "right",
    f"{DISTILLATION}.dont_reprompt_on_self_success": True,
    f"{DISTILLATION}.remove_thinking_from_demonstration": True,
    f"{DISTILLATION}.include_environment_feedback": True,
    f"{DISTILLATION}.environment_feedback_only_without_solution": True,
    f"{DISTILLATION}.is_clip": 2.0,
    f"{DISTILLATION}.reprompt_template": None,
    f"{DISTILLATION}.solution_template": None,
    f"{DISTILLATION}.feedback_template": None,
    f"{ROLLOUT}.n": 1,
    f"{ROLLOUT}.temperature": 1.0,
    f"{ROLLOUT}.top_p": 1.0,
    f"{ROLLOUT}.top_k": -1,
    f"{ALGORITHM}.adv_estimator": "gae",
    f"{ALGORITHM}.norm_adv_by_std_in_grpo": True,
    f"{ALGORITHM}.use_kl_in_reward": False,
    f"{ALGORITHM}.rollout_correction.rollout_is": None,
    f"{ALGORITHM}.rollout_correction.rollout_is_threshold": 2.0,
    "data.train_batch_size": None,
    "data.max_prompt_length": None,
    "data.max_response_length": 512,
    "data.shuffle": True,
    "data.trust_remote_code": False,
    "data.apply_chat_template_kwargs": None,
    "trainer.total_epochs": None,
}


def from_lasgroup(
    *sources: Source, overrides: Sequence[str] = (), num_processes: int = 1
) -> tuple[Method, dict[str, Any]]:
    """Returns the method, and arguments of `SelfDistillationConfig`, for a configuration of github.com/lasgroup/SDPO.

    `sources` are its YAML files, or mappings, the later over the earlier; `overrides` are Hydra's, `a.b.c=value`, as in
    its scripts. What none of them says is as in its `actor.yaml` and `rollout.yaml`, except for the templates' texts,
    which are ours then. `num_processes` is how many will train: its `train_batch_size` is that of all together. Raises
    `ArgumentError`.
    """
    if not sources:
        raise ArgumentError("sources must be at least one file or mapping, got none")
    given: dict[str, Any] = {}
    for source in sources:
        given |= _flat(source if isinstance(source, Mapping) else read_yaml(source))
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ArgumentError(f"overrides must be of the form name=value, got {override!r}")
        given[name.lstrip("+")] = parse_yaml(value, name)
    left_out = tuple(f"{name}." for name in NOT_TRANSLATED)
    given = {name: value for name, value in given.items() if not f"{name}.".startswith(left_out)}
    for name, value in given.items():
        if name not in LASGROUP:
            raise ArgumentError(f"{name}={value!r} is not known here{closest(name, LASGROUP)}")
        if isinstance(value, str) and "${" in value:
            raise ArgumentError(f"{name} must be resolved, got the interpolation {value!r}")
    values = LASGROUP | given
    method = _method(values)
    arguments = _arguments(values, num_processes)
    refuse(values, REFUSED)
    return method, {name: value for name, value in arguments.items() if value is not None}


def _method(values: Mapping[str, Any]) -> Method:
    mode = values[f"{ACTOR}.policy_loss.loss_mode"]
    aggregations: dict[str, Any] = {name: name for name in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")}
    aggregations["seq-mean-token-sum-norm"] = "sum-norm"
    if (name := values[f"{ACTOR}.loss_agg_mode"]) not in aggregations:
        raise ArgumentError(f"{ACTOR}.loss_agg_mode={name!r} is not known")
    common: dict[str, Any] = {"aggregation": aggregations[name], "num_generations": values[f"{ROLLOUT}.n"]}
    normed = values[f"{ALGORITHM}.norm_adv_by_std_in_grpo"]
    low, high = values[f"{ACTOR}.clip_ratio_low"], values[f"{ACTOR}.clip_ratio_high"]
    distillation = {name.rpartition(".")[2]: values[name] for name in LASGROUP if name.startswith(DISTILLATION)}
    if mode == "vanilla":
        return GRPO(advantages="grpo" if normed else "dr_grpo", clip_low=low, clip_high=high, **common)
    if mode != "sdpo":
        raise ArgumentError(f"{ACTOR}.policy_loss.loss_mode must be 'sdpo', or 'vanilla' for GRPO, got {mode!r}")
    topk = distillation["distillation_topk"]
    full = distillation["full_logit_distillation"]
    return SDPO(
        **common,
        **_teacher(distillation["teacher_regularization"], distillation["teacher_update_rate"]),
        template=_template(distillation),
        overflow="error" if distillation["reprompt_truncation"] == "error" else "truncate_context",
        **{ours: distillation[theirs] for theirs, ours in SHOWN.items()},
        alpha=distillation["alpha"],
        temperature=values[f"{ROLLOUT}.temperature"],
        topk=topk if full else None,
        tail=distillation["distillation_add_tail"] if full and topk is not None else True,
        sampled_token=not full,
        importance_clip=_clip(values, distillation["is_clip"]),
    )


def _teacher(regularization: str, rate: float) -> dict[str, Any]:
    if regularization == "trust-region":
        return {"teacher": "trust_region", "trust_share": rate}
    if regularization != "ema":
        raise ArgumentError(
            f"{DISTILLATION}.teacher_regularization must be ema or trust-region, got {regularization!r}"
        )
    return {"teacher": "ema", "update_rate": rate} if rate else {"teacher": "frozen"}


def _clip(values: Mapping[str, Any], clip: float | None) -> float | None:
    """Merges its two ratios, of the student now to the one that sampled and of that to the sampler, into one."""
    if values[f"{ALGORITHM}.rollout_correction.rollout_is"] is None:
        return clip
    threshold = values[f"{ALGORITHM}.rollout_correction.rollout_is_threshold"]
    if clip is not None and clip != threshold:
        raise ArgumentError(
            f"{DISTILLATION}.is_clip={clip} and {ALGORITHM}.rollout_correction.rollout_is_threshold={threshold} must "
            "be equal, since the ratio to the sampler's log-probability is clipped once here"
        )
    return threshold


def _template(distillation: Mapping[str, Any]) -> str | None:
    texts = [distillation[f"{part}_template"] for part in ("reprompt", "solution", "feedback")]
    if texts == [None] * 3:
        return None
    if None in texts:
        raise ArgumentError(
            f"{DISTILLATION} must have all of reprompt_, solution_ and feedback_template, or none of them"
        )
    return attempt_template(*texts)


def _arguments(values: Mapping[str, Any], num_processes: int) -> dict[str, Any]:
    prompts, mini = values["data.train_batch_size"], values[f"{ACTOR}.ppo_mini_batch_size"]
    if prompts is None or prompts % num_processes:
        raise ArgumentError(
            f"data.train_batch_size must be given, and be a multiple of num_processes={num_processes}, got {prompts}"
        )
    if mini not in (None, prompts):
        raise ArgumentError(
            f"{ACTOR}.ppo_mini_batch_size={mini} has no counterpart here, where completions are sampled for each "
            f"optimizer step: it must be data.train_batch_size={prompts}"
        )
    warmup, top_k = values[f"{ACTOR}.optim.lr_warmup_steps"], values[f"{ROLLOUT}.top_k"]
    return {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": prompts // num_processes,
        "micro_batch": values[f"{ACTOR}.ppo_micro_batch_size_per_gpu"],
        "num_iterations": values[f"{ACTOR}.ppo_epochs"],
        "learning_rate": values[f"{ACTOR}.optim.lr"],
        "lr_scheduler_type": "constant_with_warmup" if warmup > 0 else "constant",
        "warmup_steps": warmup if warmup > 0 else None,
        "weight_decay": values[f"{ACTOR}.optim.weight_decay"],
        "max_grad_norm": values[f"{ACTOR}.grad_clip"],
        "num_train_epochs": values["trainer.total_epochs"],
        "max_prompt_length": values["data.max_prompt_length"],
        "max_completion_length": values["data.max_response_length"],
        "sampling_temperature": values[f"{ROLLOUT}.temperature"],
        "top_p": values[f"{ROLLOUT}.top_p"],
        "top_k": top_k if top_k > 0 else None,
        "chat_template_kwargs": values["data.apply_chat_template_kwargs"],
    }


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns dotted names → values. A mapping that is itself a value stays one."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in LASGROUP:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat
