"""Gives the four fused trainers what they have in common: options, and what is refused before a step is made.

    class FusedGKDTrainer(OtherModelMixin, GKDTrainer): ...          # both mixins are `FusedTrainer`s

`FusedTrainer` stands before TRL's trainer among the bases. TRL's trainers of self-distillation are experimental and
change without notice, so a fused class names the methods of TRL's that it needs. A TRL that lacks one of them is
refused by that method's name, since overriding what nobody calls does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import nn

from ...errors import ArgumentError, UnsupportedModelError
from ...models import head_of
from ...prefix.choice import Strategy
from ...prefix.verification import Verify

TESTED = "1.16"  # of TRL

LossType = Literal["sequence", "as_configured"]


@dataclass(frozen=True, kw_only=True)
class FusedOptions:
    """Holds what TRL's configuration has no argument for. Raises `ArgumentError`."""

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
        """True if `compute_loss` goes backward itself, part by part."""
        return self.micro_batch is not None or self.strategy == "two_phase"


class FusedTrainer:
    """Constructs a fused trainer, or makes one of a trainer of TRL's that exists already (`adopt`)."""

    # Methods of TRL's trainer: those that are overridden, those that are called, and those that nobody calls any more.
    OVERRIDES: ClassVar[tuple[str, ...]] = ("compute_loss",)
    CALLS: ClassVar[tuple[str, ...]] = ()
    REPLACES: ClassVar[tuple[str, ...]] = ()
    fused: FusedOptions

    if TYPE_CHECKING:  # all else that a mixin reads is an attribute of TRL's trainer

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, *args: Any, fused: FusedOptions | None = None, **kwargs: Any) -> None:
        self.check_trl()
        self.fused = self.checked(fused)
        super().__init__(*args, **kwargs)
        self._set_up()

    @classmethod
    def check_trl(cls) -> None:
        """Raises `ImportError` where the installed TRL's trainer lacks what is overridden or called."""
        theirs = cls.__mro__[cls.__mro__.index(FusedTrainer) + 1]
        missing = [name for name in (*cls.OVERRIDES, *cls.CALLS, *cls.REPLACES) if not hasattr(theirs, name)]
        if missing:
            raise ImportError(
                f"{theirs.__module__}.{theirs.__name__} of the installed TRL has no {', '.join(missing)}, which "
                f"sdcore.integrations.trl overrides or calls; it is for trl {TESTED}.*"
            )

    @classmethod
    def checked(cls, fused: FusedOptions | None) -> FusedOptions:
        """Returns the options, or their defaults for None. Raises `ArgumentError` for what this trainer cannot do."""
        if fused is not None and not isinstance(fused, FusedOptions):
            raise ArgumentError(f"fused must be a FusedOptions or None, got {type(fused).__name__}")
        return FusedOptions() if fused is None else fused

    def adopt(self, fused: FusedOptions | None) -> None:
        """Sets up, as the constructor does, a trainer that was TRL's own; see `patch`."""
        self.fused = self.checked(fused)
        self._set_up()

    def _set_up(self) -> None:
        """Does what comes after TRL's own constructor."""

    def check_model(self) -> None:
        """Refuses, before any step, what cannot be treated exactly."""
        head_of(self.model)
        if not getattr(self.args, "disable_dropout", False) and any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules()
        ):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has dropout, which is always off in the passes: disable_dropout must be "
                "True, got False"
            )
        if self.fused.bounded and "lomo" in str(self.args.optim).lower():
            raise ArgumentError("micro_batch must be None for LOMO optimizers, which update weights in each backward")
