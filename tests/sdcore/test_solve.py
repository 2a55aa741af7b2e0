"""One question and a verifier: that feedback finds what guessing does not, and that every completion is counted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdcore import world
from sdcore.errors import ArgumentError
from sdcore.presets import Method, preset
from sdcore.rollouts.environments import Agent, Reply
from sdcore.rollouts.samplers import SampledCompletion
from sdcore.training.solve import Round, SolveConfig, Solved, Verdict, command_verifier, solve
from sdcore.types import Example
from sdcore.world.data import TEMPLATES, rows, with_feedback

CHECKPOINT = Path(world.__file__).parent / "checkpoint"
TOKENIZER = AutoTokenizer.from_pretrained(CHECKPOINT)
ROW = rows("sdpo", task="luma", count=1, seed=0)[0]
QUESTION = tuple(ROW["messages"])
METHOD = preset("sdpo", template=TEMPLATES["sdpo"])
FAST = SolveConfig(max_samples=96, max_completion_length=11, learning_rate=1e-3)


def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT)


def verify(completion: str) -> Verdict:
    reward, feedback = with_feedback(prompt=QUESTION, completion=completion, answer=ROW["answer"])
    return Verdict(reward == 1.0, reward, feedback)


class Fixed:
    """Always the same answers, in the place of sampling."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def sample(
        self, model: nn.Module, prompts: Sequence[torch.Tensor], *, num_completions: int, **options: Any
    ) -> list[list[SampledCompletion]]:
        ids = [torch.tensor([*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]) for text in self.texts]
        drawn = [SampledCompletion(one, torch.zeros(len(one)), True) for one in ids]
        return [drawn[:num_completions]]


def run(config: SolveConfig = FAST, *, method: Method = METHOD, **options: Any) -> Solved:
    return solve(model(), TOKENIZER, QUESTION, options.pop("verify", verify), method, config, **options)


def test_feedback_finds_the_answer_that_guessing_does_not() -> None:
    learned, guessed = run(), run(SolveConfig(max_samples=200, max_completion_length=11, update=False))
    assert learned.solved
    assert learned.answer == ROW["answer"]
    assert learned.samples < 96
    assert not guessed.solved  # a guess is right once in 10^5
    assert guessed.answer is None
    assert (guessed.samples, guessed.trained_tokens) == (200, 0)


def test_both_start_from_the_same_samples() -> None:
    first, again, guessed = run(), run(), run(SolveConfig(max_samples=96, max_completion_length=11, update=False))
    assert first.rounds == again.rounds
    assert first.rounds[0].attempt == guessed.rounds[0].attempt
    assert [one.attempt for one in first.rounds] != [one.attempt for one in guessed.rounds[: len(first.rounds)]]


def test_every_completion_is_counted_up_to_the_one_that_solves() -> None:
    shown: list[Round] = []
    right, wrong = ROW["answer"], "a0 a0"
    solved = run(sampler=Fixed(wrong, wrong, right, wrong), on_round=shown.append)
    assert (solved.solved, solved.answer, solved.samples, solved.sampled_tokens) == (True, right, 3, 3 + 3 + 6)
    assert solved.trained_tokens == 0
    assert [one.samples for one in shown] == [3]
    assert (shown[0].attempt, shown[0].best_reward, shown[0].loss) == (right, 1.0, None)


def test_a_budget_that_is_no_multiple_of_the_group_is_kept() -> None:
    solved = run(SolveConfig(max_samples=10, max_completion_length=11))
    assert [one.samples for one in solved.rounds] == [8, 10]
    # Nothing is learned from the last group: nobody would sample from it.
    assert [one.loss is None for one in solved.rounds] == [False, True]


def test_what_was_verified_is_not_verified_again() -> None:
    asked: list[str] = []

    def once(completion: str) -> Verdict:
        asked.append(completion)
        return verify(completion)

    solved = run(SolveConfig(max_samples=6), verify=once, sampler=Fixed("a0", "a1", "a0"))
    assert asked == ["a0", "a1"]
    assert solved.samples == 6


def test_without_feedback_and_success_nothing_is_learned() -> None:
    student = model()
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    solved = solve(
        student,
        TOKENIZER,
        QUESTION,
        lambda _: Verdict(False),
        METHOD,
        SolveConfig(max_samples=24, max_completion_length=11, learning_rate=1.0),
    )
    assert [one.loss for one in solved.rounds] == [None, None, None]
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())


