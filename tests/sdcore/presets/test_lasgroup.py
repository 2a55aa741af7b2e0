"""The SDPO authors' configurations say the same here, and what has no counterpart is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdcore.contexts.templates import render
from sdcore.errors import ArgumentError
from sdcore.presets import GRPO, SDPO, from_lasgroup
from sdcore.training.config import SelfDistillationConfig

ACTOR = "actor_rollout_ref.actor"
OWN = f"{ACTOR}.self_distillation"
# In the words of their configuration: what an SDPO run overrides.
RUN = {
    "defaults": ["ppo_trainer", "user", "_self_"],
    "max_model_len": 18944,
    "actor_rollout_ref": {
        "actor": {
            "ppo_mini_batch_size": 32,
            "policy_loss": {"loss_mode": "sdpo"},
            "self_distillation": {"max_reprompt_len": 10240, "is_clip": 2.0},
            "optim": {"lr": 1e-5},
        },
        "rollout": {"n": 8, "calculate_log_probs": True},
        "model": {"path": "some/model"},
    },
    "algorithm": {
        "adv_estimator": "grpo",
        "norm_adv_by_std_in_grpo": False,
        "rollout_correction": {"rollout_is": "token", "rollout_is_threshold": 2.0},
    },
    "data": {"train_batch_size": 32, "train_files": ["${vars.dir}/train.parquet"]},
    "trainer": {"val_before_train": False, "total_epochs": 30},
}


def test_their_run_is_the_preset() -> None:
    method, arguments = from_lasgroup(RUN)
    # Truncated from the right there; ours cuts the context, so that the generation prompt stays.
    assert method == SDPO(overflow="truncate_context")
    assert arguments["learning_rate"] == 1e-5
    assert arguments["lr_scheduler_type"] == "constant"
    assert arguments["num_train_epochs"] == 30
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == 32


def test_their_run_on_code_is_the_other_preset() -> None:
    overrides = [f"{OWN}.distillation_topk=20", f"{OWN}.alpha=1.0", f"{OWN}.teacher_update_rate=0.01"]
    method, _ = from_lasgroup(RUN, overrides=[*overrides, f"{OWN}.reprompt_truncation=error"])
    expected = {name: getattr(method, name) for name in ("alpha", "topk", "update_rate", "overflow")}
    assert expected == {"alpha": 1.0, "topk": 20, "update_rate": 0.01, "overflow": "error"}


def test_files_come_one_over_the_other_and_overrides_over_both(tmp_path: Path) -> None:
    (tmp_path / "user.yaml").write_text(
        "data:\n  train_batch_size: 4\n  max_response_length: 99\n"
        "  apply_chat_template_kwargs: {enable_thinking: false}\n"
        "actor_rollout_ref:\n  rollout: {n: 2, temperature: 0.5}\n"
    )
    (tmp_path / "sdpo.yaml").write_text(
        "actor_rollout_ref:\n  actor:\n    policy_loss: {loss_mode: sdpo}\n    optim: {lr: 1e-5}\n  rollout: {n: 6}\n"
        "algorithm: {adv_estimator: grpo}\n"
    )
    files = (tmp_path / "user.yaml", str(tmp_path / "sdpo.yaml"))
    method, arguments = from_lasgroup(*files, overrides=["+data.train_batch_size=8"], num_processes=4)
    assert (method.num_generations, method.temperature) == (6, 0.5)
    assert arguments["gradient_accumulation_steps"] == 2
    assert arguments["chat_template_kwargs"] == {"enable_thinking": False}
    config = SelfDistillationConfig(output_dir=str(tmp_path), **arguments)
    assert (config.sampling_temperature, config.max_completion_length, config.learning_rate) == (0.5, 99, 1e-5)
    assert config.top_k is None


def test_their_baseline_is_grpo() -> None:
    given = {"data.train_batch_size": 8, f"{ACTOR}.clip_ratio_high": 0.28, "actor_rollout_ref.rollout.n": 8}
    method, _ = from_lasgroup(
        given, overrides=["algorithm.norm_adv_by_std_in_grpo=False", "algorithm.adv_estimator=grpo"]
    )
    assert method == GRPO(advantages="dr_grpo", clip_high=0.28, aggregation="token-mean")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{OWN}.teacher_regularization=trust-region"], {"teacher": "trust_region", "trust_share": 0.05}),
        ([f"{OWN}.teacher_update_rate=0.0"], {"teacher": "frozen"}),
        ([f"{OWN}.distillation_topk=null"], {"topk": None, "tail": True}),
        # Without a top-k there is nothing outside it, whatever this says.
        ([f"{OWN}.distillation_topk=null", f"{OWN}.distillation_add_tail=False"], {"topk": None, "tail": True}),
        ([f"{OWN}.distillation_add_tail=False"], {"topk": 100, "tail": False}),
        ([f"{OWN}.full_logit_distillation=False", f"{OWN}.alpha=1.0"], {"topk": None, "sampled_token": True}),
        ([f"{OWN}.include_environment_feedback=False"], {"use_feedback": False}),
        ([f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm"], {"aggregation": "sum-norm"}),
        (["algorithm.rollout_correction.rollout_is=null", f"{OWN}.is_clip=null"], {"importance_clip": None}),
        ([f"{OWN}.is_clip=null"], {"importance_clip": 2.0}),
    ],
)
def test_their_choices_are_ours(overrides: list[str], expected: dict[str, Any]) -> None:
    method, _ = from_lasgroup(RUN, overrides=overrides)
    assert {name: getattr(method, name) for name in expected} == expected


def test_their_templates_give_the_same_text() -> None:
    texts = {
        f"{OWN}.reprompt_template": "{prompt}{solution}{feedback}\n\nOnce more.",
        f"{OWN}.solution_template": "\nThis was right:\n{successful_previous_attempt}",
        f"{OWN}.feedback_template": "\nThis was said:\n{feedback_raw}",
    }
    method, _ = from_lasgroup(RUN, texts)
    assert method.template is not None
    variables = {"prompt": "How?", "attempt": "So.", "feedback": None}
    assert render(method.template, variables, {}, source="here") == "How?\nThis was right:\nSo.\n\nOnce more."
    del texts[f"{OWN}.solution_template"]
    with pytest.raises(ArgumentError, match="must have all of reprompt_, solution_ and feedback_template, or none"):
        from_lasgroup(RUN, texts)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            f"{OWN}.ema_update_rate=0.01",
            r"ema_update_rate=0.01 is not known here; did you mean '.*teacher_update_rate'\?",
        ),
        ("trainer.unheard_of=1", r"^trainer.unheard_of=1 is not known here"),
        ("data.train_batch_size=${x}", r"^data.train_batch_size must be resolved, got the interpolation"),
        (f"{ACTOR}.ppo_mini_batch_size=1", r"ppo_mini_batch_size=1 has no counterpart here"),
        ("data.train_batch_size=null", r"^data.train_batch_size must be given"),
        (f"{ACTOR}.use_kl_loss=True", r"use_kl_loss=True has no counterpart here"),
        (f"{ACTOR}.policy_loss.loss_mode=gpg", r"loss_mode must be 'sdpo', or 'vanilla' for GRPO, got 'gpg'"),
        (f"{ACTOR}.loss_agg_mode=other", r"loss_agg_mode='other' is not known"),
        (f"{OWN}.teacher_regularization=none", r"teacher_regularization must be ema or trust-region, got 'none'"),
        (f"{OWN}.is_clip=3.0", r"is_clip=3.0 and .*rollout_is_threshold=2.0 must be equal"),
        ("algorithm.rollout_correction.rollout_is=sequence", r"rollout_is='sequence' has no counterpart"),
        ("algorithm.adv_estimator=gae", r"adv_estimator='gae' has no counterpart"),
        ("data.train_batch_size", r"^overrides must be of the form name=value"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        from_lasgroup(RUN, overrides=[override])


def test_prompts_of_a_batch_are_divided_among_processes() -> None:
    assert from_lasgroup(RUN, num_processes=8)[1]["gradient_accumulation_steps"] == 4
    with pytest.raises(ArgumentError, match="a multiple of num_processes=5, got 32"):
        from_lasgroup(RUN, num_processes=5)
    with pytest.raises(ArgumentError, match="at least one file or mapping"):
        from_lasgroup()
