"""Updates on trajectories: the loss and the gradients of separate passes over each turn and its teacher."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sdcore.contexts import OfTurn, Solution, SuccessOrFeedback, Template
from sdcore.diagnostics import key_of
from sdcore.errors import ArgumentError, ContextError, DataError
from sdcore.presets import GRPO, SDPO, Method
from sdcore.rollouts.environments import Agent, Reply
from sdcore.rollouts.episodes import play
from sdcore.rollouts.rewards import judge
from sdcore.rollouts.samplers import ModelSampler, Sampling
from sdcore.rollouts.window import load_rollouts, save_rollouts
from sdcore.training import SelfDistillationConfig, SelfDistillationTrainer, evaluate
from sdcore.training.turns import counts_of
from sdcore.training.update import Batch, update
from sdcore.types import Conditioned, Example, Group
from tests.sdcore.rollouts.talks import CALL, QUESTION, Higher, Says, add, run, tokenizer_of

KL = Method(context="turn_feedback", alpha=1.0)
TEXTS = ["Five", "Six", "Nine and more"]


def tiny(name: str = "smollm2", dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer_of(name)),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).to(dtype)


def group_of(name: str = "smollm2", count: int = 2, **options: Any) -> Group:
    """Trajectories of three turns, each with other words."""
    words = iter([f"{text} {i}" for text in TEXTS for i in range(count)] * 2)
    example = replace(QUESTION, privileged_context="It is 9.")
    sampler = Says(tokenizer_of(name), lambda i: next(words))
    return run(Agent(environment_factory=Higher, **options), sampler, example, count=count)


def logprobs(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """Of the whole vocabulary before each of the last tokens."""
    return model(ids[None]).logits[0, -count - 1 : -1].log_softmax(-1)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def naive(
    model: nn.Module, group: Group, teacher_reads: Callable[[int, int], Tensor | None], *, by: str = "token"
) -> Tensor:
    """The mean reverse KL, each turn by a pass of the student and one of the teacher of its own."""
    turns = []
    for i, rollout in enumerate(group.rollouts):
        own = iter(enumerate(rollout.own))
        for ids, starts in rollout.sequences(group.prompt_ids):
            for start in starts:
                t, turn = next(own)
                read, count = teacher_reads(i, t), len(turn.ids)
                if read is None:
                    continue
                p = logprobs(model, ids[: start + count], count)
                with torch.no_grad():
                    q = logprobs(model, torch.cat([read, turn.ids]), count)
                turns.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(turns).mean() if by == "token" else torch.stack([turn.mean() for turn in turns]).mean()


def require_same(model: nn.Module, group: Group, seen: Conditioned, method: Method, want: Tensor) -> Batch:
    want.backward()
    expected = gradients(model)
    model.zero_grad()
    batch = Batch.of([group], [seen], method)
    out = update(model, batch, method, teacher=method.build_teacher(model), verify="off")
    torch.testing.assert_close(out.loss, want.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-7, atol=1e-10)
    return batch


# Public templates, and what they keep of a student's turns when a reply follows: "thinking" opens and closes a block,
# "opened" closes the one that a generation prompt has opened, "tool" calls twice, the first time after a block.
EVERYTHING = "plain thinking opened tool"
KEPT = {
    **dict.fromkeys(["smollm2", "llama3", "llama3_1", "llama3_2", "qwen3_instruct_2507"], EVERYTHING),
    **dict.fromkeys(["qwen3_training", "qwen3_5_think_training", "deepseek_r1_distill_training"], EVERYTHING),
    **dict.fromkeys(["qwen3", "qwen3_5_think"], "plain tool"),
    **dict.fromkeys(["gemma3", "gemma3_training"], "plain thinking opened"),
    **dict.fromkeys(["deepseekv3", "deepseekv3_training", "deepseek_r1_distill"], "plain"),
}
# These cannot show what a tool has answered.
NO_TOOLS = {"gemma3", "gemma3_training", "deepseekv3"}
SAID = {
    "plain": ["Five", "Six ", "Seven"],
    "thinking": ["<think>\nIs it  five?\n</think>\n\nFive", "<think>\nno</think>Six", "<think>\n\n</think>\n\nSeven"],
    "opened": ["Is it  five?\n</think>\n\nFive", "no</think>Six", "so\n</think>\n\nSeven"],
    "tool": [f"<think>\nadd\n</think>\n\n{CALL}", CALL, "Seven"],
}


@pytest.mark.parametrize("history", ["as_sampled", "as_rendered"])
@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("name", KEPT)
def test_the_loss_is_on_the_ids_that_were_drawn_behind_what_was_read(name: str, kind: str, history: Any) -> None:
    """Or the template is refused: never on others, whatever it does to the past."""
    sampler = Says(tokenizer_of(name), *SAID[kind])
    host: dict[str, Any] = {"tools": [add]} if kind == "tool" else {"environment_factory": Higher}
    agent = Agent(**host, history=history)
    if (kind == "tool" and name in NO_TOOLS) or (history == "as_sampled" and kind not in KEPT[name].split()):
        with pytest.raises(ContextError, match=r"does not keep its past|chat template refused"):
            run(agent, sampler)
        return
    group = run(agent, sampler)
    rollout = replace(group.rollouts[0], reward=1.0)
    assert len(rollout.own) == len(sampler.drawn) == 3
    nothing = Conditioned(teacher_prompts=(group.prompt_ids,), active=(True,))
    plan = Batch.of([replace(group, rollouts=(rollout,))], [nothing], GRPO(aggregation="token-mean")).plan
    assert plan.target_ids.tolist() == [token for ids in sampler.drawn for token in ids]
    turns = [(ids, start) for ids, starts in rollout.sequences(group.prompt_ids) for start in starts]
    for (ids, start), read, drawn in zip(turns, sampler.read, sampler.drawn, strict=True):
        assert ids[: start + len(drawn)].tolist() == read + drawn
    if history == "as_sampled":
        assert len(rollout.sequences(group.prompt_ids)) == 1


@pytest.mark.parametrize("shows", ["feedback", "next_reply", "all_replies"])
@pytest.mark.parametrize("aggregation", ["token-mean", "turn-mean-token-mean"])
def test_a_teacher_of_each_turn_is_a_pass_of_its_own(shows: Any, aggregation: Any) -> None:
    model, group = tiny(), group_of()
    builder = OfTurn(shows=shows)
    seen = builder.condition(group, tokenizer_of("smollm2"))
    assert seen.turns is not None
    method = replace(KL, aggregation=aggregation)
    by = "token" if aggregation == "token-mean" else "turn"
    want = naive(model, group, lambda i, t: seen.turns[i][t], by=by)  # type: ignore[index]
    batch = require_same(model, group, seen, method, want)
    said = shows == "feedback"
    assert [ids is not None for ids in seen.turns[0]] == [True, True, not said]
    assert [bool(rows) for rows in batch.turns[0]] == [True, True, not said]
    assert seen.counts["context/missing"] == (2 if said else 0)
    # What the teacher reads before the second turn ends with the first reply and its hint.
    hint = {"feedback": "It is 2 higher.", "next_reply": "Guess 2 is too low."}.get(
        shows, "Guess 2 is too low.\n\nThat is it."
    )
    read = tokenizer_of("smollm2").decode(seen.turns[1][1])
    shown = f"Guess 1 is too low.\n\n(What came of the answer that you gave to this: {hint}"
    assert f"<|im_end|>\n<|im_start|>user\n{shown}" in read
    assert read.endswith(")<|im_end|>\n<|im_start|>assistant\n")
    # And it costs the hints and the turns, not the trajectory again.
    (teacher,) = batch.plan.teacher
    assert teacher.tokens(read_shared=True) < teacher.naive_tokens() / 2


@pytest.mark.parametrize(
    "builder",
    [
        Solution(template="{{ prompt }} ({{ privileged_context }})"),
        Template("{{ prompt }} Look: {{ privileged_context }}"),
        SuccessOrFeedback(),
    ],
    ids=lambda builder: type(builder).__name__,
)
def test_one_context_in_the_prompt_is_one_teacher_of_the_whole_trajectory(builder: Any) -> None:
    model, group = tiny(), group_of()
    if isinstance(builder, SuccessOrFeedback):
        (group,) = judge([group], [lambda *, completion, **columns: (float("0" in completion), "so-so")]).groups
        assert [rollout.reward for rollout in group.rollouts] == [1.0, 0.0]  # the environment's add up to 0
    seen = builder.condition(group, tokenizer_of("smollm2"))

    def read(i: int, t: int) -> Tensor:
        before = group.rollouts[i].turns[: 2 * t]
        return torch.cat([seen.teacher_prompts[i], *(turn.ids for turn in before)])

    require_same(model, group, seen, replace(KL, context="solution"), naive(model, group, read))
    if isinstance(builder, SuccessOrFeedback):
        tokenizer = tokenizer_of("smollm2")
        assert "assistant: Five 0\n\nuser: Guess 1 is too low." in tokenizer.decode(seen.teacher_prompts[1])
        assert "It is 1 higher." in tokenizer.decode(seen.teacher_prompts[0])


def test_a_past_that_the_template_rewrites_is_several_sequences_with_views_of_their_own() -> None:
    name = "deepseek_r1_distill"
    model, group = tiny(name), group_of(name, history="as_rendered")
    tokenizer = tokenizer_of(name)
    assert sum(turn.restarts for turn in group.rollouts[0].turns) == 2
    seen = OfTurn(shows="next_reply").condition(group, tokenizer)
    assert seen.turns is not None
    require_same(model, group, seen, KL, naive(model, group, lambda i, t: seen.turns[i][t]))  # type: ignore[index]
    assert "Guess 1 is too low.\n\n(What came of" in tokenizer.decode(seen.turns[0][1])
    # A context in the prompt stands in each of them.
    model, seen = tiny(name), Template("{{ prompt }} Look: {{ privileged_context }}").condition(group, tokenizer)
    asked, look = "Guess!", " Look: It is 9."

    def read(i: int, t: int) -> Tensor:
        sequences = group.rollouts[i].sequences(group.prompt_ids)
        ids, (start,) = sequences[t]
        text = tokenizer.decode(ids[:start]).replace(asked, asked + look, 1)
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    require_same(model, group, seen, replace(KL, context="template"), naive(model, group, read))
    replaced = replace(seen, teacher_prompts=(group.prompt_ids.flip(0),) * 2)
    with pytest.raises(ContextError, match="rows:1: a context must be one piece"):
        Batch.of([group], [replaced], KL)


def test_grpo_learns_from_the_same_trajectories_and_from_no_token_of_others() -> None:
    model = tiny()
    (group,) = judge([group_of()], [lambda *, completion, **columns: float("0" in completion)]).groups
    method = GRPO(num_generations=2, aggregation="token-mean")
    ones = []
    for rollout, advantage in zip(group.rollouts, (1.0, -1.0), strict=True):
        ((ids, starts),) = rollout.sequences(group.prompt_ids)
        for start, turn in zip(starts, rollout.own, strict=True):
            lp = logprobs(model, ids[: start + len(turn.ids)], len(turn.ids)).gather(1, turn.ids[:, None])[:, 0]
            ones.append(-advantage * lp)
    spread = torch.tensor([1.0, 0.0], dtype=torch.float64)
    scale = ((spread[0] - spread.mean()) / (spread.std() + 1e-4)).item()
    want = scale * torch.cat(ones).mean()
    want.backward()
    expected = gradients(model)
    model.zero_grad()
    no = Conditioned(teacher_prompts=(group.prompt_ids,) * 2, active=(True, True))
    batch = Batch.of([group], [no], method)
    update(model, batch, method, verify="off")
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-8)
    assert batch.tokens == sum(len(turn.ids) for rollout in group.rollouts for turn in rollout.own)


def test_a_trajectory_whose_environment_failed_carries_no_loss_and_is_counted() -> None:
    group = group_of()
    failed = replace(group.rollouts[1], outcome="failed", reward=None)
    group = replace(group, rollouts=(replace(group.rollouts[0], outcome="turns"), failed))
    seen = OfTurn(shows="next_reply").condition(group, tokenizer_of("smollm2"))
    batch = Batch.of([group], [seen], KL)
    assert [sum(rows) > 0 for rows in batch.turns] == [True, False]
    assert batch.counts["completions/without_loss"] == 1
    counts = counts_of([group])
    assert (counts["trajectories/failed"], counts["trajectories/turns"], counts["turns/count"]) == (1, 1, 6)
    (judged,) = judge([replace(group, rollouts=group.rollouts[::-1])], [lambda completion: len(completion)]).groups
    assert [rollout.reward for rollout in judged.rollouts] == [None, len("Nine and more 0")]


def test_trajectories_are_saved_whole(tmp_path: Path) -> None:
    group = group_of("deepseek_r1_distill", history="as_rendered")
    save_rollouts(tmp_path / "window.json", [[group]])
    ((loaded,),) = load_rollouts(tmp_path / "window.json")
    for a, b in zip(loaded, group.rollouts, strict=True):
        assert [*map(str, a.turns)] == [*map(str, b.turns)]
        assert {**vars(a), "turns": ()} == {**vars(b), "turns": ()}
        assert all(torch.equal(x.ids, y.ids) for x, y in zip(a.turns, b.turns, strict=True))


class Echo(Higher):
    """Judges by itself, and says first what it is about."""

    def reset(self, example: Example) -> str:
        self.guesses = 0
        return " Say a word."

    def step(self, message: dict[str, Any]) -> Reply:
        self.guesses += 1
        reward = float(len(message["content"]) % 3) / 2
        return Reply(
            "Another one.", done=self.guesses == 3, reward=reward, feedback=f"It had {len(message['content'])}."
        )


def sub(a: int, b: int) -> int:
    """
    Subtracts.

    Args:
        a: from this
        b: this
    """
    return a - b


def len_of(completion: str) -> int:
    return len(completion)


ROWS = [Example(prompt=({"role": "user", "content": f"Row {i}:"},), source=f"rows:{i}") for i in range(4)]


def trainer(folder: Path, method: Method, **options: Any) -> SelfDistillationTrainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "max_completion_length": 6,
        "max_turns": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "log_completions_every": 1,
    }
    given = {key: options.pop(key) for key in ("reward_funcs", "tools", "sampler") if key in options}
    factory = options.pop("environment_factory", Echo)
    tokenizer = tokenizer_of(options.pop("template", "smollm2"))
    return SelfDistillationTrainer(
        tiny(dtype=torch.float32),
        SelfDistillationConfig(**arguments | options),
        method=method,
        train_dataset=ROWS,
        processing_class=tokenizer,
        environment_factory=factory,
        **given,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


METHODS = {
    "hindsight": Method(context="hindsight", num_generations=2, alpha=0.5, aggregation="turn-mean-token-mean"),
    "turn_feedback": Method(context="turn_feedback", num_generations=2, teacher="ema"),
    "sdpo": SDPO(num_generations=2, topk=20),
    "grpo": GRPO(num_generations=3),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_on_trajectories_that_is_resumed_gives_the_same_losses(name: str, tmp_path: Path) -> None:
    # A quarter of the ids end a turn, so that many are whole.
    stops = {"stop_token_ids": [tokenizer_of("smollm2").eos_token_id, *range(100, 200)]}
    whole = trainer(tmp_path / "whole", METHODS[name], num_iterations=2, **stops)
    whole.train()
    own = lines(tmp_path / "whole")
    assert all(line["turns/count"] > line["completions/count"] for line in own if "turns/count" in line)
    assert own[0]["trajectories/answered"] + own[0]["trajectories/cut"] == own[0]["completions/count"]
    assert any(line["grad_norm"] > 0 for line in own)
    prefixes = ("trajectories/", "turns/", "tools/", "environment/", "history/")
    new = {key for line in own for key in line if key.startswith(prefixes)}
    assert len(new) == 17
    assert all(key_of(key) for key in new)
    sample = json.loads((tmp_path / "whole" / "samples.jsonl").read_text().splitlines()[0])
    assert len(sample["tokens"]) == len(sample["per_token"])
    assert [turn["own"] for turn in sample["turns"]] == [i % 2 == 0 for i in range(len(sample["turns"]))]
    starts = [turn["start"] for turn in sample["turns"]]
    for turn, start, end in zip(sample["turns"], starts, [*starts[1:], len(sample["tokens"])], strict=True):
        # Nobody's text is learned but the student's; a last word has no tokens.
        assert not any(sample["per_token"][start:end]) or turn["own"]
        assert "".join(sample["tokens"][start:end]) in (turn["text"], "")
    first = trainer(tmp_path / "part", METHODS[name], num_iterations=2, **stops)
    first.args.max_steps = 3  # between two uses of the same trajectories
    first.train()
    second = trainer(tmp_path / "part", METHODS[name], num_iterations=2, **stops)
    second.train(resume_from_checkpoint=True)
    kept = ("loss", "grad_norm", "loss/active_tokens", "completions/mean_length")
    assert [[line[key] for key in kept] for line in lines(tmp_path / "part")] == [
        [line[key] for key in kept] for line in own
    ]


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"tools": [add]}, {"tools": [add, sub]}, r"with tools=\['add', 'sub'\] \(was \['add'\]\)$"),
        ({"tools": [add]}, {}, r"with tools=\[\] \(was \['add'\]\)$"),
        ({}, {"environment_factory": None}, r"with environment=None \(was 'Echo'\)$"),
        (
            {"environment_factory": None},
            {"tools": [sub]},
            r"tools=\['sub'\] \(was \[\]\), environment='Echo' \(was None\)$",
        ),
        ({"tools": [add]}, {"tools": [add]}, None),
    ],
)
def test_a_run_that_is_resumed_with_other_tools_says_so(
    before: dict[str, Any], now: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"template": "qwen3_training", "max_steps": 1, "reward_funcs": [len_of], "max_turns": 8}
    trainer(tmp_path, METHODS["grpo"], **common | before).train()
    again = trainer(tmp_path, METHODS["grpo"], **common | now)
    with warnings.catch_warnings(record=True) as said:
        again.start(resume_from_checkpoint=True)
    texts = [str(warning.message) for warning in said if "is gone on from" in str(warning.message)]
    assert len(texts) == (words is not None)
    assert all(re.search(str(words), text) for text in texts)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (METHODS["grpo"], {"tools": [add]}, "tools must be shown to the student by the tokenizer's chat template"),
        (
            Method(context="hindsight"),
            {"environment_factory": None, "max_turns": 8},
            "context must be one of whole answers without",
        ),
        (Method(context="template", samples="dataset"), {}, "samples must be 'student'"),
        (
            Method(context="hindsight"),
            {"history": "kept"},
            "history must be one of as_sampled, as_rendered, got 'kept'",
        ),
        (GRPO(), {"environment_factory": None, "reward_funcs": [len_of]}, "for turns, got neither and max_turns=3$"),
        (
            GRPO(),
            {"max_trajectory_length": 5},
            "max_trajectory_length must be at least max_completion_length=6, the tokens of a turn, got 5",
        ),
        (GRPO(), {"max_trajectory_seconds": 0.0}, "max_trajectory_seconds must be positive seconds or None, got 0"),
        (Method(context="hindsight"), {"max_turns": 0}, "max_turns must be at least 1, got 0"),
    ],
)
def test_what_has_no_use_for_turns_is_refused(
    method: Method, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=message):
        trainer(tmp_path, method, **options)


def test_a_prompt_that_is_text_is_refused_by_row_before_any_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(globals(), "ROWS", [*ROWS, Example(prompt="Row 4:", source="rows:4")])
    with pytest.raises(DataError, match="rows:4: the prompt must be a conversation where others answer, got text"):
        trainer(tmp_path, METHODS["hindsight"])


def test_keys_are_kept_between_turns_and_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, read = tiny(), tokenizer_of("smollm2"), []
    model.register_forward_pre_hook(lambda m, a, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    sampling = Sampling(num_completions=3, max_new_tokens=6, eos_token_id=[tokenizer.eos_token_id, *range(100, 200)])

    def drawn() -> list[list[list[int]]]:
        read.clear()
        agent = Agent(environment_factory=Echo)
        groups = play(agent, ModelSampler(), model, ROWS, sampling, tokenizer=tokenizer, seed=1)
        return [[turn.ids.tolist() for turn in one.turns] for group in groups for one in group.rollouts]

    kept, most = drawn(), sorted(read)[-2:]
    monkeypatch.setattr(ModelSampler, "session", lambda self: self)
    assert drawn() == kept
    assert any(len(turns) == 6 for turns in kept)
    assert most[0] < sorted(read)[-2] / 2  # the second longest pass: a turn's, no longer the whole past's


def test_an_evaluation_is_of_trajectories_too() -> None:
    tokenizer = tokenizer_of("smollm2")
    result = evaluate(
        tiny(dtype=torch.float32),
        tokenizer,
        ROWS,
        agent=Agent(environment_factory=Echo),
        stop_token_ids=[tokenizer.eos_token_id, *range(100, 200)],
        max_completion_length=6,
    )
    assert any(len(rollout.own) > 1 for group in result.groups for rollout in group.rollouts)
    assert "reward_mean" in result.metrics
    rollouts = [rollout for group in result.groups for rollout in group.rollouts]
    spoken = [len(turn.ids) for rollout in rollouts for turn in rollout.own]  # others' words are not the student's
    assert result.metrics["mean_length"] == sum(spoken) / len(rollouts)
    assert result.metrics["mean_turns"] == len(spoken) / len(rollouts)
