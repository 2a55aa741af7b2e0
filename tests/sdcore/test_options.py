"""Every option has an effect or is refused: transformers' own fields one by one, and ours in combination with others.

What has its effect was found by setting each field of transformers 5.23 to another value and comparing losses, logs,
weights and files of a run. A field that another version brings stands in no list here, and fails the first test.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig  # type: ignore[attr-defined, import-untyped, unused-ignore]
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainingArguments,
)
from typer.testing import CliRunner

from sdcore.cli.main import app
from sdcore.contexts import SuccessOrFeedback
from sdcore.data import read_examples
from sdcore.errors import ArgumentError, NotFiniteError, UnsupportedModelError
from sdcore.presets import GRPO, OPSD, SFT, Method, SDFTAsRun
from sdcore.training.config import WITHOUT_EFFECT, SelfDistillationConfig
from sdcore.training.dry_run import dry_run
from sdcore.training.evaluation import JUDGED, MEASURED
from sdcore.training.prepare import check_engine, check_model, check_template_kwargs, within_model
from sdcore.world import CHECKPOINT
from sdcore.world.data import fraction, rows
from tests.sdcore.trainer_runs import SHOW, lines, tokenizer, trainer, world_model

ROOT = Path(__file__).resolve().parents[2]

# What transformers does with it, or accelerate, is what it does here: the optimizer, its schedule and precision,
WITH_EFFECT = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay
    adam_beta1 adam_beta2 adam_epsilon max_grad_norm gradient_accumulation_steps bf16 fp16 tf32 torch_compile
    torch_compile_backend torch_compile_mode activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs use_liger_kernel liger_kernel_config full_determinism use_cpu
    num_train_epochs max_steps seed data_seed per_device_train_batch_size per_device_eval_batch_size
    train_sampling_strategy dataloader_drop_last dataloader_num_workers dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order dataloader_pin_memory
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout fsdp fsdp_config
    output_dir logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level
    log_level_replica include_num_input_tokens_seen disable_tqdm report_to run_name debug skip_memory_metrics
    eval_strategy eval_steps eval_delay eval_on_start metric_for_best_model greater_is_better load_best_model_at_end
    save_strategy save_steps save_on_each_node save_total_limit save_only_model enable_jit_checkpoint
    ignore_data_skip restore_callback_states_from_checkpoint resume_from_checkpoint
"""
# Services, which are told what they are told elsewhere; and what scripts read and no trainer does.
HARMLESS = """
    project trackio_space_id trackio_bucket_id trackio_static_space_id push_to_hub hub_token hub_private_repo
    hub_model_id hub_strategy hub_always_push hub_revision do_train do_eval do_predict local_rank
"""
# Refused by what they are set to, with the rest of what is asked, in the tests below or in those of two processes.
REFUSED_ELSEWHERE = {"accelerator_config", "deepspeed"}


def test_every_argument_of_transformers_has_its_effect_or_is_refused() -> None:
    known = {*WITH_EFFECT.split(), *HARMLESS.split(), *REFUSED_ELSEWHERE, *WITHOUT_EFFECT}
    listed = len(WITH_EFFECT.split()) + len(HARMLESS.split()) + len(REFUSED_ELSEWHERE) + len(WITHOUT_EFFECT)
    assert len(known) == listed, "in two lists"
    assert {field.name for field in dataclasses.fields(TrainingArguments)} <= known


OTHER: dict[str, Any] = {
    "batch_eval_metrics": True,
    "eval_accumulation_steps": 4,
    "include_for_metrics": ["inputs"],
    "label_names": ["answer"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "size",
    "neftune_noise_alpha": 5.0,
    "parallelism_config": ParallelismConfig(),
    "torch_empty_cache_steps": 10,
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_an_argument_without_effect_is_refused_by_name(name: str, tmp_path: Path) -> None:
    default = next(field.default for field in dataclasses.fields(SelfDistillationConfig) if field.name == name)
    value = OTHER.get(name, not default)
    with pytest.raises(ArgumentError, match=rf"(?s)^{name} must be .*, got .*: it has no effect here, as "):
        SelfDistillationConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_arguments_that_were_checked_can_be_given_again(tmp_path: Path) -> None:
    args = SelfDistillationConfig(output_dir=str(tmp_path), use_cpu=True, label_smoothing_factor=0.0)
    assert dataclasses.replace(args, max_steps=5).max_steps == 5  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config must be left out"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config must be left out"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "accelerator_config must be left out"),
        ({"optim": "lomo"}, "optim must be an optimizer that steps after .*, got 'lomo'"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["q"]}, "got 'galore_adamw_layerwise'"),
        ({"ignore_data_skip": True, "num_iterations": 2}, "ignore_data_skip must be False with num_iterations=2"),
        ({"strategy": "naive", "verify": "always"}, "verify must not be 'always' with strategy='naive'"),
        ({"max_pass_tokens": 40, "micro_batch": 2}, "max_pass_tokens must be None with micro_batch .* got 40"),
        ({"max_pass_tokens": 40, "strategy": "two_phase"}, "max_pass_tokens must be None with micro_batch .* got 40"),
        ({"print_completions": True, "log_completions_every": 0}, "print_completions must be False where none"),
        ({"print_completions": True, "num_completions_shown": 0}, "print_completions must be False where none"),
        ({"sampling_temperature": 0.0, "top_p": 0.9}, "top_p must be 1 and top_k None with sampling_temperature=0"),
        ({"sampling_temperature": 0.0, "eval_temperature": 0.0, "top_k": 5}, "top_p must be 1 and top_k None"),
    ],
)
def test_arguments_that_others_leave_without_effect_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=message):
        SelfDistillationConfig(output_dir=str(tmp_path), use_cpu=True, **changes)


