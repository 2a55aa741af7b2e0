"""A run's progress on one line, in place of transformers' dictionary of some 45 metrics per step.

All metrics are in `metrics.jsonl` and in the services that `report_to` names. Not covered: evaluations, which have no
bar.
"""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

SHOWN: Final = {
    "loss": "loss",
    "self_distillation/reward_mean": "reward",
    "completions/mean_length": "length",
    "eval_reward_mean": "eval reward",
}


class RichProgress(TrainerCallback):
    """A bar for the terminal; where there is none, a line for every tenth of the run."""

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
        self.values |= {SHOWN[name]: value for name, value in (logs or {}).items() if name in SHOWN}
        if self.task is None or "loss" not in (logs or {}):
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self.values.items())
        self.bar.update(self.task, completed=state.global_step, values=shown)
        every = max(1, state.max_steps // 10)
        if not self.console.is_terminal and (state.global_step % every == 0 or state.global_step == 1):
            self.console.print(f"step {state.global_step}/{state.max_steps}  {shown}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()


__all__ = ["RichProgress"]
