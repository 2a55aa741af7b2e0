"""Takes what real models give to their output layer, at the tokens of their own answers.

    load("smollm2")                     # made where it is not there yet, and kept in ~/.cache/sdcore/states
    load("elsewhere/gemma.safetensors") # such a file

The student has read a question and the teacher, the same model, the facts that the question is about before it: in the
chat template where the model has one, else as plain text. Both read the same answer, and what the output layer gets at
its tokens are the rows, in their order, answer after answer. All of it is rounded to bfloat16, as `shapes` says why.

What differs from the obvious: answers are drawn once and stand in `states.json`, for the last bits of a machine's
products make other answers: so everybody has the same rows, to within rounding. Beside them stand a checksum of the
model's output layer and a few numbers of the rows, so that another model, or a file that was changed, is noticed.
`python -m sdcore.bench.states smollm2` draws and writes them anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from .options import STATES as NAMES
from .shapes import CaseInputs, Shape, leaves

FILE: Final = Path(__file__).with_name("states.json")
ROWS: Final = 1024
ANSWERS, MOST_TOKENS = 2, 32  # to each question, and of an answer
TENSORS: Final = ("student", "teacher", "head")
MASS_OF: Final = (20, 100, 1000)
# Of the rows' numbers, those that stand in the repository; and how far rounding moves them, of the largest.
EXCERPT: Final = (slice(None, None, 256), slice(6))
CLOSE: Final = 0.02


class States(NamedTuple):
    """Holds the rows of both sides and the output layer that they share, in bfloat16."""

    name: str
    student: Tensor  # (N, H)
    teacher: Tensor  # (N, H)
    head: Tensor  # (V, H)

    def shape_of(self, rows: int | None) -> Shape:
        """Returns the shape of so many of the rows, by default of all. Raises `ArgumentError`."""
        if rows is not None and rows > len(self.student):
            raise ArgumentError(f"N must be at most the {len(self.student)} rows of {self.name}, got {rows}")
        return Shape(rows or len(self.student), *self.head.shape)

    def inputs(self, shape: Shape, dtype: str, *, device: str = "cpu", frozen_head: bool = False) -> CaseInputs:
        """Makes the inputs of a case of the first rows."""
        rows = slice(shape.rows)
        sides = (side.to(device) for side in (self.student[rows], self.head, self.teacher[rows]))
        return leaves(*sides, dtype=dtype, frozen_head=frozen_head)

    @torch.no_grad()
    def mass(self, rows: int) -> list[dict[str, Any]]:
        """Returns the share of probability that the likeliest k of V tokens have, by k and side, mean over the rows."""
        head = self.head.float()
        entries: list[dict[str, Any]] = [{"states": self.name, "k": min(k, len(head))} for k in MASS_OF]
        for side in ("student", "teacher"):
            shares = []
            for part in getattr(self, side)[:rows].float().split(64):
                logits = part @ head.T
                best = logits.topk(entries[-1]["k"]).values - logits.logsumexp(-1, keepdim=True)
                shares.append(best.double().exp().cumsum(-1))
            mean = torch.cat(shares).mean(0)
            entries = [entry | {side: float(mean[entry["k"] - 1])} for entry in entries]
        return entries


def load(source: str, say: Callable[[str], None] = lambda line: None) -> States:
    """Returns the states of one of `NAMES`, made if need be, or of a file.

    Raises `ArgumentError` for what is neither and for a file that is not what it was, `ImportError` without a package.
    """
    if source not in NAMES and not Path(source).is_file():
        raise ArgumentError(f"states must be one of {', '.join(NAMES)}, or the path of a file of them, got {source!r}")
    path = Path(source)
    if source in NAMES:
        from ..models.gguf import cache_folder

        path = cache_folder("states") / f"{source}.safetensors"
        if not path.exists():
            say(f"making the states of {source}, once, in {path}")
            made = make(source)
            save(made, path)
    return read(path)


def save(states: States, path: Path) -> None:
    """Writes a file of states, which is there when it is whole."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(states, name) for name in TENSORS}
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path.with_suffix(".part"), metadata={"name": states.name, **sums})
    path.with_suffix(".part").replace(path)


