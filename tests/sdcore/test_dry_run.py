"""What a dry run says of rows: who reads which tokens, what carries a loss, what training would stumble over."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer

from sdcore import world
from sdcore.data import read_examples
from sdcore.errors import ArgumentError, DataError
from sdcore.presets import GRPO, SDPO, Method, preset
from sdcore.rollouts.environments import Agent, Reply
from sdcore.rollouts.episodes import EpisodeError
from sdcore.rollouts.rewards import RewardError
from sdcore.training.dry_run import COLOURS, DryRun, Preview, dry_run, show
from sdcore.types import Example
from sdcore.world.data import TEMPLATES, Kind, exact, rows, with_feedback
from tests.sdcore.rollouts.talks import SMOLLM2, Higher, add, tokenizer_of
from tests.sdcore.test_trajectories import tiny

CHECKPOINT = Path(world.__file__).parent / "checkpoint"
TOKENIZER = AutoTokenizer.from_pretrained(CHECKPOINT)
CONFIG = AutoConfig.from_pretrained(CHECKPOINT)
METHODS: dict[str, tuple[Kind, Method]] = {
    "sdft": ("sdft", preset("sdft_paper", template=TEMPLATES["sdft"])),
    "sdpo": ("sdpo", preset("sdpo", template=TEMPLATES["sdpo"])),
    "opsd": ("opsd", preset("opsd", template=TEMPLATES["opsd"])),
    "context": ("context_distillation", preset("context_distillation", template=TEMPLATES["context_distillation"])),
    "rl": ("rl", preset("rl_tilt")),
    "sft": ("sft", preset("sft")),
}


def examples(kind: Kind, count: int = 12) -> list[Example]:
    return read_examples(rows(kind, task="luma", count=count, seed=0))


def run(name: str, **options: Any) -> DryRun:
    kind, method = METHODS[name]
    given: dict[str, Any] = {"reward_functions": [with_feedback] if method.needs_rewards else []}
    return dry_run(examples(kind), TOKENIZER, method, CONFIG, **given | {"max_completion_length": 11} | options)


def parts(preview: Preview) -> dict[str, tuple[str, int, str]]:
    return {one.name: (one.read_by, one.tokens, one.text) for one in preview.segments}


def printed(looked: DryRun, *, colours: bool = False) -> str:
    console = Console(record=True, width=160, file=io.StringIO())
    show(looked, console)
    return console.export_text(styles=colours)


def test_a_demonstration_is_c_ext_between_the_question_and_the_answer() -> None:
    preview = run("sdft").previews[0]
    example = examples("sdft")[0]
    segments = parts(preview)
    question, answer = example.prompt[0]["content"], example.columns["answer"].split()  # type: ignore[index]
    assert segments["shared prefix"] == ("both", 7, f"<bos> {question}")
    assert segments["c_ext"] == ("teacher", 10, example.privileged_context)
    assert segments["after c_ext"] == ("both", 1, "=")
    # SDFT leaves out the first three tokens of a completion.
    assert segments["completion, no loss"] == ("both", 3, " ".join(answer[:3]))
    assert segments["completion, loss"] == ("both", 3, " ".join([*answer[3:], "<eos>"]))
    assert (preview.prompt_tokens, preview.teacher_tokens, preview.shared_tokens) == (8, 18, 7)
    assert preview.shared_fraction == pytest.approx(7 / 8)


def test_sdpo_is_shown_with_a_successful_attempt_and_with_feedback_that_was_really_given() -> None:
    with_attempt, with_words = run("sdpo").previews
    assert "another attempt had succeeded" in with_attempt.supposed
    assert "no attempt had succeeded" in with_words.supposed
    for preview, example in zip((with_attempt, with_words), examples("sdpo"), strict=False):
        decorated = " ".join(f"H {pair}" for pair in example.columns["answer"].split())
        assert parts(preview)["c_ext"] == ("teacher", 10, decorated)
        assert (preview.reward, preview.feedback) == (0.0, decorated)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_shows_its_tokens(name: str) -> None:
    looked = run(name)
    taught = METHODS[name][1].has_teacher
    preview = looked.previews[0]
    assert ("c_ext" in parts(preview)) == taught
    assert (preview.teacher_tokens is not None) == taught
    assert (looked.shared_fraction is not None) == taught
    assert parts(preview)["completion, loss"][0] == ("both" if taught else "student")
    read = sum(one.tokens for one in preview.segments if one.read_by != "teacher")
    # Five pairs and an end; SFT imitates them in the decorated style.
    assert read == preview.prompt_tokens + (11 if name == "sft" else 6)
    shown = printed(looked)
    assert "shared prefix" in shown
    assert "12 rows" in shown
    assert "peak" in shown


def test_parts_have_their_colours() -> None:
    shown = printed(run("sdft"), colours=True)
    for code in ("\x1b[32m", "\x1b[33m", "\x1b[35m"):  # green, yellow, magenta: prefix, c_ext, loss
        assert code in shown
    plain = printed(run("sdft"))
    for name in COLOURS:
        assert name in plain


def test_memory_is_predicted_for_the_longest_rows_and_the_whole_group() -> None:
    looked = run("sdpo", prompts=4)
    assert looked.load is not None
    assert looked.memory is not None
    load = looked.load
    assert (load.prompts, load.completions, load.prompt_tokens, load.context_tokens) == (4, 8, 8, 10)
    assert set(looked.memory) == {"fused, shared", "fused, naive", "plain, shared", "plain, naive"}


def test_rows_without_privileged_context_are_counted_and_none_at_all_is_an_error() -> None:
    some = rows("sdft", task="luma", count=4, seed=0)
    del some[1]["privileged_context"]
    method = METHODS["sdft"][1]
    looked = dry_run(read_examples(some), TOKENIZER, method, CONFIG, max_completion_length=11)
    assert looked.without_context == 1
    assert [preview.active for preview in looked.previews] == [True, False]
    assert "completion, loss" not in parts(looked.previews[1])
    shown = printed(looked)
    assert "1 rows have no privileged context" in shown
    assert "nothing privileged to show" in shown
    with pytest.raises(DataError, match="needs a column `privileged_context`"):
        dry_run(examples("sdpo"), TOKENIZER, method, CONFIG)


def test_a_reward_function_that_gives_no_feedback_is_not_made_to_say_something() -> None:
    with_attempt, with_words = run("sdpo", reward_functions=[exact]).previews
    assert (with_attempt.active, with_words.active) == (True, False)
    assert with_words.feedback is None


def test_what_is_too_long_is_said() -> None:
    kind, method = METHODS["sdft"]
    some = examples(kind)
    some[9] = replace(some[9], privileged_context=" ".join(["H a3"] * 80))
    for options, refused in (
        ({"method": replace(method, max_teacher_prompt_length=30)}, "at most max_teacher_prompt_length=30 tokens, got"),
        ({"max_completion_length": 90}, "must have at most 128 tokens, what the model has positions for, got 168"),
    ):
        given: dict[str, Any] = {"method": method, "config": CONFIG, "max_completion_length": 11}
        shown = printed(dry_run(some, TOKENIZER, **given | options))
        assert "1 of 12 rows cannot be used: training stops before its first step" in " ".join(shown.split())
        assert refused in " ".join(shown.split())
        assert "rows, row 9" in shown
    with pytest.raises(DataError, match=r"12 that cannot; the first: rows, row 0: .* max_prompt_length=7"):
        run("sdft", max_prompt_length=7)
    with pytest.raises(DataError, match="what the model's 128 positions leave"):
        run("sdft", max_completion_length=128)


def test_completions_of_the_data_are_shown_as_they_are_trained_on() -> None:
    assert parts(run("sft").previews[0])["completion, loss"][2].endswith("<eos>")
    some = examples("sft")
    some[1] = replace(some[1], columns={"completion": None, "answer": "a3"})
    shown = " ".join(printed(dry_run(some, TOKENIZER, preset("sft"), CONFIG, max_completion_length=3)).split())
    assert "rows, row 1: expected a text in column `completion`, got None" in shown
    looked = dry_run(some, TOKENIZER, preset("sft"), CONFIG, max_completion_length=3)
    assert parts(looked.previews[0])["completion, loss"][1] == 3  # cut, as in training


def test_reward_functions_are_needed_loaded_and_called() -> None:
    with pytest.raises(ArgumentError, match="reward functions must be given"):
        run("rl", reward_functions=[])
    with pytest.raises(ArgumentError, match="has no function 'exakt'"):
        run("rl", reward_functions=["sdcore.world.data:exakt"])
    with pytest.raises(RewardError, match="raised KeyError"):
        run("rl", reward_functions=[lambda *, completion, **columns: columns["no such column"]])
    assert run("rl", reward_functions=[exact]).previews[0].reward == 0.0


def test_a_model_that_does_not_say_its_sizes_has_no_prediction() -> None:
    kind, method = METHODS["sdft"]
    config = AutoConfig.from_pretrained(CHECKPOINT)
    config.kv_lora_rank = 8  # multi-head latent attention
    looked = dry_run(examples(kind), TOKENIZER, method, config, max_completion_length=11)
    assert looked.memory is None
    assert "no prediction of memory" in printed(looked)


def test_long_texts_are_shown_in_part(tmp_path: Path) -> None:
    row = {"prompt": "luma a b c d e", "privileged_context": " ".join(["H a3"] * 800), "answer": "a3"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    config = AutoConfig.from_pretrained(CHECKPOINT, max_position_embeddings=4096)
    looked = dry_run(read_examples(tmp_path / "long.jsonl"), TOKENIZER, METHODS["sdft"][1], config)
    assert len(parts(looked.previews[0])["c_ext"][2]) > 3900
    assert "[…]" in printed(looked)
    assert "long.jsonl:1" in printed(looked)


GUESS = Example(
    prompt=({"role": "user", "content": "Guess!"},),
    privileged_context="It is 9.",
    columns={"answer": "Five", "opening": " It is a digit."},
    source="rows:1",
)


def talk(method: Method, agent: Agent | None = None, **options: Any) -> DryRun:
    agent = agent or Agent(environment_factory=Higher)
    given: dict[str, Any] = {"max_completion_length": 8} | options
    return dry_run([GUESS] * 3, tokenizer_of("smollm2"), method, tiny().config, agent=agent, **given)


@pytest.mark.parametrize(
    ("method", "hints"),
    [
        (Method(context="turn_feedback"), ["It is 1 higher.", "It is 2 higher."]),
        (Method(context="hindsight"), ["Guess 1 is too low.", "Guess 2 is too low."]),
        (Method(context="solution"), ["It is 9."]),
        (SDPO(), ["Five"]),
        (GRPO(), []),
    ],
)
def test_turns_are_shown_with_what_was_really_replied_and_the_view_of_each(method: Method, hints: list[str]) -> None:
    first, _ = talk(method).previews
    by = "both" if method.has_teacher else "student"
    said = [one for one in first.segments if one.name == "completion, loss"]
    assert [(one.read_by, one.text, one.tokens) for one in said] == [(by, "Five<|im_end|>", said[0].tokens)] * 2
    order = [one.name for one in first.segments]
    read = "".join(one.text for one in first.segments if one.read_by == by)
    assert "Guess! It is a digit." in read
    assert first.opening == " It is a digit."
    reply = read.index("<|im_start|>user\nGuess 1 is too low.")
    assert read.index("Five") < reply < read.rindex("Five")
    # What came after the last turn is read by nobody, and no token of it is rendered.
    assert (first.segments[-1].text, first.segments[-1].tokens) == ("Guess 2 is too low.", 0)
    assert first.segments[-1].read_by == "nobody"
    shown = [one for one in first.segments if one.name == "c_ext"]
    assert all(one.read_by == "teacher" for one in shown)
    for hint, segment in zip(hints, shown, strict=True):
        assert hint in segment.text
    turns = [i for i, name in enumerate(order) if name == "completion, loss"]
    # Each hint stands before the turn that it is about.
    assert [sum(i < turn for i, name in enumerate(order) if name == "c_ext") for turn in turns] == [
        min(1, len(hints)),
        len(hints),
    ]
    assert first.ended == "turns 2, outcome turns, reward -1"
    shown_text = printed(talk(method))
    assert "the environment's reset says ' It is a digit.'" in shown_text
    assert "others, no loss" in shown_text


def test_a_turn_without_a_hint_carries_no_loss() -> None:
    class Silent(Higher):
        def step(self, message: dict[str, Any]) -> Reply:  # type: ignore[override]
            return super().step(message)._replace(feedback=None) if self.guesses else super().step(message)  # type: ignore[union-attr]

    first = talk(Method(context="turn_feedback", skip_first_tokens=2), Agent(environment_factory=Silent)).previews[0]
    said = [(one.name, one.tokens > 2) for one in first.segments if one.name.startswith("completion")]
    assert said == [("completion, no loss", False), ("completion, loss", True), ("completion, no loss", True)]
    assert sum(one.name == "c_ext" for one in first.segments) == 1


def test_tools_are_in_the_prompt_and_nobody_answers_an_answer() -> None:
    tokenizer = tokenizer_of("smollm2")
    with pytest.raises(ArgumentError, match="tools must be shown to the student by the tokenizer's chat template"):
        talk(Method(context="solution"), Agent(tools=[add]))
    shows = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    shows.chat_template = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + SMOLLM2
    looked = dry_run([GUESS], shows, Method(context="solution"), tiny().config, agent=Agent(tools=[add]))
    (first,) = looked.previews
    assert '"description": "Adds two numbers."' in first.segments[0].text
    assert [one.name for one in first.segments].count("completion, loss") == 1
    assert first.ended == "turns 1, outcome answered"


def test_memory_is_that_of_the_longest_trajectory() -> None:
    assert talk(GRPO()).load.completion_tokens == 64
    assert talk(GRPO(), Agent(environment_factory=Higher, max_tokens=40)).load.completion_tokens == 40
    long = talk(GRPO(), max_completion_length=500)
    assert long.load.completion_tokens == 1024 - max(long.prompt_tokens)
    assert "memory is that of 64 tokens behind the prompt" in printed(talk(GRPO()))


def test_an_environment_is_asked_only_about_rows_that_are_shown_and_its_failure_is_found() -> None:
    began = []

    class Counting(Higher):
        def reset(self, example: Example) -> None:
            began.append(example.source)
            super().reset(example)

    talk(Method(context="hindsight"), Agent(environment_factory=Counting), shown=1)
    assert began == ["rows:1"]

    class Broken(Higher):
        def step(self, message: dict[str, Any]) -> Reply:  # type: ignore[override]
            raise KeyError("no such door")

    with pytest.raises(EpisodeError, match="rows:1, trajectory 0, turn 0: the environment's step raised KeyError"):
        talk(Method(context="hindsight"), Agent(environment_factory=Broken))
    with pytest.raises(ArgumentError, match="reward functions must be given"):
        talk(GRPO(), Agent(tools=[add]))
