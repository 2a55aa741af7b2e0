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
that the rows do not have, is found here. Where others answer, a stand-in has turns (`previews`).

Not covered: whether the model's shared passes are right (the first step checks), lengths that the student will sample
and, but for the rows that are shown, what an environment adds to prompts.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import nn

from ..contexts import ContextBuilder, check_examples
from ..contexts.teacher_prompts import columns_of
from ..errors import ArgumentError, DataError, UnsupportedModelError
from ..memory import Load, Prediction, Setting, compare, memory_table
from ..presets.method import Method
from ..rollouts.environments import Agent
from ..rollouts.samplers import stop_ids
from ..types import Example
from .collect import Collector, kwargs_of
from .config import SelfDistillationConfig
from .prepare import check_template_kwargs, check_tools, within_model
from .previews import COLOURS, TURNS, Preview, preview
from .rows import NAMED, Rows

# Rows that are rendered for the lengths.
MOST_MEASURED: Final = 2_000
# Characters of a segment that are shown; of more, the beginning and the end.
MOST_SHOWN: Final = 1_200


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
    agent: Agent | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int = 256,
    prompts: int = 1,
    setting: Setting | None = None,
    shown: int = 2,
) -> DryRun:
    """Renders, counts and predicts. `config` is the model's Hugging Face configuration; no weights are read.

    `builder` None is the method's own. `agent` answers the student, for the rows that are shown. `prompts` is how many
    groups a device holds at a time. Raises `DataError`, `ContextError`, `RewardError`, `EpisodeError` or
    `ArgumentError` for what training would stumble over.
    """
    if not examples:
        raise DataError("no rows: there is nothing to learn from")
    if method.needs_rewards and not (reward_functions or (agent is not None and agent.environment_factory)):
        raise ArgumentError("reward functions must be given: the method learns from judged completions, got none")
    check_template_kwargs(tokenizer, chat_template_kwargs)
    check_tools(tokenizer, agent)
    chat_template_kwargs = kwargs_of(chat_template_kwargs, agent)
    positions = getattr(config, "max_position_embeddings", None)
    builder = builder or method.build_context(chat_template_kwargs=chat_template_kwargs)
    builder = within_model(builder, positions, max_completion_length)
    missing = check_examples(builder, examples) if method.has_teacher else 0
    collector = Collector(
        tokenizer=tokenizer,
        stop_ids=stop_ids(nn.Identity(), tokenizer),
        max_completion_length=max_completion_length,
        from_data=method.samples == "dataset",
        max_prompt_length=max_prompt_length,
        chat_template_kwargs=chat_template_kwargs,
        read_elsewhere=columns_of(builder),
        agent=agent,
    )
    vocabulary = getattr(config, "vocab_size", None)
    reader = SimpleNamespace(max_positions=positions, vocab_size=vocabulary, rotary_switch=None)
    rows = Rows(collector=collector, body=reader, context=builder, on_bad_row="skip", quiet=False)
    usable = rows.usable(examples, "the data")
    step = -(-len(usable) // MOST_MEASURED)
    measured = usable[::step]
    previews = [
        preview(
            example,
            # Others may take their time, so only for the rows that are shown.
            collector if i < shown else replace(collector, agent=None),
            method,
            builder,
            reward_functions if i < shown else (),
            success=i % 2 == 0 or i >= shown,
        )
        for i, example in enumerate(measured)
    ]
    lengths = tuple(row.prompt_tokens for row in previews)
    taught = [row for row in previews if row.teacher_tokens is not None and row.active]
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
    extra = [(row.teacher_tokens or 0) - row.prompt_tokens for row in taught]
    behind = max_completion_length
    if agent is not None:
        behind = agent.max_tokens or min(agent.max_turns * behind, (positions or sys.maxsize) - max(lengths))
        remarks.append(
            f"memory is that of {behind} tokens behind the prompt, the most there may be, as if all were the student's"
        )
    load = Load(
        prompt_tokens=max(lengths),
        context_tokens=max([0, *extra]),
        completion_tokens=behind,
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
        teacher_tokens=tuple(row.teacher_tokens or 0 for row in taught),
        shared_fraction=statistics.fmean(row.shared_fraction for row in taught) if taught else None,
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
    for row in run.previews:
        console.print()
        console.print(_headline(row))
        console.print(_table_of(row))
        lines = [f"the environment's reset says {row.opening!r}"] if row.opening else []
        lines += [f"a stand-in of at most {TURNS} turns: {row.ended}"] if row.ended else []
        if row.reward is not None:
            said = "no feedback" if row.feedback is None else f"feedback {row.feedback!r}"
            lines.append(f"reward functions on an empty attempt: reward {row.reward:g}, {said}")
        for line in lines:
            console.print(Padding(Text(line, overflow="fold"), (0, 2)))
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


def _headline(row: Preview) -> RenderableType:
    line = Text(row.source or "a row", style="bold")
    line.append(f"  student's prompt {row.prompt_tokens} tokens", style="not bold")
    if row.teacher_tokens is not None:
        line.append(f", teacher's {row.teacher_tokens}; shared prefix {row.shared_tokens}", style="not bold")
        line.append(f" ({100 * row.shared_fraction:.0f} % of the student's)", style="not bold")
    if row.supposed:
        line.append(f"; {row.supposed}", style="not bold")
    if not row.active:
        line.append("; nothing privileged to show: no loss", style="red")
    return line


def _table_of(row: Preview) -> RenderableType:
    table = Table(box=None, padding=(0, 2), show_header=True, header_style="dim")
    for column, justify in (("part", "left"), ("read by", "left"), ("tokens", "right"), ("text", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]  # two of rich's literals
    for segment in row.segments:
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
