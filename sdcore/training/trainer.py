"""Trains by self-distillation in `transformers.Trainer`'s loop: rollouts, rewards, teacher and divergence.

    trainer = SelfDistillationTrainer(
        "Qwen/Qwen3-0.6B",
        SelfDistillationConfig(output_dir="out", max_completion_length=512),
        method=SDPO(),
        train_dataset="train.jsonl",
        reward_funcs=["rewards.py:exact"],
    )
    trainer.train()

The arrow of an optimizer step is in two methods, which are what is overridden of Trainer's loop:

    get_batch_samples   examples → prompt ids → sampler → rewards → context → plan and weights, for the whole step
    training_step       one batch of it → distill_step (or another, by `method.target`) → metrics

What differs from the obvious: all completions of a step, over its accumulation, are there before anything goes
backward, because their losses are divided by a sum over all of them on all ranks; so any split into batches,
accumulation and ranks gives the same loss. Seeds are made of `args.seed`, the step and the batch's number in it, and no
global generator is used, so a run that was killed and resumed gives the same numbers. The completions that
`num_iterations` steps share are kept in the checkpoint, as is the teacher's state.

Not covered: DeepSpeed and FSDP1 (refused by name), data without a length, and LOMO optimizers.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import speed_metrics

from sdkernels.types import float64_device

from ..contexts import ContextBuilder, check_examples
from ..diagnostics import RunLog
from ..errors import ArgumentError
from ..models import find_body, head_of
from ..presets.method import Method
from ..rollouts.rewards import RewardFunction, check_columns, prepare
from ..rollouts.samplers import FollowsWeights, ModelSampler, Sampler, seed_of, stop_ids
from ..rollouts.window import WindowOrder
from ..step import StepOutput
from ..teachers import Teacher, TrustRegion
from ..types import Example, Group
from .checkpoints import DESCRIBED, OwnState, describe_run, is_in, saving_whole, start_of, writing
from .collect import Collector, kwargs_of
from .config import SelfDistillationConfig
from .evaluation import evaluate
from .prepare import agent_of, args_of, built, check, check_engine, examples_of, loaded, of_each, within_model
from .rows import Rows
from .samples import RichProgress, sample_rows, show
from .update import Batch, Normalizers, require_finite, update
from .watch import Hooks, Tally, Watch, due, origin_of

Data = Any  # what `read_examples` takes, or a list of Example


class SelfDistillationTrainer(Trainer):
    """Trains a causal language model by a `Method`.

    Args:
        model: a transformers model or its name; with `peft_config` an adapter is put on it.
        args: None for the defaults.
        method: what is learned from whom, such as `SDPO()`.
        train_dataset: what `sdcore.data.read_examples` reads, or a list of `Example`.
        eval_dataset: the same, or a dict of several; `evaluate` samples answers and judges them.
        processing_class: the tokenizer; None: that of the model's name.
        reward_funcs: functions, or "module:function"; see `rollouts.rewards`.
        tools, environment_factory: who answers the student, or names as above; see `rollouts.environments`.
        sampler: who draws completions; None: the model itself.
        teacher, reference: None for the method's own; a module is the frozen one.
        context: None for the method's own builder.
        callbacks, optimizers: as in transformers.

    Raises `ArgumentError`, `DataError` and `UnsupportedModelError` before any step.
    """

    control: Any  # transformers'

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: SelfDistillationConfig | None = None,
        *,
        method: Method,
        train_dataset: Data = None,
        eval_dataset: Data = None,
        processing_class: Any = None,
        reward_funcs: Sequence[RewardFunction | str] = (),
        tools: Sequence[Callable[..., Any] | str] = (),
        environment_factory: Callable[[], Any] | str | None = None,
        sampler: Sampler | None = None,
        teacher: Teacher | TrustRegion | nn.Module | None = None,
        reference: Teacher | nn.Module | None = None,
        context: ContextBuilder | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        given = {"teacher": teacher, "reference": reference, "sampler": sampler, "context": context}
        args = args_of(args, method, **given, processing_class=processing_class, peft_config=peft_config)
        self.method = method
        self.rewards = prepare(reward_funcs, args.reward_weights)
        self.sampler: Sampler = sampler or ModelSampler(prompts_at_a_time=args.generation_batch_size)
        self.agent = agent = agent_of(args, tools, environment_factory)
        self.context = context or method.build_context(chat_template_kwargs=kwargs_of(args.chat_template_kwargs, agent))
        skipped: dict[str, list[str]] | None = {} if args.on_bad_row == "skip" else None
        self._read: Any = partial(examples_of, skipped=skipped)
        train_examples = self._read(train_dataset, "train_dataset")
        eval_examples = of_each(eval_dataset, self._read, "eval_dataset")
        check(args, method, self.rewards, self.sampler, agent)
        check_examples(self.context, train_examples or [])
        if skipped is None:
            check_columns(self.rewards, train_examples, eval_examples)
        model, processing_class = loaded(model, processing_class, args, peft_config, agent)
        head_of(model)  # refuses a model whose logits are not its states times a matrix, before any work
        self.context = within_model(self.context, find_body(model).max_positions, args.max_completion_length)
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=train_examples,
            eval_dataset=eval_examples,
            processing_class=processing_class,
            callbacks=[Hooks(self), *(callbacks or [])],
            optimizers=optimizers,
        )
        check_engine(self.accelerator.state)
        for printing in (ProgressCallback, PrinterCallback):  # each prints all metrics of every step
            self.remove_callback(printing)
        if not args.disable_tqdm:
            self.add_callback(RichProgress())
        self._stop_ids = args.stop_token_ids or stop_ids(self.model, processing_class)
        self.rows = Rows.of_run(args, self.collector, self.model, self.context, skipped)
        self.train_dataset: Any = train_examples and self.rows.usable(train_examples, "train_dataset")
        self.eval_dataset = of_each(eval_examples, self.rows.of_evaluation().usable, "eval_dataset")
        self.teacher: Any = built(teacher, method.has_teacher, method.build_teacher, self.model, args)
        self.collector.check(self.teacher, self.context, self.accelerator.state)
        self.reference: Any = built(reference, method.needs_reference, method.build_reference, self.model, args)
        self.watch = Watch(
            method=method,
            args=args,
            tokenizer=processing_class,
            context=self.rows,
            teacher=self.teacher,
            origin=origin_of(self.model, args, self.teacher, self.reference),
        )
        self._own = OwnState.of(args, teacher=self.teacher, reference=self.reference, origin=self.watch.origin)
        self._tally = Tally()
        self._window: list[list[Group]] = []  # the completions in use
        self._seen = {"samples": 0, "tokens": 0}  # completions and their tokens, of all ranks
        self._log_file: RunLog | None = None
        self._early: list[dict[str, float]] = []  # measured before train()
        self._resumed: Path | None = None
        self._run: dict[str, Any] = {}  # what decides its losses
        self.order: WindowOrder | None = None

    # The arrow: examples → groups → batches → gradients.

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Normalizers | None]:
        """Returns an optimizer step's batches, sampled, judged and planned, and what their losses are divided by."""
        examples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not examples:
            return [], None
        if self.state.global_step % self.args.num_iterations == 0:
            self._window = self._collected(examples)
        else:
            self._window = self._window or self._own.window(cast(Path, self._resumed), examples, self.collector.prompt)
        args, tokenizer = self.args, self.processing_class
        options: Any = {"norm_length": args.max_completion_length, "mask_truncated": args.mask_truncated_completions}
        options |= {"device": args.device, "must_be_judged": bool(self.rewards)}
        conditioned = [[self.rows.condition(group, tokenizer) for group in groups] for groups in self._window]
        pairs = zip(self._window, conditioned, strict=True)
        batches = [Batch.of(groups, seen, self.method, **options) for groups, seen in pairs]
        return batches, self._over_ranks(batches)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Normalizers | None = None) -> Tensor:
        """Computes the gradients of one batch; returns its part of the step's loss."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        if self._is_first(inputs):
            self._tally.add(self.watch.probes(model, inputs, self.state.global_step))
        with self.compute_loss_context_manager():
            out = update(
                model,
                inputs,
                self.method,
                normalizers=num_items_in_batch,
                teacher=self.teacher,
                reference=self.reference,
                # The log-probabilities of who sampled are needed: another engine, or an older student.
                off_policy=self.args.num_iterations > 1 or not isinstance(self.sampler, ModelSampler),
                sampling_temperature=self.args.sampling_temperature,
                backward=self.accelerator.backward,
                **self.args.pass_options(),
            )
        self._observe(inputs, out)
        return out.loss.to(self.args.device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Stops before a gradient that is no number spoils all weights; a loss scale leaves out such steps itself."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:
            require_finite(norm, self.state.global_step + 1)
        return norm

    @property
    def collector(self) -> Collector:
        """Samples and judges by the arguments as they are now: a callback may have changed the temperature."""
        parts = {"tokenizer": self.processing_class, "sampler": self.sampler, "rewards": self.rewards}
        return Collector.of_run(self.args, self.method, self.context, self.agent, stop_ids=self._stop_ids, **parts)

    def _collected(self, batches: Sequence[Sequence[Example]]) -> list[list[Group]]:
        """Returns judged groups of completions, drawn from the weights as they are."""
        step, args = self.state.global_step, self.args
        if isinstance(self.sampler, FollowsWeights):
            self.sampler.follow(self.model_wrapped, step)
        # Batches of all ranks are numbered in the order of the data, whatever the number of ranks.
        seeds = [seed_of(args.seed, step, i * args.world_size + args.process_index) for i in range(len(batches))]
        drawn = self.collector.collect(self.model_wrapped, batches, seeds, (self.teacher, self.rows))
        self._tally.count(drawn.counts)
        self._tally.add(drawn.means)
        return drawn.groups

    def _over_ranks(self, batches: Sequence[Batch]) -> Normalizers:
        """Averages what the losses are divided by over ranks, since gradients are averaged; counts what is new."""
        fresh = batches if self.state.global_step % self.args.num_iterations == 0 else []
        own = [sum(batch.normalizers[i] for batch in batches) for i in range(2)]
        counts = [sum(len(batch.lengths) for batch in fresh), sum(batch.tokens for batch in fresh)]
        totals = torch.tensor([*own, *counts], dtype=torch.float64, device=float64_device(self.args.device))
        divergence, policy, completions, tokens = self.accelerator.reduce(totals, "sum").tolist()
        self._seen = {"samples": self._seen["samples"] + int(completions), "tokens": self._seen["tokens"] + int(tokens)}
        return Normalizers(divergence / self.args.world_size, policy / self.args.world_size)

    # What is known of it.

    def _observe(self, batch: Batch, out: StepOutput) -> None:
        """Puts metrics into the tally, and now and then samples into their file."""
        self._tally.add(self.watch.metrics(batch, out))
        self._tally.count(batch.counts)
        step = self.state.global_step
        if self._log_file is not None and self._is_first(batch) and due(self.args.log_completions_every, step):
            rows = sample_rows(batch, out, self.processing_class, limit=self.args.num_completions_shown)
            self._log_file.samples(step + 1, rows)
            if self.args.print_completions:
                show(rows, step + 1)

    def _is_first(self, batch: Batch) -> bool:
        """True for the first batch of a step on this rank."""
        return batch.groups[0] is self._window[0][0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as transformers does, with the metrics since the last line; and writes a line of metrics.jsonl."""
        if "loss" in logs:
            logs |= self._tally.drain()
        super().log(logs, start_time)
        if "train_runtime" in logs or not self.is_world_process_zero():
            return
        numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        if self._log_file is None:
            self._early.append(numbers)
        else:
            self._log_file.metrics(self.state.global_step, numbers, **self._seen)

    def evaluate(
        self, eval_dataset: Data = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Samples answers to the questions, with the same seeds each time, and judges them.

        Metrics are those of `training.evaluation`, as `eval_reward_mean`. Random states and modes are left as they are.
        What is measured before `train` is logged when that begins, in the first lines of a new run.
        """
        del ignore_keys
        if (data := self.eval_dataset if eval_dataset is None else eval_dataset) is None:
            raise ArgumentError("eval_dataset must be given here or to the trainer, got None")
        if isinstance(data, dict):
            parts = [self.evaluate(part, None, f"{metric_key_prefix}_{name}") for name, part in data.items()]
            return {name: value for part in parts for name, value in part.items()}
        args, started, own = self.args, time.time(), self.eval_dataset
        if not any(data is known for known in (own.values() if isinstance(own, dict) else [own])):
            data = self.rows.of_evaluation().usable(self._read(data, "eval_dataset"), "eval_dataset")
        if isinstance(self.sampler, FollowsWeights):
            self.sampler.follow(self.model_wrapped, self.state.global_step)
        result = evaluate(
            self.model_wrapped,
            self.processing_class,
            data,
            self.rewards,
            success_threshold=self.method.success_threshold,
            gather=gather_object,
            # The rows were looked at when the data came.
            **args.evaluation_options() | {"on_bad_row": None, "sampler": self.sampler, "agent": self.agent},
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.metrics.items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(data) * args.eval_generations)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset: Data, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Refuses: transformers' method returns logits. `training.evaluation.evaluate` returns answers."""
        raise ArgumentError("test_dataset must go to evaluate(test_dataset), which measures; there are no logits here")

    def floating_point_ops(self, inputs: Batch) -> int:
        return inputs.flops(int(self.model.num_parameters(exclude_embeddings=True)))

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Counts completion tokens; transformers would look for a batch's `input_ids`."""
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen = self._seen["tokens"]

    # Data order, checkpoints, resuming.

    def _get_train_sampler(self, train_dataset: Any = None) -> WindowOrder:
        args, examples = self.args, self.train_dataset if train_dataset is None else train_dataset
        self.order = WindowOrder(
            len(examples),
            window=self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            repeats=args.num_iterations,
            seed=args.data_seed,
            shuffle=args.train_sampling_strategy != "sequential",
            drop_last=args.dataloader_drop_last and args.num_iterations > 1,
        )
        return self.order

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains as in transformers; True goes on from the last whole checkpoint, None is what the arguments say."""
        if not self._run:  # else `start` has been called for it
            self.start(self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint)
        try:
            return super().train(None if self._resumed is None else str(self._resumed), **kwargs)
        finally:
            self._resumed, self._run = None, {}

    def start(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Finds where the next `train` begins. Raises `CheckpointError`, as `start_of`."""
        run = describe_run(self.method, self.args, self.model, self.train_dataset or (), self.agent)
        self._resumed, self._run = start_of(self.args.output_dir, resume_from_checkpoint, run), run

    def _init_training_state(self, max_steps: int, per_epoch: int, epochs: int, *checkpoint: Any) -> tuple[int, int]:
        """Begins behind the last epoch where no step is left: within one, transformers would do another step."""
        begun: tuple[int, int] = super()._init_training_state(max_steps, per_epoch, epochs, *checkpoint)
        if self.state.global_step < max_steps:
            return begun
        warnings.warn(f"{self._resumed} has all {max_steps} steps of this run: there is nothing to train", stacklevel=2)
        return epochs, 0

    def begin(self) -> None:
        """Takes up a checkpoint's state of ours and opens the run's log, once model and optimizer are loaded."""
        self._window, self._seen, self._tally = [], {"samples": 0, "tokens": 0}, Tally()
        step, output_dir = self.state.global_step, self.args.output_dir
        goes_on = self._resumed is not None and is_in(self._resumed, output_dir)
        if self._resumed is not None:
            self._seen = self._own.load(self._resumed)
            self._early = []  # the log that is gone on with has them, of the model as it was then
        if self.is_world_process_zero():
            self._log_file = RunLog(output_dir, resume_step=step if goes_on else None)
            method = {"name": type(self.method).__name__, **vars(self.method)}
            about = {"method": method, "config": self.args.to_dict(), "examples": len(self.train_dataset)}
            about |= {"skipped_rows": self.rows.summary} | {k: v for k, v in self._run.items() if k in DESCRIBED}
            self._log_file.describe(about)
            for numbers in self._early:
                self._log_file.metrics(step, numbers, **self._seen)
            self._early = []

    def after_step(self) -> None:
        """Lets the teacher follow before a checkpoint is written; not where the optimizer skipped the step."""
        self._tally.step()
        if not self.accelerator.optimizer_step_was_skipped:
            for teacher in self._own.stateful.values():
                teacher.update(self.model_wrapped, self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes ours first, since transformers' last file says that a checkpoint is whole."""
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        with writing(folder, main_process=self.args.should_save):
            self._own.save(folder, step, seen=self._seen, window=self._window, run=self._run)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the whole model, also where checkpoints are of FSDP2's shards and transformers writes nothing."""
        plugin = None if _internal_call else getattr(self.accelerator.state, "fsdp_plugin", None)
        with saving_whole(plugin):
            super().save_model(output_dir, _internal_call)
