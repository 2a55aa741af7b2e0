"""Shows what training would do with these rows and this model, before anything is sampled, loaded or spent.

    preview = dry_run(read_examples("train.jsonl"), tokenizer, preset("sdpo"), config, reward_functions=[reward])
    show(preview, Console())

Every row is rendered and measured as training does it before its first step (`rows`); a few are shown, token by token:
the prefix that both prompts share and one pass computes, `c_ext` (what only the teacher reads), and the completion
tokens that carry a loss.
Beside them stand the lengths over all rows and the predicted peak memory, with and without fused loss and sharing.

What differs from the obvious: nothing was sampled, so completions are stand-ins, made of the row's own columns. Where
the teacher sees an attempt and feedback, the group is two of them: one that succeeded, and an empty one that the reward
functions were really asked about; what they say is its feedback. So a reward function that raises, or wants a column
that the rows do not have, is found here.

Not covered: whether the model's shared passes are right (the first step checks), lengths that the student will sample.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final

import torch
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import nn

from ..contexts import ContextBuilder, check_examples
from ..contexts.rendering import answer_end
from ..contexts.teacher_prompts import columns_of
from ..errors import ArgumentError, DataError, UnsupportedModelError
from ..memory import Load, Prediction, Setting, compare, memory_table
from ..prefix.planner import common_prefix
from ..presets.method import Method
from ..rollouts.rewards import score
from ..rollouts.samplers import ModelSampler, Sampling, stop_ids
from ..types import Example, Group, Trajectory
from .collect import Collector
from .config import SelfDistillationConfig
from .prepare import check_template_kwargs, within_model
from .rows import NAMED, Rows

# Columns that may hold an answer, for the stand-in; the first that a row has.
ANSWERS: Final = ("completion", "answer", "solution", "response", "target")
UNKNOWN_ANSWER: Final = "(an answer)"
UNKNOWN_FEEDBACK: Final = "(feedback)"
# Rows that are rendered for the lengths.
MOST_MEASURED: Final = 2_000
# Characters of a segment that are shown; of more, the beginning and the end.
MOST_SHOWN: Final = 1_200
COLOURS: Final = {
    "prompt": "green",
    "shared prefix": "green",
    "c_ext": "yellow",
    "student only": "blue",
    "after c_ext": "cyan",
    "completion, no loss": "dim",
    "completion, loss": "magenta",
}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Holds neighbouring tokens with the same part to play."""

    name: str  # one of COLOURS
    read_by: str  # "student", "teacher", "both"
    tokens: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Holds one row, as student and teacher will read it."""

    source: str
    segments: tuple[Segment, ...]
    prompt_tokens: int  # P
    teacher_tokens: int | None = None  # None: the method has no teacher
    shared_tokens: int = 0
    active: bool = True  # False: there is nothing privileged to show, so the completion would carry no loss
    supposed: str = ""  # what the stand-in group is, where the teacher's context depends on it
    reward: float | None = None  # of the empty attempt
    feedback: str | None = None

    @property
    def shared_fraction(self) -> float:
        """Returns the share of the student's prompt that both read."""
        return self.shared_tokens / self.prompt_tokens


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Holds what `show` shows."""

    rows: int
    prompt_tokens: tuple[int, ...]  # of the rows that were rendered
    teacher_tokens: tuple[int, ...]  # () without a teacher
    shared_fraction: float | None  # mean over these rows; None without a teacher
    without_context: int  # rows that carry no loss for want of privileged context
    previews: tuple[Preview, ...]
    load: Load
    memory: Mapping[str, Prediction] | None  # None where the configuration does not say what a layer costs
    remarks: tuple[str, ...]


def setting_of_run(args: SelfDistillationConfig, method: Method, *, lora_rank: int | None = None) -> Setting:
    """Returns how `SelfDistillationTrainer` would run this method; where it chooses a strategy itself, "packed"."""
    automatic = "packed" if args.micro_batch is None else "two_phase"
    return Setting(
        teacher=method.teacher if method.has_teacher or method.needs_reference else "live",
        strategy=automatic if args.strategy == "auto" else args.strategy,  # type: ignore[arg-type]
        micro_batch=args.micro_batch,
        checkpointing=args.gradient_checkpointing,
        accumulates=args.gradient_accumulation_steps > 1,
        lora_rank=lora_rank,
        dtype=None if args.model_dtype == "auto" else args.model_dtype,
    )


def dry_run(
    examples: Sequence[Example],
    tokenizer: Any,
    method: Method,
    config: Any,
    *,
    reward_functions: Sequence[Callable[..., Any] | str] = (),
    builder: ContextBuilder | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int = 256,
    prompts: int = 1,
    setting: Setting | None = None,
    shown: int = 2,
) -> DryRun:
    """Renders, counts and predicts. `config` is the model's Hugging Face configuration; no weights are read.

    `builder` None is the method's own. `prompts` is how many groups a device holds at a time. Raises `DataError`,
    `ContextError`, `RewardError` or `ArgumentError` for what training would stumble over.
    """
    if not examples:
        raise DataError("no rows: there is nothing to learn from")
    if method.needs_rewards and not reward_functions:
        raise ArgumentError("reward functions must be given: the method learns from judged completions, got none")
    check_template_kwargs(tokenizer, chat_template_kwargs)
    positions = getattr(config, "max_position_embeddings", None)
    builder = builder or method.build_context(chat_template_kwargs=chat_template_kwargs)
    builder = within_model(builder, positions, max_completion_length)
    missing = check_examples(builder, examples) if method.has_teacher else 0
    collector = Collector(
        tokenizer=tokenizer,
        sampler=ModelSampler(),
        sampling=Sampling(max_new_tokens=max_completion_length, eos_token_id=stop_ids(nn.Identity(), tokenizer)),
        rewards=(),
        from_data=method.samples == "dataset",
        max_prompt_length=max_prompt_length,
        chat_template_kwargs=chat_template_kwargs,
        read_elsewhere=columns_of(builder),
    )
    vocabulary = getattr(config, "vocab_size", None)
    reader = SimpleNamespace(max_positions=positions, vocab_size=vocabulary, rotary_switch=None)
    rows = Rows(collector=collector, body=reader, context=builder, on_bad_row="skip", quiet=False)
    usable = rows.usable(examples, "the data")
    step = -(-len(usable) // MOST_MEASURED)
    measured = usable[::step]
    previews = [
        _preview(
            example,
            collector,
            method,
            builder,
            # Functions may take their time, so only for the rows that are shown.
            reward_functions if i < shown else (),
            success=i % 2 == 0 or i >= shown,
        )
        for i, example in enumerate(measured)
    ]
    lengths = tuple(preview.prompt_tokens for preview in previews)
    taught = [preview for preview in previews if preview.teacher_tokens is not None and preview.active]
    remarks = []
    if said := rows.skipped["the data"]:
        remarks.append(
            f"{len(said)} of {len(examples)} rows cannot be used: training stops before its first step, or leaves them "
            f"out with on_bad_row='skip': {'; '.join(said[:NAMED])}"
        )
    if step > 1:
        remarks.append(f"one row in {step} was rendered, {len(measured)} in all")
    if missing:
        fate = "are learned to be answered as the teacher does" if method.anchor else "carry no loss"
        remarks.append(f"{missing} rows have no privileged context and {fate}")
    extra = [(preview.teacher_tokens or 0) - preview.prompt_tokens for preview in taught]
    load = Load(
        prompt_tokens=max(lengths),
        context_tokens=max([0, *extra]),
        completion_tokens=max_completion_length,
        completions=method.num_generations,
        prompts=prompts,
        context_per_completion=method.context == "feedback",
    )
    memory = None
    try:
        memory = compare(config, load, setting or Setting(teacher=method.teacher))
    except UnsupportedModelError as error:
        remarks.append(f"no prediction of memory: {error}")
    return DryRun(
        rows=len(examples),
        prompt_tokens=lengths,
        teacher_tokens=tuple(preview.teacher_tokens or 0 for preview in taught),
        shared_fraction=statistics.fmean(preview.shared_fraction for preview in taught) if taught else None,
        without_context=missing,
        previews=tuple(previews[:shown]),
        load=load,
        memory=memory,
        remarks=tuple(remarks),
    )


def show(run: DryRun, console: Console) -> None:
    """Prints the rows in colours, a table of lengths, a table of memory."""
    legend = Text("colours: ")
    for name, colour in COLOURS.items():
        legend.append(name, style=colour).append("  ")
    console.print(legend)
    for preview in run.previews:
        console.print()
        console.print(_headline(preview))
        console.print(_table_of(preview))
        if preview.reward is not None:
            said = "no feedback" if preview.feedback is None else f"feedback {preview.feedback!r}"
            line = Text(f"reward functions on an empty attempt: reward {preview.reward:g}, {said}", overflow="fold")
            console.print(Padding(line, (0, 2)))
    console.print()
    console.print(_lengths(run))
    if run.shared_fraction is not None:
        console.print(f"shared prefix: on average {100 * run.shared_fraction:.0f} % of the student's prompt")
    for remark in run.remarks:
        console.print(Text(f"note: {remark}", style="yellow"))
    if run.memory is not None:
        load = run.load
        console.print()
        console.print(
            memory_table(
                run.memory,
                f"Predicted peak memory for B={load.prompts} prompts of P={load.prompt_tokens} tokens, "
                f"C={load.context_tokens} more for the teacher, G={load.completions} completions of "
                f"R={load.completion_tokens}",
            )
        )


def _preview(
    example: Example,
    collector: Collector,
    method: Method,
    builder: ContextBuilder,
    reward_functions: Sequence[Callable[..., Any] | str],
    *,
    success: bool,
) -> Preview:
    """Previews the last completion of a group of stand-ins, of which one succeeded or none."""
    student, tokenizer = collector.prompt(example), collector.tokenizer
    end = answer_end(example.prompt, tokenizer)
    answer = _rollout(_answer_of(example), tokenizer, end, reward=method.success_threshold)
    if collector.from_data:
        answer = collector.given(example, student)
    empty = _rollout("", tokenizer, end, reward=-float("inf"), feedback=UNKNOWN_FEEDBACK)
    reward, feedback = None, None
    if reward_functions:
        (judged,) = score([Group(example=example, prompt_ids=student, rollouts=(empty,))], reward_functions)
        reward, feedback = judged.rollouts[0].reward, judged.rollouts[0].feedback
        empty = replace(empty, feedback=feedback)
    rollouts: tuple[Trajectory, ...] = (answer,)
    supposed = ""
    if method.context == "feedback":
        success = method.use_solution and method.num_generations > 1 and (success or not method.use_feedback)
        supposed = "as if another attempt had succeeded" if success else "as if no attempt had succeeded"
        rollouts = (answer, empty) if success else (empty,)
    segments, active = [("prompt", "student", student)], True
    taught: dict[str, int] = {}
    if method.has_teacher:
        conditioned = builder.condition(Group(example=example, prompt_ids=student, rollouts=rollouts), tokenizer)
        teacher, active = conditioned.teacher_prompts[-1], conditioned.active[-1]
        # As in a plan: the teacher's last token is computed under its own past.
        shared = min(common_prefix(student, teacher), len(teacher) - 1)
        after = common_prefix(student[shared:].flip(0), teacher[shared:].flip(0))
        segments = [
            ("shared prefix", "both", student[:shared]),
            ("student only", "student", student[shared : len(student) - after]),
            ("c_ext", "teacher", teacher[shared : len(teacher) - after]),
            ("after c_ext", "both", student[len(student) - after :]),
        ]
        taught = {"teacher_tokens": len(teacher), "shared_tokens": shared}
    ids, read_by = answer.completion_ids, "both" if method.has_teacher else "student"
    skipped = min(method.skip_first_tokens, len(ids)) if active else len(ids)
    segments += [("completion, no loss", read_by, ids[:skipped]), ("completion, loss", read_by, ids[skipped:])]
    return Preview(
        source=example.source,
        segments=tuple(
            Segment(name=name, read_by=reader, tokens=len(part), text=str(tokenizer.decode(part.tolist())))
            for name, reader, part in segments
            if len(part)
        ),
        prompt_tokens=len(student),
        active=active,
        supposed=supposed,
        reward=reward,
        feedback=feedback,
        **taught,
    )


def _answer_of(example: Example) -> str:
    columns = {**example.columns, "privileged_context": example.privileged_context}
    for name in (*ANSWERS, "privileged_context"):
        value = columns.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return UNKNOWN_ANSWER


def _rollout(text: str, tokenizer: Any, end: int | None, *, reward: float, feedback: str | None = None) -> Trajectory:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if end is not None:
        ids = [*ids, end]
    return Trajectory.answer(
        completion_ids=torch.tensor(ids, dtype=torch.int64),
        logprobs=None,
        text=text,
        finished=True,
        reward=reward,
        feedback=feedback,
    )


def _headline(preview: Preview) -> RenderableType:
    line = Text(preview.source or "a row", style="bold")
    line.append(f"  student's prompt {preview.prompt_tokens} tokens", style="not bold")
    if preview.teacher_tokens is not None:
        line.append(f", teacher's {preview.teacher_tokens}; shared prefix {preview.shared_tokens}", style="not bold")
        line.append(f" ({100 * preview.shared_fraction:.0f} % of the student's)", style="not bold")
    if preview.supposed:
        line.append(f"; {preview.supposed}", style="not bold")
    if not preview.active:
        line.append("; nothing privileged to show: no loss", style="red")
    return line


def _table_of(preview: Preview) -> RenderableType:
    table = Table(box=None, padding=(0, 2), show_header=True, header_style="dim")
    for column, justify in (("part", "left"), ("read by", "left"), ("tokens", "right"), ("text", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]  # two of rich's literals
    for segment in preview.segments:
        text = segment.text
        if len(text) > MOST_SHOWN:
            half = MOST_SHOWN // 2
            text = f"{text[:half]} […] {text[-half:]}"
        colour = COLOURS[segment.name]
        table.add_row(Text(segment.name, style=colour), segment.read_by, str(segment.tokens), Text(text, style=colour))
    return table


def _lengths(run: DryRun) -> RenderableType:
    table = Table(title=f"{run.rows} rows", title_justify="left")
    for column in ("tokens", "least", "median", "most"):
        table.add_column(column, justify="left" if column == "tokens" else "right")
    for name, lengths in (("student's prompt", run.prompt_tokens), ("teacher's prompt", run.teacher_tokens)):
        if lengths:
            table.add_row(name, str(min(lengths)), f"{statistics.median(lengths):g}", str(max(lengths)))
    return table
