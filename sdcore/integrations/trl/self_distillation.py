"""Computes the loss of TRL's SDPO and SDFT trainers without logits: TRL's batch in, TRL's loss and metrics out.

    FusedSDPOTrainer(model, reward_funcs, args, ..., fused=FusedOptions(micro_batch=4))

`SelfDistillationMixin` stands before TRL's trainer among the bases. It overrides what computes (`compute_loss`, the
sampler's log-probabilities, the teacher) and leaves the rest to TRL: data, prompts, sampling, rewards, logging, and the
training step, which goes backward by itself.

What differs from the obvious: `compute_loss` returns a loss in the graph, as TRL's does. Only where the memory is
bounded (`micro_batch`, or strategy "two_phase") it goes backward itself, part by part; the loss that it returns then
has the value, and a backward that adds nothing.

Not covered: dropout in the passes (TRL turns it off by default), and a teacher server for `sampled_token`, which stays
TRL's own code, with the student's logits.

Letters: B rows of TRL's batch, C completion tokens, N rows of the plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from accelerate.utils import is_peft_model  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn

from sdkernels import TopK, TopKLogprobs

from ...errors import ArgumentError
from ...losses import FusedLinearDivergence, PolicyTerm, token_weights
from ...step import StepOutput, distill_step, policy_gradient_step, token_logprobs
from .fused import FusedOptions, FusedTrainer
from .padded import PaddedPlan, plan_padded
from .teachers import FOLDER, TeacherSync, build_teacher, load_teacher

TRUNCATED = "self_distillation/teacher_prompt_truncated_fraction"
# TRL's name → the weights of `losses.token_weights`. TRL divides both of the first two by the tokens of a micro-batch.
AGGREGATIONS: dict[str, Any] = {
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "sum-norm",
}


class Answers(NamedTuple):
    """Holds what a teacher server said."""

    topk: TopKLogprobs  # (N, K)
    sampled: Tensor  # (N,) log-probabilities of the completion tokens


class PromptLengths:
    """Remembers how long the prompts of the last call were before they were cut."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._warned = False

    def seen(self, ids_B: Sequence[Sequence[int]]) -> None:
        self.lengths = [len(ids) for ids in ids_B]

    def truncated(self, limit: int | None, argument: str) -> list[float]:
        """Returns 1.0 for each prompt that was cut, else 0.0; warns the first time that one was."""
        cut = [float(limit is not None and length > limit) for length in self.lengths]
        if any(cut) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{int(sum(cut))} of {len(cut)} teacher prompts were longer than {argument}={limit} and lost their "
                f"beginning, which is where the question stands; {TRUNCATED} counts them",
                stacklevel=2,
            )
        return cut


