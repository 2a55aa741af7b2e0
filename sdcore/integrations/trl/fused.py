"""What the fused SDPO and SDFT trainers have in common: TRL's batch in, TRL's loss and metrics out, no logits between.

    FusedSDPOTrainer(model, reward_funcs, args, ..., fused=FusedOptions(micro_batch=4))

`FusedMixin` stands before TRL's trainer among the bases. It overrides what computes (`compute_loss`, the sampler's
log-probabilities, the teacher) and leaves the rest to TRL: data, prompts, sampling, rewards, logging, and the training
step, which goes backward by itself.

What differs from the obvious: `compute_loss` returns a loss in the graph, as TRL's does. Only where the memory is
bounded (`micro_batch`, or strategy "two_phase") it goes backward itself, part by part; the loss that it returns then
has the value, and a backward that adds nothing.

Not covered: dropout in the passes (TRL turns it off by default), and a teacher server for `sampled_token`, which stays
TRL's own code, with the student's logits.

Letters: B rows of TRL's batch, C completion tokens, N rows of the plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from accelerate.utils import is_peft_model  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn

from sdkernels import TopK, TopKLogprobs

from ...errors import ArgumentError, UnsupportedModelError
from ...losses import FusedLinearDivergence, PolicyTerm, token_weights
from ...models import head_of
from ...prefix.choice import Strategy
from ...prefix.verification import Verify
from ...step import StepOutput, distill_step, policy_gradient_step, token_logprobs
from .guard import require_methods
from .padded import PaddedPlan, plan_padded
from .teachers import TeacherSync, build_teacher, load_teacher, save_teacher

LossType = Literal["sequence", "as_configured"]
# TRL's name → the weights of `losses.token_weights`. TRL divides both of the first two by the tokens of a micro-batch.
AGGREGATIONS: dict[str, Any] = {
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "sum-norm",
}


@dataclass(frozen=True, kw_only=True)
class FusedOptions:
    """What TRL's configuration has no argument for. Raises `ArgumentError`."""

    strategy: Strategy = "auto"  # as in `sdcore.prefix.run`
    micro_batch: int | None = None  # completions in flight at a time, which bounds the memory; None: all of the batch
    verify: Verify = "once"  # as in `sdcore.prefix.run`
    workspace_mb: float | None = None  # of the loss, as in `sdkernels.linear_divergence`
    # None: what args.teacher_model_kind says; with "trust_region" that is the reference.
    teacher: Literal["trust_region"] | None = None
    trust_share: float = 0.5  # of the student in a trust region's logits
    # The distillation loss: "sequence" is TRL's, the mean per completion and then over completions, whatever
    # args.loss_type is; "as_configured" follows args.loss_type, as the policy loss does.
    loss_type: LossType = "sequence"
    teacher_device: torch.device | str | None = None  # where "base" and "ema" keep their weights; None: the model's

    def __post_init__(self) -> None:
        for name, allowed in (("strategy", Strategy), ("verify", Verify), ("loss_type", LossType)):
            if getattr(self, name) not in get_args(allowed):
                came, wanted = getattr(self, name), ", ".join(map(repr, get_args(allowed)))
                raise ArgumentError(f"{name} must be one of {wanted}, got {came!r}")
        if self.teacher not in (None, "trust_region"):
            raise ArgumentError(f"teacher must be None or 'trust_region', got {self.teacher!r}")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.strategy not in ("auto", "two_phase")):
            raise ArgumentError(
                f"micro_batch must be positive, for strategy 'two_phase', got {self.micro_batch} and {self.strategy!r}"
            )

    @property
    def bounded(self) -> bool:
        """Whether `compute_loss` goes backward itself."""
        return self.micro_batch is not None or self.strategy == "two_phase"


class Answers(NamedTuple):
    """What a teacher server said."""

    topk: TopKLogprobs  # (N, K)
    sampled: Tensor  # (N,) log-probabilities of the completion tokens


