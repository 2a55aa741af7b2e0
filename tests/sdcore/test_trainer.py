"""The trainer: every method learns, what is odd about a batch has a clear outcome, and the log says what happened."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3Config,
    TrainerCallback,
)

from sdcore.errors import ArgumentError, DataError, UnsupportedModelError
from sdcore.prefix import runner
from sdcore.presets import (
    GRPO,
    OPSD,
    SDPO,
    SFT,
    ContextDistillation,
    Method,
    RLTilt,
    SDFTAsRun,
    SDFTPaper,
    SDPOCode,
)
from sdcore.rollouts.rewards import RewardError
from sdcore.rollouts.samplers import ModelSampler, SampledCompletion
from sdcore.teachers import EMA, Frozen
from sdcore.training.config import SelfDistillationConfig
from sdcore.training.trainer import SelfDistillationTrainer
from sdcore.world import CHECKPOINT
from sdcore.world.data import exact, fraction, lenient, rows, with_feedback
from tests.sdcore.trainer_runs import (
    SDFT_METHOD,
    SDPO_METHOD,
    SHOW,
    SHOW_ATTEMPT,
    config,
    lines,
    losses,
    tokenizer,
    trainer,
    world_model,
)

METHODS: dict[str, tuple[Method, str]] = {
    "sdft_paper": (SDFTPaper(template=SHOW), "sdft"),
    "sdft_as_run": (SDFTAsRun(template=SHOW), "sdft"),
    "sdpo": (SDPO(template=SHOW_ATTEMPT, num_generations=4), "sdpo"),
    "sdpo_code": (SDPOCode(template=SHOW_ATTEMPT, num_generations=4), "sdpo"),
    "sdpo trust region": (SDPO(template=SHOW_ATTEMPT, num_generations=4, teacher="trust_region"), "sdpo"),
    "sdpo periodic": (SDPO(template=SHOW_ATTEMPT, num_generations=4, teacher="periodic", sync_every=2), "sdpo"),
    "sdpo live": (SDPO(template=SHOW_ATTEMPT, num_generations=4, teacher="live"), "sdpo"),
    "sdpo mixed": (SDPO(template=SHOW_ATTEMPT, num_generations=4, distillation_weight=0.5, kl_anchor=0.1), "sdpo"),
    "opsd": (OPSD(template=SHOW), "opsd"),
    "context_distillation": (ContextDistillation(template=SHOW), "context_distillation"),
    "rl_tilt": (RLTilt(num_generations=4), "rl"),
    "token_tilt": (Method(template=SHOW, target="token_tilt", teacher="frozen", num_generations=4), "sdft"),
    "grpo": (GRPO(num_generations=4), "rl"),
    "grpo anchored": (GRPO(num_generations=4, kl_anchor=0.1, teacher="frozen"), "rl"),
    "sft": (SFT(), "sft"),
    "off-policy distillation": (replace(SDFT_METHOD, samples="dataset"), "sft"),
}


def weights_of(made: SelfDistillationTrainer) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in made.model.named_parameters()}


def moves(made: SelfDistillationTrainer) -> bool:
    """Trains; True where a weight is another afterwards."""
    before = weights_of(made)
    made.train()
    return any(not torch.equal(weight, before[name]) for name, weight in weights_of(made).items())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_steps(name: str, tmp_path: Path) -> None:
    method, kind = METHODS[name]
    data = rows(kind, task="luma", count=24, seed=0)  # type: ignore[arg-type]
    if method.samples == "dataset" and method.has_teacher:
        data = [row | {"privileged_context": row["completion"]} for row in data]
    rewards = {"sdpo": [with_feedback], "rl": [fraction]}.get(kind, [fraction])
    made = trainer(
        tmp_path, method=method, train_dataset=data, reward_funcs=rewards, max_steps=3, max_completion_length=11
    )
    assert moves(made)
    assert len(losses(tmp_path)) == 3
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path))
    for line in lines(tmp_path):
        assert line["completions/count"] == 4 * method.num_generations
        assert "nonfinite" not in line
        # The loss that is logged is the one that was minimised; of a mixture, its distillation.
        assert method.distillation_weight < 1 or line["self_distillation/distillation_loss"] == pytest.approx(
            line["loss"], rel=1e-5, abs=1e-6
        )


def test_sdft_learns_the_task_from_demonstrations(tmp_path: Path) -> None:
    questions = rows("sdft", task="luma", count=64, seed=0, split="eval")
    made = trainer(
        tmp_path,
        method=SDFTAsRun(template=SHOW),
        count=400,
        reward_funcs=[lenient],
        eval_dataset=questions,
        per_device_train_batch_size=32,
        learning_rate=3e-4,
        max_steps=30,
        log_completions_every=0,
    )
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    assert before["eval_reward_mean"] < 0.1
    # One question in 64 is a standard error of 0.02 here.
    assert after["eval_reward_mean"] > 0.85
    curve = [loss for _, loss in losses(tmp_path)]
    assert sum(curve[-5:]) < 0.3 * sum(curve[:5])


def test_grpo_learns_from_the_reward_alone(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        method=GRPO(num_generations=8),
        kind="rl",
        count=200,
        reward_funcs=[fraction],
        per_device_train_batch_size=8,
        max_steps=15,
        log_completions_every=0,
    )
    made.train()
    rewards = [line["self_distillation/reward_mean"] for line in lines(tmp_path)]
    assert rewards[0] < 0.3
    assert min(rewards[-3:]) > 0.6


@pytest.mark.parametrize("method", [SFT(), SFT(aggregation="seq-mean-token-mean"), SFT(aggregation="sum-norm")])
def test_batches_and_accumulation_do_not_change_the_loss(method: Method, tmp_path: Path) -> None:
    # Completions of different lengths, so that a mean of means would be another number.
    data = [
        row | {"completion": " ".join(row["completion"].split()[: 1 + 3 * i % 10])}
        for i, row in enumerate(rows("sft", task="luma", count=6, seed=0))
    ]
    runs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        made = trainer(
            tmp_path / str(batch),
            method=method,
            train_dataset=data,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_completion_length=11,
            max_steps=2,  # the second has two examples
        )
        made.train()
        runs.append(([loss for _, loss in losses(tmp_path / str(batch))], weights_of(made)))
    for other, weights in runs[1:]:
        assert other == pytest.approx(runs[0][0], rel=1e-4)
        for name, weight in weights.items():
            assert torch.allclose(weight, runs[0][1][name], atol=1e-4), name


def test_the_losses_do_not_depend_on_the_global_generator(tmp_path: Path) -> None:
    class Draw(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            torch.rand(7)

    trainer(tmp_path / "a", method=SDFT_METHOD).train()
    torch.manual_seed(99)
    trainer(tmp_path / "b", method=SDFT_METHOD, callbacks=[Draw()]).train()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    trainer(tmp_path / "c", method=SDFT_METHOD, seed=4).train()
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


# What is odd about a batch.


class Saying:
    """A sampler that says the same whatever it is asked, with the log-probabilities of a coin."""

    def __init__(self, *answers: str, ended: bool = True) -> None:
        tok = tokenizer()
        end = [tok.eos_token_id] if ended else []
        self.ids = [[*tok(answer, add_special_tokens=False)["input_ids"], *end] for answer in answers]
        self.ended = ended

    def sample(self, model: Any, prompts: Sequence[Tensor], *, num_completions: int, **options: Any) -> Any:
        one = [
            SampledCompletion(
                torch.tensor(ids, dtype=torch.int64), torch.full((len(ids),), math.log(0.5)), self.ended and bool(ids)
            )
            for ids in self.ids
        ]
        return [[one[i % len(one)] for i in range(num_completions)] for _ in prompts]


def silent(*, completion: str, **columns: Any) -> float:
    return 0.0


def without_loss(tmp_path: Path, **options: Any) -> list[dict[str, Any]]:
    """Runs two steps, that must leave the weights as they are, and returns the log."""
    made = trainer(tmp_path, **options)
    assert not moves(made)
    assert made.state.global_step == 2
    log = lines(tmp_path)
    assert [line["loss"] for line in log] == [0.0, 0.0]
    assert all(line["loss/active_tokens"] == 0 for line in log)
    return log


def test_a_group_without_success_or_feedback_carries_no_loss_and_is_counted(tmp_path: Path) -> None:
    log = without_loss(tmp_path, method=SDPO_METHOD, kind="sdpo", reward_funcs=[silent])
    for line in log:
        assert line["self_distillation/success_group_fraction"] == 0
        assert line["self_distillation/reprompt_sample_fraction"] == 0
        assert line["completions/count"] == line["completions/without_loss"] == line["context/missing"] == 16
    assert log[-1]["samples"] == 32


def test_empty_completions_carry_no_loss_and_are_counted(tmp_path: Path) -> None:
    log = without_loss(tmp_path, sampler=Saying("", ended=False))
    assert all(line["completions/empty_ratio"] == 1 for line in log)
    assert all(line["completions/without_loss"] == 4 for line in log)


def test_an_empty_completion_among_others_changes_nothing_for_them(tmp_path: Path) -> None:
    method = replace(SDPO_METHOD, num_generations=2)
    made = trainer(
        tmp_path, method=method, kind="sdpo", reward_funcs=[with_feedback], sampler=Saying("", "a1 b2", ended=False)
    )
    assert moves(made)
    assert [line["completions/empty_ratio"] for line in lines(tmp_path)] == [0.5, 0.5]
    assert all(math.isfinite(loss) and loss > 0 for _, loss in losses(tmp_path))


def test_completions_that_are_all_masked_carry_no_loss(tmp_path: Path) -> None:
    log = without_loss(tmp_path, sampler=Saying("a1 b2", ended=False), mask_truncated_completions=True)
    assert all(line["completions/truncated_masked"] == 4 for line in log)
    # Completions no longer than the tokens that carry no loss are masked as well.
    without_loss(tmp_path / "short", method=SDFTAsRun(template=SHOW), sampler=Saying("a1 b2"))


def test_rewards_that_are_alike_have_no_policy_gradient(tmp_path: Path) -> None:
    made = trainer(tmp_path, method=GRPO(num_generations=4), kind="rl", reward_funcs=[silent])
    assert not moves(made)
    assert all(line["self_distillation/flat_group_fraction"] == 1 for line in lines(tmp_path))


def test_a_row_without_privileged_context_carries_no_loss_and_the_others_do(tmp_path: Path) -> None:
    data = rows("sdft", task="luma", count=8, seed=0)
    for row in data[::2]:
        del row["privileged_context"]
    trainer(tmp_path, train_dataset=data, per_device_train_batch_size=8, max_steps=1).train()
    assert lines(tmp_path)[0]["context/missing"] == lines(tmp_path)[0]["completions/without_loss"] == 4
    with pytest.raises(DataError, match="needs a column `privileged_context`"):
        trainer(tmp_path, train_dataset=[{k: v for k, v in row.items() if k != "privileged_context"} for row in data])


def test_an_anchor_is_held_to_the_frozen_teacher(tmp_path: Path) -> None:
    """A student that is the teacher has nothing to learn of it; one that has moved is drawn back."""
    data = rows("sdft", task="luma", count=8, seed=0)
    for row in data[1:]:
        del row["privileged_context"]
    method = SDFTAsRun(template=SHOW, teacher="frozen", anchor=True, skip_first_tokens=0)
    made = trainer(tmp_path, method=method, train_dataset=data, per_device_train_batch_size=8, max_steps=3)
    made.train()
    log = lines(tmp_path)
    assert [line["context/anchored"] for line in log] == [7, 7, 7]
    assert all(line["completions/without_loss"] == line["context/missing"] == 0 for line in log)
    for anchor in (True, False):
        folder = tmp_path / f"anchor-{anchor}"
        method = SDFTAsRun(template=SHOW, teacher="frozen", anchor=anchor, skip_first_tokens=0)
        options = {"per_device_train_batch_size": 1, "max_steps": 1, "train_sampling_strategy": "sequential"}
        other = trainer(folder, method=method, train_dataset=[*data[1:], data[0]], **options)
        with torch.no_grad():
            for weight in other.model.parameters():
                weight.mul_(1.05)
        assert moves(other) is anchor


def sometimes(*, completion: str, answer: str, **columns: Any) -> float:
    return float("nan") if int(answer[1]) % 2 else 1.0


def test_a_nan_reward_stops_the_run_or_drops_the_completion_and_is_counted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": GRPO(num_generations=4), "kind": "rl", "reward_funcs": [sometimes, fraction]}
    with pytest.raises(RewardError, match=r"sometimes, rows, row .* finite number, got nan"):
        trainer(tmp_path / "raise", **options).train()
    made = trainer(tmp_path / "drop", reward_on_error="drop", max_steps=6, **options)
    made.train()
    log = lines(tmp_path / "drop")
    dropped = sum(line["rewards/dropped"] for line in log)
    # Every row once: so many of 24 have a first digit that is odd.
    odd = sum(int(row["answer"][1]) % 2 for row in rows("rl", task="luma", count=24, seed=0))
    assert dropped == 4 * odd
    assert 0 < odd < 24
    assert sum(line["completions/without_loss"] for line in log) == dropped
    assert sum(line["completions/count"] for line in log) == 96
    assert any(line["self_distillation/unjudged_fraction"] > 0 for line in log)


def test_a_dropped_completion_carries_no_divergence_either(tmp_path: Path) -> None:
    def broken(**columns: Any) -> float:
        raise ValueError("no")

    log = without_loss(tmp_path, reward_funcs=[broken], reward_on_error="drop")
    assert all(line["rewards/dropped"] == line["rewards/raised"] == 4 for line in log)


def test_what_carries_no_loss_is_not_computed(tmp_path: Path) -> None:
    def first_only(*, answer: str, completion: str, **columns: Any) -> Any:
        return (0.0, answer) if completion.startswith("a") else (0.0, None)

    method = replace(SDPO_METHOD, num_generations=2)
    options: dict[str, Any] = {"method": method, "kind": "sdpo", "reward_funcs": [first_only]}
    trainer(tmp_path / "both", sampler=Saying("a1 b2 c3", "b2 c3 d4 e5 a1"), **options).train()
    trainer(tmp_path / "one", sampler=Saying("a1 b2 c3", ""), **options).train()
    for both, one in zip(lines(tmp_path / "both"), lines(tmp_path / "one"), strict=True):
        assert both["prefix/student_tokens"] == one["prefix/student_tokens"]
        assert both["loss"] == one["loss"]
        assert both["loss/active_fraction"] == pytest.approx(4 / 10)
        assert one["loss/active_fraction"] == pytest.approx(4 / 5)


# Reuse, importance, teachers.


def test_completions_are_used_num_iterations_times(tmp_path: Path) -> None:
    trainer(
        tmp_path, method=SDPO_METHOD, kind="sdpo", reward_funcs=[with_feedback], num_iterations=2, max_steps=4
    ).train()
    shown = [
        [row["completion"] for row in lines(tmp_path, "samples.jsonl") if row["step"] == step] for step in range(1, 5)
    ]
    assert shown[0] == shown[1] != shown[2] == shown[3]
    assert [line["samples"] for line in lines(tmp_path)] == [16, 16, 32, 32]


def test_the_importance_clip_weighs_by_the_samplers_log_probabilities(tmp_path: Path) -> None:
    """A coin that said likely words is weighed down: by p / 0.5, and never by more than the clip."""
    options: dict[str, Any] = {"kind": "sdpo", "reward_funcs": [with_feedback], "sampler": Saying("a1"), "max_steps": 1}
    loss_of = {}
    for clip in (None, 1e-3, 1e6):
        method = replace(SDPO_METHOD, importance_clip=clip)
        trainer(tmp_path / str(clip), method=method, **options).train()
        loss_of[clip] = losses(tmp_path / str(clip))[0][1]
    assert loss_of[1e-3] <= 1e-3 * loss_of[None] * (1 + 1e-5)
    assert loss_of[1e6] != loss_of[None]
    assert 0 < loss_of[1e6] < 2 * loss_of[None]  # p is at most 1


def test_the_teacher_follows_after_each_step_and_not_before(tmp_path: Path) -> None:
    made = trainer(tmp_path, method=replace(SDFT_METHOD, teacher="ema", update_rate=0.25), max_steps=1)
    name = "lm_head.weight"
    before = weights_of(made)[name]
    assert isinstance(made.teacher, EMA)
    assert torch.equal(made.teacher._kept[name].value, before)
    made.train()
    after = weights_of(made)[name]
    assert not torch.equal(before, after)
    assert torch.allclose(made.teacher._kept[name].value, 0.75 * before + 0.25 * after, atol=1e-7)


def test_a_module_can_be_the_teacher(tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_config(world_model().config)
    made = SelfDistillationTrainer(
        world_model(),
        config(tmp_path, max_steps=1),
        method=replace(SDFT_METHOD, teacher="frozen"),
        train_dataset=rows("sdft", task="luma", count=8, seed=0),
        processing_class=tokenizer(),
        teacher=other,
    )
    assert isinstance(made.teacher, Frozen)
    made.train()
    # A random teacher is close to a uniform one.
    assert lines(tmp_path)[0]["teacher/entropy"] > 0.8 * math.log(134)


# What the run says.


def test_a_run_writes_its_log_its_samples_and_its_description(tmp_path: Path) -> None:
    trainer(
        tmp_path, method=SDPO_METHOD, kind="sdpo", reward_funcs=[with_feedback, fraction], reward_weights=[1.0, 0.5],
        leak_probe_every=1, overlap_probe_every=1, drift_probe_every=1,
    ).train()  # fmt: skip
    first = lines(tmp_path)[0]
    assert first["step"] == 1
    for name in (
        "loss", "grad_norm", "learning_rate", "self_distillation/reward_mean", "completions/mean_length",
        "context/overflow", "context/shared_fraction", "student/entropy", "teacher/entropy_gap", "teacher/leak_kl",
        "student/drift_kl", "distillation/student_mass", "prefix/shared_fraction", "rewards/fraction/mean",
    ):  # fmt: skip
        assert name in first, name
    assert first["student/drift_kl"] == pytest.approx(0, abs=1e-6)
    assert lines(tmp_path)[1]["student/drift_kl"] > 1e-4
    means = [first[f"rewards/{name}/mean"] for name in ("with_feedback", "fraction")]
    assert first["self_distillation/reward_mean"] == pytest.approx(means[0] + 0.5 * means[1])
    shown = lines(tmp_path, "samples.jsonl")
    assert [row["step"] for row in shown] == [1] * 4 + [2] * 4
    for row in shown:
        assert len(row["tokens"]) == len(row["per_token"]) > 0
        assert "".join(row["tokens"]).replace(" ", "").startswith(row["completion"].replace(" ", ""))
        assert row["active"] is (max(row["per_token"]) > 0)
        assert (row["feedback"] is None) is (row["reward"] >= 1)
    assert len({row["prompt"] for row in shown[:4]}) == 4
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["method"]["name"] == "SDPO"
    assert told["config"]["max_completion_length"] == 8


def test_completions_are_shown_as_a_table_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, print_completions=True, max_steps=1).train()
    assert "step 1" in (out := capsys.readouterr().out)
    assert "privileged" in out
    assert "luma" in out


def test_evaluation_is_the_same_each_time_and_changes_nothing(tmp_path: Path) -> None:
    questions = rows("sdft", task="luma", count=20, seed=0, split="eval")
    options: dict[str, Any] = {"eval_dataset": questions, "reward_funcs": [exact]}
    made = trainer(tmp_path / "with", eval_strategy="steps", eval_steps=1, eval_generations=3, **options)
    state = torch.get_rng_state()
    first, second = made.evaluate(), made.evaluate()
    assert torch.equal(state, torch.get_rng_state())
    for name, value in first.items():
        if "runtime" not in name and "per_second" not in name:
            assert second[name] == value, name
    assert 0 <= first["eval_reward_mean"] <= 1
    assert first["eval_questions"] == 20
    made.train()
    trainer(tmp_path / "without", **options).train()
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    evaluations = [line for line in lines(tmp_path / "with") if "eval_reward_mean" in line]
    assert [line["step"] for line in evaluations] == [0, 0, 1, 2]
    assert evaluations[0]["eval_reward_mean"] == first["eval_reward_mean"]
    assert (evaluations[0]["samples"], evaluations[0]["tokens"]) == (0, 0)


def test_what_is_measured_before_a_resumed_run_is_not_in_its_log_twice(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_dataset": rows("sdft", task="luma", count=4, seed=0, split="eval")}
    for steps, resume in ((1, False), (2, True)):
        made = trainer(tmp_path, reward_funcs=[exact], save_strategy="steps", save_steps=1, max_steps=steps, **options)
        made.evaluate()
        made.train(resume_from_checkpoint=resume)
    assert [line["step"] for line in lines(tmp_path) if "eval_reward_mean" in line] == [0]
    assert [step for step, _ in losses(tmp_path)] == [1, 2]


def test_several_evaluation_sets_have_names(tmp_path: Path) -> None:
    parts = {name: rows("sdft", task=name, count=4, seed=0, split="eval") for name in ("luma", "pi")}
    made = trainer(tmp_path, eval_dataset=parts, reward_funcs=[exact])
    metrics = made.evaluate()
    assert metrics["eval_pi_reward_mean"] > metrics["eval_luma_reward_mean"]


# Models.

TINY: dict[str, Any] = {
    "vocab_size": 134,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
CHAT_MODELS = {
    "llama": LlamaConfig(**TINY),
    "qwen3": Qwen3Config(**TINY | {"head_dim": 12}),
    "gemma3": Gemma3TextConfig(
        **TINY
        | {
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    ),
}


@pytest.mark.parametrize("family", CHAT_MODELS)
@pytest.mark.parametrize("name", ["sdft_as_run", "sdpo", "rl_tilt"])
def test_random_chat_models_of_every_family_train(name: str, family: str, tmp_path: Path) -> None:
    method, kind = METHODS[name]
    made = trainer(
        tmp_path,
        model=AutoModelForCausalLM.from_config(CHAT_MODELS[family]),
        method=method,
        kind=kind,  # type: ignore[arg-type]
        reward_funcs=[fraction if kind == "rl" else with_feedback],
        max_steps=2,
    )
    # A random model is seldom right, and then the tilt has nothing to compare.
    assert moves(made) or name == "rl_tilt"
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path))
    assert all(line["prefix/fallbacks"] == 0 for line in lines(tmp_path))


def test_a_model_that_sees_is_refused_by_name_before_any_work(tmp_path: Path) -> None:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    seeing = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TINY | {"head_dim": 8}, vision_config=vision | {"image_size": 28, "patch_size": 14})
    )
    with pytest.raises(UnsupportedModelError, match="Gemma3ForConditionalGeneration reads more than text"):
        trainer(tmp_path / "run", model=seeing)
    assert not (tmp_path / "run").exists()


SEEN = [
    pytest.param({"images": ["cat.png"]}, "`images`", id="images"),
    pytest.param({"pixel_values": [[0.0]], "image_grid_thw": [[1]]}, "`pixel_values`, `image_grid_thw`", id="inputs"),
    pytest.param(
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "luma a"}]}]},
        "message 0 has a part of type 'image'",
        id="part",
    ),
]


@pytest.mark.parametrize(("more", "message"), SEEN)
def test_rows_with_images_are_refused_by_row_before_a_model_is_loaded(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = rows("sdft", task="luma", count=3, seed=0)
    Path(tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*good, good[0] | more]))
    with pytest.raises(UnsupportedModelError, match=f"train.jsonl:4: .*{message}.* take token ids alone"):
        trainer(tmp_path / "run", model="no/such-model", train_dataset=str(tmp_path / "train.jsonl"))
    questions = [row | {"images": None} for row in good]  # of a data set in which others have some
    made = trainer(tmp_path / "run", train_dataset=questions)
    with pytest.raises(UnsupportedModelError, match=r"row 0: .*take token ids alone"):
        made.evaluate([good[0] | more])


@pytest.mark.parametrize("teacher", ["adapter_off", "ema", "frozen"])
def test_an_adapter_is_trained_and_resumed(teacher: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    method = replace(SDFT_METHOD, teacher=teacher)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    options: dict[str, Any] = {"method": method, "peft_config": adapter, "max_steps": 4}
    whole = trainer(tmp_path / "whole", **options)
    trained = {name for name, weight in whole.model.named_parameters() if weight.requires_grad}
    before = weights_of(whole)
    whole.train()
    changed = {name for name, weight in weights_of(whole).items() if not torch.equal(weight, before[name])}
    assert changed <= trained
    assert len(changed) > len(trained) / 2
    trainer(tmp_path / "part", save_strategy="steps", save_steps=2, **options | {"max_steps": 3}).train()
    resumed = trainer(tmp_path / "part", **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def test_a_model_can_be_given_by_name(tmp_path: Path) -> None:
    made = SelfDistillationTrainer(
        str(CHECKPOINT),
        config(tmp_path, max_steps=1),
        method=SDFT_METHOD,
        train_dataset=rows("sdft", task="luma", count=4, seed=0),
    )
    made.train()
    assert losses(tmp_path)[0][1] > 0
    assert json.loads((tmp_path / "run.json").read_text())["model"] == str(CHECKPOINT)


def test_checkpointed_activations_and_micro_batches_give_the_same_loss(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": SDPO_METHOD, "kind": "sdpo", "reward_funcs": [with_feedback]}
    trainer(tmp_path / "plain", **options).train()
    for name, changes in {
        "checkpointed": {"activation_checkpointing": True},
        "two_phase": {"micro_batch": 2},
        "a budget of tokens": {"max_pass_tokens": 40},
        "naive": {"strategy": "naive"},
    }.items():
        trainer(tmp_path / name, **options, **changes).train()
        wanted = [loss for _, loss in losses(tmp_path / "plain")]
        assert [loss for _, loss in losses(tmp_path / name)] == pytest.approx(wanted, rel=1e-3), name


def test_a_budget_of_tokens_is_what_rows_are_filled_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = []

    def filled(loads: Any, most: int) -> list[list[int]]:
        budgets.append(most)
        return [[index] for index in range(len(loads))]

    monkeypatch.setattr(runner, "filled", filled)
    trainer(tmp_path, method=SDFT_METHOD, kind="sdft", max_steps=2, max_pass_tokens=40).train()
    assert budgets == [40, 40]


def test_the_error_of_gradients_that_may_have_one_is_logged(tmp_path: Path) -> None:
    method = replace(SDFT_METHOD, gradient_tolerance=0.05)
    trainer(tmp_path, method=method, kind="sdft", max_steps=2).train()
    found = [line["loss/gradient_error"] for line in lines(tmp_path) if "loss/gradient_error" in line]
    assert len(found) == 2
    assert all(0 <= error <= 0.05 for error in found)


# What is refused.


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"teacher": "Qwen/Qwen3-0.6B"}, r"teacher must be an object, such as Frozen\(another model\), .* got 'Qwen"),
        ({"teacher": EMA}, "teacher must be an object, .* got <class 'sdcore.teachers.ema.EMA'>"),
        ({"reference": "adapter_off"}, "reference must be an object, .* got 'adapter_off'"),
        ({"sampler": "vllm"}, r"sampler must be an object, such as ModelSampler\(\), got 'vllm'"),
        ({"sampler": ModelSampler}, "sampler must be an object, .* got <class"),
        ({"context": "{{ prompt }}"}, "context must be an object, .* got '{{ prompt }}'"),
        ({"processing_class": "Qwen/Qwen3-0.6B"}, "processing_class must be an object, .* got 'Qwen/Qwen3-0.6B'"),
        ({"peft_config": {"r": 8}}, r"peft_config must be an object, such as LoraConfig\(...\), got {'r': 8}"),
    ],
)
def test_an_object_that_is_given_by_its_name_or_class_is_refused_before_anything_is_loaded(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=said):
        SelfDistillationTrainer("no/such-model", config(tmp_path), method=SDFT_METHOD, **given)


def test_a_reward_function_that_lacks_a_column_is_refused_before_anything_is_loaded_or_sampled(tmp_path: Path) -> None:
    def by_trl(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.0 for _ in completions]

    def compares(completion: str, answer: str) -> float:
        return float(completion == answer)

    whole, last = rows("rl", task="luma", count=4, seed=0), {"prompt": "luma a"}
    for reward, data, evaluated, said in (
        (by_trl, whole, None, "by_trl needs prompts, completions, which rows, row 0 .* with completion, prompt, "),
        (compares, [*whole, last], None, "compares needs answer, which rows, row 4 does not have"),
        (compares, whole, [last], "compares needs answer, which rows, row 0 does not have"),
        (compares, whole, {"a": whole, "b": [last]}, "compares needs answer, which rows, row 0 does not have"),
    ):
        with pytest.raises(ArgumentError, match=said):
            SelfDistillationTrainer(
                "no/such-model",
                config(tmp_path),
                method=GRPO(),
                reward_funcs=[reward],
                train_dataset=data,
                eval_dataset=evaluated,
            )
    made = trainer(tmp_path, kind="rl", method=GRPO(num_generations=2), reward_funcs=[compares])
    with pytest.raises(ArgumentError, match="compares needs answer, which rows, row 0"):
        made.evaluate([last])


def test_a_quiet_run_shows_no_bar_and_warns_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows("sdft", task="luma", count=8, seed=0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        made = SelfDistillationTrainer(
            CHECKPOINT,
            config(tmp_path / "run", disable_tqdm=True, max_steps=1, save_strategy="steps", save_steps=1),
            method=SDFT_METHOD,
            train_dataset=tmp_path / "data",
            peft_config=peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        made.train()
        made.save_model()
    shown = capfd.readouterr()
    assert "%|" not in shown.err + shown.out
    assert "examples/s" not in shown.err + shown.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"sampling_temperature": -1.0}, "sampling_temperature must be at least 0 and finite, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        ({"strategy": "fast"}, "strategy must be one of auto, packed, .*, got 'fast'"),
        ({"reward_on_error": "ignore"}, "reward_on_error must be one of raise, drop, got 'ignore'"),
        ({"reward_timeout": 0.0}, "reward_timeout must be positive seconds or None, got 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"ddp_find_unused_parameters": True}, "ddp_find_unused_parameters must be False"),
        ({"log_completions_every": -1}, "log_completions_every must be at least 0, got -1"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs must be an object, got 'x'"),
    ],
)
def test_arguments_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        SelfDistillationConfig(output_dir=str(tmp_path), use_cpu=True, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": SDPO_METHOD}, "reward_funcs must have a function for SDPO"),
        ({"method": GRPO(), "reward_funcs": [silent], "num_iterations": 2, "top_p": 0.9}, "top_p must be 1"),
        (
            {"method": GRPO(), "reward_funcs": [silent], "sampling_temperature": 0.0},
            "sampling_temperature must not be 0",
        ),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be 'random' or 'sequential'"),
        ({"reward_funcs": [silent], "reward_weights": [1.0, 2.0]}, "weights must be finite, one per reward function"),
        ({"reward_funcs": ["nowhere:f"]}, "no module 'nowhere'"),
    ],
)
def test_a_trainer_refuses_what_does_not_go_together(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        trainer(tmp_path, **options)


def test_a_trainer_refuses_other_arguments_and_methods(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="method must be a Method such as SDPO"):
        trainer(tmp_path, method="sdpo")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="not a transformers model"):
        trainer(tmp_path, model=torch.nn.Linear(2, 2))


def test_a_prompt_that_is_too_long_is_an_error_that_names_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows, row \d+: a prompt may have max_prompt_length=3 tokens, got"):
        trainer(tmp_path, max_prompt_length=3).train()


def test_the_order_of_the_data_is_told_its_epoch_whatever_wraps_the_loader(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.get_train_dataloader()
    assert made.order is not None
    made.state.epoch = 1.5  # as in a checkpoint
    made.callback_handler.on_epoch_begin(made.args, made.state, made.control)
    assert made.order.epoch == 1


def test_the_sampler_is_asked_with_the_configs_options(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    class Recording:
        def sample(self, model: Any, prompts: Any, **options: Any) -> Any:
            asked.append(options)
            return ModelSampler().sample(model, prompts, **options)

    class Cool(TrainerCallback):
        def on_step_end(self, args: Any, *others: Any, **kwargs: Any) -> None:
            args.sampling_temperature = 0.5

    options: dict[str, Any] = {"top_k": 5, "top_p": 0.9, "sampling_temperature": 0.7, "callbacks": [Cool()]}
    trainer(tmp_path, sampler=Recording(), gradient_accumulation_steps=2, **options).train()
    assert {(a["top_k"], a["top_p"], a["max_new_tokens"]) for a in asked} == {(5, 0.9, 8)}
    assert [a["temperature"] for a in asked] == [0.7, 0.7, 0.5, 0.5]  # as the arguments are at each step
    assert len({a["seed"] for a in asked}) == len(asked) == 4
    assert asked[0]["eos_token_id"] == (tokenizer().eos_token_id,)


def after_a_first_run(folder: Path) -> Any:
    """What a LoRA run leaves in its output folder; its model."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    first = trainer(folder, model=str(CHECKPOINT), peft_config=adapter, max_steps=2, learning_rate=1e-2)
    first.train()
    first.save_model()
    return first.model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 5, 9, 4]])).logits


