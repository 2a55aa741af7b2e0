"""The command line as it is typed: every method trains, a run can be looked at before, and errors fit on a line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from typer.testing import CliRunner

from sdcore.cli.main import app
from sdcore.data import read_examples
from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.presets import dump_config
from sdcore.training.evaluation import evaluate
from sdcore.training.solve import SolveConfig, Solved
from sdcore.world import CHECKPOINT
from sdcore.world.data import Kind, rows, settings
from tests.sdcore.trainer_runs import tokenizer, trainer, world_model

COMMANDS = ["train", "eval", "solve", "report", "profile-memory", "demo"]
REWARD = {"sdpo": "with_feedback", "rl": "fraction", "grpo": "fraction"}
PATHS = ["sdft", "sdpo", "opsd", "context_distillation", "rl", "sft"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


def sdcore(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    """What a command that succeeds says."""
    result = sdcore(*words)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def write(kind: Kind, *, count: int = 64, split: Any = "train", name: str = "train.jsonl") -> Path:
    lines = [json.dumps(row) + "\n" for row in rows(kind, task="luma", count=count, seed=0, split=split)]
    Path(name).write_text("".join(lines))
    return Path(name)


def prepared(kind: Kind) -> list[str]:
    """A data file, a configuration in this world's words, and the options that name them."""
    write(kind)
    dump_config(*settings(kind), "world.yaml")
    reward = ["--reward", f"sdcore.world.data:{REWARD[kind]}"] if kind in REWARD else []
    return ["--data", "train.jsonl", "--config", "world.yaml", *reward]