def test_bf16_is_taken_where_there_is_no_device_but_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert SelfDistillationConfig(output_dir=str(tmp_path), bf16=True).use_cpu
    assert not SelfDistillationConfig(output_dir=str(tmp_path)).use_cpu


def test_what_is_sampled_at_another_temperature_may_be_cut(tmp_path: Path) -> None:
    SelfDistillationConfig(str(tmp_path), use_cpu=True, sampling_temperature=0.0, eval_temperature=1.0, top_p=0.9)


class Parrot:
    """A sampler of one's own, which is never asked."""

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": Parrot(), "generation_batch_size": 2}, "generation_batch_size must be None with a sampler"),
        (
            {"method": GRPO(), "reward_funcs": [fraction], "teacher_device": "cpu"},
            "teacher_device must be None for GRPO",
        ),
        ({"method": Method(template=SHOW), "teacher_device": "cpu"}, "teacher_device must be None for Method with"),
        ({"model_dtype": "bfloat16"}, "model_dtype is of a model that is given by name"),
        ({"chat_template_kwargs": {"enable_thinkin": False}}, "chat template reads, got 'enable_thinkin'"),
    ],
)
def test_a_trainer_refuses_options_without_effect(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    chat = tokenizer()
    chat.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking %}<think>{% endif %}"
    with pytest.raises(ArgumentError, match=message):
        trainer(tmp_path, processing_class=chat, **options)


def test_options_with_effect_are_not_refused(tmp_path: Path) -> None:
    chat = tokenizer()
    chat.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking %}<think>{% endif %}"
    for kwargs in ({"enable_thinking": False}, {"continue_final_message": True}, None):
        check_template_kwargs(chat, kwargs)
    chat.chat_template = None
    check_template_kwargs(chat, {"anything": 1})  # rows of plain text, and tokenizers with templates of their own
    model = world_model().to(torch.bfloat16)
    trainer(tmp_path, model=model, model_dtype="bfloat16", teacher_device="cpu", processing_class=tokenizer())
    trainer(tmp_path, method=GRPO(kl_anchor=0.1, teacher="frozen"), reward_funcs=[fraction], teacher_device="cpu")


# What a model asks for, and what its weights and its files are.

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EXPERTS: dict[str, Any] = SMALL | {"vocab_size": 134, "num_local_experts": 2, "num_key_value_heads": 2}


def gpt2(**changes: float) -> Any:
    zero: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=134, n_embd=16, n_layer=1, n_head=2, **(zero | changes)))


UNHEEDED: dict[str, tuple[Any, str | None]] = {
    "dropout of modules": (lambda: gpt2(embd_pdrop=0.1), "asks for dropout of 0.1, which"),
    "of attention": (
        lambda: LlamaForCausalLM(LlamaConfig(vocab_size=134, attention_dropout=0.2, **SMALL)),
        "asks for attention_dropout=0.2, which",
    ),
    "of layers": (
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=134, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, layerdrop=0.5
            )
        ),
        "layerdrop=0.5",
    ),
    "noise of routers": (
        lambda: MixtralForCausalLM(MixtralConfig(router_jitter_noise=0.1, **EXPERTS)),
        "jitter_noise=0.1",
    ),
    "a loss of routers": (
        lambda: MixtralForCausalLM(MixtralConfig(output_router_logits=True, **EXPERTS)),
        "asks for router_aux_loss_coef, which",
    ),
    "nothing": (world_model, None),
    "no dropout": (gpt2, None),
    "experts": (lambda: MixtralForCausalLM(MixtralConfig(**EXPERTS)), None),
}


@pytest.mark.parametrize(("make", "said"), UNHEEDED.values(), ids=UNHEEDED)
def test_what_a_model_asks_for_and_no_pass_does_is_said(make: Any, said: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_model(make())
    texts = [str(warning.message) for warning in caught if "has no effect" in str(warning.message)]
    assert len(texts) == (said is not None)
    assert said is None or said in texts[0]


def test_dropout_of_an_adapter_is_said_to_be_off(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="asks for dropout of 0.05, which has no effect"):
        trainer(tmp_path, peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.05))