class SelfDistillationMixin(FusedTrainer):
    """Puts a loss from hidden states, and a teacher of the weights in memory, in place of TRL's."""

    OVERRIDES: ClassVar[tuple[str, ...]] = (
        "compute_loss",
        "_compute_rollout_logps",
        "_setup_teacher_model",
        "_save_checkpoint",
        "_load_from_checkpoint",
    )
    CALLS: ClassVar[tuple[str, ...]] = (
        "_log_self_distillation_metric",
        "_get_teacher_token_logprobs_from_server",
        "_compute_server_distillation_loss",
    )
    REPLACES: ClassVar[tuple[str, ...]] = (
        "_compute_self_distillation_loss",
        "_compute_teacher_student_logits",
        "_forward_logits",
        "_get_teacher_context_for_self_distillation",
    )
    teacher: Any
    # TRL's trainer has these, and they are set here.
    teacher_model: Any
    teacher_context_builder: Any
    max_prompt_length: Any
    reward_funcs: Any
    _last_loaded_step: Any

    def _set_up(self) -> None:
        self.prompt_lengths = PromptLengths()

    def adopt(self, fused: FusedOptions | None) -> None:
        if self.state.global_step:
            raise ArgumentError(
                f"trainer must be patched before it trains, got one after {self.state.global_step} steps: its "
                "teacher starts from the weights as they are"
            )
        super().adopt(fused)
        self._setup_teacher_model()
        for kind in [type(callback) for callback in self.callback_handler.callbacks]:
            if kind.__name__ in ("SyncTeacherModelCallback", "PEFTAdapterEMACallback"):
                self.remove_callback(kind)

    # The teacher.

    def _setup_teacher_model(self) -> None:
        """Builds the teacher from the student's weights in memory; TRL's own `teacher_model` becomes the student."""
        self.check_model()
        if self.fused.loss_type == "as_configured" and getattr(self.args, "loss_type", None) not in AGGREGATIONS:
            raise ArgumentError(
                f"loss_type 'as_configured' needs an args.loss_type, one of {', '.join(AGGREGATIONS)}, which "
                f"{type(self.args).__name__} has not: got {getattr(self.args, 'loss_type', None)!r}"
            )
        if self.use_teacher_server and self.fused.teacher is not None:
            raise ArgumentError("teacher must be None with use_teacher_server, which serves the live one")
        if self.use_teacher_server and self.args.distillation_mode == "sampled_token":
            warnings.warn(
                "use_teacher_server with distillation_mode='sampled_token' is left to TRL's own code, which makes the "
                "student's logits",
                stacklevel=3,
            )
        self.teacher = build_teacher(
            self.args.teacher_model_kind,
            self.model,
            has_adapter=is_peft_model(self.model),
            update_rate=self.args.teacher_update_rate,
            trust_share=self.fused.trust_share if self.fused.teacher == "trust_region" else None,
            device=self.fused.teacher_device,
        )
        self.teacher_model = self.model
        if self.args.teacher_model_kind == "ema":
            self.add_callback(TeacherSync(self, self.args.teacher_sync_steps))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves the teacher first, on every rank, since TRL's last file says that a checkpoint is whole."""
        self.teacher.save(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}" / FOLDER)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        load_teacher(self.teacher, Path(resume_from_checkpoint))

    # The loss.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Returns TRL's loss of a batch, divided by the accumulation steps while training, as TRL's is.

        It is in the graph, unless `fused.bounded`, where the gradients are there already. Raises `ArgumentError`.
        """
        if return_outputs:
            raise ArgumentError(f"return_outputs must be False: {type(self).__name__} has no logits to return")
        scale = self.current_gradient_accumulation_steps if self.model.training else 1.0
        served = self.use_teacher_server
        if served and self.args.distillation_mode == "sampled_token":
            return self._compute_server_distillation_loss(model, inputs) / scale
        backward = None  # but by whoever calls this
        if self.fused.bounded and torch.is_grad_enabled():
            backward = lambda loss: self.accelerator.backward(loss / scale)  # noqa: E731
        out = self._one_step(model, inputs, backward, served=served)
        loss = out.loss / scale
        if backward is None:
            return loss
        return loss.detach() + torch.zeros_like(loss, requires_grad=True)

    def _one_step(self, model: nn.Module, inputs: dict[str, Any], backward: Any, *, served: bool) -> StepOutput:
        """Computes the loss, and puts TRL's metrics into the log."""
        share = self._distillation_weight
        distilled = self._loss_mask(inputs) != 0  # (B, C)
        teaches = share > 0 and not served
        padded = plan_padded(
            inputs["prompt_ids"],
            inputs["prompt_mask"],
            inputs["completion_ids"],
            inputs["completion_mask"],
            loss_mask=distilled if share == 1 else inputs["completion_mask"],
            teacher_input_ids=inputs["teacher_input_ids"] if teaches else None,
            teacher_attention_mask=inputs["teacher_attention_mask"] if teaches else None,
        )
        options: dict[str, Any] = {"verify": self.fused.verify, "backward": backward}
        # Evaluation keeps nothing for a backward, so nothing has to be bounded.
        bounded = backward is not None or not self.fused.bounded
        options |= {"strategy": self.fused.strategy if bounded else "auto"}
        options |= {"micro_batch": self.fused.micro_batch if bounded else None}
        policy = None if share == 1 else self._policy_term(inputs, padded)
        if share == 0:
            out = policy_gradient_step(model, padded.plan, policy, **options)  # type: ignore[arg-type]
            self._log(model, "self_distillation/policy_loss", out.metrics["loss/policy"])
            return out
        weights, normalizer = self._reduced(
            distilled, None if self.fused.loss_type == "sequence" else self.args.loss_type
        )
        rows = padded.gather(weights)
        clip, old = self.args.distillation_is_clip, inputs.get("old_per_token_logps")
        if clip is None or old is None:
            clip = old = None
        answers = self._served(inputs, padded, rows) if served else None
        out = distill_step(
            model,
            padded.plan,
            loss=self._divergence(clip, served=served),
            teacher=self.teacher if answers is None else answers.topk,
            token_weights=rows,
            old_logprobs=None if old is None else padded.gather(old),
            normalizer=normalizer,
            policy=policy,
            **options,
        )
        if policy is not None:
            self._log(model, "self_distillation/policy_loss", out.metrics["loss/policy"])
        per_token = torch.where(rows != 0, out.rows["per_token"] / rows, 0.0)
        self._log_distillation(model, per_token.sum() / distilled.sum().clamp(min=1))
        if answers is not None:
            # Of the student's own from the server's: sudden jumps mean that the server's weights are old.
            apart = torch.where(rows != 0, (out.rows["student_logprobs"] - answers.sampled).abs(), 0.0)
            self._log(model, "self_distillation/server_logprob_abs_diff", apart.sum() / distilled.sum().clamp(min=1))
        return out

    @property
    def _distillation_weight(self) -> float:
        return float(getattr(self.args, "distillation_weight", 1.0))

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        """Marks, (B, C), the tokens with a distillation loss."""
        raise NotImplementedError

    def _policy_term(self, inputs: dict[str, Any], padded: PaddedPlan) -> PolicyTerm:
        raise NotImplementedError

    def _divergence(self, importance_clip: float | None, *, served: bool) -> FusedLinearDivergence:
        args = self.args
        support: TopK | str | None = None
        if args.distillation_mode == "topk_logits":
            if args.distillation_topk is None:
                raise ArgumentError("distillation_topk must be given with distillation_mode='topk_logits', got None")
            # A server says the teacher's most likely tokens, not the student's.
            side: Literal["teacher", "student"] = "teacher" if served else "student"
            support = TopK(args.distillation_topk, of=side, tail=args.distillation_add_tail)
        elif args.distillation_mode == "sampled_token":
            support = "sampled"
        elif args.distillation_mode != "full_logits":
            raise ArgumentError(
                "distillation_mode must be 'sampled_token', 'full_logits' or 'topk_logits', got "
                f"{args.distillation_mode!r}"
            )
        return FusedLinearDivergence(
            alpha=args.distillation_alpha,
            temperature=self.temperature,
            support=support,
            importance_clip=importance_clip,
            workspace_mb=self.fused.workspace_mb,
        )

    def _reduced(self, mask: Tensor, loss_type: str | None) -> tuple[Tensor, float]:
        """Returns weights (B, C) of the tokens in `mask` (B, C) bool, and what their sum is divided by, as in TRL.

        `loss_type` None: the mean of each completion, and of all completions.
        """
        count, length = mask.shape
        aggregation = AGGREGATIONS["grpo" if loss_type is None else loss_type]
        norm_length = self.args.max_completion_length if aggregation == "sum-norm" else None
        weights, normalizer = token_weights(aggregation, [length] * count, mask.reshape(-1), norm_length=norm_length)
        if aggregation == "seq-mean-token-mean":
            normalizer = float(count)  # also those without a token that counts
        return weights.view(count, length), normalizer

    # A teacher that a server computes.

    def _served(self, inputs: dict[str, Any], padded: PaddedPlan, weights: Tensor) -> Answers:
        """Asks the server about the rows of a plan, as TRL does, after it was sent the student's weights."""
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self.accelerator.wait_for_everyone()
            self._last_loaded_step = self.state.global_step
        answer = self._get_teacher_token_logprobs_from_server(inputs, inputs["completion_ids"].shape[1])
        ids, logprobs = (answer[name].flatten(0, 1)[padded.index] for name in ("topk_token_ids", "topk_logprobs"))
        sampled = padded.gather(answer["actual_logprobs"])
        answered = logprobs.isfinite().all(dim=1) & sampled.isfinite()
        if bool(((weights != 0) & ~answered).any()):
            raise ArgumentError("the teacher server returned no log-probability for a token with a loss")
        # What was not answered has no weight, but must be distinct ids with log-probabilities.
        stand_in = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        ids = torch.where(answered[:, None], ids, stand_in)
        return Answers(TopKLogprobs(ids, torch.where(answered[:, None], logprobs, -1e4)), sampled)

    # The log.

    def _log_distillation(self, model: nn.Module, value: Tensor) -> None:
        mean = self.accelerator.gather(value.detach()).mean().item()
        self._log_self_distillation_metric("train" if model.training else "eval", mean)

    def _log(self, model: nn.Module, name: str, value: Tensor) -> None:
        mode = "train" if model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather(value.detach()).mean().item())

    def log_truncated(self, limit: int | None, argument: str) -> None:
        """Logs which part of the teacher prompts that were tokenized last was longer than the limit."""
        cut = torch.tensor(self.prompt_lengths.truncated(limit, argument), device=self.accelerator.device)
        self._log(self.model, TRUNCATED, cut)

    # The sampler.

    def _compute_rollout_logps(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor | None:
        """Returns the sampler's log-probabilities (B, C), 0 outside of the mask; None where TRL needs none."""
        generate_every = self.args.steps_per_generation * self.args.num_iterations
        if self.args.gradient_accumulation_steps % generate_every == 0:
            return None
        padded = plan_padded(prompt_ids, prompt_mask, completion_ids, completion_mask)
        # In the precision of the loss that they are compared with.
        with self.compute_loss_context_manager():
            logprobs = token_logprobs(
                self.model,
                padded.plan,
                temperature=self.temperature,
                strategy=self.fused.strategy,
                verify=self.fused.verify,
            )
        return padded.scatter(logprobs)
