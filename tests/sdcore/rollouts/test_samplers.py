"""Where completions come from: the model itself with seeds of its own, the data, and in which order examples come."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from sdcore.contexts import SuccessOrFeedback, student_prompt_ids
from sdcore.contexts.templates import unopened
from sdcore.errors import ArgumentError, DataError
from sdcore.prefix import generate
from sdcore.rollouts.rewards import judge
from sdcore.rollouts.samplers import (
    FollowsWeights,
    ModelSampler,
    Sampler,
    Sampling,
    completion_of,
    sample_groups,
    seed_of,
    whole_weights,
)
from sdcore.rollouts.window import WindowOrder, given_completion, load_rollouts, save_rollouts
from sdcore.types import Example, Group, Trajectory
from sdcore.world import CHECKPOINT
from tests.sdcore.contexts.chats import chat_tokenizer

PROMPTS = [torch.tensor([1, 5, 9, 2]), torch.tensor([1, 7, 2]), torch.tensor([1, 8, 8, 8, 2])]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def sample(model: PreTrainedModel, tokenizer: Any, sampler: Sampler | None = None, **changes: Any) -> Any:
    options = {
        "num_completions": 3,
        "max_new_tokens": 6,
        "temperature": 1.0,
        "top_p": None,
        "top_k": None,
        "eos_token_id": [tokenizer.eos_token_id],
        "pad_token_id": tokenizer.pad_token_id,
        "seed": 11,
    }
    return (sampler or ModelSampler()).sample(model, PROMPTS, **(options | changes))


def ids_of(completions_B_G: Any) -> list[list[list[int]]]:
    return [[one.ids.tolist() for one in group] for group in completions_B_G]


def test_the_model_samples_what_generate_samples(model: PreTrainedModel, tokenizer: Any) -> None:
    completions_B_G = sample(model, tokenizer)
    plain = generate(model, PROMPTS, num_completions=3, max_new_tokens=6, eos_token_id=tokenizer.eos_token_id, seed=11)
    assert ids_of(completions_B_G) == [[ids.tolist() for ids in group] for group in plain.completions]
    logprobs = torch.cat([one.logprobs for group in completions_B_G for one in group])
    assert torch.equal(logprobs, plain.logprobs)
    for one in (one for group in completions_B_G for one in group):
        assert one.finished is (int(one.ids[-1]) == tokenizer.eos_token_id)
        assert one.finished or len(one.ids) == 6
        assert len(one.ids) == len(one.logprobs)


def test_equal_seeds_draw_equal_completions_and_the_global_state_is_left_alone(
    model: PreTrainedModel, tokenizer: Any
) -> None:
    before = torch.get_rng_state()
    first = sample(model, tokenizer)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert ids_of(sample(model, tokenizer)) == ids_of(first)
    assert ids_of(sample(model, tokenizer, seed=12)) != ids_of(first)


def test_prompts_at_a_time_bounds_the_batch_and_gives_every_prompt_its_completions(
    model: PreTrainedModel, tokenizer: Any
) -> None:
    completions_B_G = sample(model, tokenizer, ModelSampler(prompts_at_a_time=2), num_completions=2)
    assert [len(group) for group in completions_B_G] == [2, 2, 2]
    # The first part is what it would be alone; the second has a seed of its own.
    alone = ModelSampler().sample(
        model, PROMPTS[:2], num_completions=2, max_new_tokens=6, eos_token_id=[tokenizer.eos_token_id], seed=11
    )
    assert ids_of(completions_B_G)[:2] == ids_of(alone)
    with pytest.raises(ArgumentError, match="prompts_at_a_time must be at least 1, got 0"):
        ModelSampler(prompts_at_a_time=0)


def test_seeds_are_a_function_of_their_parts_and_do_not_meet() -> None:
    seeds = {seed_of(seed, step, batch) for seed in range(20) for step in range(20) for batch in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 23) != seed_of(12, 3)
    # Pinned, since a change of it changes every run.
    assert seed_of(0, 1, 2) == 603432347784401458


def test_the_protocols_are_recognised(model: PreTrainedModel) -> None:
    assert isinstance(ModelSampler(), Sampler)
    assert not isinstance(ModelSampler(), FollowsWeights)
    with whole_weights(model):  # nothing to gather
        pass


class Engine(ModelSampler):
    """With weights of its own."""

    def follow(self, model: torch.nn.Module, step: int) -> None:
        pass


def test_weights_are_gathered_for_who_samples_from_them_alone(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    model = torch.nn.Linear(2, 2)
    fully_shard(model, reshard_after_forward=True)
    for sampler, gathered in ((None, True), (ModelSampler(), True), (Engine(), False)):
        with whole_weights(model, sampler):
            assert isinstance(model.weight, DTensor) == (not gathered)
        assert isinstance(model.weight, DTensor)
    dist.destroy_process_group()


def test_an_engines_answer_needs_a_log_probability_per_token() -> None:
    one = completion_of([4, 5, 3], [-1.0, -2.0, -0.5], frozenset({3}))
    assert one.ids.tolist() == [4, 5, 3]
    assert one.finished
    assert not completion_of([4], [-1.0], frozenset({3})).finished
    assert not completion_of([], [], frozenset({3})).finished
    with pytest.raises(ArgumentError, match="logprobs must have one entry per token, 2, got 1"):
        completion_of([1, 2], [0.0], frozenset())


# Completions from data.


def given(tokenizer: Any, prompt: Any, completion: Any, **changes: Any) -> Trajectory:
    example = Example(prompt=prompt, columns={"completion": completion}, source="train.jsonl:3")
    prompt_ids = student_prompt_ids(example, tokenizer)
    options: dict[str, Any] = {"stop_ids": [tokenizer.eos_token_id], "max_length": 20}
    return given_completion(example, tokenizer, prompt_ids, **(options | changes))


@pytest.mark.parametrize("prompt", ["luma a b", ({"role": "user", "content": "luma a b"},)])
def test_a_completion_of_the_data_is_its_tokens_and_the_end(prompt: Any, tokenizer: Any) -> None:
    rollout = given(tokenizer, prompt, "a1 b2")
    want = [*tokenizer("a1 b2", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert rollout.completion_ids.tolist() == want
    assert rollout.finished
    assert rollout.logprobs is None
    cut = given(tokenizer, prompt, "a1 b2", max_length=2)
    assert cut.completion_ids.tolist() == want[:2]
    assert not cut.finished


def test_a_conversations_completion_ends_with_the_templates_end_of_turn(tokenizer: Any) -> None:
    """A chat template may end a turn with another token than the tokenizer's end of sequence."""
    other = AutoTokenizer.from_pretrained(CHECKPOINT)
    turn_end = tokenizer.convert_ids_to_tokens(20)
    other.chat_template = (
        "{% for m in messages %}{{ m['content'] }} " + turn_end + " {% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    prompt = ({"role": "user", "content": "luma a b"},)
    rollout = given(other, prompt, "a1 b2", stop_ids=[20])
    assert rollout.completion_ids.tolist() == other(f"a1 b2 {turn_end}", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("missing", [None, "", " \n", [{"role": "assistant", "content": "a1"}]])
def test_a_row_without_a_completion_is_an_error_that_names_it(missing: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:3: expected a text in column `completion`, got ") as caught:
        given(tokenizer, "luma a", missing)
    assert str(caught.value).endswith(repr(missing)[:60])


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize(("prompt", "completion"), [("2+2=", "4"), ("a", " 4"), ("a=", "22</s>4")])
def test_a_completion_of_a_plain_prompt_continues_it_as_one_text(scheme: Any, prompt: str, completion: str) -> None:
    """SentencePiece's tokenizers put a space before a text, which is not there within one."""
    words = ["<unk>", "<s>", "</s>", "▁", *"a24+=", "▁4", "▁2", "22"]
    merges = [("▁", "4"), ("▁", "2"), ("2", "2")]
    model = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    model.add_special_tokens(["</s>"])
    llama = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")
    rollout = given(llama, prompt, completion, stop_ids=[2])
    text = completion.split("</s>")[0] + "</s>"  # one that is written already is not learned twice
    whole = [*student_prompt_ids(Example(prompt=prompt), llama).tolist(), *rollout.completion_ids.tolist()]
    assert whole == llama(prompt + text)["input_ids"]


def test_a_prompts_tokens_stay_what_they_are_where_the_completion_would_change_them(tokenizer: Any) -> None:
    model = Tokenizer(models.BPE({"2": 0, "22": 1, "</s>": 2}, [("2", "2")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    assert given(merging, "2", "2", stop_ids=[2]).completion_ids.tolist() == [0, 2]


# Takes what was thought out of an answer, as the template of DeepSeek-R1 does, so that the data's own text is learned.
FORGETFUL = (
    "{% for m in messages %}{{ '<U>' + m.content if m.role == 'user' else '<A>' + m.content.split(END)[-1] + '<eos>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<A>BEGIN\n' }}{% endif %}"
)


@pytest.mark.parametrize(("begin", "end"), [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷")])
@pytest.mark.parametrize("completion", ["BEGIN\nsixENDb2", " BEGINsixENDb2", "sixENDb2"])
def test_what_the_prompt_has_opened_the_completion_does_not_open_again(begin: str, end: str, completion: str) -> None:
    chat = chat_tokenizer("qwen")
    with patch.object(chat, "chat_template", FORGETFUL.replace("END", repr(end)).replace("BEGIN", begin)):
        text = completion.replace("BEGIN", begin).replace("END", end)
        learned = given(chat, ({"role": "user", "content": "?"},), text, stop_ids=[chat.eos_token_id], max_length=99)
    assert chat.decode(learned.completion_ids).startswith(f"six{end}b2")
    assert learned.text == text


def test_a_prompt_that_opens_nothing_leaves_the_tag_to_the_completion() -> None:
    assert unopened("<think>\nsix</think>", "<think></think>\n") == "<think>\nsix</think>"
    assert unopened("[THINK]six[/THINK]", "<think>\n") == "[THINK]six[/THINK]"


# The order of examples.


def test_an_epoch_has_every_example_once_and_its_order_is_a_function_of_seed_and_epoch() -> None:
    order = WindowOrder(10, window=4, seed=5)
    first = list(order)
    assert sorted(first) == list(range(10))
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    again = WindowOrder(10, window=2, seed=5)
    again.set_epoch(1)
    assert list(again) == list(order)
    assert list(WindowOrder(10, window=4, shuffle=False)) == list(range(10))


@pytest.mark.parametrize(("count", "window", "repeats"), [(8, 4, 2), (10, 4, 3), (3, 8, 2), (5, 1, 4)])
def test_each_window_is_repeated_and_the_last_is_filled_up(count: int, window: int, repeats: int) -> None:
    order = WindowOrder(count, window=window, repeats=repeats, seed=1)
    indices = list(order)
    assert len(indices) == len(order)
    assert len(indices) % (window * repeats) == 0
    for start in range(0, len(indices), window * repeats):
        parts = [indices[at : at + window] for at in range(start, start + window * repeats, window)]
        assert all(part == parts[0] for part in parts)
    # Nothing is lost, and little is used twice.
    uses = Counter(indices)
    assert set(uses) == set(range(count))
    assert sum(uses.values()) - count * repeats < window * repeats


def test_a_last_window_can_be_dropped_where_it_is_repeated() -> None:
    order = WindowOrder(10, window=4, repeats=2, drop_last=True)
    assert len(list(order)) == len(order) == 16
    with pytest.raises(ArgumentError, match="count, window and repeats must be at least 1, got 0, 1 and 1"):
        WindowOrder(0, window=1)


def test_rollouts_are_saved_and_loaded_to_the_last_digit(tmp_path: Path) -> None:
    logprobs = torch.randn(5).log_softmax(-1)
    rollouts = (
        Trajectory.answer(
            completion_ids=torch.tensor([3, 1, 4, 1, 5]),
            logprobs=logprobs,
            text="π ≈ 3\n",
            finished=True,
            reward=0.1 + 0.2,
            feedback="nearly",
        ),
        Trajectory.answer(completion_ids=torch.zeros(0, dtype=torch.int64), logprobs=None, text="", finished=False),
    )
    group = Group(example=Example(prompt="π?"), prompt_ids=torch.tensor([1]), rollouts=rollouts)
    save_rollouts(tmp_path / "deep" / "rollouts-0.json", [[group], []])
    (((first, second),), none) = load_rollouts(tmp_path / "deep" / "rollouts-0.json")
    assert none == []
    assert first.logprobs is not None
    assert torch.equal(first.logprobs, logprobs)
    assert first.completion_ids.tolist() == [3, 1, 4, 1, 5]
    assert (first.text, first.finished, first.reward, first.feedback) == ("π ≈ 3\n", True, 0.1 + 0.2, "nearly")
    assert len(second.completion_ids) == 0
    assert second.completion_ids.dtype == torch.int64
    assert (second.logprobs, second.reward, second.feedback) == (None, None, None)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["rollouts-0.json"]


SPECIAL_TAGS = {
    "angles": ("<think>", "</think>"),
    "brackets": ("[THINK]", "[/THINK]"),
    "triangles": ("◁think▷", "◁/think▷"),
    "another pair": ("<answer>", "</answer>"),
}


@pytest.mark.parametrize(("begin", "end"), SPECIAL_TAGS.values(), ids=SPECIAL_TAGS)
def test_tags_that_are_special_tokens_are_seen_by_rewards_and_taken_out_of_attempts(begin: str, end: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.add_special_tokens({"additional_special_tokens": [begin, end, "<s>", "</s>", "<|channel|>"]})
    said = f"{begin} euler root {end} <|channel|> </s> golden"
    ids = torch.tensor([*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    assert tokenizer.convert_tokens_to_ids(begin) in ids

    class Says:
        def sample(self, model: Any, prompts: Any, **options: Any) -> Any:
            return [[completion_of(ids.tolist(), [0.0] * len(ids), frozenset({tokenizer.eos_token_id}))]] * len(prompts)

    row = Example(prompt="e0 = ?", source="rows:1")
    prompts, sampling = [student_prompt_ids(row, tokenizer)], Sampling(max_new_tokens=9)
    groups = sample_groups(Says(), torch.nn.Identity(), [row], prompts, sampling, tokenizer=tokenizer, seed=0)
    seen: dict[str, Any] = {}

    def look(completion: str, raw_completion: str, completion_ids: list[int]) -> float:
        seen.update(completion=completion, raw=raw_completion, ids=completion_ids)
        return float(end in completion)

    (group,) = judge(groups, [look]).groups
    assert group.rollouts[0].reward == 1
    assert seen == {"completion": f"{begin} euler root {end} golden", "raw": f"{said} <eos>", "ids": ids.tolist()}
    builder = SuccessOrFeedback(
        template="{{ prompt }} {{ attempt }} {{ feedback }}", dont_reprompt_on_self_success=False
    )
    (teacher,) = builder.condition(group, tokenizer).teacher_prompts
    shown = tokenizer.decode(teacher.tolist())
    assert "golden" in shown
    assert ("euler" in shown) is ("answer" in begin)


def test_a_window_that_was_saved_keeps_what_was_said(tmp_path: Path) -> None:
    ids = torch.tensor([5, 2])
    rollout = Trajectory.answer(completion_ids=ids, logprobs=None, text="a", finished=True, raw_text="a <eos>")
    group = Group(example=Example(prompt="q"), prompt_ids=ids, rollouts=(rollout,))
    save_rollouts(tmp_path / "window.json", [[group]])
    assert load_rollouts(tmp_path / "window.json")[0][0][0].raw_text == "a <eos>"
    text = (tmp_path / "window.json").read_text().replace(', "raw_text": "a <eos>"', "")
    (tmp_path / "window.json").write_text(text)  # as before there was one
    assert load_rollouts(tmp_path / "window.json")[0][0][0].raw_text is None