@pytest.mark.parametrize("method", [SFT(), Method(template=SHOW), OPSD(template=SHOW)])
def test_float16_weights_are_not_trained(method: Method, tmp_path: Path) -> None:
    model = world_model().half()
    model.save_pretrained(tmp_path / "half")
    tokenizer().save_pretrained(tmp_path / "half")
    kind: Any = "sft" if isinstance(method, SFT) else "opsd"
    by_name: dict[str, Any] = {"model": str(tmp_path / "half"), "model_dtype": "auto"}
    for options in ({"model": model}, by_name):
        with pytest.raises(
            UnsupportedModelError, match=r"model must have float32 or bfloat16 weights .* got float16 in"
        ):
            trainer(tmp_path, method=method, kind=kind, **options)
    model.requires_grad_(False)
    model.lm_head.float().requires_grad_(True)  # what rests may have any
    check_model(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.6},
        {"top_p": 0.9, "temperature": 0.9},
        {"num_return_sequences": 2},
        {"cache_implementation": "x"},
    ],
)
def test_a_generation_config_that_could_not_be_saved_is_refused_before_training(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = world_model()
    for name, value in changes.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=r"Fix these issues to save|Invalid `cache_implementation`"):
        model.save_pretrained(tmp_path / "late")
    with pytest.raises(
        ArgumentError,
        match="(?s)model must have a generation_config that transformers can save: .*" + next(iter(changes)),
    ):
        trainer(tmp_path, model=model)


@pytest.mark.parametrize(
    ("metric", "judged", "known"),
    [
        ("eval_reward", True, "reward_mean"),
        ("accuracy", True, "success_rate"),
        ("reward_mean", False, "mean_length"),
        ("eval_success_rate", False, "clipped_ratio"),
    ],
)
def test_a_best_metric_that_no_evaluation_has_is_refused(metric: str, judged: bool, known: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"metric_for_best_model": metric, "reward_funcs": [fraction] if judged else []}
    with pytest.raises(
        ArgumentError, match=f"metric_for_best_model must be one of .*{known}.* in this run, got '{metric}'"
    ):
        trainer(tmp_path, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 500},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    ],
)
def test_transformers_own_best_metric_is_refused_by_its_reason(changes: dict[str, Any], tmp_path: Path) -> None:
    message = r"metric_for_best_model must be one of .*got 'loss' \(transformers' default"
    with pytest.raises(ArgumentError, match=message):
        trainer(tmp_path, save_strategy=changes["eval_strategy"], **changes)


def test_every_metric_of_an_evaluation_may_be_the_best(tmp_path: Path) -> None:
    questions = rows("sdft", task="luma", count=2, seed=1)
    made = trainer(tmp_path, reward_funcs=[fraction], eval_dataset=questions)
    unjudged = trainer(tmp_path, eval_dataset=questions)
    assert {name.removeprefix("eval_") for name in made.evaluate()} == {"epoch", *MEASURED, *JUDGED}
    assert {name.removeprefix("eval_") for name in unjudged.evaluate()} == {"epoch", *MEASURED}
    for metric in ("reward_mean", "eval_dropped", "a_reward_mean"):  # one of several sets
        trainer(tmp_path, metric_for_best_model=metric, reward_funcs=[fraction])


# Steps that teach nothing, or would spoil the weights.


IDLE: dict[str, dict[str, Any]] = {
    "all are skipped": {"method": SDFTAsRun(template=SHOW, skip_first_tokens=100)},
    "all are cut": {"max_completion_length": 1, "mask_truncated_completions": True},
    "no context": {
        "train_sampling_strategy": "sequential",
        "train_dataset": [
            *({**row, "privileged_context": None} for row in rows("sdft", task="luma", count=8, seed=0)),
            *rows("sdft", task="luma", count=1, seed=0),
        ],
    },
}


