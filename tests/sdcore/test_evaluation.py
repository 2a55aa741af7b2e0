"""Evaluation by sampling: the same draws each time, whoever does the work, and means that say what they mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sdcore.contexts import SuccessOrFeedback, student_prompt_ids
from sdcore.data import read_examples
from sdcore.errors import ArgumentError, DataError
from sdcore.presets import SDFTAsRun
from sdcore.rollouts.environments import Agent
from sdcore.rollouts.samplers import SampledCompletion, stop_ids
from sdcore.training.evaluation import evaluate
from sdcore.training.rows import Rows
from sdcore.world.data import exact, rows
from tests.sdcore.trainer_runs import tokenizer, trainer, world_model

QUESTIONS = read_examples(rows("rl", task="pi", count=11, seed=0))


class Scripted:
    """Answers 1, 0, 1, 0, ... as text, and says what it was asked."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def sample(self, model: Any, prompts: Sequence[Any], *, num_completions: int, seed: int, **options: Any) -> Any:
        self.seeds.append(seed)
        ids = torch.tensor([7, 3])
        one = SampledCompletion(ids, torch.zeros(2), True)
        cut = SampledCompletion(ids[:1], torch.zeros(1), False)
        return [[one if i % 2 == 0 else cut for i in range(num_completions)] for _ in prompts]


def by_turn() -> Any:
    turn = -1

    def reward(**columns: Any) -> float:
        nonlocal turn
        turn += 1
        return (1.0, 0.0, 0.0, 0.0, 1.0, 1.0)[turn % 6]

    return reward


def test_the_means_are_over_questions_and_the_error_is_theirs() -> None:
    metrics = evaluate(
        world_model(), tokenizer(), QUESTIONS[:3], [by_turn()], num_generations=2, sampler=Scripted(), batch_size=2
    ).metrics
    means = [0.5, 0.0, 1.0]
    assert metrics["reward_mean"] == pytest.approx(0.5)
    assert metrics["reward_stderr"] == pytest.approx(torch.tensor(means).std().item() / math.sqrt(3))
    assert metrics["success_rate"] == pytest.approx(0.5)
    assert metrics["pass_any"] == pytest.approx(2 / 3)
    assert metrics["mean_length"] == 1.5
    assert metrics["clipped_ratio"] == 0.5
    assert metrics["questions"] == 3


