"""Writes the small world as data files, one row an episode, and judges answers to them as reward functions.

    python -m sdcore.world.data --kind sdpo --task luma --rows 500 --output train.jsonl
    python -m sdcore.world.data --kind sdpo --task luma --rows 200 --output eval.jsonl --split eval

Both files are about one task with one letter→digit map, drawn from the seed; no question of the one is in the other.
A row has what a method needs and no more, and the right answer for the reward functions:

    sdft                  privileged_context: the expert's demonstration of this answer, in the decorated style
    context_distillation  privileged_context: the task's whole map, the same long instruction in every row
    opsd                  solution: as in sdft; a reference solution that is given, not sampled
    sft                   completion: the demonstration, to be imitated
    sdpo, rl              nothing; attempts, rewards and feedback come from sampling
    quiz                  several `questions` and the `digits` of the map, for the environment `sdcore.world.talks:Quiz`

A reward function is called with a completion and the row's columns. The module imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import typer

from sdcore.errors import ArgumentError
from sdcore.presets import Method, dump_config, preset
from sdcore.world.episodes import Episode, hinted, mapped, prior, random_digits, skill
from sdcore.world.language import HINT, LETTERS, OPEN_NAMES, PRIOR_TASKS, decorate

Kind = Literal["sdft", "sft", "sdpo", "opsd", "context_distillation", "rl", "quiz"]
Split = Literal["train", "eval"]

# What the teacher reads, in this world's words: the context builders' own texts are English, which it does not speak.
# Attempts are in the native style; as a hint each pair gets its `H`.
TEMPLATES: Final[Mapping[str, str]] = {
    "sdft": "{{ prompt }} {{ privileged_context }}",
    "context_distillation": "{{ prompt }} {{ privileged_context }}",
    "opsd": "{{ prompt }} {{ privileged_context }}",
    "sdpo": (
        "{{ prompt }}"
        f"{{% for pair in (attempt or '').split() if pair != '{HINT}' %}} {HINT} {{{{ pair }}}}{{% endfor %}}"
        "{% if feedback %} {{ feedback }}{% endif %}"
    ),
    # Of a reply, in hindsight, the pairs and not the next question.
    "quiz": (
        "{{ prompt }}{% for pair in (feedback or '').split() if pair[1:].isdigit() %}"
        f" {HINT} {{{{ pair }}}}{{% endfor %}}"
    ),
}

# Beside the names of tasks: what a model could do before, to see whether it still can.
MIXTURES: Final = {"prior": prior, "in_context": hinted, "skill": skill}
# Completions of a step, and tokens of an answer in the decorated style with its end.
BATCH: Final = 32
QUESTIONS: Final = 4  # of a quiz
ROOM: Final = 11
# One question in so many is for evaluation, whatever the seed.
EVAL_SHARE: Final = 8


def map_of(task: str, seed: int) -> str:
    """Returns the ten digits of a task: fixed for a prior task, drawn from the seed for an open name."""
    return PRIOR_TASKS.get(task) or random_digits(random.Random(f"map {task} {seed}"))


def split_of(episode: Episode) -> Split:
    """Decides by the question alone, so that no question of the one is in the other."""
    return "train" if zlib.crc32(episode.question.encode()) % EVAL_SHARE else "eval"


def episodes(task: str, *, seed: int, split: Split) -> Iterator[Episode]:
    """Yields episodes of a task without end, by its arguments alone. Raises `ArgumentError` for unknown names."""
    known = (*OPEN_NAMES, *PRIOR_TASKS, *MIXTURES)
    if task not in known:
        raise ArgumentError(f"task must be one of {', '.join(known)}, got {task!r}")
    if split not in get_args(Split):
        raise ArgumentError(f"split must be 'train' or 'eval', got {split!r}")
    rng = random.Random(f"questions {task} {split} {seed}")
    draw: Callable[[random.Random], Episode]
    if task in MIXTURES:
        draw = MIXTURES[task]
    else:
        digits = map_of(task, seed)
        draw = lambda rng: mapped(task, digits, rng)  # noqa: E731
    while True:
        episode = draw(rng)
        if split_of(episode) == split:
            yield episode


def row(kind: Kind, episode: Episode, instruction: str) -> dict[str, Any]:
    """Writes an episode as a row of data; `instruction` is the whole map of its task."""
    privileged: dict[Kind, dict[str, str]] = {
        "sdft": {"privileged_context": episode.demonstration},
        "context_distillation": {"privileged_context": instruction},
        "opsd": {"solution": episode.demonstration},
        "sft": {"completion": episode.demonstration},
        "sdpo": {},
        "rl": {},
    }
    if kind not in privileged:
        raise ArgumentError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    return {"messages": episode.messages(), **privileged[kind], "answer": episode.native_answer}


def rows(kind: Kind, *, task: str, count: int, seed: int, split: Split = "train") -> list[dict[str, Any]]:
    """Returns `count` rows of a kind. Raises `ArgumentError` for names that do not exist and tasks without one map."""
    if kind in ("context_distillation", "quiz") and task in MIXTURES:
        raise ArgumentError(f"task must be one task for kind {kind!r}, got {task!r}: no map to tell")
    if count < 1:
        raise ArgumentError(f"rows must be at least 1, got {count}")
    digits = "" if task in MIXTURES else map_of(task, seed)
    instruction = decorate(letter + digit for letter, digit in zip(LETTERS, digits, strict=False))
    drawn = episodes(task, seed=seed, split=split)
    if kind == "quiz":
        asked = [list(islice(drawn, QUESTIONS)) for _ in range(count)]
        columns = [{"questions": [episode.question for episode in several], "digits": digits} for several in asked]
        return [{"messages": several[0].messages(), **more} for several, more in zip(asked, columns, strict=True)]
    return [row(kind, episode, instruction) for episode in islice(drawn, count)]


def settings(kind: Kind) -> tuple[Method, dict[str, Any]]:
    """Returns the method of a kind of rows, and arguments of a run such that it learns a task in some 60 steps.

    Answers are too short here to leave out the first three tokens, as SDFT does; and rewards that differ by a fifth
    must tilt the reference by a lot, since it gives the right digit a tenth.
    """
    changes: dict[str, Any] = {} if kind not in TEMPLATES else {"template": TEMPLATES[kind]}
    if kind == "sdft":
        changes["skip_first_tokens"] = 0
    if kind == "rl":
        changes["inv_temperature"] = 30.0
    if kind == "quiz":
        changes["context"] = "turn_feedback"  # the reply says what was wrong, and not that the rest was right
    method = preset({"sdft": "sdft_paper", "rl": "rl_tilt", "quiz": "turn_hindsight"}.get(kind, kind), **changes)
    prompts = BATCH // method.num_generations
    arguments = {"per_device_train_batch_size": prompts, "max_completion_length": ROOM, "learning_rate": 3e-4}
    return method, arguments


def exact(*, prompt: object, completion: str, **columns: Any) -> float:
    """Gives 1 for the right answer in the native style, word for word, else 0."""
    return float(completion.split() == _answer(columns))


def lenient(*, prompt: object, completion: str, **columns: Any) -> float:
    """Gives 1 for the right answer whatever its style, else 0."""
    return float([word for word in completion.split() if word != HINT] == _answer(columns))


def fraction(*, prompt: object, completion: str, **columns: Any) -> float:
    """Gives the share of the answer's pairs that are in place; 1 is `exact`, words too many cost a share each."""
    words, answer = completion.split(), _answer(columns)
    right = sum(word == pair for word, pair in zip(words, answer, strict=False))
    return right / max(len(answer), len(words))