@pytest.mark.parametrize("options", IDLE.values(), ids=IDLE)
def test_steps_without_any_loss_are_said(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no completion since the last line of the log has a loss"):
        trainer(tmp_path, **options).train()
    assert [line["loss"] for line in lines(tmp_path)] == [0, 0]


@pytest.mark.parametrize("method", [SFT(), Method(template=SHOW)])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_run_ends_before_a_gradient_that_is_no_number_reaches_the_weights(
    method: Method, max_grad_norm: float, tmp_path: Path
) -> None:
    kind: Any = "sft" if isinstance(method, SFT) else "opsd"
    made = trainer(
        tmp_path,
        method=method,
        kind=kind,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        max_grad_norm=max_grad_norm,
    )
    made.model.lm_head.weight.register_hook(lambda grad: grad * float("nan") if made.state.global_step == 1 else grad)
    with pytest.raises(NotFiniteError, match="step 2: the gradient's norm is nan"):
        made.train()
    assert all(bool(weight.isfinite().all()) for weight in made.model.parameters())
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


# What a teacher's prompt may be long.


def test_without_a_limit_a_context_is_cut_to_what_the_model_can_read(tmp_path: Path) -> None:
    data = rows("sdft", task="luma", count=8, seed=0)
    data = [row | {"privileged_context": " ".join([row["privileged_context"]] * 30)} for row in data]
    options: dict[str, Any] = {"train_dataset": data, "max_steps": 1, "per_device_train_batch_size": 2}
    with pytest.raises(ArgumentError, match="128 tokens, what the model has positions for"):
        trainer(tmp_path, method=OPSD(template=SHOW), **options)
    for limit in (None, 10_000):
        method = OPSD(template=SHOW, overflow="truncate_context", max_teacher_prompt_length=limit)
        made = trainer(tmp_path, method=method, **options)
        made.train()
        assert getattr(made.context, "max_teacher_prompt_length", None) == 128 - 8
        (line,) = [line for line in lines(tmp_path) if "loss" in line]
        assert line["context/overflow"] == 2
        assert line["context/dropped"] == 0


def test_a_limit_of_ones_own_that_is_lower_stays() -> None:
    builder = SuccessOrFeedback(overflow="drop_oldest_feedback", max_teacher_prompt_length=50)
    assert within_model(builder, 128, 8) == builder
    assert within_model(builder, 40, 8).max_teacher_prompt_length == 32
    assert within_model(builder, None, 8) == builder
    with pytest.raises(ArgumentError, match=r"max_completion_length must leave room .* 128 positions, got 128"):
        within_model(builder, 128, 128)


def test_a_dry_run_shows_the_context_as_it_is_cut() -> None:
    data = rows("sdft", task="luma", count=2, seed=0)
    examples = read_examples([row | {"privileged_context": " ".join([row["privileged_context"]] * 30)} for row in data])
    method = OPSD(template=SHOW, overflow="truncate_context")
    config: Any = AutoConfig.from_pretrained(CHECKPOINT)
    shown = dry_run(examples, tokenizer(), method, config, max_completion_length=8)
    assert max(shown.teacher_tokens) == 128 - 8
    assert not [remark for remark in shown.remarks if "positions" in remark]


# The command line, and several processes.


def said(*words: str) -> str:
    """What a command that is refused says."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    return result.output


def data_file(folder: Path) -> str:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows("sft", task="luma", count=4, seed=0)))
    return str(path)


@pytest.mark.parametrize("name", ["do_train", "do_eval", "do_predict"])
def test_what_transformers_tells_scripts_is_no_option_of_the_command(name: str, tmp_path: Path) -> None:
    words = ("train", "--method", "sft", "--data", data_file(tmp_path), f"{name}=true")
    assert f"{name} is no field of a method or a run" in said(*words)


def test_one_of_several_processes_that_know_nothing_of_each_other_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as launchers set it; accelerate heeds it where there are GPUs, or use_cpu
    monkeypatch.chdir(tmp_path)
    data = data_file(tmp_path)
    with pytest.raises(ArgumentError, match=r"WORLD_SIZE must be 1 .*, got 2, .* need use_cpu=True"):
        SelfDistillationConfig(output_dir=str(tmp_path / "run"))
    assert "WORLD_SIZE must be 1" in said("train", "--method", "sft", "--data", data, "--output", "run")
    alone = "this command runs in one process, without a launcher, got WORLD_SIZE=2"
    assert alone in said("eval", "--data", data, "--reward", "sdcore.world.data:exact", "--output", "answers.json")
    assert alone in said("solve", "--verifier", "true", "--question", "luma")
    assert os.listdir(tmp_path) == ["train.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "override", "message"),
    [
        (["--multi_gpu"], None, "WORLD_SIZE must be 1"),
        (["--use_fsdp", "--fsdp_version", "2"], "use_cpu=true", "must not ask for FSDP on CPUs"),
    ],
)
def test_what_accelerate_launches_on_cpus_is_refused(
    flags: list[str], override: str | None, message: str, tmp_path: Path
) -> None:
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *flags,
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words = ["train", "--method", "sft", "--data", data_file(tmp_path), "--output", "run", "max_steps=1"]
    done = subprocess.run(
        [*launcher, "-m", "sdcore", *words, *([] if override is None else [override])],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode
    assert message in done.stderr
    assert not list(tmp_path.glob("run/*"))


def test_fsdp_that_accelerate_leaves_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine(SimpleNamespace())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_engine(SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2)))
    with pytest.raises(UnsupportedModelError, match="must not ask for FSDP on CPUs"):
        check_engine(SimpleNamespace())
