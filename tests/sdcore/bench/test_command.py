"""`sdcore bench` works outside of a checkout, and what is chosen on its command line is checked before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdcore.bench import options as options_module
from sdcore.bench.models import REAL_MODELS, size_of, with_layers
from sdcore.bench.options import (
    SUITES,
    Options,
    checkout,
    folder_name,
    newest_results,
    parse_shape,
    result_path,
    split_names,
    workload,
)
from sdcore.bench.peers import CONTENDERS
from sdcore.bench.trl_trainers import TRAINERS
from sdcore.cli import bench
from sdcore.cli.main import app
from sdcore.errors import ArgumentError

RUN = """
import runpy, sys
sys.argv[1:] = ["bench", "--quick", "--device", "cpu", "--threads", "1", "--peers", "naive,trl"]
runpy.run_module("sdcore", run_name="__main__", alter_sys=True)
"""


def test_a_quick_run_writes_into_the_working_directory_outside_of_a_checkout(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    shown = run_python(RUN)
    assert "multiples of the four bare matrix products" in shown
    (result,) = tmp_path.glob("sdcore-bench/*/quick/*.json")
    assert result.with_suffix(".md").is_file()
    assert len(list(result.parent.glob("*.png"))) == 3


def test_without_matplotlib_tables_and_json_still_come(run_python: Callable[..., str], tmp_path: Path) -> None:
    run_python("import sys; sys.modules['matplotlib'] = None\n" + RUN)
    (result,) = tmp_path.glob("sdcore-bench/*/quick/*.json")
    assert result.with_suffix(".md").is_file()
    assert list(result.parent.glob("*.png")) == []


def test_the_divergence_suite_needs_neither_typer_nor_transformers_nor_trl(run_python: Callable[..., str]) -> None:
    """`benchmarks/gpu_run.sh` runs it on a machine with torch, triton, rich and no network."""
    code = """
