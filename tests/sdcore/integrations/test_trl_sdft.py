"""The fused SDFT trainer has TRL's losses and gradients; its teachers are kept in memory, right, and restored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("trl")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

from sdcore.errors import ArgumentError
from sdcore.integrations.trl import FusedOptions
from sdcore.integrations.trl.self_distillation import TRUNCATED
from sdcore.integrations.trl.teachers import FOLDER
from sdcore.teachers import EMA, AdapterOff, Live, Snapshot, TrustRegion
from tests.sdcore.integrations import trl_runs as runs
from tests.sdcore.integrations.trl_runs import MODES, FusedSDFTTrainer, SDFTTrainer, load_model, logged, losses
from tests.sdcore.prefix.models import double_precision

FAMILY = "llama"
Make = Callable[..., Any]
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return runs.same_teacher(runs.SDFT, folder, tmp_path_factory.mktemp("pair"))


def outcome(
    trainer: Any, batch: dict[str, Tensor] | None = None, **arguments: Any
) -> tuple[Tensor, Tensor, list[float]]:
    """Returns loss, all gradients and the logged loss of one `compute_loss` in float64, with these arguments."""
    for name, value in arguments.items():
        setattr(trainer.args, name, value)
        setattr(trainer, name, value)
    model = trainer.model.train()
    model.zero_grad()
    trainer._metrics["train"].clear()
    with double_precision():
        loss = trainer.compute_loss(model, batch or runs.batch())
        loss.backward()
    gradients = torch.cat([w.grad.flatten() for w in model.parameters()])
    return loss.detach().double(), gradients, trainer._metrics["train"]["self_distillation/distillation_loss"]


@pytest.mark.parametrize("clip", [None, 1.2])
@pytest.mark.parametrize("skipped", [0, 2, 3, 6])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_number_of_skipped_tokens_has_trls_loss(
    pair: tuple[Any, Any], mode: str, skipped: int, clip: float | None
) -> None:
    """Completions have 5, 3, 6 and 2 tokens: some lose all, and with 6 all do."""
    arguments = MODES[mode] | {"num_loss_tokens_to_skip": skipped, "distillation_is_clip": clip}
    theirs, ours = (outcome(trainer, **arguments) for trainer in pair)
    assert (theirs[0] == 0) == (skipped == 6)
    assert_same(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_a_tools_output_in_a_completion_is_read_and_has_no_loss(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(pair[0], "_forward_logits", runs.reading_holes(pair[0]))
    arguments = MODES[mode] | {"num_loss_tokens_to_skip": 1, "distillation_is_clip": 1.2}
    theirs, ours = (outcome(trainer, runs.batch_with_tools(), **arguments) for trainer in pair)
    assert theirs[0] != 0
    assert_same(ours, theirs)


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.allclose(ours[0], theirs[0], rtol=1e-6)
    assert torch.allclose(ours[1], theirs[1], rtol=0, atol=1e-6 * float(theirs[1].abs().max()))
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_three_steps_have_trls_losses(make: Make, mode: str) -> None:
    theirs, ours = (losses(make(kind, num_loss_tokens_to_skip=1, **MODES[mode])) for kind in runs.SDFT)
    assert len(set(theirs)) == 3
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("teacher", ["live", "base", "ema"])
@pytest.mark.parametrize("sync_steps", [1, 2])
def test_each_of_trls_teachers_is_updated_when_trls_is(make: Make, teacher: str, sync_steps: int) -> None:
    """The rate is so large that an update before the optimizer's step, or a missed one, would show."""
    changes = {"teacher_model_kind": teacher, "teacher_update_rate": 0.6, "teacher_sync_steps": sync_steps}
    theirs, ours = (losses(make(kind, max_steps=4, **changes, **MODES["full jsd"])) for kind in runs.SDFT)
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("teacher", ["base", "live"])
def test_with_an_adapter_base_and_live_are_trls(make: Make, teacher: str) -> None:
    changes = {"teacher_model_kind": teacher, "learning_rate": 1e-2, **MODES["full reverse"]}
    theirs, ours = (losses(make(kind, peft_config=LoraConfig(**LORA), **changes)) for kind in runs.SDFT)
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("options", [FusedOptions(strategy="two_phase"), FusedOptions(teacher_device="cpu")], ids=str)
def test_options_change_no_loss(make: Make, options: FusedOptions) -> None:
    plain, changed = (losses(make(FusedSDFTTrainer, fused=fused, **MODES["full jsd"])) for fused in (None, options))
    assert changed == pytest.approx(plain, abs=1e-5)


