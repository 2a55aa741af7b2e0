"""Defines the published methods: sdpo, sdpo_code, sdft_paper, sdft_as_run, opsd, rl_tilt, grpo and the others.

    method = SDPO(alpha=1.0, topk=20)            # a preset with two of its fields changed
    method = preset("sdpo", alpha=1.0, topk=20)  # the same by name, as YAML and the command line have it

A preset is a `Method` (`method.py`) whose defaults are a publication's, named with its source; `docs/methods.md` has
the equations, and where published defaults differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import ArgumentError
from .fields import closest
from .method import Aggregation, ContextKind, Method, TargetKind, TeacherKind, field_types


@dataclass(frozen=True, kw_only=True)
class SDFTPaper(Method):
    """Minimises the reverse KL to the model with a demonstration in context: SDFT, as its paper writes it.

    `KL(p(·|x) ‖ q(·|x, demonstration))` on the student's own samples, the teacher an EMA of rate 0.01. Shenfeld et al.
    2026, "Self-Distillation Enables Continual Learning", arXiv:2601.19897. The first 3 completion tokens carry no loss,
    since they are where the teacher answers to its prompt's own words; one completion for a prompt, full vocabulary.
    """

    preset_name: ClassVar[str | None] = "sdft_paper"
    context: ContextKind = "demonstration"
    teacher: TeacherKind = "ema"
    update_rate: float = 0.01
    alpha: float = 1.0
    aggregation: Aggregation = "seq-mean-token-mean"
    skip_first_tokens: int = 3


@dataclass(frozen=True, kw_only=True)
class SDFTAsRun(SDFTPaper):
    """Minimises the forward KL: SDFT, as its published results were run.

    The README of github.com/Continual-Intelligence/Self-Distillation says (2026-04-07) that all of the paper's results
    were made with on-policy samples and the per-token forward KL, `KL(q ‖ p)`, and makes it the default. The rest is as
    in its `main.py`, but for a weight of whole sequences against vLLM's different rounding.
    """

    preset_name: ClassVar[str | None] = "sdft_as_run"
    alpha: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SDPO(Method):
    """Lets the teacher see a successful attempt, or what went wrong: self-distillation policy optimisation.

    Jensen-Shannon divergence on the student's top 100 tokens and a tail, the teacher an EMA of rate 0.05, 8 completions
    for a prompt. Hübotter et al. 2026, "Reinforcement Learning via Self-Distillation", arXiv:2601.20802; the defaults
    are those of github.com/lasgroup/SDPO, `verl/trainer/config/{actor/actor,sdpo}.yaml`.
    """

    preset_name: ClassVar[str | None] = "sdpo"
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
    """Runs SDPO with rich feedback, as on LiveCodeBench: reverse KL, top 20, a slower teacher.

    github.com/lasgroup/SDPO, `experiments/rich_feedback/run_sdpo.sh` (its `ema_update_rate=0.01` is a key that the
    configuration no longer has; today's is `teacher_update_rate`).
    """

    preset_name: ClassVar[str | None] = "sdpo_code"
    update_rate: float = 0.01
    alpha: float = 1.0
    topk: int | None = 20


@dataclass(frozen=True, kw_only=True)
class TurnHindsight(SDPO):
    """Lets the teacher of each turn see what was replied to it: SDPO with hindsight, for agents.

    After "HERO: Hindsight-Enhanced Reflection from Environment Observations", arXiv:2606.11559, whose abstract has the
    next observation as the feedback that is aligned with a turn; only that was read. Its reflection on the observation
    in words is not done, and everything else is SDPO's.
    """

    preset_name: ClassVar[str | None] = "turn_hindsight"
    context: ContextKind = "hindsight"


@dataclass(frozen=True, kw_only=True)
class OPSD(Method):
    """Lets the teacher, the model before training, read a reference solution: on-policy self-distillation.

    Zhao et al. 2026, "Self-Distilled Reasoner", arXiv:2601.18734; divergence and teacher are those of
    github.com/siyan-zhao/OPSD, `scripts/run_opsd.sh`: `--beta 0.5 --fixed_teacher`, full vocabulary. Under LoRA,
    `teacher="adapter_off"` is the same teacher without a copy. `entry_clip` is the paper's cap on the summand of a
    vocabulary entry, by which single tokens of style do not dominate; it is off in the scripts.
    """

    preset_name: ClassVar[str | None] = "opsd"
    context: ContextKind = "solution"
    teacher: TeacherKind = "frozen"
    alpha: float = 0.5


@dataclass(frozen=True, kw_only=True)
class ContextDistillation(Method):
    """Puts a system prompt, an instruction or a document into the weights: forward KL on the student's samples.

    Snell et al. 2022, "Learning by Distilling Context", arXiv:2209.15189, with the student's samples in the place of
    the teacher's (`teacher_samples=1.0`; `samples="dataset"` is for what the teacher, with the context, wrote). The
    teacher is the model before training: a live one forgets how to read the context that it no longer needs.
    """

    preset_name: ClassVar[str | None] = "context_distillation"
    context: ContextKind = "template"
    teacher: TeacherKind = "frozen"
    alpha: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RLTilt(Method):
    """Distils the tilted reference `p* ∝ p_ref·exp(inv_temperature·r)`: reinforcement learning as distillation.

    The reverse KL to p* over whole responses, by the variance of `d = log π - log p_ref - inv_temperature·r` within a
    group: `½ Σ (d_i - d̄)²/(G-1)`. VarGrad, Richter et al. 2020, arXiv:2010.10436; as a policy gradient REBEL, Gao et
    al. 2024, arXiv:2404.16767.
    """

    preset_name: ClassVar[str | None] = "rl_tilt"
    context: ContextKind = "none"
    teacher: TeacherKind = "frozen"
    target: TargetKind = "tilt"
    num_generations: int = 8


@dataclass(frozen=True, kw_only=True)
class GRPO(Method):
    """Follows the clipped policy gradient of advantages within a group: the baseline with rewards.

    Shao et al. 2024, arXiv:2402.03300, without its KL term, as most run it today; `kl_anchor=0.04, teacher="frozen"` is
    the paper's. `aggregation` is the paper's mean over completions; `"token-mean"` is DAPO's (arXiv:2503.14476).
    """

    preset_name: ClassVar[str | None] = "grpo"
    context: ContextKind = "none"
    target: TargetKind = "policy_gradient"
    aggregation: Aggregation = "seq-mean-token-mean"
    num_generations: int = 8


@dataclass(frozen=True, kw_only=True)
class SFT(Method):
    """Minimises the cross-entropy of the column `completion`: the baseline with demonstrations."""

    preset_name: ClassVar[str | None] = "sft"
    context: ContextKind = "none"
    target: TargetKind = "imitation"
    samples: Literal["student", "dataset"] = "dataset"


PRESETS: dict[str, type[Method]] = {
    str(made.preset_name): made
    for made in (SDFTPaper, SDFTAsRun, SDPO, SDPOCode, TurnHindsight, OPSD, ContextDistillation, RLTilt, GRPO, SFT)
}


def preset(name: str, **changes: Any) -> Method:
    """Returns the method of this name, some fields changed. Raises `ArgumentError`, which suggests the nearest name."""
    if name not in PRESETS:
        raise ArgumentError(f"method must be one of {', '.join(PRESETS)}, got {name!r}{closest(name, PRESETS)}")
    for field in changes:
        if field not in field_types():
            raise ArgumentError(f"{field} is no field of a method{closest(field, field_types())}")
    return PRESETS[name](**changes)