import sys
from pathlib import Path
sys.modules |= dict.fromkeys(["typer", "transformers", "trl", "liger_kernel", "orda_kernel", "datasets", "matplotlib"])
from sdcore.bench.suite import run
from sdcore.bench.suites.divergence import SUITE
from sdcore.bench.options import Options
print(run(SUITE, Options(suite="divergence", quick=True, device="cpu", threads=1, output=Path("."))))
"""
    assert run_python(code).strip().endswith(".json")


def test_results_go_into_the_checkout_when_run_there_and_into_a_folder_of_their_own_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkout()
    assert root is not None
    named = {"device": "cpu-1", "date": "2026-01-02"}
    monkeypatch.chdir(root / "docs")
    results = root / "benchmarks" / "results"
    assert result_path(suite="divergence", **named) == results / "cpu-1" / "2026-01-02.json"
    assert result_path(suite="step", **named) == results / "cpu-1" / "step" / "2026-01-02.json"
    monkeypatch.chdir(tmp_path)
    assert result_path(suite="step", variant="quick", **named) == Path("sdcore-bench/cpu-1/step/quick/2026-01-02.json")
    assert result_path(suite="step", output=tmp_path, **named) == tmp_path / "step-2026-01-02.json"
    monkeypatch.setattr(options_module, "SOURCE", tmp_path)
    assert checkout() is None


def test_runs_that_are_not_the_suites_own_have_a_folder_that_the_readme_does_not_read(tmp_path: Path) -> None:
    for options in (
        Options(suite="prefix", quick=True),
        Options(suite="prefix", model="qwen3-4b", shapes=("L=1",)),
        Options(suite="prefix", everything=True),
        Options(suite="prefix", dtype="bf16"),
    ):
        folder = tmp_path / "device" / "prefix" / folder_name(options.variant)
        folder.mkdir(parents=True)
        (folder / "2026-01-02.json").touch()
        assert folder.name not in ("", "prefix")
    assert Options(suite="prefix").variant == ""
    assert newest_results(tmp_path) == []
    assert newest_results(tmp_path, "prefix") == []


def test_renewing_a_readme_outside_of_a_checkout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "SOURCE", tmp_path)
    shown = CliRunner().invoke(app, ["bench", "--readme"])
    assert shown.exit_code == 2
    assert "checkout" in shown.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "naive,nobody"], "nobody"),
        (["--model", "gpt-5"], "model must be one of qwen3-0.6b"),
        (["--shape", "N=8,P=3"], "of the letters N, V, H"),
        (["--shape", "N=0"], "shape must be like"),
        (["--dtype", "fp16"], "dtype must be one of fp32, bf16"),
        (["--seconds", "-1"], "seconds must be at least 0"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--quick", "--model", "qwen3-4b"], "quick runs have sizes of their own"),
        (["--device", "tpu"], "device must be one of cpu, cuda"),
        (["prefix", "--shape", "N=8"], "of the letters P, C, R, G, L"),
        (["trainer", "--trainers", "grpo"], "trainers must be of sdpo"),
        (["scaling", "--sweeps", "N,H"], "sweeps must be of N, V, G, P"),
        (["scaling", "--shape", "C=8"], "of the letters N, V, H, P, R, G, L"),
        (["step", "--everything"], "everything is for divergence, prefix, scaling, not for step"),
        (["prefix", "--sweeps", "N"], "sweeps is for scaling, not for prefix"),
        (["compare", "a.json", "b.json", "--quick"], "quick is for divergence"),
        (["compare", "a.json"], "compare takes two files"),
        (["prefix", "a.json"], "files is for compare"),
        (["everything"], "suite must be one of divergence, prefix"),
    ],
)
def test_a_wrong_choice_is_an_error_of_use_that_names_it(arguments: list[str], said: str) -> None:
    shown = CliRunner().invoke(app, ["bench", *arguments])
    assert shown.exit_code == 2
    assert said in shown.output


def test_the_names_in_the_help_are_those_of_the_suites() -> None:
    assert set(bench.PEERS) == {one.peer for one in CONTENDERS if one.peer}
    assert {name.lower() for name in TRAINERS} == set(bench.TRAINERS)
    for name in REAL_MODELS:
        assert name in bench.PRESETS
    for suite in (*SUITES, "compare"):
        assert CliRunner().invoke(app, ["bench", suite, "--help"]).exit_code == 0


@pytest.mark.parametrize("name", REAL_MODELS)
def test_a_preset_has_the_sizes_of_a_configuration_of_its_family(name: str) -> None:
    size = size_of(name)
    config = size.config(vocab=size.step_vocab)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (
        size.hidden,
        size.layers,
        size.step_vocab,
    )
    assert config.model_type == size.family
    assert size.source in str(size)


# Billions of parameters, as the models' cards say (gemma's without the image tower).
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-0.6b", 0.596),
        ("qwen3-4b", 4.02),
        ("qwen3-8b", 8.19),
        ("llama-3.1-8b", 8.03),
        ("gemma-3-4b", 3.88),
        ("qwen3-30b-a3b", 30.5),
    ],
)
def test_a_preset_has_as_many_parameters_as_the_model(name: str, billions: float) -> None:
    from sdcore.memory import count_parameters

    size = size_of(name)
    assert count_parameters(size.config(vocab=size.step_vocab)).all / 1e9 == pytest.approx(billions, rel=0.01)


def test_layers_can_be_cut_and_a_model_that_is_not_there_is_refused() -> None:
    assert size_of(with_layers("qwen3-8b", 2)) == size_of("qwen3-8b")._replace(layers=2)
    assert size_of(with_layers("qwen3-8b", None)) is REAL_MODELS["qwen3-8b"]
    for name in ("qwen3-9b", "qwen3-8b, 0 layers", "nothing, 2 layers"):
        with pytest.raises(ArgumentError, match="model must be one of"):
            size_of(name)


def test_a_shape_says_what_it_says_and_the_rest_is_the_devices() -> None:
    assert parse_shape("N=8, V=100", "NVH") == {"N": 8, "V": 100}
    assert workload({"P": 5}, "cpu") == workload({}, "cpu") | {"prompt": 5}
    assert list(workload({"P": 5, "C": 6, "R": 7, "G": 8}, "cuda").values()) == [5, 6, 7, 8]
    assert split_names("a, b", ("a", "b"), "letters") == ("a", "b")
    assert split_names(None, ("a",), "letters") is None