@pytest.mark.parametrize("given", ["folder", "checkpoint", "loaded"])
def test_a_second_run_goes_on_from_what_the_adapter_of_the_first_learned(given: str, tmp_path: Path) -> None:
    expected = logits_of(after_a_first_run(tmp_path / "first"))
    model: Any = str(tmp_path / "first")
    if given == "checkpoint":
        model = str(next((tmp_path / "first").glob("checkpoint-*"), tmp_path / "first"))
    if given == "loaded":
        peft = pytest.importorskip("peft")
        model = peft.PeftModel.from_pretrained(world_model(), model, is_trainable=True)
    second = trainer(tmp_path / "second", model=model, max_steps=2, learning_rate=1e-2)
    assert torch.allclose(logits_of(second.model), expected, atol=1e-5)
    assert not torch.allclose(logits_of(world_model()), expected, atol=1e-3)
    before = weights_of(second)
    second.train()
    changed = {name for name, weight in weights_of(second).items() if not torch.equal(weight, before[name])}
    assert any("lora_" in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name for name in changed)


def test_an_adapter_whose_base_model_has_gone_is_refused_by_its_path(tmp_path: Path) -> None:
    after_a_first_run(tmp_path / "first")
    file = tmp_path / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ArgumentError, match=r"^the base model of .*first must be a folder .* got .*gone"):
        trainer(tmp_path / "second", model=str(tmp_path / "first"))


@pytest.mark.parametrize("given", ["folder", "PeftModel", "transformers"])
def test_a_new_adapter_beside_one_that_is_there_is_refused(given: str, tmp_path: Path) -> None:
    trained = after_a_first_run(tmp_path / "first")
    peft = pytest.importorskip("peft")
    model: Any = {"folder": str(tmp_path / "first"), "PeftModel": trained}.get(given)
    model = model or AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    with pytest.raises(ArgumentError, match="peft_config must be None for a model that has an adapter already"):
        trainer(tmp_path / "second", model=model, peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("given", ["frozen", "PeftModel", "transformers"])
def test_a_model_of_which_nothing_is_trained_is_refused(given: str, tmp_path: Path) -> None:
    model: Any = world_model().requires_grad_(False)
    if given != "frozen":
        peft = pytest.importorskip("peft")
        after_a_first_run(tmp_path / "first")
        load = AutoModelForCausalLM.from_pretrained
        model = peft.PeftModel.from_pretrained(model, tmp_path / "first") if given == "PeftModel" else None
        model = load(tmp_path / "first") if model is None else model
    with pytest.raises(ArgumentError, match=r"model must have weights that are trained, .* is_trainable=True"):
        trainer(tmp_path / "second", model=model)