# The teachers.


def test_the_teacher_is_of_the_weights_in_memory(folder: Path, tmp_path: Path, make: Make) -> None:
    """TRL reads the model's name again: what was changed since is not in its teacher, and a name that is gone fails."""
    model = load_model(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    changed = model.lm_head.weight.detach().clone()
    theirs = make(SDFTTrainer, model=model, teacher_model_kind="base")
    assert not torch.equal(theirs.teacher_model.lm_head.weight, changed)
    model.config._name_or_path = str(tmp_path / "gone")
    with pytest.raises(Exception, match="gone"):
        make(SDFTTrainer, model=model, teacher_model_kind="base")
    ours = make(FusedSDFTTrainer, model=model, teacher_model_kind="base")
    ours.train()
    assert ours.teacher_model is ours.model
    with ours.teacher.weights(ours.model) as teacher:
        assert torch.equal(teacher.lm_head.weight, changed)
    assert not torch.equal(model.lm_head.weight, changed)


@pytest.mark.parametrize(
    ("kind", "peft", "options", "expected"),
    [
        ("live", False, {}, Live),
        ("base", False, {}, Snapshot),
        ("ema", False, {}, EMA),
        ("live", True, {}, Live),
        ("base", True, {}, AdapterOff),
        ("ema", True, {}, EMA),
        ("base", False, {"teacher": "trust_region", "trust_share": 0.3}, TrustRegion),
        ("ema", True, {"teacher": "trust_region"}, TrustRegion),
    ],
)
def test_each_kind_of_teacher_is_built_and_trains(
    make: Make, kind: str, peft: bool, options: dict[str, Any], expected: type
) -> None:
    config = LoraConfig(**LORA) if peft else None
    trainer = make(FusedSDFTTrainer, peft_config=config, teacher_model_kind=kind, fused=FusedOptions(**options))
    assert type(trainer.teacher) is expected
    assert len(losses(trainer)) == 3
    if expected is TrustRegion:
        assert trainer.teacher.share == options.get("trust_share", 0.5)
        assert type(trainer.teacher.reference) is (EMA if kind == "ema" else Snapshot)


def test_a_live_teacher_has_no_reference_for_a_trust_region(make: Make) -> None:
    with pytest.raises(ArgumentError, match="teacher_model_kind must be 'base' or 'ema' for a trust region"):
        make(FusedSDFTTrainer, teacher_model_kind="live", fused=FusedOptions(teacher="trust_region"))


def test_a_trust_region_lies_between_the_reference_and_the_student(make: Make) -> None:
    """With a share of 0 it is the reference itself, with one of 1 the student."""

    def trained(kind: str, **options: Any) -> list[float]:
        fused = FusedOptions(**options)
        return losses(make(FusedSDFTTrainer, teacher_model_kind=kind, fused=fused, **MODES["full jsd"]))

    none, all_of_it = (trained("base", teacher="trust_region", trust_share=share) for share in (0.0, 1.0))
    assert none == pytest.approx(trained("base"), abs=1e-5)
    assert all_of_it == pytest.approx(trained("live"), abs=1e-5)
    assert none[2] != pytest.approx(all_of_it[2], abs=1e-5)


def adapter(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {
        n.replace(f".{name}.", "."): w.detach().clone()
        for n, w in model.named_parameters()
        if "lora_" in n and f".{name}." in n
    }


class Adapters:
    """Records the student's adapter after every step; a callback."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        outer = self
        self.seen: list[dict[str, Tensor]] = []

        class Recorder(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                outer.seen.append(adapter(kwargs["model"]))

        self.callback = Recorder()


def test_the_average_of_an_adapter_starts_from_the_adapter(make: Make) -> None:
    """It is, by hand, an average of what the student's factors were, from where they began. TRL's starts from zero."""
    rate, recorder = 0.25, Adapters()
    changes = {"teacher_model_kind": "ema", "teacher_update_rate": rate, "learning_rate": 1e-2, **MODES["full jsd"]}
    ours = make(FusedSDFTTrainer, peft_config=LoraConfig(**LORA), callbacks=[recorder.callback], **changes)
    expected = adapter(ours.model)
    ours.train()
    for seen in recorder.seen:
        expected = {name: (1 - rate) * old + rate * seen[name] for name, old in expected.items()}
    with ours.teacher.weights(ours.model) as teacher:
        average = adapter(teacher)
    assert average.keys() == expected.keys()
    assert average
    for name, weight in expected.items():
        assert torch.allclose(average[name], weight, atol=1e-6), name

    theirs = make(SDFTTrainer, peft_config=LoraConfig(**LORA), **changes)
    theirs.train()
    of_trl = adapter(theirs.model, "teacher")
    drawn = next(name for name in expected if "lora_A" in name)
    assert of_trl[drawn].norm() < 0.7 * expected[drawn].norm()


@pytest.mark.parametrize("case", ["ema", "base", "lora ema", "trust region"])
def test_a_resumed_run_has_the_losses_of_one_that_went_on(folder: Path, tmp_path: Path, case: str) -> None:
    changes: dict[str, Any] = {
        "teacher_model_kind": "base" if case in ("base", "trust region") else "ema",
        "teacher_update_rate": 0.3,
        "save_strategy": "steps",
        "save_steps": 2,
        # One epoch: TRL's sampler starts its order anew where a run is resumed, and so does another epoch's.
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        **MODES["full jsd"],
    }
    options = FusedOptions(teacher="trust_region") if case == "trust region" else None

    def trainer(model: nn.Module, output: Path) -> Any:
        if case == "lora ema":
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(**LORA))
        return runs.build(FusedSDFTTrainer, model, output, fused=options, **changes)

    whole = losses(trainer(load_model(folder), tmp_path / "out"))
    again = trainer(load_model(folder), tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-2" / FOLDER).is_dir()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert logged(again, "loss") == pytest.approx(whole, abs=1e-6)

    # Without the teacher's file it says so, and is another run.
    shutil.rmtree(tmp_path / "out" / "checkpoint-2" / FOLDER)
    fresh = trainer(load_model(folder), tmp_path / "out")
    with pytest.warns(UserWarning, match="has no sdcore_teacher"):
        fresh.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    same = logged(fresh, "loss") == pytest.approx(whole, abs=1e-6)
    assert same == (changes["teacher_model_kind"] == "base")


def test_the_loss_type_has_to_be_configured_to_be_followed(make: Make) -> None:
    with pytest.raises(ArgumentError, match="SDFTConfig has not"):
        make(FusedSDFTTrainer, fused=FusedOptions(loss_type="as_configured"))


# What is counted.


def test_teacher_prompts_that_were_cut_are_counted_and_warned_about_once(make: Make) -> None:
    """With a context they have 7 to 11 tokens, alone at most 7."""
    trainer = make(FusedSDFTTrainer, max_prompt_length=8)
    with pytest.warns(UserWarning, match="teacher prompts were longer than max_prompt_length=8") as caught:
        trainer.train()
    assert len([warning for warning in caught if "max_prompt_length" in str(warning.message)]) == 1
    fractions = logged(trainer, TRUNCATED)
    lengths = [
        len(trainer._tokenizer(f"{q} {h}")["input_ids"]) for q, h in zip(runs.QUESTIONS, runs.HINTS, strict=True)
    ]
    assert all(0 <= fraction <= 1 for fraction in fractions)
    assert sum(fractions) > 0
    assert 0 < sum(length > 8 for length in lengths) < 4
    assert losses(make(SDFTTrainer, max_prompt_length=8)) == pytest.approx(logged(trainer), abs=1e-4)


def test_nothing_is_counted_where_nothing_was_cut(make: Make) -> None:
    trainer = make(FusedSDFTTrainer, max_prompt_length=None)
    trainer.train()
    assert logged(trainer, TRUNCATED) == [0.0] * 3
