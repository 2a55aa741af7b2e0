"""Defines the arguments of `SelfDistillationTrainer`: transformers' `TrainingArguments`, and what sampling needs.

    args = SelfDistillationConfig(output_dir="out", max_completion_length=512, learning_rate=1e-5, max_steps=200)

What a method is (teacher, context, divergence, group size) is not here but in a `Method`; here is how it is run.

What differs from the obvious: `per_device_train_batch_size` counts prompts, each with `method.num_generations`
completions. Some defaults are others than transformers': every step is logged and nothing is reported to services,
columns are kept for the reward functions, bfloat16 is used on a GPU that has it, and data-parallel training looks for
no unused parameters, since all are used. What would have no effect is refused: arguments that only transformers' loop
and evaluation read, and those that the others leave without use. Fields have a `help` in their metadata.

Not covered: DeepSpeed and FSDP1, which the trainer refuses.
"""

from __future__ import annotations

import math
import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..contexts.conversation import History
from ..errors import ArgumentError, require_positive
from ..prefix.choice import Strategy
from ..prefix.verification import Verify
from ..rollouts.rewards import OnError

OnBadRow: TypeAlias = Literal["raise", "skip"]
TURNS: Final = ("max_turns", "max_trajectory_length", "max_trajectory_seconds", "history")  # of a run with an agent
PROBES: Final = ("leak_probe_every", "overlap_probe_every", "drift_probe_every")

_EVALUATION: Final = "an evaluation samples answers and judges them"
# What transformers' own loop or evaluation reads and this trainer's does not, and what there is in its place.
WITHOUT_EFFECT: Final = {
    "auto_find_batch_size": "micro_batch and generation_batch_size bound the memory and leave the step what it is",
    "average_tokens_across_devices": "losses are divided by sums over all ranks",
    "batch_eval_metrics": _EVALUATION,
    "bf16_full_eval": "an evaluation samples with the model as it is trained (model_dtype, bf16)",
    "ddp_find_unused_parameters": "all are used",
    "ddp_static_graph": "every step uses all parameters (and gradients that are accumulated would not be reduced)",
    "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "fp16_full_eval": "an evaluation samples with the model as it is trained (model_dtype, fp16)",
    "include_for_metrics": _EVALUATION,
    "label_names": "rows are examples, without labels",
    "label_smoothing_factor": "the loss is the method's, without labels",
    "length_column_name": "rows are not grouped by length",
    "neftune_noise_alpha": "no noise is added to what student and teacher read",
    "parallelism_config": "processes share the data, by DistributedDataParallel or FSDP2",
    "prediction_loss_only": _EVALUATION,
    "remove_unused_columns": "rows are examples, not a model's inputs",
    "torch_empty_cache_steps": "PYTORCH_ALLOC_CONF=expandable_segments:True keeps free memory in one piece",
    "use_cache": "strategy says what is cached",
}


