"""The methods as data: which context the teacher sees, whose weights it has, which divergence, on whose samples.

    method = SDPO(alpha=1.0, topk=20)            # a preset with two of its fields changed
    method = preset("sdpo", alpha=1.0, topk=20)  # the same by name, as YAML and the command line have it
    builder, loss, teacher = method.build_context(), method.build_loss(), method.build_teacher(model)

`Method` is flat, so that a field has the same name in Python, in YAML and on the command line; it checks itself when it
is made. A preset is a subclass whose defaults are a publication's, named with its source; `docs/methods.md` has the
equations, and where published defaults differ.

What differs from the obvious: nothing here imports torch until something is built, so that `--help` can list every
method. A choice that would have no effect is refused, not ignored.

Not covered: what belongs to a run and not to a method (learning rate, lengths, sampling): `SelfDistillationConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_type_hints

from ..errors import ArgumentError
from .combinations import combinations
from .fields import check_field, closest

if TYPE_CHECKING:
    from torch import nn

    from ..contexts import ContextBuilder
    from ..losses import FusedLinearDivergence
    from ..teachers import Teacher, TrustRegion

ContextKind: TypeAlias = Literal["none", "demonstration", "feedback", "solution", "template"]
TeacherKind: TypeAlias = Literal["live", "frozen", "ema", "periodic", "trust_region", "adapter_off"]
TargetKind: TypeAlias = Literal["divergence", "tilt", "token_tilt", "policy_gradient", "imitation"]
Aggregation: TypeAlias = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum-norm"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Every choice of a self-distillation method. Raises `ArgumentError`, which names the field."""

    # What the teacher sees beyond the student's prompt.
    context: ContextKind = "template"
    template: str | None = None  # Jinja, in place of the context builder's own; None: the builder's own
    overflow: Literal["error", "drop_oldest_feedback", "truncate_context"] = "error"
    max_teacher_prompt_length: int | None = None  # tokens; None: what the model can read
    success_threshold: float = 0.5  # reward from which a completion is a successful attempt
    use_solution: bool = True  # show a successful attempt of the group
    use_feedback: bool = True  # show the environment's feedback about the completion itself
    dont_reprompt_on_self_success: bool = True
    environment_feedback_only_without_solution: bool = True
    remove_thinking: bool = True  # thinking blocks are taken out of attempts that are shown

    # Whose weights the teacher has.
    teacher: TeacherKind = "live"
    update_rate: float = 0.05  # "ema": teacher ← (1 - update_rate)·teacher + update_rate·student, per optimizer step
    sync_every: int = 1  # "periodic": optimizer steps between copies
    trust_share: float = 0.5  # "trust_region": share of the live student in the teacher's logits

    # What is minimised.
    target: TargetKind = "divergence"
    alpha: float = 1.0  # 1: reverse KL, 0: forward KL, between: Jensen-Shannon
    normalize: bool = False
    temperature: float = 1.0  # of both distributions in the divergence
    topk: int | None = None  # None: the full vocabulary
    topk_of: Literal["student", "teacher"] = "student"
    tail: bool = True  # one bucket for the mass outside the top-k
    sampled_token: bool = (
        False  # the sampled token's log-ratio alone: unbiased for the reverse KL's gradient, but noisy
    )
    importance_clip: float | None = None  # None: no importance sampling
    entry_clip: float | None = None
    inv_temperature: float = 1.0  # "tilt", "token_tilt": p* ∝ p_ref·exp(inv_temperature·reward)
    logz: Literal["group_var", "leave_one_out", "reference_lme", "exact", "mean_reward"] = "group_var"
    distillation_weight: float = 1.0  # 1: distillation alone; the rest is a policy gradient on the rewards
    advantages: Literal["grpo", "dr_grpo", "leave_one_out"] = "grpo"  # of the policy gradient and the token tilt
    clip_low: float | None = 0.2  # policy gradient: its ratio is held in [1 - clip_low, 1 + clip_high]; None: it is not
    clip_high: float | None = 0.2
    ratio_of: Literal["token", "completion"] = "token"  # "completion": of the mean log-ratio of its tokens (GSPO)
    kl_anchor: float = 0.0  # "policy_gradient" and mixtures: weight of the KL to the frozen reference
    aggregation: Aggregation = "token-mean"
    skip_first_tokens: int = 0  # completion tokens at the start that carry no loss

    # On whose samples.
    samples: Literal["student", "dataset"] = "student"  # "dataset": the column `completion`
    num_generations: int = 1  # G, completions sampled for a prompt

    def __post_init__(self) -> None:
        for name, annotation in field_types().items():
            check_field(name, getattr(self, name), annotation)
        for makes_sense, reason in combinations(self):
            if not makes_sense:
                raise ArgumentError(f"{reason}; the method has context={self.context!r}, target={self.target!r}")

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher's context is read: in a divergence and in a tilt of tokens."""
        return self.target in ("divergence", "token_tilt")

    @property
    def needs_rewards(self) -> bool:
        """Whether completions have to be judged."""
        judged = self.context == "feedback" or self.target in ("tilt", "token_tilt", "policy_gradient")
        return judged or self.distillation_weight < 1.0

    @property
    def needs_reference(self) -> bool:
        """Whether the step reads a policy that the student is held to: p_ref of a tilt, the anchor of a gradient.

        It is the teacher, except in a mixture, which has one beside it.
        """
        return self.target == "tilt" or self.kl_anchor > 0

    def build_context(self, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> ContextBuilder:
        """What turns a group into the teacher's prompts; `chat_template_kwargs` are those of the student's prompt."""
        from ..contexts import Demonstration, No, Solution, SuccessOrFeedback, Template

        if self.context == "none":
            return No()
        common: dict[str, Any] = {
            "overflow": self.overflow,
            "max_teacher_prompt_length": self.max_teacher_prompt_length,
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
        }
        if self.context == "template":
            return Template(self.template, **common)
        if self.context == "demonstration":
            return Demonstration(template=self.template, **common)
        if self.context == "solution":
            return Solution(template=self.template, **common)
        return SuccessOrFeedback(
            template=self.template,
            success_threshold=self.success_threshold,
            use_solution=self.use_solution,
            use_feedback=self.use_feedback,
            dont_reprompt_on_self_success=self.dont_reprompt_on_self_success,
            environment_feedback_only_without_solution=self.environment_feedback_only_without_solution,
            remove_thinking=self.remove_thinking,
            **common,
        )

    def build_loss(self) -> FusedLinearDivergence:
        """The divergence at each token; for other targets, the one that their diagnostics show."""
        from sdkernels import TopK

        from ..losses import FusedLinearDivergence

        support: TopK | str | None = "sampled" if self.sampled_token else None
        if self.topk is not None:
            support = TopK(self.topk, of=self.topk_of, tail=self.tail)
        return FusedLinearDivergence(
            alpha=self.alpha,
            normalize=self.normalize,
            temperature=self.temperature,
            support=support,
            importance_clip=self.importance_clip,
            entry_clip=self.entry_clip,
        )

    def build_teacher(
        self, model: nn.Module, *, device: Any = None, reference: nn.Module | None = None
    ) -> Teacher | TrustRegion:
        """Whose weights, at the start of the training of `model`.

        Args:
            model: the student, before its first optimizer step.
            device: where the weights of a teacher that has some of its own are kept; None: where the student's are.
            reference: another module as the frozen teacher, or as the reference of a trust region. None: the student as
                it is now, of which only the trained weights are kept.
        """
        from ..teachers import EMA, AdapterOff, Frozen, Live, PeriodicSync, Snapshot, TrustRegion

        if reference is not None and self.teacher not in ("frozen", "trust_region"):
            raise ArgumentError(
                f"reference must be None with teacher={self.teacher!r}, whose weights are the student's, got "
                f"{type(reference).__name__}"
            )
        if self.teacher == "live":
            return Live()
        if self.teacher == "adapter_off":
            return AdapterOff()
        if self.teacher == "ema":
            return EMA(model, self.update_rate, device=device)
        if self.teacher == "periodic":
            return PeriodicSync(model, self.sync_every, device=device)
        frozen: Teacher = Snapshot(model, device=device) if reference is None else Frozen(reference)
        return TrustRegion(frozen, self.trust_share) if self.teacher == "trust_region" else frozen

    def build_reference(
        self, model: nn.Module, *, device: Any = None, reference: nn.Module | None = None
    ) -> Teacher | None:
        """The policy that the student is held to, None where there is none; arguments as for `build_teacher`."""
        from ..teachers import AdapterOff, Frozen, Snapshot

        if not self.needs_reference:
            return None
        if not self.has_teacher:
            # A trust region is refused there: it is no policy whose log-probabilities could be read.
            return cast("Teacher", self.build_teacher(model, device=device, reference=reference))
        if reference is not None:
            return Frozen(reference)
        return AdapterOff() if self.teacher == "adapter_off" else Snapshot(model, device=device)

    def changes(self) -> dict[str, Any]:
        """The fields that are not this class's defaults: with its name, all there is to know about the method."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def name(self) -> str | None:
        """The preset's name; None for a `Method` that is none."""
        return next((name for name, made in PRESETS.items() if made is type(self)), None)


@dataclass(frozen=True, kw_only=True)
class SDFTPaper(Method):
    """Self-distillation fine-tuning, as the paper writes it: reverse KL to the model with a demonstration in context.

    `KL(p(·|x) ‖ q(·|x, demonstration))` on the student's own samples, the teacher an EMA of rate 0.01. Shenfeld et al.
    2026, "Self-Distillation Enables Continual Learning", arXiv:2601.19897. The first 3 completion tokens carry no loss,
    since they are where the teacher answers to its prompt's own words; one completion for a prompt, full vocabulary.
    """

    context: ContextKind = "demonstration"
    teacher: TeacherKind = "ema"
    update_rate: float = 0.01
    alpha: float = 1.0
    aggregation: Aggregation = "seq-mean-token-mean"
    skip_first_tokens: int = 3


@dataclass(frozen=True, kw_only=True)
class SDFTAsRun(SDFTPaper):
    """Self-distillation fine-tuning, as its published results were run: forward KL.

    The README of github.com/Continual-Intelligence/Self-Distillation says (2026-04-07) that all of the paper's results
    were made with on-policy samples and the per-token forward KL, `KL(q ‖ p)`, and makes it the default. The rest is as
    in its `main.py`, but for a weight of whole sequences against vLLM's different rounding.
    """

    alpha: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SDPO(Method):
    """Self-distillation policy optimisation: the teacher has seen a successful attempt, or what went wrong.

    Jensen-Shannon divergence on the student's top 100 tokens and a tail, the teacher an EMA of rate 0.05, 8 completions
    for a prompt. Hübotter et al. 2026, "Reinforcement Learning via Self-Distillation", arXiv:2601.20802; the defaults
    are those of github.com/lasgroup/SDPO, `verl/trainer/config/{actor/actor,sdpo}.yaml`.
    """

    context: ContextKind = "feedback"
    max_teacher_prompt_length: int | None = 10240
    teacher: TeacherKind = "ema"
    update_rate: float = 0.05
    alpha: float = 0.5
    topk: int | None = 100
    importance_clip: float | None = 2.0
    num_generations: int = 8


@dataclass(frozen=True, kw_only=True)
class SDPOCode(SDPO):
    """SDPO with rich feedback, as run on LiveCodeBench: reverse KL, top 20, a slower teacher.

    github.com/lasgroup/SDPO, `experiments/rich_feedback/run_sdpo.sh` (its `ema_update_rate=0.01` is a key that the
    configuration no longer has; today's is `teacher_update_rate`).
    """

    update_rate: float = 0.01
    alpha: float = 1.0
    topk: int | None = 20


@dataclass(frozen=True, kw_only=True)
class OPSD(Method):
    """On-policy self-distillation: the teacher has read a reference solution, and is the model before training.

    Zhao et al. 2026, "Self-Distilled Reasoner", arXiv:2601.18734; divergence and teacher are those of
    github.com/siyan-zhao/OPSD, `scripts/run_opsd.sh`: `--beta 0.5 --fixed_teacher`, full vocabulary. Under LoRA,
    `teacher="adapter_off"` is the same teacher without a copy. `entry_clip` is the paper's cap on the summand of a
    vocabulary entry, by which single tokens of style do not dominate; it is off in the scripts.
    """

    context: ContextKind = "solution"
    teacher: TeacherKind = "frozen"
    alpha: float = 0.5


@dataclass(frozen=True, kw_only=True)
class ContextDistillation(Method):
    """A system prompt, an instruction or a document, put into the weights: forward KL on the student's samples.

    Snell et al. 2022, "Learning by Distilling Context", arXiv:2209.15189, with the student's samples in the place of
    the teacher's (`samples="dataset"` is for completions that the teacher, with the context, has written). The teacher
    is the model before training: a live one forgets how to read the context that it no longer needs.
    """

    context: ContextKind = "template"
    teacher: TeacherKind = "frozen"
    alpha: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RLTilt(Method):
    """Reinforcement learning as distillation from the tilted reference `p* ∝ p_ref·exp(inv_temperature·r)`.

    The reverse KL to p* over whole responses, by the variance of `d = log π - log p_ref - inv_temperature·r` within a
    group: `½ Σ (d_i - d̄)²/(G-1)`. VarGrad, Richter et al. 2020, arXiv:2010.10436; as a policy gradient REBEL, Gao et
    al. 2024, arXiv:2404.16767.
    """

    context: ContextKind = "none"
    teacher: TeacherKind = "frozen"
    target: TargetKind = "tilt"
    num_generations: int = 8


@dataclass(frozen=True, kw_only=True)
class GRPO(Method):
    """The baseline with rewards: the clipped policy gradient of advantages within a group.

    Shao et al. 2024, arXiv:2402.03300, without its KL term, as most run it today; `kl_anchor=0.04, teacher="frozen"` is
    the paper's. `aggregation` is the paper's mean over completions; `"token-mean"` is DAPO's (arXiv:2503.14476).
    """

    context: ContextKind = "none"
    target: TargetKind = "policy_gradient"
    aggregation: Aggregation = "seq-mean-token-mean"
    num_generations: int = 8


@dataclass(frozen=True, kw_only=True)
class SFT(Method):
    """The baseline with demonstrations: cross-entropy of the column `completion`."""

    context: ContextKind = "none"
    target: TargetKind = "imitation"
    samples: Literal["student", "dataset"] = "dataset"


PRESETS: dict[str, type[Method]] = {
    "sdft_paper": SDFTPaper,
    "sdft_as_run": SDFTAsRun,
    "sdpo": SDPO,
    "sdpo_code": SDPOCode,
    "opsd": OPSD,
    "context_distillation": ContextDistillation,
    "rl_tilt": RLTilt,
    "grpo": GRPO,
    "sft": SFT,
}


def preset(name: str, **changes: Any) -> Method:
    """The method of this name, with some fields changed. Raises `ArgumentError`; a misspelling gets a suggestion."""
    if name not in PRESETS:
        raise ArgumentError(f"method must be one of {', '.join(PRESETS)}, got {name!r}{closest(name, PRESETS)}")
    for field in changes:
        if field not in field_types():
            raise ArgumentError(f"{field} is no field of a method{closest(field, field_types())}")
    return PRESETS[name](**changes)


@cache
def field_types() -> dict[str, Any]:
    """Name → type of every field of a method; what YAML and the command line parse by."""
    hints = get_type_hints(Method)
    return {f.name: hints[f.name] for f in fields(Method)}


__all__ = [
    "GRPO",
    "OPSD",
    "PRESETS",
    "SDPO",
    "SFT",
    "Aggregation",
    "ContextDistillation",
    "ContextKind",
    "Method",
    "RLTilt",
    "SDFTAsRun",
    "SDFTPaper",
    "SDPOCode",
    "TargetKind",
    "TeacherKind",
    "field_types",
    "preset",
]
