"""Two lines make TRL's trainers fused; reward functions may say something about each completion; TRL may be missing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl")
pytest.importorskip("peft")

from peft import LoraConfig
from transformers import Trainer
from trl.experimental.gkd import GKDTrainer

from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.integrations.trl import FusedOptions, patch, patching
from sdcore.integrations.trl.sdpo import TextCollector, merged
from sdcore.integrations.trl.self_distillation import TRUNCATED, PromptLengths
from sdcore.teachers import EMA, AdapterOff, Live, Snapshot
from tests.sdcore.integrations import trl_runs as runs
from tests.sdcore.integrations.trl_runs import (
    MODES,
    FusedSDPOTrainer,
    SDFTTrainer,
    SDPOTrainer,
    load_model,
    logged,
    losses,
)

Make = Callable[..., Any]


# patch


@pytest.mark.parametrize(("theirs", "fused"), [runs.SDPO, runs.SDFT], ids=["sdpo", "sdft"])
@pytest.mark.parametrize("kind", ["live", "base", "ema"])
def test_a_patched_trainer_is_the_fused_one(make: Make, theirs: type, fused: type, kind: str) -> None:
    changes = {"teacher_model_kind": kind, "teacher_update_rate": 0.5, **MODES["full jsd"]}
    trainer = make(theirs, **changes)
    copied = trainer.teacher_model
    assert patch(trainer) is trainer
    assert type(trainer) is fused
    assert type(trainer.teacher) is {"live": Live, "base": Snapshot, "ema": EMA}[kind]
    assert trainer.teacher_model is trainer.model
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert "SyncTeacherModelCallback" not in names
    assert names.count("TeacherSync") == (kind == "ema")
    assert copied is trainer.model or kind != "live"
    expected = losses(make(fused, **changes))
    torch.manual_seed(trainer.args.seed)
    again = make(theirs, **changes)
    assert losses(patch(again)) == pytest.approx(expected, abs=1e-6)
    assert TRUNCATED in again.state.log_history[0]


def test_options_are_those_of_the_fused_class(make: Make) -> None:
    trainer = patch(make(SDFTTrainer), micro_batch=2, teacher="trust_region")
    assert trainer.fused == FusedOptions(micro_batch=2, teacher="trust_region")
    assert len(losses(trainer)) == 3


def test_an_adapters_average_is_taken_over_from_trl(make: Make) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = patch(make(SDFTTrainer, peft_config=config, teacher_model_kind="ema"))
    losses(trainer)
    assert type(trainer.teacher) is EMA
    assert list(trainer.model.peft_config) == ["default"]
    base = make(SDFTTrainer, peft_config=config, teacher_model_kind="base")
    assert type(patch(base).teacher) is AdapterOff


class Extended(SDPOTrainer):
    """Adds, and overrides nothing that is replaced."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | {"extended": 1.0}, start_time)


class OwnLoss(SDPOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)

    def _compute_policy_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super()._compute_policy_loss(*args, **kwargs)


def test_a_subclass_keeps_what_it_adds(make: Make) -> None:
    trainer = patch(make(Extended))
    assert isinstance(trainer, FusedSDPOTrainer)
    assert isinstance(trainer, Extended)
    assert type(trainer).__name__ == "FusedExtended"
    losses(trainer)
    assert logged(trainer, "extended")[:3] == [1.0] * 3


def test_a_subclass_with_its_own_loss_is_refused_by_name(make: Make) -> None:
    trainer = make(OwnLoss)
    with pytest.raises(TypeError, match=r"OwnLoss overrides _compute_policy_loss, compute_loss, which patch"):
        patch(trainer)
    assert type(trainer) is OwnLoss


def test_other_trainers_are_refused_with_the_names_of_those_that_can_be() -> None:
    for other in (object(), nn.Linear(2, 2), Trainer):
        with pytest.raises(TypeError, match=r"SDPOTrainer, SDFTTrainer, GKDTrainer, DistillationTrainer, got"):
            patch(other)


def test_a_name_alone_is_not_a_trainer_of_trl() -> None:
    class SDPOTrainer:
        pass

    with pytest.raises(TypeError, match=r"trainer must be one of TRL's"):
        patch(SDPOTrainer())
    assert GKDTrainer.__module__.startswith("trl.")


def test_what_is_fused_already_is_refused(make: Make) -> None:
    trainer = patch(make(SDFTTrainer))
    with pytest.raises(TypeError, match="FusedSDFTTrainer already"):
        patch(trainer)


def test_a_trainer_that_has_trained_is_refused(make: Make) -> None:
    trainer = make(SDFTTrainer, max_steps=1)
    trainer.train()
    with pytest.raises(ArgumentError, match="before it trains, got one after 1 steps"):
        patch(trainer)
    assert type(trainer) is SDFTTrainer


def test_what_cannot_be_treated_leaves_the_trainer_as_it_was(folder: Path, make: Make) -> None:
    model = load_model(folder)
    trainer = make(SDPOTrainer, model=model)
    before, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedModelError):
        patch(trainer)
    with pytest.raises(ArgumentError, match="strategy must be one of"):
        patch(trainer, strategy="fast")
    with pytest.raises(TypeError, match="speed"):
        patch(trainer, speed=2)
    assert type(trainer) is SDPOTrainer
    assert vars(trainer) == before
    assert trainer.callback_handler.callbacks == callbacks


# Texts of reward functions


def shown(trainer: Any) -> list[str]:
    """Returns what the teacher was shown in the first step, in words."""
    seen: list[str] = []
    build = trainer.teacher_context_builder._tokenize_teacher_messages

    def spy(messages: Any) -> Any:
        seen.extend(messages)
        return build(messages)

    trainer.teacher_context_builder._tokenize_teacher_messages = spy
    trainer.train()
    return seen[:4]


