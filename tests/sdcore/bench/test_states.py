"""States of real models: made once, the same wherever they are made, and refused by name where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from sdcore.bench import readme, states
from sdcore.bench.options import Options, checkout, newest_results
from sdcore.bench.rows import MemoryRow, SpeedRow
from sdcore.bench.states import load, make, states_of
from sdcore.bench.suite import markdown, run
from sdcore.bench.suites.divergence import SUITE
from sdcore.cli.main import app
from sdcore.contexts import Template, student_prompt_ids
from sdcore.errors import ArgumentError
from sdcore.models import gguf
from sdcore.types import Group, Trajectory
from tests.sdcore.contexts.chats import chat_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 40


def save_model(folder: Path, *, seed: int = 0, head_seed: int = 0) -> None:
    tokenizer = chat_tokenizer("qwen")
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    more: dict[str, Any] = {"num_attention_heads": 2, "initializer_range": 0.5, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **more))
    torch.manual_seed(head_seed + 100)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in the place of SmolLM2, with a record and a cache of its own."""
    model, record = tmp_path / "tiny", tmp_path / "states.json"
    save_model(model)
    record.write_text(json.dumps(json.loads(states.FILE.read_text()) | {"models": {}}))
    monkeypatch.setattr(states, "FILE", record)
    monkeypatch.setattr(states, "ROWS", ROWS)
    monkeypatch.setattr(states, "MOST_TOKENS", 3)
    monkeypatch.setattr(gguf, "packaged_file", lambda name: str(model))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    make("smollm2", anew=True)
    return model


def cached(folder: Path) -> Path:
    return folder.parent / ".cache" / "sdcore" / "states" / "smollm2.safetensors"


def test_states_are_made_once_and_it_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = load("smollm2", said.append)
    assert said == [f"making the states of smollm2, once, in {cached(folder)}"]
    monkeypatch.setattr(states, "make", None)
    for source in ("smollm2", str(cached(folder))):
        again = load(source, said.append)
        assert again.name == "smollm2"
        assert all(torch.equal(one, other) for one, other in zip(first[1:], again[1:], strict=True))
    assert len(said) == 1
    assert first.student.shape == first.teacher.shape == (ROWS, 16)
    assert first.head.dtype == first.student.dtype == torch.bfloat16


def test_rows_are_what_the_output_layer_gets_at_the_answers_tokens(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    questions = states.questions(tokenizer)
    answers = [[torch.tensor([5, 6, 7]), torch.tensor([8])] for _ in questions]
    sides = states_of(model, tokenizer, answers)
    example = questions[1]  # its rows are the fifth to the eighth
    prompt = student_prompt_ids(example, tokenizer)
    rollout = Trajectory.answer(completion_ids=answers[1][0], logprobs=None, text="", finished=True)
    group = Group(example=example, prompt_ids=prompt, rollouts=(rollout,))
    taught = Template("{{ privileged_context }}\n\n{{ prompt }}").condition(group, tokenizer).teacher_prompts[0]
    assert example.privileged_context in tokenizer.decode(taught)
    for side, read in zip(sides, (prompt, taught), strict=True):
        logits = model(torch.cat([read, answers[1][0]])[None]).logits[0]
        torch.testing.assert_close(side[4:7] @ model.lm_head.weight.T, logits[len(read) - 1 : -1])
        last = model(torch.cat([read, answers[1][1]])[None]).logits[0, -2]
        torch.testing.assert_close(side[7] @ model.lm_head.weight.T, last)


def test_what_is_no_states_file_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"one of smollm2, gemma, or the path .* got 'smollm3'"):
        load("smollm3")
    load("smollm2")
    whole = cached(folder).read_bytes()
    cached(folder).write_bytes(whole[:-10])
    with pytest.raises(ArgumentError, match=r"whole file, got .*smollm2\.safetensors.* to have it made"):
        load("smollm2")
    cached(folder).write_bytes(whole)
    with safe_open(cached(folder), "pt") as file:
        about = file.metadata()
    tensors = load_file(cached(folder))
    tensors["teacher"][3, 3] += 1
    save_file(tensors, tmp_path / "changed.safetensors", metadata=about)
    with pytest.raises(ArgumentError, match=r"changed\.safetensors with another teacher"):
        load(str(tmp_path / "changed.safetensors"))
    save_file({"student": tensors["student"]}, tmp_path / "part.safetensors")
    with pytest.raises(ArgumentError, match=r"whole file, got .*part\.safetensors"):
        load(str(tmp_path / "part.safetensors"))


