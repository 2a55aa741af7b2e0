"""Reward functions: what they are called with, what they may return, and what becomes of one that fails or hangs."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sdcore.errors import ArgumentError
from sdcore.rollouts import calls
from sdcore.rollouts.named import load
from sdcore.rollouts.rewards import RewardError, check_columns, contains, judge, prepare
from sdcore.types import Example, Group, Trajectory


def group(*texts: str, **columns: Any) -> Group:
    example = Example(prompt="2 + 2?", privileged_context="four", columns=columns, source="train.jsonl:7")
    rollouts = tuple(
        Trajectory.answer(completion_ids=torch.tensor([1]), logprobs=None, text=text, finished=True) for text in texts
    )
    return Group(example=example, prompt_ids=torch.tensor([5]), rollouts=rollouts)


def length(*, completion: str, **columns: Any) -> float:
    return float(len(completion))


def score(groups: list[Group], functions: list[Any], **options: Any) -> list[Group]:
    return judge(groups, functions, **options).groups


def rewards_of(groups: list[Group]) -> list[float | None]:
    return [rollout.reward for one in groups for rollout in one.rollouts]


def test_a_function_gets_prompt_completion_and_the_rows_columns() -> None:
    seen: list[dict[str, Any]] = []

    def watch(**columns: Any) -> float:
        seen.append(columns)
        return 0.0

    asked = group("a", "b", answer=4, level="easy")
    score([asked], [watch])
    assert [columns.pop("trajectory") for columns in seen] == [*asked.rollouts]
    common = {"prompt": "2 + 2?", "privileged_context": "four", "answer": 4, "level": "easy"}
    assert seen == [common | {"completion": t, "raw_completion": t, "completion_ids": [1]} for t in ("a", "b")]


def test_a_function_without_columns_gets_those_that_it_names() -> None:
    def named(*, completion: str, answer: int, level: str = "none") -> float:
        return float(answer) if level == "none" else -1.0

    assert rewards_of(score([group("a", answer=4, other=1)], [named])) == [4.0]
    with pytest.raises(ArgumentError, match=r"named needs answer, which train.jsonl:7 does not have: .* other"):
        score([group("a", other=1)], [named])


def by_trl(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def by_trl_with_names(completions: list[str], answer: list[str]) -> list[float]:
    return [1.0 for _ in completions]


def by_verl(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (by_trl, "by_trl needs prompts, completions, which train.jsonl:7 does not have: .*; TRL gives lists of them"),
        (by_trl_with_names, "needs completions, .*columns, answer; TRL gives lists of them, here it is one, and one"),
        (by_verl, "needs data_source, solution_str, ground_truth, which .* with completion, .* columns, answer$"),
    ],
)
def test_functions_of_other_libraries_are_told_what_they_are_called_with(function: Any, said: str) -> None:
    examples = [Example(prompt="q", columns={"answer": "a"}, source="train.jsonl:7")]
    with pytest.raises(ArgumentError, match=said):
        check_columns(prepare([function]), examples)
    check_columns(prepare([lambda completion, answer, level=0, **more: 0.0]), examples)


def test_what_was_sampled_comes_before_a_column_of_its_name() -> None:
    assert rewards_of(score([group("abc", completion="from the data")], [length])) == [3.0]


def test_a_function_may_return_feedback_about_this_very_completion() -> None:
    def judged(*, completion: str, **columns: Any) -> Any:
        return (1.0, None) if completion == "right" else (0.0, f"not {completion}")

    (scored,) = score([group("right", "wrong")], [judged])
    assert [(r.reward, r.feedback) for r in scored.rollouts] == [(1.0, None), (0.0, "not wrong")]


def test_several_functions_are_a_weighted_sum_and_their_feedback_is_joined() -> None:
    def first(**columns: Any) -> Any:
        return 1.0, "one"

    async def second(**columns: Any) -> Any:
        return 10, "two"

    scored = judge([group("a")], [first, length, second], weights=[0.5, 2.0, 0.1])
    assert rewards_of(scored.groups) == [pytest.approx(0.5 + 2.0 + 1.0)]
    assert scored.groups[0].rollouts[0].feedback == "one\n\ntwo"
    assert scored.sums == {"first": (1.0, 1), "length": (1.0, 1), "second": (10.0, 1)}


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("It has 412 employees.", 412, 1),
        ("It has 4120 employees.", "412", 0),
        ("They are in /srv/amber.", "/srv/amber", 1),
        ("On the Fifth floor", ["floor 5", "fifth floor"], 1),
        ("At Floor 51", ["floor 5"], 0),
        ("", "2", 0),
    ],
)
def test_an_answer_is_right_with_a_word_of_its_own(completion: str, answer: Any, right: int) -> None:
    assert contains(completion, answer) == right


@pytest.mark.parametrize("answer", [None, "", " ", ["a", ""]])
def test_an_answer_of_no_words_is_in_nothing_and_refused(answer: Any) -> None:
    with pytest.raises(ArgumentError, match="answer must be a text"):
        contains("anything", answer)


def test_without_functions_nothing_is_judged() -> None:
    groups = [group("a")]
    assert score(groups, []) == groups


def test_async_functions_run_at_the_same_time_also_inside_an_event_loop() -> None:
    running, most = 0, 0

    async def slow(**columns: Any) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return 1.0

    async def caller() -> list[float | None]:
        return rewards_of(score([group("a", "b", "c")], [slow]))

    assert asyncio.run(caller()) == [1.0] * 3
    assert most == 3


def test_workers_run_sync_functions_at_the_same_time_and_keep_the_order() -> None:
    together = threading.Barrier(3, timeout=10)

    def meet(*, completion: str, **columns: Any) -> float:
        together.wait()
        return float(len(completion))

    assert rewards_of(score([group("a", "bb", "ccc")], [meet], workers=3)) == [1.0, 2.0, 3.0]


def raises(**columns: Any) -> float:
    raise KeyError("lost")


async def raises_later(**columns: Any) -> float:
    raise KeyError("lost")


def returns(value: Any) -> Any:
    def function(**columns: Any) -> Any:
        return value

    return function


BAD = {
    "raised": (raises, "raised KeyError: 'lost'", "raised"),
    "raised, async": (raises_later, "raised KeyError: 'lost'", "raised"),
    "nan": (returns(float("nan")), "finite number, got nan", "invalid"),
    "nan in a tuple": (returns((math.nan, "words")), "finite number, got nan", "invalid"),
    "infinity": (returns(-math.inf), "finite number, got -inf", "invalid"),
    "None": (returns(None), r"a number or \(number, feedback\), got None", "invalid"),
    "text": (returns("1.0"), r"a number or \(number, feedback\), got '1.0'", "invalid"),
    "three things": (returns((1.0, "a", "b")), "number, feedback text or None", "invalid"),
    "feedback that is no text": (returns((1.0, 5)), "number, feedback text or None", "invalid"),
    "many numbers": (returns(torch.ones(2)), r"a number or \(number, feedback\)", "invalid"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("timeout", [None, 20.0])
def test_what_a_function_gets_wrong_stops_the_run_or_drops_the_completion(name: str, timeout: float | None) -> None:
    function, message, why = BAD[name]
    with pytest.raises(RewardError, match=rf"reward function \w+, train.jsonl:7, completion 0: .*{message}"):
        score([group("a")], [function], timeout=timeout)
    scored = judge([group("aa", "b")], [length, function], timeout=timeout, on_error="drop")
    assert rewards_of(scored.groups) == [None, None]
    assert [r.feedback for r in scored.groups[0].rollouts] == [None, None]
    expected = {"rewards/dropped": 2, "rewards/raised": 0, "rewards/timeout": 0, "rewards/invalid": 0}
    assert scored.counts == expected | {f"rewards/{why}": 2}


@pytest.mark.parametrize("value", [True, 3, 0.5, torch.tensor(0.5), torch.tensor(2), torch.tensor(0.5).numpy()])
def test_numbers_of_every_kind_are_numbers(value: Any) -> None:
    assert rewards_of(score([group("a")], [returns(value)])) == [float(value)]


def test_a_function_that_hangs_is_left_behind_and_the_others_go_on(release: threading.Event) -> None:
    def hangs(*, completion: str, **columns: Any) -> float:
        if completion == "hang":
            release.wait()
        return 1.0

    scored = judge([group("a", "hang", "b")], [hangs], timeout=0.05, on_error="drop")
    assert rewards_of(scored.groups) == [1.0, None, 1.0]
    assert scored.counts["rewards/timeout"] == scored.counts["rewards/dropped"] == 1
    assert calls._left_behind() == 1
    with pytest.raises(RewardError, match=r"completion 1: did not return within 0.05 seconds"):
        score([group("a", "hang", "b")], [hangs], timeout=0.05)


def test_an_async_function_that_hangs_is_cancelled() -> None:
    cancelled = []

    async def hangs(*, completion: str, **columns: Any) -> float:
        try:
            await asyncio.sleep(60 if completion == "hang" else 0)
        except asyncio.CancelledError:
            cancelled.append(completion)
            raise
        return 1.0

    scored = judge([group("a", "hang", "b")], [hangs], timeout=0.1, on_error="drop")
    assert rewards_of(scored.groups) == [1.0, None, 1.0]
    assert cancelled == ["hang"]
    assert calls._left_behind() == 0


def test_an_async_function_that_blocks_its_loop_does_not_block_the_run(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "GRACE_SECONDS", 0.1)

    async def blocks(**columns: Any) -> float:
        release.wait()
        return 1.0

    scored = judge([group("a", "b")], [blocks], timeout=0.05, on_error="drop")
    assert rewards_of(scored.groups) == [None, None]
    assert scored.counts["rewards/timeout"] == 2


def test_too_many_calls_left_behind_stop_the_run_in_either_case(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "MOST_LEFT_BEHIND", 2)

    def hangs(**columns: Any) -> float:
        release.wait()
        return 1.0

    with pytest.raises(RewardError, match=r"2 calls .* still run .* cannot be killed"):
        judge([group("a", "b")], [hangs], timeout=0.05, on_error="drop")


def test_nothing_is_called_after_an_error_that_stops_the_run() -> None:
    called = []

    def fails(*, completion: str, **columns: Any) -> float:
        called.append(completion)
        raise ValueError("first")

    with pytest.raises(RewardError, match="first"):
        score([group("a", "b")], [fails])
    assert called == ["a"]


def test_a_hung_function_does_not_keep_the_process_from_ending(run_python: Any) -> None:
    code = """