def metrics(run: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", PATHS)
def test_every_method_trains_from_a_file(kind: Kind) -> None:
    output = done("train", *prepared(kind), "--output", "run", "max_steps=2", "per_device_train_batch_size=2")
    assert "step 2/2" in output
    assert [line["step"] for line in metrics() if "loss" in line] == [1, 2]
    trained, before = (load_file(folder / "model.safetensors") for folder in (Path("run"), CHECKPOINT))
    assert any(not torch.equal(trained[name], weight) for name, weight in before.items())
    assert json.loads(Path("run/run.json").read_text())["method"]["name"] == type(settings(kind)[0]).__name__


def test_a_baseline_and_a_method_of_ones_own_train_by_overrides_alone() -> None:
    write("sdft")
    own = ["context=template", "template={{ prompt }} {{ privileged_context }}", "teacher=frozen", "alpha=0.5"]
    run = ["max_completion_length=11", "max_steps=1", "per_device_train_batch_size=2"]
    done("train", "--method", "grpo", "--data", "train.jsonl", "--reward", "sdcore.world.data:exact", *run)
    done("train", "--method", "context_distillation", "--data", "train.jsonl", "--output", "own", *own, *run)
    assert json.loads(Path("own/run.json").read_text())["method"]["alpha"] == 0.5
    assert Path("sdcore-run/model.safetensors").exists()


def test_overrides_win_over_the_file_and_what_was_run_is_written_down() -> None:
    options = prepared("sdft")
    done("train", *options, "--output", "run", "max_steps=1", "per_device_train_batch_size=2", "alpha=0.25")
    written = yaml.safe_load(Path("run/config.yaml").read_text())
    assert written["method"] == "sdft_paper"
    assert (written["alpha"], written["max_steps"], written["per_device_train_batch_size"]) == (0.25, 1, 2)
    assert written["learning_rate"] == settings("sdft")[1]["learning_rate"]
    # It is a configuration itself: the same run again.
    done("train", "--data", "train.jsonl", "--config", "run/config.yaml", "--output", "again")
    again, first = (load_file(Path(run) / "model.safetensors") for run in ("again", "run"))
    assert all(torch.equal(again[name], weight) for name, weight in first.items())


def test_a_run_goes_on_from_its_last_checkpoint() -> None:
    options = [*prepared("sdft"), "per_device_train_batch_size=2", "save_steps=1"]
    done("train", *options, "--output", "whole", "max_steps=3", "lr_scheduler_type=constant")
    done("train", *options, "--output", "run", "max_steps=2", "lr_scheduler_type=constant")
    done("train", *options, "--output", "run", "max_steps=3", "lr_scheduler_type=constant", "--resume")
    assert [line["step"] for line in metrics() if "loss" in line] == [1, 2, 3]
    whole, resumed = (load_file(Path(run) / "model.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_a_run_that_a_signal_stops_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does it with enable_jit_checkpoint: a checkpoint, and the end of training."""

    def signalled(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.jit_manager.is_checkpoint_requested = state.global_step == 2 and state.max_steps == 3
        after_step(self, args, state, control, **kwargs)

    after_step = JITCheckpointCallback.on_step_end
    monkeypatch.setattr(JITCheckpointCallback, "on_step_end", signalled)
    options = [*prepared("sdft"), "per_device_train_batch_size=2", "save_steps=9", "enable_jit_checkpoint=true"]
    said = done("train", *options, "--output", "run", "max_steps=3")
    assert "stopped after step 2 of 3; --resume goes on from a checkpoint" in said
    assert "stopped" not in done("train", *options, "--output", "run", "max_steps=4", "--resume")
    assert [line["step"] for line in metrics() if "loss" in line] == [1, 2, 3, 4]


def test_a_folder_of_another_run_is_refused_before_anything_in_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", *prepared("sdft"), "max_completion_length=11", "save_steps=1", "--output", "run"]
    done(*words, "max_steps=1")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    for more, message in (
        (["max_steps=2"], "output_dir must have no checkpoints beyond the start of this run, got run/checkpoint-1"),
        (["max_steps=2", "alpha=0.5", "--resume"], "run/checkpoint-1 is of a run with another alpha=0.5 (was 1.0)"),
        (
            ["max_steps=2", "resume_from_checkpoint=run", "seed=5"],
            "must be a whole checkpoint of this trainer, got run",
        ),
    ):
        result = sdcore(*words, *more)
        assert result.exit_code == 1
        assert message in result.output
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    monkeypatch.setattr("sdcore.training.prepare.loaded", None)
    assert "must have no checkpoints" in sdcore(*words).output  # before a model is loaded


def test_adapters_are_trained_in_place_of_the_model() -> None:
    pytest.importorskip("peft")
    options = [*prepared("opsd"), "per_device_train_batch_size=2", "max_steps=1", "teacher=adapter_off"]
    done("train", *options, "--output", "run", "--lora-rank", 2)
    assert Path("run/adapter_model.safetensors").exists()
    assert not Path("run/model.safetensors").exists()
    # Of the folder, a dry run shows the same as it did of model and rank, and so does the prediction.
    looked = [done("train", *options, *more, "--dry-run") for more in (["--lora-rank", 2], ["--model", "run"])]
    assert looked[0] == looked[1]
    asked = (["world"], ["world", "--lora-rank", 2], ["run"])
    whole, ranked, adapter = (done("profile-memory", "--model", *words).splitlines()[1:] for words in asked)
    assert adapter == ranked != whole


@pytest.mark.parametrize("tokens", ["resized", "trained", "copied"])
def test_an_adapter_with_tokens_of_its_own_is_measured_as_it_was_trained(tokens: str) -> None:
    peft = pytest.importorskip("peft")
    chat, model = tokenizer(), world_model()
    chat.add_tokens(["zork", "blib"])
    model.resize_token_embeddings(len(chat))
    more: dict[str, Any] = {
        "trained": {"trainable_token_indices": [134, 135]},
        "copied": {"modules_to_save": ["embed_tokens", "lm_head"]},
    }
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], **more.get(tokens, {}))
    data = [row | {"prompt": "luma a zork", "messages": None} for row in rows("sdft", task="luma", count=4, seed=0)]
    made = trainer(
        "run", model=model, processing_class=chat, peft_config=adapter, train_dataset=data, learning_rate=0.1
    )
    made.train()
    made.save_model()
    Path("eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    words = ["--data", "eval.jsonl", "--reward", "sdcore.world.data:fraction", "--temperature", 0]
    done("eval", "--model", "run", *words, "--output", "answers.json")
    told = json.loads(Path("answers.json").read_text())["samples"]
    own = evaluate(made.model, chat, read_examples(data), temperature=0.0, max_completion_length=8).groups
    assert [row["answers"][0]["text"] for row in told] == [group.rollouts[0].text for group in own]


@pytest.mark.parametrize("kind", ["sdft", "sdpo"])
def test_a_dry_run_shows_the_shared_prefix_and_trains_nothing(kind: Kind) -> None:
    output = done("train", *prepared(kind), "--output", "run", "--dry-run")
    assert not Path("run").exists()
    for words in (
        "train.jsonl:1",
        "shared prefix 7 (88 % of the student's)",
        "c_ext",
        "completion, loss",
        "64 rows",
        "on average 88 %",
        "fused, shared",
        "plain, naive",
    ):
        assert words in output, words


def test_the_path_of_a_new_user() -> None:
    """As the README has it: rows of one's own, a look, training, and both models measured on the same draws."""
    options = prepared("sdft")
    write("rl", split="eval", count=100, name="eval.jsonl")
    done("train", *options, "--dry-run")
    shown = done(
        *("train", *options, "--output", "run", "max_steps=20", "learning_rate=1e-3"),
        *("--eval-data", "eval.jsonl", "--reward", "sdcore.world.data:exact"),
    )
    assert "eval: reward" in shown
    judged = ["--data", "eval.jsonl", "--reward", "sdcore.world.data:exact", "--max-completion-length", 11]
    reached = {}
    for model in ("world", "run"):
        table = done("eval", "--model", model, *judged, "--output", f"{model}.json")
        assert "reward_stderr" in table
        measured = json.loads(Path(f"{model}.json").read_text())
        assert len(measured["samples"]) == 100
        assert measured["samples"][0]["source"] == "eval.jsonl:1"
        reached[model] = measured["metrics"]["reward_mean"]
    assert reached["world"] <= 0.02
    assert reached["run"] >= 0.3  # 0.9 in a trial


def test_what_a_teacher_knows_is_measured_before_training() -> None:
    write("sdft", count=20)
    words = ["eval", "--data", "train.jsonl", "--reward", "sdcore.world.data:exact", "--max-completion-length", 11]
    Path("run.yaml").write_text("method: sdft_as_run\ntemplate: '{{ prompt }} {{ privileged_context }}'\n")
    done(*words, "--config", "run.yaml", "--output", "seen.json")
    told = json.loads(Path("seen.json").read_text())
    assert told["metrics"]["with_context_reward_mean"] > told["metrics"]["without_context_reward_mean"] + 0.5
    first = json.loads(Path("train.jsonl").read_text().splitlines()[0])
    assert told["in_view"][0].keys() == {"source", "prompt", "text", "finished", "reward", "feedback"}
    assert first["privileged_context"] in told["in_view"][0]["prompt"]
    # In words that this model does not know.
    done(*words, "--method", "sdft_as_run", "--output", "seen.json")
    assert json.loads(Path("seen.json").read_text())["metrics"]["with_context_reward_mean"] < 0.5
    assert "context is no field of an evaluation" in sdcore(*words, "context=solution").output
    assert "method must be one of" in sdcore(*words, "--method", "sdtf").output


def test_the_same_seed_measures_the_same() -> None:
    write("rl", count=8)
    words = ["eval", "--data", "train.jsonl", "--reward", "sdcore.world.data:fraction", "--max-completion-length", 11]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done(*words, "--output", name, "--seed", seed, "--generations", 3)
    a, b, c = (Path(name).read_text() for name in "abc")
    assert a == b != c


def test_a_model_is_measured_and_searched_as_it_was_trained() -> None:
    """The chat template's arguments and the sampling, of the run and of its checkpoints; what is typed comes first."""
    write("rl", count=16, name="eval.jsonl")
    shutil.copytree(CHECKPOINT, "base")
    template = Path("base/chat_template.jinja")
    template.write_text("{{ hint }}" + template.read_text())
    asked: dict[str, Any] = {
        "chat_template_kwargs": {"hint": "nu "},
        "top_p": 0.9,
        "top_k": 7,
        "stop_token_ids": [2, 9],
    }
    asked |= {"max_completion_length": 9, "sampling_temperature": 0.7}
    words = [f"{name}={json.dumps(value)}" for name, value in asked.items()]
    judged = ["--reward", "sdcore.world.data:fraction"]
    done(
        *(
            "train",
            *prepared("sdft"),
            "--model",
            "base",
            "--output",
            "run",
            *judged,
            "--eval-data",
            "eval.jsonl",
            *words,
        ),
        *("max_steps=1", "save_strategy=steps", "save_steps=1"),
    )
    trained = next(line for line in metrics() if "eval_reward_mean" in line)
    look = ["eval", "--data", "eval.jsonl", *judged, "--seed", 42, "--batch-size", 8, "--output", "x.json"]

    def measured(*more: object) -> dict[str, Any]:
        done(*look, *more)
        return json.loads(Path("x.json").read_text())

    found = measured("--model", "run")
    assert found["metrics"]["reward_mean"] == pytest.approx(trained["eval_reward_mean"], abs=1e-12)
    assert found["metrics"]["mean_length"] == trained["eval_mean_length"]
    expected = {("temperature" if name == "sampling_temperature" else name): value for name, value in asked.items()}
    assert found["settings"] | expected == found["settings"]
    assert measured("--model", "run/checkpoint-1")["metrics"] == found["metrics"]
    assert measured("--model", "base", "--like", "run")["settings"] == found["settings"]
    assert measured("--model", "base", "--max-completion-length", 9)["settings"]["top_p"] == 1.0
    other = measured("--model", "run", "--temperature", 0, "--max-completion-length", 3, "top_p=0.5", "top_k=null")
    shown = {name: other["settings"][name] for name in ("temperature", "max_completion_length", "top_p", "top_k")}
    assert shown == {"temperature": 0.0, "max_completion_length": 3, "top_p": 0.5, "top_k": None}
    assert other["settings"]["chat_template_kwargs"] == {"hint": "nu "}
    assert "as the run in run: chat_template_kwargs={'hint': 'nu '}" in done(*look, "--model", "run")


def test_a_search_reads_the_runs_settings_and_refuses_those_that_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SolveConfig] = []

    def search(
        model: Any, tokenizer: Any, example: Any, verify: Any, method: Any, config: SolveConfig, **_: Any
    ) -> Any:
        asked.append(config)
        return Solved(solved=True, answer="a3", samples=1, sampled_tokens=1, trained_tokens=0, seconds=0.0, rounds=())

    monkeypatch.setattr("sdcore.training.solve.solve", search)
    shutil.copytree(CHECKPOINT, "run")
    config = {"chat_template_kwargs": {"hint": "nu"}, "top_p": 0.9, "sampling_temperature": 0.7, "max_steps": 3}
    Path("run/run.json").write_text(json.dumps({"config": config}))
    words = ["solve", "--model", "run", "--question", "luma a", "--verifier", "true"]
    done(*words, "top_k=3", "topk=5", "--learning-rate", 1e-3)
    wanted = SolveConfig(chat_template_kwargs={"hint": "nu"}, top_p=0.9, top_k=3, temperature=0.7, learning_rate=1e-3)
    assert asked == [wanted]
    refused = sdcore(*words, "max_steps=3")
    assert refused.exit_code == 2
    assert "max_steps is no field of a search" in refused.output


def verifier(answer: str) -> str:
    """A check in a file, and the command that runs it from elsewhere."""
    Path("check.py").write_text(
        "import sys\n"
        f"right, got = {answer.split()!r}, sys.stdin.read().split()\n"
        "if got == right: sys.exit(0)\n"
        "wrong = [pair for i, pair in enumerate(right) if got[i : i + 1] != [pair]]\n"
        "print(*(f'H {pair}' for pair in wrong or right))\n"
        "sys.exit(1)\n"
    )
    return f"{sys.executable} -S {Path('check.py').resolve()}"


def test_one_question_is_solved_with_a_verifier_command() -> None:
    write("sdpo", count=1)
    answer = rows("sdpo", task="luma", count=1, seed=0)[0]["answer"]
    dump_config(*settings("sdpo"), "world.yaml")
    words = ["solve", "--question-file", "train.jsonl", "--verifier", verifier(answer), "--config", "world.yaml"]
    output = done(*words, "--learning-rate", 1e-3, "--max-samples", 80, "--output", "found.json")
    assert output.strip().endswith(answer)
    search = json.loads(Path("found.json").read_text())
    assert (search["solved"], search["answer"]) == (True, answer)
    assert f"solved after {search['samples']} answers" in output
    # Best-of-k from the same start: a guess is right once in 10^5.
    guessed = sdcore(*words, "--no-update", "--max-samples", 8)
    assert guessed.exit_code == 1
    assert "not solved after 8 answers" in guessed.output


def test_memory_is_predicted_from_a_configuration() -> None:
    output = done("profile-memory", "--model", "world", "--teacher", "ema", "--completions", 4)
    for words in ("weights", "teacher weights", "prompt cache", "logits", "fused, shared", "peak"):
        assert words in output


def test_a_run_becomes_a_page() -> None:
    done("train", *prepared("sdft"), "--output", "run", "max_steps=2", "per_device_train_batch_size=2")
    assert "run/report.html" in done("report", "run")
    assert "<html" in Path("run/report.html").read_text()[:2000].lower()
    assert "both.html" in done("report", "run", "run", "--output", "both.html")
    assert sdcore("report", "run", "--format", "pdf").exit_code == 2
    missing = sdcore("report", "nowhere")
    assert missing.exit_code == 1
    assert missing.output.startswith("sdcore report: nowhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "train.jsonl:3: expected JSON"),
        ('{"question": "luma a"}', "train.jsonl:3: expected a column `prompt` or `messages`"),
        ('{"prompt": 7}', "train.jsonl:3, column `prompt`"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(line: str, message: str) -> None:
    options = prepared("sdft")
    lines = Path("train.jsonl").read_text().splitlines()
    Path("train.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    for more in ([], ["--dry-run"]):
        result = sdcore("train", *options, *more)
        assert result.exit_code == 1
        assert result.output.startswith(f"sdcore train: {message}")
        assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("train --data train.jsonl", 2, "a method must be named, by --method or in the file of --config, got none"),
        ("train --data train.jsonl --method sdftpaper", 2, "did you mean 'sdft_paper'?"),
        ("train --data train.jsonl --method sdpo", 2, "needs rewards, got none"),
        ("train --data train.jsonl --method sdft_paper alhpa=1", 2, "did you mean 'alpha'?"),
        ("train --data train.jsonl --method sdft_paper alpha=2", 2, "alpha must be in [0, 1], got 2"),
        ("train --data train.jsonl --method sdft_paper alpha", 2, "of the form key=value, got 'alpha'"),
        ("train --data train.jsonl --method rl_tilt --reward no.such:function", 2, "there is no module 'no'"),
        ("train --data none.jsonl --method sdft_paper", 1, "none.jsonl is not there"),
        ("train --data train.jsonl --method sdft_paper --config none.yaml", 1, "none.yaml"),
        (
            "train --data train.jsonl --method sdft_paper --resume max_completion_length=11",
            1,
            "must find a checkpoint in sdcore-run",
        ),
        ("train --method sdft_paper", 2, "Missing option '--data'"),
        ("eval --data train.jsonl --reward sdcore.world.data:nothing", 2, "has no function 'nothing'"),
        (
            "eval --data train.jsonl --reward sdcore.world.data:exact --max-completion-length 300",
            2,
            "max_completion_length must be at most ",
        ),
        ("train --data train.jsonl --method sft max_completion_length=0", 2, "max_completion_length must be at least"),
        (
            "train --data train.jsonl --method grpo --reward sdcore.world.data:exact max_completion_length=300",
            2,
            "max_completion_length must be at most ",
        ),
        (
            "solve --verifier true --question luma --max-completion-length 300",
            2,
            "max_completion_length must be at most ",
        ),
        ("solve --verifier true", 2, "one of --question and --question-file must be given"),
        ("solve --verifier true --question luma --method grpo", 2, "method must have context 'feedback'"),
        ("solve --verifier no-such-check --question luma --max-completion-length 2", 2, "could not be run"),
        ("profile-memory --model world --completions 0", 2, "completions must be at least 1, got 0"),
        ("profile-memory --model world --teacher emma", 2, "teacher must be one of live, "),
        ("profile-memory --model ./nowhere", 2, "--model must be a folder or a file that is there, or a Hub id"),
        ("train --data train.jsonl --method sdft_paper --model no/such/run", 2, "--model must be a folder"),
        ("train --data train.jsonl --method sdft_paper --model no/such/run --dry-run", 2, "--model must be a folder"),
        ("eval --data train.jsonl --reward sdcore.world.data:exact --model ../no", 2, "--model must be a folder"),
        ("solve --verifier true --question luma --model ./no.gguf", 2, "--model must be a folder"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_with_an_exit_code(words: str, code: int, message: str) -> None:
    write("sdft", count=4)
    result = sdcore(*words.split())
    assert message in result.output
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    if "Missing option" not in message:
        assert result.output.startswith(f"sdcore {words.split()[0]}: ")
        assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    "option", ["--generations", "--max-completion-length", "--batch-size", "--limit", "--temperature"]
)
def test_an_option_out_of_its_range_is_named_as_it_was_typed(option: str) -> None:
    write("rl", count=4)
    result = sdcore("eval", "--data", "train.jsonl", "--reward", "sdcore.world.data:exact", option, -1)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            RuntimeError("size mismatch for lm_head.weight:\n copying a param"),
            1,
            "RuntimeError: size mismatch for lm_head",
        ),
        (OSError("no/such is not a local folder"), 1, "OSError: no/such is not a local folder"),
        (ImportError("needs flash_attn"), 1, "ImportError: needs flash_attn"),
        (KeyError("qwen9"), 1, "KeyError: 'qwen9'"),
        (AttributeError("no vocab_size"), 1, "AttributeError: no vocab_size"),
        (torch.cuda.OutOfMemoryError("tried to allocate"), 1, "OutOfMemoryError: tried to allocate"),
        (UnsupportedModelError("sees tokens ahead"), 1, "sees tokens ahead"),
        (ArgumentError("dtype must be float32"), 2, "dtype must be float32"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_any_kind_is_a_line_and_an_exit_code(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise error

    write("rl", count=4)
    rewarded = ["--data", "train.jsonl", "--reward", "sdcore.world.data:exact"]
    for place, words in (
        ("transformers.AutoModelForCausalLM.from_pretrained", ["train", "--method", "grpo", *rewarded]),
        ("transformers.AutoModelForCausalLM.from_pretrained", ["eval", *rewarded]),
        ("transformers.AutoModelForCausalLM.from_pretrained", ["solve", "--verifier", "true", "--question", "luma"]),
        ("transformers.AutoConfig.from_pretrained", ["profile-memory", "--model", "world"]),
        ("sdcore.report.write_report", ["report", "run"]),
        ("sdcore.demo.run_demo", ["demo"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, fails)
            result = sdcore(*words)
            assert (result.exit_code, result.output.count("\n")) == (code, 1), result.output
            assert result.output.startswith(f"sdcore {words[0]}: {said}")
            patch.setenv("SDCORE_TRACEBACK", "1")
            assert sdcore(*words).exception is error


def test_of_several_processes_one_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    options = prepared("sdft")
    monkeypatch.setenv("RANK", "0")
    assert "completion, loss" in done("train", *options, "--dry-run")
    monkeypatch.setenv("RANK", "1")
    assert done("train", *options, "--dry-run") == ""


def test_a_reward_that_raises_stops_the_run_with_its_row_and_the_whole_story_on_demand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = prepared("sdft")
    Path("rewards.py").write_text("def broken(*, completion, **columns):\n    return 1 / 0\n")
    words = ["train", *options, "--reward", "rewards.py:broken", "max_steps=1", "per_device_train_batch_size=2"]
    result = sdcore(*words)
    assert result.exit_code == 1
    assert "reward function broken, train.jsonl:" in result.output
    assert "raised ZeroDivisionError: division by zero" in result.output
    monkeypatch.setenv("SDCORE_TRACEBACK", "1")
    assert "RewardError" in repr(sdcore(*words).exception)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_and_imports_no_torch(command: str, run_python: Callable[..., str]) -> None:
    code = """
import json, runpy, sys
try:
    runpy.run_module("sdcore", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    status = stop.code
heavy = sorted({"torch", "transformers", "numpy", "matplotlib", "datasets", "sdkernels"} & set(sys.modules))
print(json.dumps({"status": status, "heavy": heavy}))
"""
    shown, _, verdict = run_python(code, command, "--help").strip().rpartition("\n")
    assert json.loads(verdict) == {"status": 0, "heavy": []}
    # An example to copy; `demo` needs none.
    assert command == "demo" or f"\n    sdcore {command} " in shown


def test_the_first_help_lists_every_command() -> None:
    output = done("--help")
    for command in COMMANDS:
        assert f"\n  {command} " in output
    assert "sdcore train ... --dry-run" in output
