"""The names that users import: those of each public package, and the paths from which modules have moved."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import pytest

import sdcore

# Sorted, as text.
PUBLIC: dict[str, str] = {
    "sdcore": "SelfDistillationConfig SelfDistillationTrainer StepOutput distill_step imitate_step patch",
    "sdcore.contexts": (
        "ContextBuilder Custom Demonstration FEEDBACK_SEPARATOR No OfTurn Solution SuccessOrFeedback "
        "Template check_examples join_feedback prompt_ids require_text split_feedback student_prompt_ids "
        "with_context without_thinking"
    ),
    "sdcore.diagnostics": (
        "KEYS Key RunData RunLog RunLogError drift key_of leak metrics overlap read_run topk_overlap"
    ),
    "sdcore.losses": (
        "Aggregation Estimator FusedLinearDivergence LogZ PolicyTerm TiltOutput Tilted TokenTilt group_advantages "
        "over_ranks per_completion policy_loss spread token_weights"
    ),
    "sdcore.memory": (
        "CARDS CATEGORIES CONTENDERS Fit Lives Load Measurement PARTS Parameters Prediction Setting Shrunk Tiles "
        "TimeLine compare count_parameters device_bytes fits_table largest measure measured_table memory_table "
        "predict save_plot shrunk what_fits"
    ),
    "sdcore.models": "Body Head Matrix find_body head_of lifted without_dropout",
    "sdcore.prefix": (
        "Cost ModelSizes Part PassCost PassReport Passes Plan PrefixOutput Report Sampled Strategy TeacherRows "
        "Tree View buckets check_against cost cost_of_sizes generate passes plan plan_trajectories run"
    ),
    "sdcore.presets": (
        "ContextDistillation GRPO Method OPSD PRESETS RLTilt SDFTAsRun SDFTPaper SDPO SDPOCode SFT "
        "TurnHindsight dump_config field_types from_lasgroup from_trl load_config preset types_of"
    ),
    "sdcore.report": "Format write_report",
    "sdcore.step": "StepOutput distill_step imitate_step policy_gradient_step tilt_step token_logprobs",
    "sdcore.teachers": "AdapterOff EMA Frozen Live PeriodicSync Snapshot StatefulTeacher Teacher TrustRegion",
    "sdcore.training": "EvalResult SelfDistillationConfig SelfDistillationTrainer evaluate",
    "sdkernels": (
        "DivergenceOutput ImportanceClip LogitTransform LogprobOutput TeacherMix TopK TopKLogprobs TopKOutput "
        "linear_divergence linear_logprobs linear_topk logit_divergence"
    ),
}
# Packages whose modules are what is public, and not names of their own.
FOLDERS = ["sdcore.bench", "sdcore.integrations", "sdcore.rollouts", "sdcore.world"]


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_exports_these_names(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == PUBLIC[package].split()
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("package", FOLDERS)
def test_a_folder_exports_modules_alone(package: str) -> None:
    assert not hasattr(importlib.import_module(package), "__all__")


@pytest.mark.parametrize(("old", "new"), sdcore._MOVED.items())
def test_a_module_that_moved_is_found_where_it_was(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"sdcore.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"^sdcore\.{old} is sdcore\.{new} now$") as told:
        module = importlib.import_module(f"sdcore.{old}")
    assert len(told) == 1
    assert module is importlib.import_module(f"sdcore.{new}")


def test_old_imports_give_the_classes_of_the_new_ones_and_name_the_line_that_asks(
    run_python: Callable[..., str],
) -> None:
    code = """
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import sdcore.trainer
    from sdcore.config import SelfDistillationConfig
    from sdcore import targets
    from sdcore.targets.tilt import Tilted
ours = [w for w in told if "sdcore" in str(w.message)]
print(*[w.lineno for w in ours], {w.filename for w in ours} == {"<string>"})
import sdcore.losses, sdcore.losses.tilt
print(sdcore.trainer.SelfDistillationTrainer is sdcore.SelfDistillationTrainer)
print(SelfDistillationConfig is sdcore.SelfDistillationConfig, targets is sdcore.losses)
print(Tilted is sdcore.losses.Tilted, sdcore.losses.tilt.__spec__.name)
"""
    assert run_python(code).split("\n")[:4] == ["5 6 7 8 True", "True", "True True", "True sdcore.losses.tilt"]


def test_the_package_alone_imports_neither_torch_nor_transformers(run_python: Callable[..., str]) -> None:
    code = "import sys, sdcore; print(sorted({'torch', 'transformers', 'numpy', 'sdkernels'} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_a_module_that_never_was_is_still_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'sdcore\.trainers'"):
        importlib.import_module("sdcore.trainers")
