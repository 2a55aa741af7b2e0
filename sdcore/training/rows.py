"""Says of every row, before the first step, whether a run can use it; and of the others, why not.

    rows = Rows(collector=collector, body=find_body(model), context=builder)
    examples = rows.usable(examples, "train_dataset")     # raises, or leaves out what cannot be used
    rows.condition(group, tokenizer)                      # what the teacher reads, once completions are there

A row is rendered as the run renders it, by the same functions: the student's prompt, the completion where it is the
data's, the teacher's prompt. Together with the longest completion they must be what the model can read. Ranks share the
rows and hear of each other's, so that all of them go on with the same ones, or none.

What differs from the obvious: where the teacher's context is made of completions, stand-ins of one word are shown to
it, which finds what no completion would mend. What only real ones bring, a long attempt or feedback, is refused when it
comes, with the row's name; "skip" then leaves the group without a teacher, and counts it. Prompts are not kept: to
render one again takes less than a millisecond.

Not covered: what reward functions think of a row, beyond the columns that they ask for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped, unused-ignore]
from rich import get_console
from rich.progress import track
from torch import Tensor

from ..contexts import ContextBuilder, Demonstration, No, Solution, SuccessOrFeedback, Template
from ..contexts.rendering import question_of
from ..contexts.teacher_prompts import COUNTS
from ..errors import DataError, SdcoreError
from ..models import find_body
from ..prefix.sampling import check_room
from ..rollouts.samplers import ModelSampler
from ..types import Conditioned, Example, Group, Trajectory
from .collect import Collector
from .config import OnBadRow, SelfDistillationConfig

NAMED: Final = 5  # rows that are named in the log
EXCERPT: Final = 60  # characters of a prompt
# Builders that can be asked before anything is sampled, and what they are asked about: a success, and a failure.
ASKED: Final = (Demonstration, Solution, SuccessOrFeedback, Template)
_STAND_INS: Final = tuple(
    Trajectory.answer(
        completion_ids=torch.zeros(1, dtype=torch.int64),
        logprobs=None,
        text="answer",
        finished=True,
        reward=reward,
        feedback="feedback",
    )
    for reward in (math.inf, -math.inf)
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Checks rows. Is a `ContextBuilder` too: its `context`, with refusals by row."""

    collector: Collector
    body: Any  # a `Body`, or what has its vocab_size, max_positions and rotary_switch; None: any length will do
    context: ContextBuilder = field(default_factory=No)
    on_bad_row: OnBadRow = "raise"
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] | None = None  # gives the lists of all ranks; None: this process checks all rows
    quiet: bool = True  # no progress bar
    least: int = 1  # rows that there must be
    skipped: dict[str, list[str]] = field(default_factory=dict)  # name of the data → what was said of rows left out

    @classmethod
    def of_run(
        cls,
        args: SelfDistillationConfig,
        collector: Collector,
        model: Any,
        context: ContextBuilder,
        skipped: dict[str, list[str]] | None,
    ) -> Rows:
        """Makes what checks the rows of a run's training steps."""
        batches = args.gradient_accumulation_steps if args.num_iterations > 1 else 1
        return cls(
            least=batches * args.train_batch_size * args.world_size if args.dataloader_drop_last else 1,
            collector=collector,
            body=find_body(model),
            context=context,
            on_bad_row=cast(OnBadRow, args.on_bad_row),
            rank=args.process_index,
            world_size=args.world_size,
            gather=gather_object,
            quiet=bool(args.disable_tqdm),
            skipped={} if skipped is None else skipped,
        )

    def of_evaluation(self) -> Rows:
        """Returns what checks questions that are only answered."""
        collector = replace(self.collector, from_data=False, max_prompt_length=None)
        body = self.body if isinstance(collector.sampler, ModelSampler) else None  # as in `evaluate`
        return replace(self, collector=collector, body=body, context=No(), least=1)

    def usable(self, examples: Sequence[Example], what: str) -> list[Example]:
        """Returns the rows that the run can use; `what` is how the data is called.

        Raises what is said of the first that it cannot use, or, with "skip", `DataError` where none is left.
        """
        alone = self.gather is None
        mine = range(0 if alone else self.rank, len(examples), 1 if alone else self.world_size)
        bad: list[tuple[int, type[SdcoreError], str]] = []
        no_bar = self.quiet or self.rank > 0 or not get_console().is_terminal
        for i in track(mine, f"measuring {what}", transient=True, disable=no_bar):
            try:
                self._check(examples[i])
            except SdcoreError as error:
                bad.append((i, type(error), _with_excerpt(error, examples[i])))
                if self.on_bad_row == "raise":
                    break
        if self.gather is not None:
            bad = self.gather(bad)
        bad.sort(key=lambda refusal: refusal[0])
        if bad and self.on_bad_row == "raise":
            _, kind, text = bad[0]
            raise kind(f"{text}; on_bad_row='skip' leaves such rows out")
        if len(examples) - len(bad) < self.least:
            raise DataError(
                f"{what} must have {'a row' if self.least == 1 else f'{self.least} rows (dataloader_drop_last)'} that "
                f"can be used, got {len(examples)}{f', {len(bad)} that cannot; the first: {bad[0][2]}' if bad else ''}"
            )
        said = self.skipped.setdefault(what, [])
        said += [text for _, _, text in bad]
        if said and self.rank == 0:
            shown = "\n".join([*said[:NAMED], *(["…"] if len(said) > NAMED else [])])
            logger.warning("%s: %d rows are left out, on_bad_row='skip':\n%s", what, len(said), shown)
        plain = sum(isinstance(example.prompt, str) for example in examples)
        if plain and getattr(self.collector.tokenizer, "chat_template", None) and self.rank == 0:
            logger.warning(
                "%s: %d prompts are plain text, so the model reads them without its chat template; as `messages`, or "
                "as `prompt` with a list of messages, they would be the user's turn",
                *(what, plain),
            )
        refused = {i for i, _, _ in bad}
        return [example for i, example in enumerate(examples) if i not in refused]

    @property
    def summary(self) -> dict[str, Any]:
        """Returns what `run.json` says of rows that are left out."""
        return {what: {"rows": len(said), "first": said[:NAMED]} for what, said in self.skipped.items() if said}

    def condition(self, group: Group, tokenizer: Any) -> Conditioned:
        """Returns what the teacher reads. A refusal names the row, or leaves the group without a teacher ("skip")."""
        example, size = group.example, len(group.rollouts)
        try:
            seen = self.context.condition(group, tokenizer)
            for i, (rollout, prompt) in enumerate(zip(group.rollouts, seen.teacher_prompts, strict=True)):
                if seen.turns is not None:
                    for ids, turn in zip(seen.turns[i], rollout.own, strict=True):
                        if ids is not None:
                            self._fits(example, ids, turn.ids, "teacher's prompt of a turn")
                elif seen.active[i] and prompt is not group.prompt_ids:
                    self._fits(example, prompt, rollout.completion_ids, "teacher's prompt")
            return seen
        except SdcoreError as error:
            text = _with_excerpt(error, example)
            if self.on_bad_row == "raise":
                raise type(error)(text) from error
            said = self.skipped.setdefault("contexts", [])
            if len(said) < NAMED:
                said.append(text)
                logger.warning("a context is left out: %s", text)
            counts = dict.fromkeys(COUNTS, 0) | {"context/skipped": size}
            return Conditioned(teacher_prompts=(group.prompt_ids,) * size, active=(False,) * size, counts=counts)

    def _check(self, example: Example) -> None:
        """Raises a subclass of `SdcoreError` where a run could not use the row."""
        for reward in self.collector.rewards:
            reward.check(example)
        prompt = self.collector.prompt(example)
        completion = self.collector.given(example, prompt).completion_ids if self.collector.from_data else None
        self._fits(example, prompt, completion, "prompt")
        if isinstance(self.context, ASKED):
            seen = self.context.condition(
                Group(example=example, prompt_ids=prompt, rollouts=_STAND_INS), self.collector.tokenizer
            )
            for teacher in {id(ids): ids for ids in seen.teacher_prompts if ids is not prompt}.values():
                self._fits(example, teacher, completion, "teacher's prompt")

    def _fits(self, example: Example, prompt: Tensor, completion: Tensor | None, whose: str) -> None:
        """Refuses what the model cannot read; without a completion, the longest that may be sampled."""
        if self.body is None:
            return
        where = f"{example.source}, the {whose}: "
        highest = int(max(ids.max() for ids in (prompt, completion) if ids is not None and len(ids)))
        if self.body.vocab_size is not None and highest >= self.body.vocab_size:
            raise DataError(
                f"{where}ids must be in [0, V={self.body.vocab_size}), the model's vocabulary, got {highest}"
            )
        name = "max_completion_length" if completion is None else "tokens of the completion"
        most = self.collector.max_completion_length if completion is None else len(completion)
        check_room(self.body, len(prompt), most, name=name, where=where)


def _with_excerpt(error: SdcoreError, example: Example) -> str:
    question = " ".join(question_of(example.prompt).split())
    return f"{error} (the row asks {question[:EXCERPT]!r}{'…' if len(question) > EXCERPT else ''})"