def test_another_model_is_noticed_by_what_differs(folder: Path) -> None:
    save_model(folder, head_seed=1)
    with pytest.raises(ArgumentError, match="output layer and student and teacher differ"):
        load("smollm2")
    assert not cached(folder).exists()
    save_model(folder, seed=1)
    with pytest.raises(ArgumentError, match=r"smollm2 that states\.json has .* whose student and teacher differ"):
        load("smollm2")
    save_model(folder)
    made = load("smollm2")
    states.save(made._replace(head=made.head * 2), cached(folder))  # whole, and of another model
    with pytest.raises(ArgumentError, match=r"smollm2\.safetensors, whose output layer differ"):
        load("smollm2")


def test_the_mass_is_that_of_the_likeliest_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "MASS_OF", (1, 5, 10_000))
    made = load("smollm2")
    entries = made.mass(7)
    for side in ("student", "teacher"):
        shares = (getattr(made, side)[:7].double() @ made.head.double().T).softmax(-1).sort(descending=True).values
        for entry, k in zip(entries, (1, 5, None), strict=True):
            assert entry[side] == pytest.approx(float(shares[:, :k].sum(-1).mean()), rel=1e-5)


def measured(tmp_path: Path, **options: Any) -> Any:
    chosen: dict[str, Any] = {"suite": "divergence", "states": "smollm2", "device": "cpu", "peers": ("naive",)}
    return SUITE.load(run(SUITE, Options(**chosen | {"seconds": 0.0, "output": tmp_path / "out"} | options)))


def test_a_run_on_states_has_their_errors_memory_and_mass(folder: Path, tmp_path: Path) -> None:
    report = measured(tmp_path, shapes=("N=12",))
    groups = list(dict.fromkeys(row.group for row in report.speed))
    vocab = len(chat_tokenizer("qwen"))
    assert [str(group) for group in groups] == [
        f"smollm2 N=12 V={vocab} H=16 {dtype} {name}"
        for dtype in ("fp32", "bf16")
        for name in ("reverse KL", "JSD", "JSD, top-100 + tail")
    ]
    ours = [row for row in report.speed if row.contender == "sdcore"]
    assert all(row.seconds and row.errors.gradient < {"fp32": 1e-5, "bf16": 0.01}[row.group.dtype] for row in ours)
    assert {row.group for row in report.memory} == set(groups)
    assert [entry["k"] for entry in report.mass] == [20, 100, vocab]
    assert report.accuracy == []
    text = (tmp_path / "out").glob("*.md").__next__().read_text()
    assert f"smollm2 N=12 V={vocab} H=16: relative error of the worse gradient against float64" in text
    assert "| smollm2 | 20 |" in text


def test_divergences_and_a_dtype_can_be_chosen(folder: Path, tmp_path: Path) -> None:
    report = measured(tmp_path, shapes=("N=12",), divergences=("forward", "jsd"), dtype="bf16")
    assert {str(row.group.divergence) for row in report.speed} == {"forward KL", "JSD"}
    with pytest.raises(ArgumentError, match=f"N must be at most the {ROWS} rows of smollm2, got {ROWS + 1}"):
        measured(tmp_path, shapes=(f"N={ROWS + 1}",))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--states", "smollm3"], "states must be one of smollm2, gemma"),
        (["--states", "smollm2", "--quick"], "leave out model, shape, states"),
        (["--states", "smollm2", "--model", "qwen3-8b"], "bring a model: leave out qwen3-8b"),
        (["--states", "smollm2", "--shape", "V=100"], "of the letters N"),
        (["prefix", "--states", "smollm2"], "states is for divergence, not for prefix"),
        (["--divergences", "backward"], "divergences must be of forward, reverse, jsd, top-100"),
        (["step", "--divergences", "jsd"], "divergences is for divergence, not for step"),
        (["--quick", "--divergences", "forward"], "divergences must be among the suite's own"),
    ],
)
def test_a_wrong_choice_is_named(arguments: list[str], said: str) -> None:
    shown = CliRunner().invoke(app, ["bench", *arguments])
    assert shown.exit_code == 2
    assert said in " ".join(shown.output.replace("│", " ").split())