def test_the_question_is_asked_with_the_chat_templates_arguments_and_the_sampling() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.chat_template = "{{ hint }}" + tokenizer.chat_template
    asked: list[tuple[list[int], dict[str, Any]]] = []

    class Recording(Fixed):
        def sample(self, model: nn.Module, prompts: Sequence[torch.Tensor], **options: Any) -> Any:
            asked.append((prompts[0].tolist(), options))
            return super().sample(model, prompts, **options)

    config = SolveConfig(
        max_samples=4,
        top_p=1.0,
        top_k=3,
        stop_token_ids=[9],
        chat_template_kwargs={"hint": "luma "},
        learning_rate=1e-3,
    )
    method = replace(METHOD, num_generations=2)
    solve(model(), tokenizer, QUESTION, verify, method, config, sampler=Recording("a0", "a1"))
    ids, options = asked[0]
    assert tokenizer.decode(ids).startswith("luma <bos>")
    assert (options["top_p"], options["top_k"], list(options["eos_token_id"])) == (None, 3, [9])
    assert len(asked) == 2  # something was learned between them


@pytest.mark.parametrize("verdict", [True, Verdict(False, float("nan")), (False, 0.0, None)])
def test_a_verifier_that_gives_no_verdict_is_refused(verdict: Any) -> None:
    with pytest.raises(ArgumentError, match="verify must return a Verdict of a finite reward, got "):
        run(verify=lambda _: verdict)


@pytest.mark.parametrize("name", ["rl_tilt", "sdft_paper", "grpo"])
def test_a_method_that_has_no_use_for_feedback_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="method must have context 'feedback' and target 'divergence' alone"):
        run(method=preset(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
    ],
)
def test_settings_without_meaning_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SolveConfig(**change)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("true", Verdict(True, 1.0, None)),
        ("false", Verdict(False, 0.0, None)),
        ("cat; exit 1", Verdict(False, 0.0, "my answer")),
        ("echo 0.25; echo two of eight; exit 1", Verdict(False, 0.25, "two of eight")),
        ("echo 0.9; exit 0", Verdict(True, 0.9, None)),
        ("echo nan; exit 1", Verdict(False, 0.0, "nan")),
        ("echo in the way >&2; exit 1", Verdict(False, 0.0, "in the way")),
    ],
)
def test_a_command_says_by_exit_code_number_and_words(command: str, expected: Verdict) -> None:
    assert command_verifier(command)("my answer") == expected


def test_a_verifier_that_hangs_has_not_accepted() -> None:
    verdict = command_verifier("echo 1; echo nearly; sleep 60", wall_seconds=0.3)("x")
    assert not verdict.solved
    assert verdict.feedback is not None
    assert verdict.feedback.startswith("nearly\nThe check was stopped: timed out after")


def test_long_feedback_is_cut() -> None:
    verdict = command_verifier([sys.executable, "-c", "print('x' * 9000); raise SystemExit(1)"], max_feedback=100)("")
    assert verdict.feedback == "x" * 100


def test_a_verifier_that_is_not_there_is_an_error_and_no_verdict() -> None:
    with pytest.raises(ArgumentError, match=r"the verifier could not be run, exit code 127: .*no-such-check"):
        command_verifier("no-such-check")("x")


class Second:
    """Wants a second answer, and says what it thinks of the first."""

    def reset(self, example: Example) -> None:
        self.heard: list[str] = []

    def step(self, message: dict[str, Any]) -> Reply:
        self.heard.append(message["content"])
        return Reply("luma", feedback="a3", done=len(self.heard) == 2)


def test_in_several_turns_the_last_is_verified_and_what_was_said_of_the_others_is_shown() -> None:
    asked, rounds, agent = [], [], Agent(environment_factory=Second)

    def never(completion: str) -> Verdict:
        asked.append(completion)
        return Verdict(False, 0.0, "b4")

    class Counts(Fixed):
        """Says its first text in the first turn, and the second in all others."""

        def sample(self, model: nn.Module, prompts: Any, *, num_completions: int, **options: Any) -> Any:
            first = len(prompts) == 1
            (said,) = Fixed(self.texts[0] if first else self.texts[1]).sample(model, prompts, num_completions=1)
            return [said * num_completions for _ in prompts]

    config = SolveConfig(max_samples=16, max_completion_length=8, learning_rate=1e-3)
    solved = run(config, verify=never, sampler=Counts("a0 a0", "b1"), agent=agent, on_round=rounds.append)
    assert asked == ["b1"]
    assert (solved.samples, solved.sampled_tokens) == (16, 16 * (3 + 2))  # the student's own
    assert (rounds[0].attempt, rounds[0].feedback, rounds[0].active) == ("b1", "a3\n\na3\n\nb4", 8)
    assert rounds[0].loss is not None
    assert rounds[0].loss > 0
