"""Tests the small world: its language, its episodes, who is judged right, and the model that is shipped with it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sdcore.world import CHECKPOINT, episodes
from sdcore.world.episodes import Episode
from sdcore.world.language import LETTERS, OPEN_NAMES, PRIOR_TASKS, SKILLS, VOCABULARY, build_tokenizer, decorate
from sdcore.world.pretrain import Phase, PretrainConfig, build_model, collate, measure, pretrain, train
from sdcore.world.verifier import Verdict, accuracy, judge, prompt_ids

KINDS = {kind.__name__: kind for kind in (episodes.prior, episodes.skill, episodes.unknown, episodes.hinted)}
FEW_STEPS = Phase(steps=3, learning_rate=3e-3, guesses=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture
def episode() -> Episode:
    return episodes.mapped("luma", "0123456789", random.Random(0)).with_demonstration()


def test_each_of_134_words_is_one_token_and_comes_back_and_others_become_unk(tokenizer: Any) -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 134
    ids = tokenizer(" ".join(VOCABULARY), add_special_tokens=False)["input_ids"]
    assert ids == list(range(134))
    assert tokenizer.decode(ids) == " ".join(VOCABULARY)
    assert tokenizer.decode(tokenizer("a colour b", add_special_tokens=False)["input_ids"]) == "a <unk> b"


@pytest.mark.parametrize("kind", KINDS)
def test_the_chat_template_renders_the_plain_sequence(tokenizer: Any, kind: str) -> None:
    rng = random.Random(0)
    for _ in range(50):
        drawn = KINDS[kind](rng)
        chat = [*drawn.messages(), {"role": "assistant", "content": drawn.native_answer}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == drawn.plain()
        prompt = tokenizer.decode(prompt_ids(tokenizer, drawn))
        assert drawn.plain() == f"{prompt} {drawn.native_answer} <eos>"


def test_context_follows_the_question_which_student_and_teacher_share(tokenizer: Any, episode: Episode) -> None:
    bare = Episode(task=episode.task, letters=episode.letters, answer=episode.answer)
    student, teacher = prompt_ids(tokenizer, bare), prompt_ids(tokenizer, episode)
    assert tokenizer.decode(teacher) == f"<bos> {episode.question} {episode.demonstration} ="
    assert teacher[: len(student) - 1] == student[:-1]
    assert teacher[-1] == student[-1]


def test_the_chat_template_refuses_a_system_turn(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="expected a user or assistant turn, got system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "a"}], tokenize=False)


@pytest.mark.parametrize("hints", range(1, 11))
def test_hints_cover_the_question_and_agree_with_the_answer(hints: int) -> None:
    rng = random.Random(hints)
    for _ in range(50):
        drawn = episodes.hinted(rng, hints=hints)
        assert len({hint[0] for hint in drawn.hints}) == hints
        assert set(drawn.answer) <= set(drawn.hints)
        assert tuple(pair[0] for pair in drawn.answer) == drawn.letters
        assert drawn.task in OPEN_NAMES


@pytest.mark.parametrize("hints", [0, 11])
def test_a_number_of_hints_that_no_episode_has_is_refused(hints: int) -> None:
    with pytest.raises(ValueError, match=rf"hints must be in \[1, 10\], got {hints}"):
        episodes.hinted(random.Random(0), hints=hints)


def test_prior_tasks_have_one_map_and_open_tasks_many() -> None:
    rng = random.Random(0)
    for name, digits in PRIOR_TASKS.items():
        drawn = [e for e in (episodes.prior(rng) for _ in range(300)) if e.task == name]
        assert {pair for e in drawn for pair in e.answer} == {x + d for x, d in zip(LETTERS, digits, strict=True)}
    pairs = {pair for _ in range(300) for pair in episodes.unknown(rng).answer}
    assert len(pairs) == 100


def test_skills_reverse_and_sort_and_number_the_places() -> None:
    rng = random.Random(0)
    for _ in range(50):
        drawn = episodes.skill(rng)
        assert drawn.task in SKILLS
        ordered = sorted(drawn.letters) if drawn.task == "sort" else drawn.letters[::-1]
        assert drawn.answer == tuple(letter + str(place) for place, letter in enumerate(ordered))


def test_the_same_seed_draws_the_same_episodes() -> None:
    first, second, other = (episodes.pretraining_batch(random.Random(seed), 64, guesses=True) for seed in (0, 0, 1))
    assert first == second
    assert first != other


def test_an_answer_is_judged_up_to_its_end_and_a_decorated_one_is_right_only_leniently(episode: Episode) -> None:
    assert judge(f"{episode.native_answer} <eos>", episode) == Verdict(lenient=True, strict=True)
    assert judge(f"{episode.demonstration} <eos>", episode) == Verdict(lenient=True, strict=False)
    assert judge(f"{episode.native_answer} <eos> <pad> a0 <eos>", episode).strict


def test_wrong_short_long_and_unfinished_answers_are_wrong(episode: Episode) -> None:
    first, *rest = episode.answer
    wrong = "b0" if first != "b0" else "b1"
    answers = {
        "wrong digit": f"{' '.join([wrong, *rest])} <eos>",
        "wrong order": f"{' '.join([*rest, first])} <eos>",
        "short": f"{' '.join(rest)} <eos>",
        "long": f"{episode.native_answer} {first} <eos>",
        "unfinished": episode.native_answer,
        "decorated and wrong": f"{decorate([wrong, *rest])} <eos>",
        "empty": "",
    }
    for answer in answers.values():
        assert judge(answer, episode) == Verdict(lenient=False, strict=False)


def test_labels_are_exactly_the_answer_and_its_end(tokenizer: Any) -> None:
    drawn = [episodes.prior(random.Random(0)), episodes.hinted(random.Random(0), hints=10)]
    input_ids, labels = collate(tokenizer, [episode.plain() for episode in drawn])
    for row, episode in enumerate(drawn):
        assert tokenizer.decode(labels[row][labels[row] >= 0]) == f"{episode.native_answer} <eos>"
        assert tokenizer.decode(input_ids[row], skip_special_tokens=False).startswith(episode.plain())


def test_the_checkpoint_is_at_most_2_mb_and_plain_hugging_face() -> None:
    files = {file.name: file.stat().st_size for file in CHECKPOINT.iterdir()}
    assert sum(files.values()) <= 2_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)


def test_the_checkpoint_has_the_architecture_that_pretraining_builds(model: LlamaForCausalLM, tokenizer: Any) -> None:
    fresh = build_model(seed=0)
    assert type(model) is LlamaForCausalLM
    assert {name: p.shape for name, p in model.named_parameters()} == {n: p.shape for n, p in fresh.named_parameters()}
    assert model.config.rope_parameters == fresh.config.rope_parameters
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer.chat_template == build_tokenizer().chat_template


# The gate asks for 0.99 of 1,000 answers of each kind. Of 400 answers, 0.99 has a standard error of 0.005.
@pytest.mark.parametrize("kind", ["prior", "hinted", "demonstrated", "unknown"])
def test_the_shipped_model_answers_all_but_an_open_task_without_context(
    model: LlamaForCausalLM, tokenizer: Any, kind: str
) -> None:
    rng, state = random.Random(7), torch.get_rng_state()
    shares = accuracy(model, tokenizer, [getattr(episodes, kind)(rng) for _ in range(400)], seed=7)
    assert shares.lenient <= 0.02 if kind == "unknown" else shares.strict >= 0.96
    assert torch.equal(torch.get_rng_state(), state)  # as it was


def test_pretraining_twice_gives_the_same_weights() -> None:
    config = PretrainConfig(batch_size=8, phases=(FEW_STEPS,))
    models = [build_model(config.seed) for _ in range(2)]
    for model in models:
        train(model, build_tokenizer(), FEW_STEPS, config, random.Random(config.seed))
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


def test_the_gate_refuses_an_untrained_model_and_writes_nothing(tmp_path: Path) -> None:
    config = PretrainConfig(batch_size=8, phases=(FEW_STEPS,), gate_episodes=8)
    with pytest.raises(RuntimeError, match=r"release gate: sampled accuracy must be at least 0.99"):
        pretrain(tmp_path / "checkpoint", config)
    assert list(tmp_path.iterdir()) == []


def test_the_gate_measures_every_number_of_hints(model: LlamaForCausalLM, tokenizer: Any) -> None:
    results = measure(model, tokenizer, PretrainConfig(gate_episodes=4))
    assert set(results) == {"prior", "demonstration", *(f"hints {k}" for k in range(1, 11))}