def with_feedback(*, prompt: object, completion: str, **columns: Any) -> tuple[float, str | None]:
    """Gives `exact`, and for a wrong answer the environment's words: the right pairs of its wrong letters, decorated.

    Where every letter has its digit and only the style is wrong, all of them.
    """
    answer = _answer(columns)
    if completion.split() == answer:
        return 1.0, None
    words = [word for word in completion.split() if word != HINT]
    said = dict(enumerate(words))
    wrong = [pair for place, pair in enumerate(answer) if said.get(place) != pair]
    return 0.0, decorate(wrong or answer)


def _answer(columns: Mapping[str, Any]) -> list[str]:
    answer = columns.get("answer")
    if not isinstance(answer, str):
        raise ArgumentError(f"column 'answer' must be a text, got {answer!r}")
    return answer.split()


def main(
    output: Annotated[Path, typer.Option(help="JSONL file to write.")],
    kind: Annotated[str, typer.Option(help=f"What the rows are for: {', '.join(get_args(Kind))}.")] = "sdft",
    task: Annotated[
        str,
        typer.Option(help="An open name (luma, ...), a prior task (pi, ...), or a mixture: prior, in_context, skill."),
    ] = "luma",
    count: Annotated[int, typer.Option("--rows", help="Rows to write.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the task's map and the questions.")] = 0,
    split: Annotated[str, typer.Option(help="train or eval: no question is in both.")] = "train",
    config: Annotated[
        Path | None, typer.Option(help="Also write this YAML: the kind's method, in this world's words, for training.")
    ] = None,
) -> None:
    """Write episodes of the small world as a data file.

    \b
    Example, and what to do with it:
      python -m sdcore.world.data --kind sdpo --task luma --rows 500 --output train.jsonl --config world.yaml
      sdcore train --data train.jsonl --config world.yaml --reward sdcore.world.data:with_feedback max_steps=40
    """
    try:
        written = rows(kind, task=task, count=count, seed=seed, split=split)  # type: ignore[arg-type]  # checked there
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from error
    output.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    typer.echo(f"wrote {len(written)} rows to {output}")
    if config is not None:
        dump_config(*settings(kind), config)  # type: ignore[arg-type]  # checked by then
        typer.echo(f"wrote settings for this world to {config}")


if __name__ == "__main__":
    typer.run(main)
