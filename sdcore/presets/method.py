"""Defines what a method is: each of its choices as a field, which go together, and the parts that it builds.

    method = Method(context="demonstration", teacher="ema", alpha=0.0)
    builder, loss, teacher = method.build_context(), method.build_loss(), method.build_teacher(model)

`Method` is flat, so that a field has the same name in Python, in YAML and on the command line; it checks itself when it
is made. The published methods are subclasses with other defaults, in `methods.py`.

What differs from the obvious: nothing here imports torch until something is built, so that `--help` can list every
method. A combination is refused where a field would have no effect or the loss would be none (always 0, or of an
unknown policy's samples), because a run does not show either mistake. What a field by itself may be is in `fields.py`.

Not covered: what belongs to a run and not to a method (learning rate, lengths, sampling): `SelfDistillationConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeAlias, cast, get_type_hints

from ..errors import ArgumentError
from .fields import check_field

if TYPE_CHECKING:
    from torch import nn

    from ..contexts import ContextBuilder
    from ..losses import FusedLinearDivergence
    from ..teachers import Teacher, TrustRegion

ContextKind: TypeAlias = Literal[
    "none", "demonstration", "feedback", "solution", "template", "turn_feedback", "hindsight"
]
OF_TURNS: Final = {"turn_feedback": "feedback", "hindsight": "next_reply"}  # what they show of each turn
AFTER_ROLLOUTS: Final = frozenset({"feedback", *OF_TURNS})  # contexts that are known when completions have been judged
TeacherKind: TypeAlias = Literal["live", "frozen", "ema", "periodic", "trust_region", "adapter_off"]
TargetKind: TypeAlias = Literal["divergence", "tilt", "token_tilt", "policy_gradient", "imitation"]
Aggregation: TypeAlias = Literal[
    "token-mean", "turn-mean-token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum-norm"
]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Holds every choice of a self-distillation method. Raises `ArgumentError`, which names the field."""

    preset_name: ClassVar[str | None] = None  # what YAML and the command line call this class; None: not published

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
    anchor: bool = False  # rows without privileged context are learned to be answered as the teacher does: kept

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
    sampled_token: bool = False  # the sampled token's log-ratio alone: unbiased for the reverse KL's gradient, noisy
    importance_clip: float | None = None  # None: no importance sampling
    entry_clip: float | None = None
    gradient_tolerance: float | None = None  # relative error that the loss's own gradients may have; None: none
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
    teacher_samples: float = 0.0  # share of these that the teacher draws, with its context in view

    def __post_init__(self) -> None:
        for name, annotation in field_types().items():
            check_field(name, getattr(self, name), annotation)
        checks = (_context_problems, _weights_problems, _divergence_problems, _rewards_problems, _idle_problems)
        for problem in chain.from_iterable(check(self) for check in checks):
            raise ArgumentError(f"{problem}; the method has context={self.context!r}, target={self.target!r}")

    @property
    def has_teacher(self) -> bool:
        """True where a teacher's context is read: in a divergence and in a tilt of tokens."""
        return self.target in ("divergence", "token_tilt")

    @property
    def needs_rewards(self) -> bool:
        """True where completions have to be judged."""
        judged = self.context == "feedback" or self.target in ("tilt", "token_tilt", "policy_gradient")
        return judged or self.distillation_weight < 1.0

    @property
    def needs_reference(self) -> bool:
        """True where the step reads a policy that the student is held to: p_ref of a tilt, the anchor of a gradient.

        It is the teacher, except in a mixture, which has one beside it.
        """
        return self.target == "tilt" or self.kl_anchor > 0

    def build_context(self, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> ContextBuilder:
        """Builds what turns a group into the teacher's prompts, with the `chat_template_kwargs` of the student's."""
        from ..contexts import Demonstration, No, OfTurn, Solution, SuccessOrFeedback, Template

        if self.context == "none":
            return No()
        common: dict[str, Any] = {
            "overflow": self.overflow,
            "max_teacher_prompt_length": self.max_teacher_prompt_length,
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
        }
        if self.context == "feedback":
            # Its other fields are the method's own, of the same names.
            own = {f.name: getattr(self, f.name) for f in fields(SuccessOrFeedback) if f.name not in common}
            return SuccessOrFeedback(**own, **common)
        if self.context in OF_TURNS:
            shows: Any = OF_TURNS[self.context]
            return OfTurn(template=self.template, shows=shows, success_threshold=self.success_threshold, **common)
        if self.context == "template":
            return Template(self.template, anchor=self.anchor, **common)
        of_row = {"demonstration": Demonstration, "solution": Solution}[self.context]
        return of_row(template=self.template, anchor=self.anchor, **common)

    def build_loss(self) -> FusedLinearDivergence:
        """Builds the divergence at each token; for other targets, the one that their diagnostics show."""
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
            gradient_tolerance=self.gradient_tolerance,
        )

    def build_teacher(
        self, model: nn.Module, *, device: Any = None, reference: nn.Module | None = None
    ) -> Teacher | TrustRegion:
        """Builds the teacher, which says whose weights read its prompt, at the start of the training of `model`.

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
            with AdapterOff().weights(model):  # raises for a model that it is not right for
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
        """Builds the policy that the student is held to; None where there is none. Arguments as for `build_teacher`."""
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
        """Returns the fields that are not this class's defaults: with the name, all there is to know about a method."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def name(self) -> str | None:
        """Returns the preset's name; None for a `Method` that is none, a subclass of a preset included."""
        return vars(type(self)).get("preset_name")