def _arg(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SelfDistillationConfig(TrainingArguments):
    """Says how a method is run. Raises `ArgumentError`, which names the argument, beside what transformers raises."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs"]

    # Other defaults than transformers'.
    learning_rate: float = _arg(1e-5, "The initial learning rate. 1e-5 to 5e-5 is usual; LoRA stands ten times more.")
    num_train_epochs: float = _arg(1.0, "How often to go through the data; max_steps overrides it.")
    logging_steps: float = _arg(1, "Log every so many optimizer steps; metrics.jsonl gets the same lines.")
    report_to: str | list[str] | None = _arg("none", "Services that get the metrics too, such as wandb; or all.")
    remove_unused_columns: bool | None = _arg(False, "Stays False: columns are for the reward functions.")
    bf16: bool | None = _arg(None, "bfloat16 autocast. None: on a GPU that has it, unless fp16 is on.")
    ddp_find_unused_parameters: bool | None = _arg(False, "Stays False: every trained parameter has a gradient.")
    logging_nan_inf_filter: bool = _arg(False, "Hide losses that are NaN from the log.")
    data_seed: int | None = _arg(None, "Of the order of the data. None: seed.")
    dataloader_pin_memory: bool = _arg(False, "Examples are text: there is nothing to pin.")

    # Models given by name.
    model_dtype: str = _arg("float32", "Of a model that is given by name: float32, bfloat16, or auto, the file's.")
    gguf_file: str | None = _arg(None, "The GGUF file of a model that is given by name; converted once, beside it.")
    trust_remote_code: bool = _arg(False, "Run code that a model given by name brings along. It can do anything.")

    # Prompts and completions.
    on_bad_row: str = _arg(
        "raise", "A row that cannot be rendered, or is too long for the model: raise, or skip and count it."
    )
    max_prompt_length: int | None = _arg(None, "Refuse prompts of more tokens. None: what the model can read.")
    max_completion_length: int = _arg(256, "Tokens of a completion, at most; longer ones are cut, and counted.")
    sampling_temperature: float = _arg(1.0, "Of sampling; 0 takes the likeliest token.")
    top_p: float = _arg(1.0, "Sample from the likeliest tokens that together have this probability. 1: from all.")
    top_k: int | None = _arg(None, "Sample from so many likeliest tokens. None: from all.")
    stop_token_ids: list[int] | None = _arg(None, "Ids that end a completion. None: the tokenizer's and the model's.")
    chat_template_kwargs: dict[str, Any] | str | None = _arg(
        None, 'For the chat template, as {"enable_thinking": false}'
    )
    mask_truncated_completions: bool = _arg(False, "Completions that were cut carry no loss.")
    generation_batch_size: int | None = _arg(None, "Prompts sampled at a time: bounds the memory. None: a whole batch.")
    num_iterations: int = _arg(1, "Optimizer steps for which completions are used before new ones are sampled.")

    # Turns, where there are tools or an environment.
    max_turns: int = _arg(8, "Turns of the student in a trajectory.")
    max_trajectory_length: int | None = _arg(
        None, "Tokens behind the prompt, of all sides. None: what the model can read."
    )
    max_trajectory_seconds: float | None = _arg(
        None, "Seconds for the trajectories of a batch; then no turn begins. None: no limit."
    )
    history: str = _arg(
        "as_sampled", "Refuse a chat template that rewrites earlier turns; as_rendered: learn what it makes of them."
    )

    # Rewards; the limit of time and what becomes of errors are those of tools and environments too.
    reward_weights: list[float] | None = _arg(None, "One per reward function. None: all 1.")
    reward_timeout: float | None = _arg(60.0, "Seconds for each call of a reward function. None: no limit.")
    reward_on_error: str = _arg("raise", "A reward that fails, hangs or is NaN: raise, or drop the completion.")
    reward_workers: int = _arg(1, "Calls of sync reward functions at the same time: more need a thread-safe function.")

    # The passes.
    micro_batch: int | None = _arg(None, "Completions in flight at a time: bounds the memory. None: all, if they fit.")
    max_pass_tokens: int | None = _arg(
        None, "Tokens in flight at a time, of whole groups or conversations: bounds the memory. None: all."
    )
    strategy: str = _arg("auto", "How prefixes are shared: auto, packed, cached, two_phase or naive.")
    verify: str = _arg("once", "Compare the strategy with the naive one: once per kind of model, always, or off.")
    teacher_device: str | None = _arg(None, "Where a teacher's own weights are kept, such as cpu. None: the student's.")

    # Evaluation and logs.
    eval_generations: int = _arg(1, "Completions per question of the evaluation.")
    eval_temperature: float | None = _arg(None, "Of the evaluation's sampling. None: sampling_temperature.")
    eval_seed: int | None = _arg(None, "Of the evaluation's sampling, the same each time. None: seed.")
    log_completions_every: int = _arg(10, "Write samples.jsonl every so many steps, the first one too. 0: never.")
    num_completions_shown: int = _arg(4, "Completions written then.")
    print_completions: bool = _arg(False, "Show them as a table on the terminal, too.")
    leak_probe_every: int = _arg(50, "Every so many steps, measure what another row's context teaches. 0: never.")
    overlap_probe_every: int = _arg(50, "Every so many steps, measure how student's and teacher's top tokens overlap.")
    drift_probe_every: int = _arg(
        0, "Every so many steps, measure the distance from the start; may keep a copy of the weights."
    )

    def __post_init__(self) -> None:
        self._check()
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # it is what will be used, and transformers wants to be told so
        if self.bf16 is None:
            has_it = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            self.bf16 = has_it and not self.fp16 and not self.use_cpu
        # The order of the data is a function of the seed, not of the global generator's state.
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        super().__post_init__()
        self._check_engine()
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ArgumentError(f"chat_template_kwargs must be an object, got {self.chat_template_kwargs!r}")

    def _check(self) -> None:
        lengths = ("max_prompt_length", "max_completion_length", "max_trajectory_length", "max_turns")
        counts = ("top_k", "generation_batch_size", "num_iterations", "reward_workers", "eval_generations")
        passes = ("micro_batch", "max_pass_tokens")
        require_positive(**{name: getattr(self, name) for name in (*lengths, *counts, *passes)})
        for name in ("log_completions_every", "num_completions_shown", *PROBES):
            if getattr(self, name) < 0:
                raise ArgumentError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("sampling_temperature", "eval_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ArgumentError(f"{name} must be at least 0 and finite, got {value}")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p must be in (0, 1], got {self.top_p}")
        for name in ("reward_timeout", "max_trajectory_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ArgumentError(f"{name} must be positive seconds or None, got {value}")
        choices: dict[str, Any] = {"strategy": Strategy, "verify": Verify, "history": History}
        choices |= {"reward_on_error": OnError, "on_bad_row": OnBadRow}
        allowed = {name: get_args(kind) for name, kind in choices.items()}
        for name, options in (allowed | {"model_dtype": ("float32", "bfloat16", "auto")}).items():
            if getattr(self, name) not in options:
                raise ArgumentError(f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}")
        for known in fields(self):
            default = known.default if known.default_factory is MISSING else known.default_factory()
            value = getattr(self, known.name)
            if known.name in WITHOUT_EFFECT and value != default:
                why = WITHOUT_EFFECT[known.name]
                raise ArgumentError(f"{known.name} must be {default!r}, got {value!r}: it has no effect here, as {why}")
        if self.max_pass_tokens is not None and (self.micro_batch is not None or self.strategy == "two_phase"):
            raise ArgumentError(
                f"max_pass_tokens must be None with micro_batch and strategy='two_phase', got {self.max_pass_tokens}"
            )
        if self.strategy == "naive" and self.verify == "always":
            raise ArgumentError("verify must not be 'always' with strategy='naive', which is what others are held to")
        if self.print_completions and not (self.log_completions_every and self.num_completions_shown):
            raise ArgumentError(
                "print_completions must be False where none are shown, got True with log_completions_every="
                f"{self.log_completions_every} and num_completions_shown={self.num_completions_shown}"
            )
        is_cut = self.top_p < 1 or self.top_k is not None
        if is_cut and self.sampling_temperature == 0 and not self.eval_temperature:
            raise ArgumentError(
                "top_p must be 1 and top_k None with sampling_temperature=0, which takes the likeliest token, got "
                f"{self.top_p} and {self.top_k}"
            )
        if self.ignore_data_skip and self.num_iterations > 1:
            raise ArgumentError(
                f"ignore_data_skip must be False with num_iterations={self.num_iterations}: completions are used again "
                "with the rows that they were sampled for"
            )

    def _check_engine(self) -> None:
        """Refuses what accelerate and the optimizers would do otherwise than asked, once transformers has read it."""
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked > 1 and self.world_size == 1:
            raise ArgumentError(
                f"WORLD_SIZE must be 1 for a run on one process, got {asked}, of which accelerate makes {asked} runs "
                "that do not know of each other: on a machine without GPUs several processes need use_cpu=True"
            )
        if self.accelerator_config != AcceleratorConfig():
            raise ArgumentError(
                "accelerator_config must be left out, as batches are examples that this trainer shares out itself "
                f"(gradient_accumulation_steps is an argument), got {self.accelerator_config}"
            )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if "lomo" in optimizer or "layerwise" in optimizer:
            raise ArgumentError(
                f"optim must be an optimizer that steps after the last backward of a step, got {optimizer!r}, which "
                "steps within each"
            )

    def pass_options(self) -> dict[str, Any]:
        """Returns how the passes of a step are run."""
        own = {name: getattr(self, name) for name in ("micro_batch", "strategy", "verify")}
        return own | {"max_tokens": self.max_pass_tokens}

    def evaluation_options(self) -> dict[str, Any]:
        """Returns what `evaluate` is asked for in a run."""
        return {
            "num_generations": self.eval_generations,
            "max_completion_length": self.max_completion_length,
            "seed": self.seed if self.eval_seed is None else self.eval_seed,
            "batch_size": self.per_device_eval_batch_size,
            "temperature": self.sampling_temperature if self.eval_temperature is None else self.eval_temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop_token_ids": self.stop_token_ids,
            "chat_template_kwargs": self.chat_template_kwargs,
            "timeout": self.reward_timeout,
            "on_error": self.reward_on_error,
            "workers": self.reward_workers,
            "on_bad_row": self.on_bad_row,
            "rank": self.process_index,
            "world_size": self.world_size,
        }