def test_without_the_package_the_command_says_what_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setitem(gguf.PACKAGES, "gemma", ("no_such_package", "the-package==1"))
    shown = CliRunner().invoke(app, ["bench", "--states", "gemma"])
    assert shown.exit_code == 1
    assert "pip install the-package==1" in shown.output


def test_runs_on_states_are_shown_together_and_in_order(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Options, "chosen", False)  # as if N=12 were all rows
    results = tmp_path / "results"
    first = readme.Block(readme.FIRST)
    assert "No results are committed yet; `sdcore bench --states smollm2`" in first.made(results, tmp_path)
    for name, options in {
        "b": {"dtype": "bf16", "divergences": ("jsd",)},
        "a": {"dtype": "fp32", "divergences": ("jsd", "reverse")},
        "c": {"dtype": "bf16", "divergences": ("reverse", "jsd")},
    }.items():
        report = measured(tmp_path, shapes=("N=12",), **options)
        report.machine["date"] = name
        for group in {row.group for row in report.speed}:
            for missing in ("torch.compile", "TRL chunked", "Liger chunked"):
                report.speed.append(SpeedRow(group=group, contender=missing, reason="not run: needs 30 GiB"))
                report.memory.append(MemoryRow(group=group, contender=missing, reason="not run: needs 30 GiB"))
        SUITE.save(report, results / "device" / "states" / name / f"2026-01-0{1 + (name == 'b')}.json")
    ((whole, files),) = readme.on_states(results)
    assert [path.parent.name for path in files] == ["a", "b", "c"]
    assert list(dict.fromkeys(str(row.group).partition("H=16 ")[2] for row in whole.speed)) == [
        "fp32 reverse KL",
        "fp32 JSD",
        "bf16 reverse KL",
        "bf16 JSD",
    ]
    assert len(whole.mass) == 3
    assert whole.machine["date"] == "b"
    assert [row.contender for row in whole.speed].count("sdcore") == 4
    text = first.made(results, tmp_path)
    heads = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert heads[2:] == [
        *(f"time, {dtype} {name}" for dtype in ("fp32", "bf16") for name in ("reverse KL", "JSD")),
        *(f"{what}, bf16 {name}" for what in ("peak MiB", "gradient error") for name in ("reverse KL", "JSD")),
    ]
    assert "**SmolLM2-135M-Instruct**, vocabulary" in text
    assert "\n\n- Liger chunked, fp32 JSD: not run: needs 30 GiB" in text
    assert "(results/device/states/c/2026-01-01.md)" in text


@pytest.mark.parametrize("name", states.NAMES)
def test_the_record_has_a_thousand_tokens_of_answers_to_every_question(name: str) -> None:
    records = json.loads(states.FILE.read_text(encoding="utf-8"))
    record = records["models"][name]
    answers = [line.split() for lines in record["answers"] for line in lines]
    assert sum(map(len, answers)) >= states.ROWS
    assert len(record["answers"]) == sum(len(about["questions"]) for about in records["facts"])
    assert len(record["student"]) == len(record["teacher"]) == states.ROWS // 256


def test_every_committed_result_on_states_can_be_read() -> None:
    root = checkout()
    assert root is not None
    for path in newest_results(root / "benchmarks" / "results", "states/*"):
        assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(SUITE, SUITE.load(path))


def test_the_newest_results_of_states_are_not_those_of_a_choice(tmp_path: Path) -> None:
    assert Options(suite="divergence", states="gemma", dtype="bf16").kind == "states"
    for own in ({"shapes": ("N=8",)}, {"peers": ("trl",)}, {"states": str(tmp_path / "gemma.safetensors")}):
        assert Options(**{"suite": "divergence", "states": "gemma"} | own).kind == "divergence"