def _context_problems(method: Method) -> Iterator[str]:
    """Says what is wrong where a teacher would never read something, or reads what the student does."""
    # A target without a teacher has no use for what only a teacher reads.
    if not method.has_teacher and method.context != "none":
        yield (
            f"context must be 'none' with target={method.target!r}, which shows nothing to a teacher, got "
            f"{method.context!r}"
        )
    if method.template is not None and method.context == "none":
        yield f"template must be None with context='none', got {method.template!r}"
    if method.target == "divergence" and method.context == "none" and method.teacher == "live":
        yield "teacher must not be 'live' with context='none': it would be the student itself, and the loss 0"
    shown = method.context == "feedback"
    if shown and not method.use_solution and not method.use_feedback:
        yield "use_solution or use_feedback must be True with context='feedback', got False for both"
    others_alone = method.dont_reprompt_on_self_success and not method.use_feedback
    if shown and others_alone and method.num_generations == 1:
        yield (
            f"num_generations must be at least 2 where only another attempt of the group is shown, got "
            f"{method.num_generations}"
        )
    if method.anchor and method.teacher == "live":
        yield "anchor must be False with teacher='live', which without a context is the student itself, got True"
    if method.overflow == "drop_oldest_feedback" and not (
        (shown and method.use_feedback) or method.context in OF_TURNS
    ):
        yield "overflow='drop_oldest_feedback' needs a context that shows feedback"


def _weights_problems(method: Method) -> Iterator[str]:
    """Says what is wrong with teachers and references whose weights make no difference."""
    if method.teacher == "ema" and method.update_rate == 0:
        yield "update_rate must be in (0, 1] with teacher='ema', got 0: teacher='frozen' is the one that never moves"
    if method.teacher == "trust_region" and method.target != "divergence":
        yield f"teacher must not be 'trust_region' with target={method.target!r}: it is for the divergence"
    if not method.has_teacher and method.needs_reference and method.teacher == "live":
        yield (
            "teacher must not be 'live' where it is the reference that the student is held to (a tilt, a kl_anchor): "
            "its distance to itself is 0"
        )


def _divergence_problems(method: Method) -> Iterator[str]:
    """Says which support, clip or normalization the target or the rest of the divergence does not have."""
    is_divergence = method.target == "divergence"
    full = method.topk is None and not method.sampled_token
    if method.normalize and method.alpha in (0.0, 1.0):
        yield f"normalize must be False where alpha is 0 or 1, which it leaves as they are, got alpha={method.alpha}"
    if not full and not is_divergence:
        yield (
            f"topk and sampled_token must be left out with target={method.target!r}, which is not a divergence on a "
            f"support, got topk={method.topk}, sampled_token={method.sampled_token}"
        )
    if method.topk is not None and method.sampled_token:
        yield f"topk must be None with sampled_token=True, got {method.topk}"
    if method.sampled_token and not (method.alpha == 1.0 and method.samples == "student"):
        yield (
            "sampled_token=True is the score-function form of the reverse KL on the student's own samples: alpha must "
            f"be 1 and samples 'student', got {method.alpha} and {method.samples!r}"
        )
    if method.entry_clip is not None and not (is_divergence and full):
        yield f"entry_clip must be None except for a divergence over the full vocabulary, got {method.entry_clip}"
    if method.importance_clip is not None and not is_divergence:
        yield (
            f"importance_clip must be None with target={method.target!r}, got {method.importance_clip} (the policy "
            "gradient has clip_low and clip_high)"
        )
    if method.importance_clip is not None and method.samples == "dataset":
        yield (
            f"importance_clip must be None with samples='dataset', which no known policy drew, got "
            f"{method.importance_clip}"
        )
    if method.target == "token_tilt" and method.alpha not in (0.0, 1.0):
        yield f"alpha must be 0 or 1 with target='token_tilt', which is exact for the two KLs, got {method.alpha}"