class FusedMixin:
    """Before TRL's trainer among the bases: its loss from hidden states, its teacher from the weights in memory."""

    # Methods of TRL's trainer: those that are overridden, those that are called, and those that nobody calls any more.
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
    # TRL's trainer has these.
    fused: FusedOptions
    teacher: Any
    args: Any
    model: Any
    accelerator: Any
    temperature: float

    def __init__(self, *args: Any, fused: FusedOptions | None = None, **kwargs: Any) -> None:
        self.check_trl()
        self.fused = checked_options(fused)
        super().__init__(*args, **kwargs)
        self._set_up_contexts()

    @classmethod
    def check_trl(cls) -> None:
        """Raises `ImportError` where the installed TRL's trainer lacks what is overridden or called."""
        after = cls.__mro__[cls.__mro__.index(FusedMixin) + 1]
        require_methods(after, (*cls.OVERRIDES, *cls.CALLS, *cls.REPLACES))

    def adopt(self, fused: FusedOptions | None) -> None:
        """Be set up as by the constructor, for a trainer that was TRL's own; see `patch`."""
        trainer: Any = self
        if trainer.state.global_step:
            raise ArgumentError(
                f"trainer must be patched before it trains, got one after {trainer.state.global_step} steps: its "
                "teacher starts from the weights as they are"
            )
        self.fused = checked_options(fused)
        self._set_up_contexts()
        self._setup_teacher_model()
        for kind in [type(one) for one in trainer.callback_handler.callbacks]:
            if kind.__name__ in ("SyncTeacherModelCallback", "PEFTAdapterEMACallback"):
                trainer.remove_callback(kind)

    def _set_up_contexts(self) -> None:
        """Where the trainer builds the teacher's prompts."""

    # The teacher.

    def _setup_teacher_model(self) -> None:
        """Of the student's weights in memory. `teacher_model`, which TRL's trainer has, is the student."""
        trainer: Any = self
        check_model(trainer)
        if self.fused.loss_type == "as_configured" and getattr(self.args, "loss_type", None) not in AGGREGATIONS:
            raise ArgumentError(
                f"loss_type 'as_configured' needs an args.loss_type, one of {', '.join(AGGREGATIONS)}, which "
                f"{type(self.args).__name__} has not: got {getattr(self.args, 'loss_type', None)!r}"
            )
        if trainer.use_teacher_server and self.fused.teacher is not None:
            raise ArgumentError("teacher must be None with use_teacher_server, which serves the live one")
        if trainer.use_teacher_server and self.args.distillation_mode == "sampled_token":
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
        trainer.teacher_model = self.model
        if self.args.teacher_model_kind == "ema":
            trainer.add_callback(TeacherSync(trainer, self.args.teacher_sync_steps))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """With the teacher first, since TRL's last file says that a checkpoint is whole."""
        trainer: Any = self
        save_teacher(self.teacher, Path(trainer._get_output_dir(trial)) / f"checkpoint-{trainer.state.global_step}")
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        load_teacher(self.teacher, Path(resume_from_checkpoint))

    # The loss.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss of a batch, divided by the accumulation steps while training, as TRL's is.

        In the graph, unless `fused.bounded`, where the gradients are there already. Raises `ArgumentError`.
        """
        if return_outputs:
            raise ArgumentError(f"return_outputs must be False: {type(self).__name__} has no logits to return")
        trainer: Any = self
        scale = trainer.current_gradient_accumulation_steps if self.model.training else 1.0
        served = trainer.use_teacher_server
        if served and self.args.distillation_mode == "sampled_token":
            return trainer._compute_server_distillation_loss(model, inputs) / scale
        backward = self._backward(scale)
        out = self._one_step(model, inputs, backward, served=served)
        loss = out.loss / scale
        if backward is None:
            return loss
        return loss.detach() + torch.zeros_like(loss, requires_grad=True)

    def _backward(self, scale: float) -> Callable[[Tensor], object] | None:
        """None: whoever calls `compute_loss` goes backward."""
        if not (self.fused.bounded and torch.is_grad_enabled()):
            return None
        return lambda loss: self.accelerator.backward(loss / scale)

    def _one_step(self, model: nn.Module, inputs: dict[str, Any], backward: Any, *, served: bool) -> StepOutput:
        """One pass: the loss, with TRL's metrics into the log."""
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
            self._log_policy(model, out)
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
            self._log_policy(model, out)
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
        """(B, C): the tokens with a distillation loss."""
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
        """Weights (B, C) of the tokens in `mask` (B, C) bool, and what their sum is divided by, as TRL does.

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
        """Of the rows of a plan; asked as TRL asks, after the student's weights were sent to the server."""
        trainer: Any = self
        if trainer.state.global_step != trainer._last_loaded_step:
            trainer.vllm_generation.sync_weights()
            self.accelerator.wait_for_everyone()
            trainer._last_loaded_step = trainer.state.global_step
        found = trainer._get_teacher_token_logprobs_from_server(inputs, inputs["completion_ids"].shape[1])
        ids, logprobs = (found[name].flatten(0, 1)[padded.index] for name in ("topk_token_ids", "topk_logprobs"))
        sampled = padded.gather(found["actual_logprobs"])
        answered = logprobs.isfinite().all(dim=1) & sampled.isfinite()
        if bool(((weights != 0) & ~answered).any()):
            raise ArgumentError("the teacher server returned no log-probability for a token with a loss")
        # What was not answered has no weight, but must be distinct ids with log-probabilities.
        stand_in = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        ids = torch.where(answered[:, None], ids, stand_in)
        return Answers(TopKLogprobs(ids, torch.where(answered[:, None], logprobs, -1e4)), sampled)

    # The log.

    def _log_distillation(self, model: nn.Module, value: Tensor) -> None:
        trainer: Any = self
        mean = self.accelerator.gather(value.detach()).mean().item()
        trainer._log_self_distillation_metric("train" if model.training else "eval", mean)

    def _log_policy(self, model: nn.Module, out: StepOutput) -> None:
        self._log(model, "self_distillation/policy_loss", out.metrics["loss/policy"])

    def _log(self, model: nn.Module, name: str, value: Tensor) -> None:
        trainer: Any = self
        mode = "train" if model.training else "eval"
        trainer._metrics[mode][name].append(self.accelerator.gather(value.detach()).mean().item())

    # The sampler.

    def _compute_rollout_logps(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor | None:
        """(B, C) log-probabilities under the student as it samples, where TRL asks for them; 0 outside of the mask."""
        generate_every = self.args.steps_per_generation * self.args.num_iterations
        if self.args.gradient_accumulation_steps % generate_every == 0:
            return None
        trainer: Any = self
        padded = plan_padded(prompt_ids, prompt_mask, completion_ids, completion_mask)
        # In the precision of the loss that they are compared with.
        with trainer.compute_loss_context_manager():
            found = token_logprobs(
                self.model,
                padded.plan,
                temperature=self.temperature,
                strategy=self.fused.strategy,
                verify=self.fused.verify,
            )
        return padded.scatter(found)


def checked_options(fused: FusedOptions | None) -> FusedOptions:
    if fused is not None and not isinstance(fused, FusedOptions):
        raise ArgumentError(f"fused must be a FusedOptions or None, got {type(fused).__name__}")
    return FusedOptions() if fused is None else fused


def check_model(trainer: Any) -> None:
    """Refuse, before any step, what cannot be treated exactly."""
    head_of(trainer.model)
    if not getattr(trainer.args, "disable_dropout", False) and any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in trainer.model.modules()
    ):
        raise UnsupportedModelError(
            f"{type(trainer.model).__name__} has dropout, which is always off in the passes: disable_dropout must be "
            "True, got False"
        )
    if trainer.fused.bounded and "lomo" in str(trainer.args.optim).lower():
        raise ArgumentError("micro_batch must be None for LOMO optimizers, which update weights in each backward")


__all__ = ["AGGREGATIONS", "FusedMixin", "FusedOptions", "LossType", "check_model", "checked_options"]
