"""A flat file and overrides become a method and a run's arguments, typed by their fields; the unknown is refused."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from sdcore.errors import ArgumentError
from sdcore.presets import (
    GRPO,
    PRESETS,
    SDPO,
    ContextDistillation,
    Method,
    dump_config,
    field_types,
    load_config,
    preset,
    types_of,
)
from sdcore.training.config import SelfDistillationConfig

TYPES = types_of(SelfDistillationConfig)


def load(text: str, *overrides: str, folder: Path) -> tuple[Method, dict[str, Any]]:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides, trainer_fields=TYPES)


def test_keys_go_where_a_field_of_their_name_is(tmp_path: Path) -> None:
    text = "method: sdpo\ntopk: 20\nlearning_rate: 1e-5\nmax_completion_length: 64\noutput_dir: out\n"
    method, arguments = load(text, folder=tmp_path)
    assert method == SDPO(topk=20)
    assert arguments == {"learning_rate": 1e-5, "max_completion_length": 64, "output_dir": "out"}
    assert type(arguments["learning_rate"]) is float


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    method, arguments = load(
        "method: sdpo\nseed: 1\nalpha: 0.25\n", "method=grpo", "alpha=1", "seed=2", folder=tmp_path
    )
    assert method == GRPO(alpha=1.0)
    assert arguments == {"seed": 2}


def test_without_a_file_and_without_a_preset_there_is_the_plain_method() -> None:
    assert load_config(None, ["alpha=0"], trainer_fields=TYPES) == (Method(alpha=0.0), {})


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("learning_rate=3e-6", 3e-6),
        ("learning_rate=1", 1.0),
        ("max_steps=1e3", 1000),
        ("max_prompt_length=null", None),
        ("max_prompt_length=None", None),
        ("verify=off", "off"),
        ("report_to=wandb", "wandb"),
        ("report_to=[wandb, tensorboard]", ["wandb", "tensorboard"]),
        ("output_dir=007", "007"),
        ("output_dir=a=b: c", "a=b: c"),
        ("reward_weights=[1, 0.5]", [1, 0.5]),
        ('chat_template_kwargs={"enable_thinking": false}', {"enable_thinking": False}),
        ("bf16=true", True),
        ("lr_scheduler_type=cosine", "cosine"),
    ],
)
def test_texts_become_what_their_field_is(override: str, value: object) -> None:
    _, arguments = load_config(None, [override], trainer_fields=TYPES)
    name = override.partition("=")[0]
    assert arguments == {name: value}
    assert type(arguments[name]) is type(value)


def test_words_of_yaml_are_not_truth_values(tmp_path: Path) -> None:
    assert load("verify: off\nstrategy: auto\n", folder=tmp_path)[1] == {"verify": "off", "strategy": "auto"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alpa=1", r"^alpa is no field of a method or a run; did you mean 'alpha'\?$"),
        ("learning_rat=1", r"did you mean 'learning_rate'\?"),
        ("alpha", r"^overrides must be of the form key=value, got 'alpha'$"),
        ("alpha=much", r"^alpha must be a number, got 'much'$"),
        ("alpha=2", r"^alpha must be in \[0, 1\], got 2.0$"),
        ("topk=1.5", r"^topk must be a whole number or None, got 1.5$"),
        ("tail=yes", r"^tail must be True or False, got 'yes'$"),
        ("fp16=1", r"^fp16 must be True or False, got 1$"),
        ("method=sdop", r"did you mean 'sdpo'\?"),
        ("reward_weights=[1", r"^reward_weights must be YAML"),
        ("teacher=emma", r"^teacher must be one of .*, got 'emma'$"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(override: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        load_config(None, [override], trainer_fields=TYPES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpa: 1\n", r"run\.yaml: alpa is no field of a method or a run; did you mean 'alpha'\?"),
        ("alpha: x\n", r"run\.yaml: alpha must be a number, got 'x'"),
        ("- alpha\n", r"run\.yaml must be a mapping, `key: value`, got list"),
        ("alpha: 1\nalpha: 2\n", r"run\.yaml must be YAML: 'alpha' stands there twice .*line 2"),
        ("alpha: [\n", r"run\.yaml must be YAML"),
        ("alpha: !!python/object:os.system 1\n", r"run\.yaml must be YAML"),
        ("1: 2\n", r"run\.yaml: 1 is no field"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        load(text, folder=tmp_path)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert load("# nothing\n", folder=tmp_path) == (Method(), {})


def test_a_trainer_may_not_have_a_methods_names() -> None:
    with pytest.raises(ArgumentError, match="must not have the names of a method's fields, got alpha, method"):
        load_config(None, trainer_fields={"alpha": float, "method": str})


def test_no_argument_of_the_trainer_has_a_methods_name() -> None:
    assert set(TYPES).isdisjoint(field_types())


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_is_read_as_the_same(name: str, tmp_path: Path) -> None:
    method = preset(name, success_threshold=0.75)
    arguments = {"learning_rate": 1e-5, "verify": "off", "report_to": "none", "max_steps": 3, "output_dir": "1e5"}
    text = dump_config(method, arguments, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == text
    assert text.startswith(f"method: {name}\nsuccess_threshold: 0.75\n")
    assert load_config(tmp_path / "again.yaml", trainer_fields=TYPES) == (method, arguments)


def test_a_template_survives(tmp_path: Path) -> None:
    method = ContextDistillation(template="{{ prompt }}\n\n'Always' \"answer\": {{ privileged_context }} – ä\n")
    dump_config(method, {}, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml", trainer_fields=TYPES) == (method, {})


class Schedule(Enum):
    FLAT = "flat"


def test_only_plain_data_is_written_and_no_token() -> None:
    text = dump_config(Method(), {"hub_token": "hf_secret", "output_dir": Path("out"), "schedule": Schedule.FLAT})
    assert text == "output_dir: out\nschedule: flat\n"
    with pytest.raises(ArgumentError, match="device must be plain data to be written as YAML, got object"):
        dump_config(Method(), {"device": object()})


def test_types_are_those_of_a_dataclass() -> None:
    @dataclass
    class Run:
        steps: int = 1
        name: str | None = None

    assert types_of(Run) == {"steps": int, "name": str | None}