class ReadsAll:
    """Answers with one token where it reads no more than `length`, else with two."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.read: list[list[int]] = []

    def sample(self, model: Any, prompts: Sequence[Any], *, num_completions: int, **options: Any) -> Any:
        self.read.append([len(prompt) for prompt in prompts])
        one, two = (SampledCompletion(torch.full((n,), 7), torch.zeros(n), True) for n in (1, 2))
        return [[one if len(prompt) <= self.length else two] * num_completions for prompt in prompts]


def two_tokens(completion_ids: Sequence[int]) -> float:
    return float(len(completion_ids) == 2)


def test_a_question_is_asked_again_with_the_context_in_view_and_without() -> None:
    questions = read_examples([*rows("sdft", task="pi", count=4, seed=0), *rows("rl", task="pi", count=1, seed=0)])
    longest = max(len(student_prompt_ids(question, tokenizer())) for question in questions)
    sampler, context = ReadsAll(longest), SDFTAsRun().build_context()
    options: dict[str, Any] = {"sampler": sampler, "batch_size": 3, "num_generations": 2}
    result = evaluate(world_model(), tokenizer(), questions, [two_tokens], context=context, **options)
    numbers = result.metrics
    # The last row has nothing to show; two completions of the other four are asked again, three at a time.
    assert numbers["asked_again"] == len(result.in_view) == 8
    assert max(map(len, sampler.read)) == 3
    assert (numbers["reward_mean"], numbers["without_context_reward_mean"]) == (0, 0)
    assert numbers["with_context_reward_mean"] == numbers["with_context_success_rate"] == 1
    group = result.in_view[0]
    assert group.prompt_ids.tolist() in [
        read.tolist() for read in context.condition(group, tokenizer()).teacher_prompts
    ]
    bare = evaluate(world_model(), tokenizer(), questions, [two_tokens], **options)
    assert bare.metrics == {name: value for name, value in numbers.items() if name in bare.metrics}
    assert bare.in_view == ()


def test_what_the_teacher_is_shown_of_an_answer_is_that_answers() -> None:
    """Feedback is known when an answer has been judged; right ones have none."""

    def judged(prompt: Any, completion_ids: Sequence[int], **columns: Any) -> tuple[float, str | None]:
        turns.append(len(completion_ids))
        return (1.0, None) if len(turns) % 2 else (0.0, f"H b{len(turns)}")

    turns: list[int] = []
    result = evaluate(
        world_model(),
        tokenizer(),
        QUESTIONS[:2],
        [judged],
        num_generations=2,
        sampler=ReadsAll(0),
        context=SuccessOrFeedback(use_solution=False, template="{{ prompt }} {{ feedback }}"),
    )
    assert result.metrics["asked_again"] == 2
    assert [rollout.feedback for group in result.groups for rollout in group.rollouts] == [None, "H b2", None, "H b4"]
    read = [tokenizer().decode(group.prompt_ids) for group in result.in_view]
    assert ["H b2" in read[0], "H b4" in read[1]] == [True, True]


class Nobody:
    def reset(self, **columns: Any) -> None: ...

    def step(self, message: str) -> None: ...


def test_what_cannot_be_asked_again_is_refused_before_anything_is_sampled() -> None:
    sampler, context = Scripted(), SDFTAsRun().build_context()
    with pytest.raises(DataError, match="needs a column `privileged_context`"):
        evaluate(world_model(), tokenizer(), QUESTIONS, context=context, sampler=sampler)
    agent = Agent(environment_factory=Nobody)
    with pytest.raises(ArgumentError, match="context must be None with an agent"):
        evaluate(world_model(), tokenizer(), QUESTIONS, context=context, sampler=sampler, agent=agent)
    assert not sampler.seeds


def test_the_same_questions_get_the_same_answers_and_random_states_stay() -> None:
    model, before = world_model().train(), torch.get_rng_state()
    first = evaluate(model, tokenizer(), QUESTIONS, [exact], num_generations=2, max_completion_length=8)
    torch.rand(5)
    second = evaluate(model, tokenizer(), QUESTIONS, [exact], num_generations=2, max_completion_length=8)
    assert [[r.text for r in g.rollouts] for g in first.groups] == [[r.text for r in g.rollouts] for g in second.groups]
    assert first.metrics == second.metrics
    assert model.training
    torch.set_rng_state(before)
    # A task that the model knows.
    assert first.metrics["reward_mean"] > 0.8


def test_a_trainer_asks_once_whether_the_rows_of_an_evaluation_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    check = Rows._check
    monkeypatch.setattr(Rows, "_check", lambda self, row: asked.append(row.source) or check(self, row))
    parts = {"a": QUESTIONS[:2], "b": QUESTIONS[2:3]}
    made = trainer(tmp_path, count=4, reward_funcs=[exact], eval_dataset=parts, sampler=Scripted())
    first = len(asked)
    assert first == 4 + 3
    assert made.evaluate()["eval_b_questions"] == 1
    assert len(asked) == first
    assert made.evaluate(QUESTIONS[3:8])["eval_questions"] == 5
    assert len(asked) == first + 5


def test_predict_says_what_to_use(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^test_dataset must go to evaluate\(test_dataset\), which measures"):
        trainer(tmp_path, count=4).predict(QUESTIONS)


def test_another_seed_draws_other_answers() -> None:
    unknown = read_examples(rows("rl", task="luma", count=5, seed=0))
    groups_of_runs = [
        evaluate(world_model(), tokenizer(), unknown, max_completion_length=8, seed=seed).groups for seed in (0, 0, 1)
    ]
    texts = [[group.rollouts[0].text for group in groups] for groups in groups_of_runs]
    assert texts[0] == texts[1] != texts[2]


def test_how_many_processes_share_the_work_does_not_matter() -> None:
    options: dict[str, Any] = {"num_generations": 2, "max_completion_length": 8, "batch_size": 4}
    model, tok = world_model(), tokenizer()
    alone = evaluate(model, tok, QUESTIONS, [exact], **options)
    parts: list[Any] = []

    def keep(own: list[Any]) -> list[Any]:
        parts.extend(own)
        return list(parts)

    for rank in (1, 0):  # whichever is done first
        shared = evaluate(model, tok, QUESTIONS, [exact], rank=rank, world_size=2, gather=keep, **options)
    assert shared.metrics == alone.metrics
    assert [g.example.source for g in shared.groups] == [g.example.source for g in alone.groups]
    assert [g.rollouts[1].text for g in shared.groups] == [g.rollouts[1].text for g in alone.groups]


def test_each_batch_has_a_seed_of_its_own() -> None:
    sampler = Scripted()
    evaluate(world_model(), tokenizer(), QUESTIONS, [exact], sampler=sampler, batch_size=3)
    assert len(sampler.seeds) == len(set(sampler.seeds)) == 4


def test_completions_that_cannot_be_judged_are_left_out_and_counted() -> None:
    def odd(*, prompt: Any, completion: str, answer: str, **columns: Any) -> float:
        return math.nan if answer == QUESTIONS[0].columns["answer"] else 1.0

    metrics = evaluate(world_model(), tokenizer(), QUESTIONS[:4], [odd], sampler=Scripted(), on_error="drop").metrics
    assert metrics["dropped"] == 1
    assert metrics["reward_mean"] == 1.0


def test_without_reward_functions_there_are_samples_and_no_reward() -> None:
    result = evaluate(world_model(), tokenizer(), QUESTIONS[:2], sampler=Scripted())
    assert "reward_mean" not in result.metrics
    assert len(result.groups) == 2


def test_a_completion_ends_with_the_models_ends_too() -> None:
    model, tok = world_model(), tokenizer()
    assert stop_ids(model, tok) == [tok.eos_token_id]
    model.generation_config.eos_token_id = [50, tok.eos_token_id]
    assert stop_ids(model, tok) == sorted({50, tok.eos_token_id})


def test_options_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="examples must have at least one"):
        evaluate(world_model(), tokenizer(), [])
    with pytest.raises(ArgumentError, match="batch_size must be at least 1, got 0"):
        evaluate(world_model(), tokenizer(), QUESTIONS, batch_size=0)