def tell(completion_ids: list[list[int]], **columns: object) -> list[Any]:
    """Answers in every form there is, and never with a success."""
    return [(0.0, "a1"), (0.5, None), None, (0.0, " ")]


def tell_more(completion_ids: list[list[int]], **columns: object) -> list[Any]:
    return [(0.0, "b2"), 0.25, (None, "c3"), torch.tensor(0.0)]


FEEDBACK: dict[str, Any] = {"include_environment_feedback": True, "max_steps": 1}


def test_each_completions_text_is_shown_to_its_teacher(make: Make) -> None:
    trainer = make(FusedSDPOTrainer, reward_funcs=[tell, tell_more], **FEEDBACK)
    texts = shown(trainer)
    assert texts[0].endswith(" H a1\nb2")
    assert texts[2].endswith(" H c3")
    # Those about which nothing was said are shown the prompt's own.
    assert all(any(text.endswith(f" H {hint}") for hint in runs.HINTS) for text in (texts[1], texts[3]))
    assert logged(trainer, "self_distillation/reward_mean")[0] == pytest.approx((0.5 + 0.25) / 4)
    assert logged(trainer, "self_distillation/feedback_used_fraction")[0] == 1.0


def test_texts_are_not_shown_unless_feedback_is_included(make: Make) -> None:
    trainer = make(FusedSDPOTrainer, reward_funcs=[tell], max_steps=1)
    assert not any("a1" in text for text in shown(trainer))
    assert logged(trainer, "self_distillation/feedback_available_fraction")[0] == 1.0


def test_without_texts_rewards_are_trls(make: Make) -> None:
    def score(completion_ids: list[list[int]], **columns: object) -> list[Any]:
        return [None if sum(ids) % 3 == 0 else float(sum(ids) % 2) for ids in completion_ids]

    logs = []
    for kind in runs.SDPO:
        trainer = make(kind, reward_funcs=[score, runs.parity], **FEEDBACK)
        trainer.train()
        logs.append([line for line in trainer.state.log_history if "loss" in line])
    for theirs, ours in zip(*logs, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-4)


def test_reward_functions_are_called_as_trl_calls_them(make: Make) -> None:
    seen: list[dict[str, Any]] = []

    def look(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.append(columns)
        return [1.0] * len(prompts)

    trainer = make(FusedSDPOTrainer, reward_funcs=look, max_steps=1)
    trainer.train()
    assert set(seen[0]) == {"privileged_context", "trainer_state"}
    assert trainer.reward_funcs == [look]


@pytest.mark.parametrize("value", [(1.0, 2.0), (1.0, "a", "b"), ("a", "b"), ()])
def test_other_answers_of_reward_functions_are_refused_by_name(value: Any) -> None:
    function = TextCollector(1).wrap(lambda: [value], "judge")
    with pytest.raises(ArgumentError, match=r"reward function judge must return numbers.*for completion 0"):
        function()


def test_a_completions_own_text_takes_the_place_of_its_prompts() -> None:
    assert merged(["own", None, None], ["given", "given", None]) == ["own", "given", None]
    assert merged(["own", None], None) == ["own", None]


# Prompts that are cut


def test_sdpos_cut_teacher_prompts_are_counted(make: Make) -> None:
    trainer = make(FusedSDPOTrainer, max_reprompt_len=9, include_environment_feedback=True)
    with pytest.warns(UserWarning, match=r"teacher prompts were longer than max_reprompt_len=9"):
        trainer.train()
    fractions = logged(trainer, TRUNCATED)
    assert len(fractions) == 3
    assert max(fractions) > 0


def test_a_limit_is_reached_by_what_is_longer() -> None:
    lengths = PromptLengths()
    lengths.seen([[1] * 3, [1] * 4])
    with pytest.warns(UserWarning, match="1 of 2"):
        assert lengths.truncated(3, "limit") == [0.0, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lengths.truncated(3, "limit") == [0.0, 1.0]
        assert lengths.truncated(None, "limit") == [0.0, 0.0]


# TRL itself


def test_where_trl_is_missing_the_error_says_what_to_install(run_python: Callable[..., str]) -> None:
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "trl" else find(name, package)
import sys
sys.modules["trl"] = None
import sdcore.integrations.trl as integration
print(sorted({"torch", "transformers"} & set(sys.modules)))
for name in ("FusedSDPOTrainer", "FusedSDFTTrainer", "FusedGKDTrainer", "FusedDistillationTrainer"):
    try:
        getattr(integration, name)
    except ImportError as error:
        print(error)
try:
    integration.patch(object())
except ImportError as error:
    print(error)
"""
    first, *messages = run_python(code).splitlines()
    assert first == "[]"
    assert messages == ['sdcore.integrations.trl needs TRL: pip install "sdcore[trl]"'] * 5


def test_another_version_of_trl_is_warned_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "version", lambda _: "1.17.0")
    patching._warn_of_version.cache_clear()
    with pytest.warns(UserWarning, match=r"trl 1\.17\.0 is not tested.*trl 1\.16\.\*"):
        patching.require_trl()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patching.require_trl()
    patching._warn_of_version.cache_clear()


def test_a_method_that_trl_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(SDPOTrainer, "_compute_rollout_logps")
    with pytest.raises(ImportError, match=r"SDPOTrainer of the installed TRL has no _compute_rollout_logps"):
        FusedSDPOTrainer(model=None)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import sdcore.integrations.trl as integration

    with pytest.raises(AttributeError, match="FusedPPOTrainer"):
        integration.FusedPPOTrainer  # noqa: B018