import time
from sdcore.rollouts.rewards import judge
from sdcore.types import Example, Group, Trajectory
import torch
rollout = Trajectory.answer(completion_ids=torch.tensor([1]), logprobs=None, text="a", finished=True)
group = Group(example=Example(prompt="p"), prompt_ids=torch.tensor([1]), rollouts=(rollout,))
def hangs(**columns):
    time.sleep(1000)
print(judge([group], [hangs], timeout=0.05, on_error="drop").counts["rewards/timeout"])
"""
    assert run_python(code).strip() == "1"


def test_a_function_is_loaded_by_module_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_here.py").write_text(
        "class Holder:\n    @staticmethod\n    def f(**c): return 2.0\ng = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("my_rewards_here:Holder.f", "my_rewards_here.py:Holder.f", f"{tmp_path}/my_rewards_here.py:Holder.f"):
        assert load(name)() == 2.0
    assert rewards_of(score([group("a")], ["my_rewards_here:Holder.f"])) == [2.0]
    assert load("sdcore.world.data:exact").__name__ == "exact"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact", "module:function or file.py:function, got 'exact'"),
        ("sdcore.world.data:", "module:function"),
        ("not_there_at_all:f", "there is no module 'not_there_at_all', neither installed nor in /"),
        ("not_there.py:f", "there is no file /.*not_there.py"),
        ("sdcore.world.data:exakt", "has no function 'exakt'; it has .*exact"),
        ("one.py:f", "has no function 'f'; it has g$"),
        ("sdcore.world.data:EVAL_SHARE", "must be a function, got int"),
        ("broken.py:f", "could not be loaded, ZeroDivisionError"),
        ("needy:f", "needy imports not_installed_xyz, which is missing"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_a_clear_error(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needy.py").write_text("import not_installed_xyz\n")
    (tmp_path / "one.py").write_text("from pathlib import Path\ndef g(): pass\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=message):
        load(name)


def test_functions_of_one_name_are_told_apart() -> None:
    assert [reward.name for reward in prepare([length, length])] == ["length", "length_1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout must be positive seconds, or None for no limit, got 0"),
        ({"timeout": math.inf}, "timeout must be positive"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'drop', got 'ignore'"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"weights": [1.0, 2.0]}, "one per reward function, 1, got"),
        ({"weights": [math.nan]}, "weights must be finite"),
    ],
)
def test_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        score([group("a")], [length], **options)


def test_what_is_no_list_of_functions_is_refused() -> None:
    with pytest.raises(ArgumentError, match="must be a list"):
        prepare(length)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="reward function 0 must be callable or 'module:function', got 3"):
        prepare([3])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="len is called with keywords"):
        prepare([len])


def test_no_time_limit_calls_in_the_thread_of_the_caller() -> None:
    def where(**columns: Any) -> float:
        return float(threading.current_thread() is threading.main_thread())

    assert rewards_of(score([group("a")], [where], timeout=None)) == [1.0]
    assert rewards_of(score([group("a")], [where], timeout=5)) == [0.0]


def test_a_time_limit_is_each_calls_own() -> None:
    def slow(**columns: Any) -> float:
        time.sleep(0.05)
        return 1.0

    assert rewards_of(score([group(*"abcdefgh")], [slow], timeout=0.3)) == [1.0] * 8
