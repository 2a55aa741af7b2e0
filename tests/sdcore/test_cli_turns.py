"""Runs in several turns as they are typed: tools and environments by name, from training to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sdcore.errors import ArgumentError
from sdcore.rollouts.named import load_tools
from sdcore.world import CHECKPOINT
from tests.sdcore.rollouts.talks import SMOLLM2, tokenizer_of
from tests.sdcore.test_cli import done, metrics, sdcore, write
from tests.sdcore.test_trajectories import tiny

GAME = '''
from pathlib import Path

from sdcore.rollouts.environments import Reply

with Path("loads").open("a") as loads:
    loads.write("x")


class Game:
    """Wants another answer once, then says that it was right."""

    def reset(self, example):
        self.heard = []
        return example.columns.get("opening")

    def step(self, message):
        self.heard.append(message["content"])
        if len(self.heard) == 2:
            return Reply("b", done=True, reward=1.0, feedback="a3")
        return Reply("luma", reward=0.25, feedback="a3")
'''
TOOLS = '''
from os.path import join as borrowed


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


def double(a: int) -> int:
    """
    Doubles a number.

    Args:
        a: the number
    """
    return 2 * a


def _hidden(a):
    return a
'''
GAME_RUN = ["--environment", "game.py:Game", "max_completion_length=6", "max_turns=3", "stop_token_ids=[2,9,10,11,12]"]
FEW = ["max_steps=2", "per_device_train_batch_size=2", "log_completions_every=1"]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("game.py").write_text(GAME)
    Path("tools.py").write_text(TOOLS)
    write("rl", count=6)


def model_with_tools() -> str:
    """A model that has learned nothing, whose chat template shows tools."""
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_of("smollm2").save_pretrained("tokenizer")[0].rpartition("/")[0]
    )
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + SMOLLM2
    tiny().float().save_pretrained("base")
    tokenizer.save_pretrained("base")
    return "base"


def test_the_functions_of_a_tools_file_are_all_that_it_defines_for_others() -> None:
    assert [tool.__name__ for tool in load_tools(["tools.py"])] == ["add", "double"]
    assert [tool.__name__ for tool in load_tools(["tools.py:double", load_tools])] == ["double", "load_tools"]
    (double, add) = load_tools(["tools:double", "tools.py:add"])
    assert double(add(1, 2)) == 6
    Path("none.py").write_text("from os.path import join\n")
    with pytest.raises(
        ArgumentError, match=r"tools must be functions, or a file or module that defines some, got none.py"
    ):
        load_tools(["none.py"])
    with pytest.raises(ArgumentError, match="there is no file"):
        load_tools(["nowhere.py"])


def test_a_run_in_an_environment_is_trained_and_measured_by_its_name() -> None:
    done("train", "--method", "grpo", "--data", "train.jsonl", "--output", "run", *GAME_RUN, *FEW)
    assert [line["turns/count"] > line["completions/count"] for line in metrics() if "loss" in line] == [True] * 2
    assert Path("loads").read_text() == "x"  # its file was run once
    described = json.loads(Path("run/run.json").read_text())
    assert (described["tools"], described["environment"]) == ([], "Game")
    judged = ["eval", "--model", "run", "--data", "train.jsonl", "--generations", 2, "--output", "x.json"]
    shown = done(*judged, "--environment", "game.py:Game")
    assert "mean_turns" in shown
    assert "trajectories/answered" in shown
    told = json.loads(Path("x.json").read_text())
    # The limits are the run's.
    assert told["settings"]["max_turns"] == 3
    assert told["settings"]["environment"] == "Game"
    answers = [answer for sample in told["samples"] for answer in sample["answers"]]
    assert sum(answer["turns"] for answer in answers) == told["metrics"]["turns/count"]
    assert told["metrics"]["mean_turns"] == pytest.approx(sum(answer["turns"] for answer in answers) / 12)
    assert any(answer["feedback"] == "a3\n\na3" for answer in answers)
    ended = [answer for answer in answers if answer["outcome"] == "answered"]
    assert len(ended) == told["metrics"]["trajectories/answered"]
    assert any(answer["turns"] == 2 and "\n\nuser: luma\n\nassistant: " in answer["transcript"] for answer in ended)
    # Without the option nobody answers, which is said, and then somebody has to judge.
    assert "had tools or an environment (Game); here nobody answers" in done(
        *judged, "--reward", "sdcore.world.data:exact"
    )
    assert "turns" not in json.loads(Path("x.json").read_text())["samples"][0]["answers"][0]
    alone = sdcore(*judged)
    assert alone.exit_code == 2
    assert "--reward must be given where no --environment judges" in alone.output


def test_tools_of_a_file_are_shown_called_and_counted() -> None:
    words = [
        "--model",
        model_with_tools(),
        "--data",
        "train.jsonl",
        "--reward",
        "sdcore.world.data:exact",
        "--tools",
        "tools.py",
    ]
    done("train", "--method", "grpo", *words, "--output", "run", *FEW, "max_completion_length=4")
    assert json.loads(Path("run/run.json").read_text())["tools"] == ["add", "double"]
    assert "tools/called" in metrics()[0]
    assert "tools/called" in done("eval", *words, "--max-completion-length", 4)
    for command in (["train", "--method", "grpo"], ["eval"]):
        result = sdcore(*command, *words[2:], "--model", CHECKPOINT)
        assert result.exit_code == 2
        assert "tools must be shown to the student by the tokenizer's chat template" in result.output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--tools", "tools.py:triple"], "tools.py has no function 'triple'; it has add, double"),
        (
            ["--environment", "game.py"],
            "a function must be given as module:function or file.py:function, got 'game.py'",
        ),
    ],
)
def test_a_name_that_is_none_is_refused_before_a_model_is_loaded(
    option: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcore.training.prepare.model_of", None)
    judged: list[Any] = ["--data", "train.jsonl", "--reward", "sdcore.world.data:exact"]
    for command in (["train", "--method", "grpo"], ["eval"]):
        result = sdcore(*command, *judged, *option)
        assert result.exit_code == 2
        assert message in result.output


def test_a_question_is_searched_in_turns_of_which_the_last_is_verified() -> None:
    words = ["solve", "--verifier", "cat > $OLDPWD/last; true", "--question", "luma a b", *GAME_RUN]
    Path("check.sh").write_text(f"cat > {Path.cwd()}/last\n")
    words[2] = f"sh {Path.cwd()}/check.sh"
    said = done(*words, "--output", "x.json")
    assert "solved after 1 answers" in said
    assert Path("last").read_text() == json.loads(Path("x.json").read_text())["answer"]
    refused = sdcore(*words, "max_turns=0")
    assert (refused.exit_code, "max_turns must be at least 1, got 0" in refused.output) == (2, True)


def test_a_dry_run_plays_a_stand_in() -> None:
    looked = done("train", "--method", "grpo", "--data", "train.jsonl", *GAME_RUN, "--dry-run")
    assert "a stand-in of at most 2 turns: turns 2, outcome answered, reward 1.25" in looked
    assert looked.count("nobody") == 2  # the last word, of the two rows that are shown
    assert "others, no loss" in looked


def test_a_report_shows_turns() -> None:
    done("train", "--method", "sdpo", "--data", "train.jsonl", "--output", "run", *GAME_RUN, *FEW)
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert any(row["feedback"] == "a3\n\na3" for row in samples)
    done("report", "run")
    page = Path("run/report.html").read_text()
    assert page.count('<p class="soft">turn 2') >= 1
    assert page.count('<p class="soft">reply</p>') >= 1