def _rewards_problems(method: Method) -> Iterator[str]:
    """Says what only judged samples of the student have a use for, where there are none."""
    mixed = method.target == "divergence" and method.distillation_weight < 1.0
    has_policy = mixed or method.target == "policy_gradient"
    if method.distillation_weight < 1.0 and method.target != "divergence":
        yield (
            f"distillation_weight must be 1 with target={method.target!r}: there is no divergence to mix, got "
            f"{method.distillation_weight}"
        )
    if method.distillation_weight == 0.0:
        yield "distillation_weight must be in (0, 1], got 0: target='policy_gradient' is the one without distillation"
    if method.num_generations == 1 and (has_policy or method.target in ("tilt", "token_tilt")):
        yield (
            "num_generations must be at least 2 where completions are compared with their group, got "
            f"{method.num_generations}"
        )
    if method.samples == "dataset" and method.target not in ("divergence", "imitation"):
        yield f"samples must be 'student' with target={method.target!r}, which learns from rewards, got 'dataset'"
    if method.samples == "dataset" and (mixed or method.context in AFTER_ROLLOUTS):
        yield (
            "samples must be 'student' with a context of feedback and with distillation_weight < 1: both need "
            "completions that were judged, got 'dataset'"
        )
    if method.samples == "student" and method.target == "imitation":
        yield (
            "samples must be 'dataset' with target='imitation': its own samples teach the student nothing, got "
            "'student'"
        )
    if method.samples == "dataset" and method.num_generations > 1:
        yield (
            "num_generations must be 1 with samples='dataset', which has one completion a row, got "
            f"{method.num_generations}"
        )
    clipped = method.importance_clip is not None or method.sampled_token
    one_teacher = method.target == "divergence" and not mixed and method.teacher != "trust_region"
    drawn_after = method.samples == "student" and method.context not in AFTER_ROLLOUTS
    if method.teacher_samples > 0 and not (one_teacher and drawn_after and not clipped):
        yield (
            "teacher_samples must be 0 except for a divergence alone, of one set of weights with a context known "
            f"before it samples, without importance_clip and sampled_token, got {method.teacher_samples}"
        )
    if method.target == "tilt" and method.skip_first_tokens > 0:
        yield (
            "skip_first_tokens must be 0 with target='tilt', which is about whole completions, got "
            f"{method.skip_first_tokens}"
        )


def _idle_problems(method: Method) -> Iterator[str]:
    """Says which fields were set and would be read by nothing."""
    reads = method.has_teacher or method.needs_reference
    has_policy = method.target == "policy_gradient" or method.distillation_weight < 1.0
    feedback_alone = (
        *("use_solution", "use_feedback", "dont_reprompt_on_self_success"),
        *("environment_feedback_only_without_solution", "remove_thinking"),
    )
    mixtures = "for target='policy_gradient' and mixtures (distillation_weight < 1)"
    needed: tuple[tuple[tuple[str, ...], str, bool], ...] = (
        (("overflow", "max_teacher_prompt_length"), "where a context is shown", method.context != "none"),
        (feedback_alone, "with context='feedback'", method.context == "feedback"),
        (("anchor",), "where a row's context is shown", method.context not in ("none", *AFTER_ROLLOUTS)),
        (("teacher",), "where a teacher or a reference is read", reads),
        (("update_rate",), "with teacher='ema'", reads and method.teacher == "ema"),
        (("sync_every",), "with teacher='periodic'", reads and method.teacher == "periodic"),
        (("trust_share",), "with teacher='trust_region'", method.teacher == "trust_region"),
        (("alpha", "temperature"), "for a divergence or a token tilt", method.has_teacher),
        (("gradient_tolerance",), "with target='divergence'", method.target == "divergence"),
        (("topk_of", "tail"), "with topk", method.topk is not None),
        (("inv_temperature",), "for a tilt", method.target in ("tilt", "token_tilt")),
        (("logz",), "with target='tilt'", method.target == "tilt"),
        (("advantages",), "for policy gradients and token tilts", has_policy or method.target == "token_tilt"),
        (("clip_low", "clip_high", "ratio_of", "kl_anchor"), mixtures, has_policy),
        (("aggregation",), "for other targets than 'tilt'", method.target != "tilt"),
    )
    changes = method.changes()
    for name, where in ((name, where) for names, where, has_effect in needed if not has_effect for name in names):
        if name in changes and changes[name] != getattr(Method, name):
            default = getattr(type(method), name)
            yield f"{name} must be left at {default!r}: it has an effect only {where}, got {changes[name]!r}"


@cache
def field_types() -> dict[str, Any]:
    """Returns name → type of every field of a method; what YAML and the command line parse by."""
    hints = get_type_hints(Method)
    return {f.name: hints[f.name] for f in fields(Method)}
