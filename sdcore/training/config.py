"""Defines the arguments of `SelfDistillationTrainer`: transformers' `TrainingArguments`, and what sampling needs.

    args = SelfDistillationConfig(output_dir="out", max_completion_length=512, learning_rate=1e-5, max_steps=200)

What a method is (teacher, context, divergence, group size) is not here but in a `Method`; here is how it is run.

What differs from the obvious: `per_device_train_batch_size` counts prompts, each with `method.num_generations`
completions. Some defaults are others than transformers': every step is logged and nothing is reported to services,
columns are kept for the reward functions, bfloat16 is used on a GPU that has it, and data-parallel training looks for
no unused parameters, since all are used. Fields have a `help` in their metadata, for command lines.

Not covered: DeepSpeed and FSDP1, which the trainer refuses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, get_args

import torch
from transformers import TrainingArguments

from ..errors import ArgumentError
from ..prefix.choice import Strategy
from ..prefix.verification import Verify
from ..rollouts.rewards import OnError

PROBES: Final = ("leak_probe_every", "overlap_probe_every", "drift_probe_every")


@dataclass
class SelfDistillationConfig(TrainingArguments):
    """Says how a method is run. Raises `ArgumentError`, which names the argument, beside what transformers raises."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs"]

    # Other defaults than transformers'.
    learning_rate: float = field(
        default=1e-5, metadata={"help": "The initial learning rate. 1e-5 to 5e-5 is usual; LoRA stands ten times more."}
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "How often to go through the data; max_steps overrides it."}
    )
    logging_steps: float = field(
        default=1, metadata={"help": "Log every so many optimizer steps; metrics.jsonl gets the same lines."}
    )
    report_to: str | list[str] | None = field(
        default="none", metadata={"help": "Services that get the metrics too, such as wandb; or all."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Stays False: columns are for the reward functions."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 autocast. None: on a GPU that has it, unless fp16 is on."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Stays False: every trained parameter has a gradient."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are NaN from the log."})
    data_seed: int | None = field(default=None, metadata={"help": "Of the order of the data. None: seed."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Examples are text: there is nothing to pin."})

    # Models given by name.
    model_dtype: str = field(
        default="float32",
        metadata={"help": "Of a model that is given by name: float32, bfloat16, or auto, the file's."},
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "The GGUF file of a model that is given by name; converted once, beside it."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that a model given by name brings along. It can do anything."}
    )

    # Prompts and completions.
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Refuse prompts of more tokens. None: what the model can read."}
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Tokens of a completion, at most; longer ones are cut, and counted."}
    )
    sampling_temperature: float = field(default=1.0, metadata={"help": "Of sampling; 0 takes the likeliest token."})
    top_p: float = field(
        default=1.0,
        metadata={"help": "Sample from the likeliest tokens that together have this probability. 1: from all."},
    )
    top_k: int | None = field(default=None, metadata={"help": "Sample from so many likeliest tokens. None: from all."})
    stop_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Ids that end a completion. None: the tokenizer's and the model's."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'For the chat template, as {"enable_thinking": false}'}
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Completions that were cut carry no loss."}
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Prompts sampled at a time: bounds the memory. None: a whole batch."}
    )
    num_iterations: int = field(
        default=1, metadata={"help": "Optimizer steps for which completions are used before new ones are sampled."}
    )

    # Rewards.
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One per reward function. None: all 1."})
    reward_timeout: float | None = field(
        default=60.0, metadata={"help": "Seconds for each call of a reward function. None: no limit."}
    )
    reward_on_error: str = field(
        default="raise", metadata={"help": "A reward that fails, hangs or is NaN: raise, or drop the completion."}
    )
    reward_workers: int = field(
        default=1,
        metadata={"help": "Calls of sync reward functions at the same time: more need a thread-safe function."},
    )

    # The passes.
    micro_batch: int | None = field(
        default=None, metadata={"help": "Completions in flight at a time: bounds the memory. None: all, if they fit."}
    )
    strategy: str = field(
        default="auto", metadata={"help": "How prefixes are shared: auto, packed, cached, two_phase or naive."}
    )
    verify: str = field(
        default="once",
        metadata={"help": "Compare the strategy with the naive one: once per kind of model, always, or off."},
    )
    teacher_device: str | None = field(
        default=None, metadata={"help": "Where a teacher's own weights are kept, such as cpu. None: the student's."}
    )

    # Evaluation and logs.
    eval_generations: int = field(default=1, metadata={"help": "Completions per question of the evaluation."})
    eval_temperature: float | None = field(
        default=None, metadata={"help": "Of the evaluation's sampling. None: sampling_temperature."}
    )
    eval_seed: int | None = field(
        default=None, metadata={"help": "Of the evaluation's sampling, the same each time. None: seed."}
    )
    log_completions_every: int = field(
        default=10, metadata={"help": "Write samples.jsonl every so many steps, the first one too. 0: never."}
    )
    num_completions_shown: int = field(default=4, metadata={"help": "Completions written then."})
    print_completions: bool = field(default=False, metadata={"help": "Show them as a table on the terminal, too."})
    leak_probe_every: int = field(
        default=50, metadata={"help": "Every so many steps, measure what another row's context teaches. 0: never."}
    )
    overlap_probe_every: int = field(
        default=50, metadata={"help": "Every so many steps, measure how student's and teacher's top tokens overlap."}
    )
    drift_probe_every: int = field(
        default=0,
        metadata={"help": "Every so many steps, measure the distance from the start; may keep a copy of the weights."},
    )

    def __post_init__(self) -> None:
        self._check()
        if self.bf16 is None:
            has_it = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            self.bf16 = has_it and not self.fp16 and not self.use_cpu
        # The order of the data is a function of the seed, not of the global generator's state.
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        super().__post_init__()
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ArgumentError(f"chat_template_kwargs must be an object, got {self.chat_template_kwargs!r}")

    def _check(self) -> None:
        counts = ("max_prompt_length", "max_completion_length", "top_k", "generation_batch_size", "num_iterations")
        for name in (*counts, "reward_workers", "micro_batch", "eval_generations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}")
        for name in ("log_completions_every", "num_completions_shown", *PROBES):
            if getattr(self, name) < 0:
                raise ArgumentError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("sampling_temperature", "eval_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ArgumentError(f"{name} must be at least 0 and finite, got {value}")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.reward_timeout is not None and not 0 < self.reward_timeout < math.inf:
            raise ArgumentError(f"reward_timeout must be positive seconds or None, got {self.reward_timeout}")
        choices = {"strategy": Strategy, "verify": Verify, "reward_on_error": OnError}
        allowed = {name: get_args(kind) for name, kind in choices.items()}
        for name, options in (allowed | {"model_dtype": ("float32", "bfloat16", "auto")}).items():
            if getattr(self, name) not in options:
                raise ArgumentError(f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}")
        if self.remove_unused_columns:
            raise ArgumentError("remove_unused_columns must be False: rows are examples, not a model's inputs")
        if self.ddp_find_unused_parameters:
            raise ArgumentError("ddp_find_unused_parameters must be False: all are used")

    def evaluation_options(self) -> dict[str, Any]:
        """Returns what `evaluate` is asked for in a run."""
        return {
            "num_generations": self.eval_generations,
            "max_completion_length": self.max_completion_length,
            "seed": self.seed if self.eval_seed is None else self.eval_seed,
            "batch_size": self.per_device_eval_batch_size,
            "temperature": self.sampling_temperature if self.eval_temperature is None else self.eval_temperature,
            "top_p": None if self.top_p == 1 else self.top_p,
            "top_k": self.top_k,
            "chat_template_kwargs": self.chat_template_kwargs,
            "timeout": self.reward_timeout,
            "on_error": self.reward_on_error,
            "workers": self.reward_workers,
            "rank": self.process_index,
            "world_size": self.world_size,
        }
