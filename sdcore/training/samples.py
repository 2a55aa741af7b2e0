"""Shows a run on the terminal: completions of a step as a table and as rows of samples.jsonl, progress as one line.

    rows = sample_rows(batch, out, tokenizer, limit=4)
    show(rows, step=1)
    trainer.add_callback(RichProgress())       # in place of transformers' dictionary of some 45 metrics per step

Each row has a completion's tokens with the divergence at each of them, 0 where a token carried no loss, and where it
has several turns, at which token each begins. Those that carried a loss come first. All metrics are in `metrics.jsonl`
and in the services that `report_to` names; evaluations have no bar.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import TrainerCallback

from ..contexts.overflow import plain_feedback
from ..prefix.planner import common_prefix
from ..step import StepOutput
from ..types import Example, Trajectory
from .update import Batch

SHOWN_CHARACTERS = 400
SHOWN_METRICS: Final = {
    "loss": "loss",
    "self_distillation/reward_mean": "reward",
    "completions/mean_length": "length",
    "eval_reward_mean": "eval reward",
}


def sample_rows(batch: Batch, out: StepOutput, tokenizer: Any, *, limit: int) -> list[dict[str, Any]]:
    """Returns at most `limit` completions, one of each group first, as `RunLog.samples` writes them."""
    per_token, weights = out.rows.get("per_token"), batch.divergence_weights
    if per_token is not None:
        weights = torch.where(weights != 0, weights, batch.policy_weights)
        per_token = torch.where(weights != 0, per_token / torch.where(weights != 0, weights, 1), 0).cpu()
    slices = batch.plan.rows
    places = [(i, g) for g, group in enumerate(batch.groups) for i in range(len(group.rollouts))]
    taught = dict(zip(places, batch.taught.tolist(), strict=True))
    turns = dict(zip(places, batch.turns, strict=True))
    rows = []
    for i, g in sorted(places, key=lambda place: (not taught[place], place))[:limit]:
        group, rollout = batch.groups[g], batch.groups[g].rollouts[i]
        rows.append(
            {
                "prompt": _question(group.example),
                "privileged_context": group.example.privileged_context
                or _added(group.prompt_ids, batch.conditioned[g].teacher_prompts[i], tokenizer),
                "completion": rollout.transcript(str),
                "tokens": [tokenizer.decode([token]) for token in rollout.completion_ids.tolist()],
                "per_token": _divergences(per_token, slices[g][i].start, rollout, turns[i, g]),
                "reward": rollout.reward,
                "feedback": rollout.feedback,
                "active": taught[i, g],
                "by_teacher": rollout.by_teacher,
            }
            | (_turns(rollout) if len(rollout.turns) > 1 else {})
        )
    return rows


def show(rows: Sequence[dict[str, Any]], step: int, console: Console | None = None) -> None:
    """Prints the rows as a table on the terminal."""
    table = Table(title=f"step {step}", show_lines=True)
    for column in ("prompt", "privileged context", "completion", "reward", "feedback"):
        table.add_column(column)
    for row in rows:
        reward = "" if row["reward"] is None else f"{row['reward']:g}"
        texts = (row["prompt"], row["privileged_context"], row["completion"], reward, row["feedback"])
        # As text, not markup: a completion may have brackets.
        table.add_row(*[_short(text or "") for text in texts])
    (console or Console()).print(table, markup=False)


class RichProgress(TrainerCallback):
    """Draws a bar on the terminal; where there is none, prints a line for every tenth of the run."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console()
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )
        self.console = console
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.values: dict[str, float] = {}
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar.start()
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, values="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.values |= {SHOWN_METRICS[name]: value for name, value in (logs or {}).items() if name in SHOWN_METRICS}
        if self.task is None or "loss" not in (logs or {}):
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        self.bar.update(self.task, completed=state.global_step, values=shown)
        every = max(1, state.max_steps // 10)
        if not self.console.is_terminal and (state.global_step % every == 0 or state.global_step == 1):
            self.console.print(f"step {state.global_step}/{state.max_steps}  {shown}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()


def _divergences(per_token: Tensor | None, start: int, rollout: Trajectory, rows: Sequence[int]) -> list[float]:
    """Returns the divergence at each token of a trajectory, whose turns have rows where they carried a loss."""
    values: list[float] = []
    own = iter(rows)
    for turn in rollout.turns:
        count = next(own) if turn.is_own else 0
        values += [0.0] * len(turn.ids) if per_token is None or not count else per_token[start : start + count].tolist()
        start += count
    return values


def _turns(rollout: Trajectory) -> dict[str, Any]:
    """Says of each turn whose it is, the token at which it begins, and its text as its tokens have it."""
    starts = accumulate((len(turn.ids) for turn in rollout.turns), initial=0)
    turns = [
        {"start": start, "own": turn.is_own, "text": turn.raw_text or turn.text}
        for start, turn in zip(starts, rollout.turns, strict=False)
    ]
    return {"turns": turns, "feedback": plain_feedback(rollout.feedback)}


def _question(example: Example) -> str:
    if isinstance(example.prompt, str):
        return example.prompt
    turns = [(message["role"], message["content"]) for message in example.prompt]
    if len(turns) == 1 and isinstance(turns[0][1], str):
        return turns[0][1]
    return "\n".join(f"{role}: {content}" for role, content in turns)


def _added(student: Tensor, teacher: Tensor, tokenizer: Any) -> str | None:
    """Returns what the teacher's prompt has beyond the student's: between what both begin and what both end with."""
    if torch.equal(student, teacher):
        return None
    start = common_prefix(student, teacher)
    end = common_prefix(student[start:].flip(0), teacher[start:].flip(0))
    return str(tokenizer.decode(teacher[start : len(teacher) - end].tolist())).strip()


def _short(text: str) -> str:
    safe = text.replace("[", "\\[")
    return safe if len(safe) <= SHOWN_CHARACTERS else safe[: SHOWN_CHARACTERS - 1] + "…"