def read(path: Path) -> States:
    """Reads a file of states; raises `ArgumentError` where it is not what was written, or not of this version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in TENSORS}
    except SafetensorError as error:
        raise ArgumentError(f"states must be a whole file, got {path}: {error}; delete it to have it made") from error
    states = States(about.get("name", ""), **tensors)
    wrong = [name for name, tensor in tensors.items() if checksum(tensor) != about.get(name)]
    if wrong:
        raise ArgumentError(f"states must be as they were written, got {path} with another {' and '.join(wrong)}")
    if states.name in NAMES:
        _require_as_recorded(states, _records()["models"][states.name], str(path))
    return states


def _require_as_recorded(states: States, record: dict[str, Any], path: str) -> None:
    wrong = ["output layer"] if checksum(states.head) != record["head"] else []
    for name in ("student", "teacher"):
        kept, there = torch.stack([*map(_numbers, record[name])]), getattr(states, name)[EXCERPT].float()
        if kept.shape != there.shape or not (kept - there).abs().max() <= CLOSE * kept.abs().max():
            wrong.append(name)
    if wrong:
        raise ArgumentError(
            f"states must be those of {states.name} that {FILE.name} has excerpts of, got {path}, whose "
            f"{' and '.join(wrong)} differ: delete it, or look at what changed the model"
        )


def checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _lines(rows: Iterable[Tensor]) -> list[str]:
    return [" ".join(str(number) for number in row.tolist()) for row in rows]


def _numbers(line: str) -> Tensor:
    return torch.tensor([*map(json.loads, line.split())])


def _records() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def questions(tokenizer: Any) -> list[Any]:
    """Returns questions with the facts that they are about; plain text where the tokenizer has no chat template."""
    from ..types import Example, Prompt

    def prompt(question: str) -> Prompt:
        plain = f"Question: {question}\nAnswer:"
        return ({"role": "user", "content": question},) if tokenizer.chat_template else plain

    return [
        Example(prompt=prompt(question), privileged_context=about["facts"], source=question)
        for about in _records()["facts"]
        for question in about["questions"]
    ]


def drawn(model: Any, tokenizer: Any, *, count: int, most_tokens: int, seed: int = 0) -> list[list[Tensor]]:
    """Draws so many answers to each of the questions."""
    from ..contexts import student_prompt_ids
    from ..prefix import generate
    from ..rollouts.samplers import stop_ids

    prompts = [student_prompt_ids(example, tokenizer) for example in questions(tokenizer)]
    how: dict[str, Any] = {"num_completions": count, "max_new_tokens": most_tokens, "seed": seed}
    return generate(model, prompts, eos_token_id=stop_ids(model, tokenizer), **how).completions


@torch.no_grad()
def states_of(model: Any, tokenizer: Any, answers: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns the student's and the teacher's states, (N, H) each, at the tokens of answers to the questions."""
    from ..contexts import Template, student_prompt_ids
    from ..types import Group, Trajectory

    builder = Template("{{ privileged_context }}\n\n{{ prompt }}")
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for example, of_question in zip(questions(tokenizer), answers, strict=True):
        prompt = student_prompt_ids(example, tokenizer)
        rollouts = tuple(
            Trajectory.answer(completion_ids=ids, logprobs=None, text="", finished=True) for ids in of_question
        )
        group = Group(example=example, prompt_ids=prompt, rollouts=rollouts)
        taught = builder.condition(group, tokenizer).teacher_prompts
        for answer, teacher_prompt in zip(of_question, taught, strict=True):
            for side, read in zip(sides, (prompt, teacher_prompt), strict=True):
                states = model.base_model(torch.cat([read, answer])[None]).last_hidden_state[0]
                side.append(states[len(read) - 1 : -1])
    return torch.cat(sides[0]), torch.cat(sides[1])


def make(name: str, *, anew: bool = False) -> States:
    """Computes the states of an installed model at its recorded answers; `anew` draws them, and writes the record.

    Raises `ArgumentError` where they are not those of the record, `ImportError` without the package.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..models.gguf import packaged_file, plain_folder

    folder = plain_folder(packaged_file(name))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    records = _records()
    if anew:
        chosen = drawn(model, tokenizer, count=ANSWERS, most_tokens=MOST_TOKENS)
    else:
        chosen = [[_numbers(ids) for ids in lines] for lines in records["models"][name]["answers"]]
    student, teacher = (side[:ROWS].bfloat16() for side in states_of(model, tokenizer, chosen))
    head = model.get_output_embeddings().weight.detach().bfloat16()
    states = States(name, student.contiguous(), teacher.contiguous(), head)
    if anew:
        excerpts = {side: _lines(getattr(states, side)[EXCERPT]) for side in ("student", "teacher")}
        answers = [_lines(of_question) for of_question in chosen]
        records["models"][name] = {"head": checksum(states.head), **excerpts, "answers": answers}
        FILE.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _require_as_recorded(states, records["models"][name], folder)
    return states


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        sys.stdout.write(f"{wanted}: {len(make(wanted, anew=True).student)} rows\n")
