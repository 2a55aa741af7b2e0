"""Makes a Hugging Face model return its last hidden states in place of logits, for code that makes its loss of them.

    with sdcore.patch(model):
        states = model(input_ids=ids).last_hidden_state          # (B, L, H); no logits are computed
        out = loss(states[mask], model.lm_head.weight, teacher_states[mask])

The states are those of `model(ids, output_hidden_states=True).hidden_states[-1]`, bit for bit, and the call goes the
way it always goes: through `DistributedDataParallel`, `fully_shard`, PEFT and accelerate's autocast, all of which see
it and its output.

What differs from the obvious: the output has no `logits` and no positions, rather than None or the states under their
name, so code that expects logits stops with the reason. `generate` works while patched, on the model's own logits. A
copy or pickle of a patched model is a plain model. Patches count: the model is itself again when the last is undone.

Not covered, and refused by name: what `sdcore.models.find_body` refuses, and models that cannot be told to compute
logits nowhere (no `logits_to_keep`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..errors import ArgumentError, UnsupportedModelError
from ..models import Body, find_body
from ..models.body import in_this_thread
from ..models.names import CACHE_OUTPUT

REPLACED = ("forward", "generate")
# What a causal language model's output has and a patched one's has not.
ABSENT = ("logits", "loss")


def patch(model: nn.Module) -> Patched:
    """Makes a causal language model return hidden states until this is undone.

        with sdcore.patch(model): ...                            # or: handle = sdcore.patch(model); handle.undo()

    `model` may be wrapped as for `distill_step`, before or after this call. Its outputs are then `StatesOutput`:
    `last_hidden_state` (B, L, H) in the model's dtype, in the graph, and all else that the family returns (caches,
    attentions, router logits, `aux_loss`) but logits and loss; and, for wrappers, `empty_logits` (B, 0, V).
    `logits_to_keep` selects states as it does logits.

    A patched model raises `ArgumentError` for `labels`, since its own loss needs logits, and for `return_dict=False`.
    Raises `UnsupportedModelError` and `ArgumentError` as `find_body` does.
    """
    body = find_body(model)
    known = _PATCHES.get(body.causal_lm)
    applied = (known and known()) or _Patch(body)
    applied.acquire()
    handle = Patched()
    handle.callback(applied.release)
    return handle


class Patched(ExitStack):
    """Holds a patch that can be undone; undoing twice is undoing once."""

    def undo(self) -> None:
        """Takes this patch back. The model returns logits again when no other patch of it is left."""
        self.close()


@dataclass(init=False, eq=False, repr=False)
class StatesOutput(ModelOutput):
    """Is what a patched model returns: a `ModelOutput` without `logits` and `loss`.

    Read by name only: by position, the first entry of what the model returned before was its logits.
    """

    last_hidden_state: Tensor | None = None  # (B, L, H), after the final norm; fewer than L with `logits_to_keep`
    hidden_states: Any = None
    attentions: Any = None

    def __init__(
        self,
        last_hidden_state: Tensor | Mapping[str, Any] | None = None,
        hidden_states: Any = None,
        attentions: Any = None,
        **others: Any,
    ) -> None:
        super().__init__()
        # accelerate rebuilds outputs as type(output)(mapping), pytrees as type(output)(**mapping).
        if not isinstance(last_hidden_state, Mapping):
            others |= {"hidden_states": hidden_states, "attentions": attentions}
            last_hidden_state = {"last_hidden_state": last_hidden_state} | others
        for name, value in last_hidden_state.items():
            if value is not None:
                self[name] = value

    def __getattr__(self, name: str) -> Any:
        if name == CACHE_OUTPUT:  # no field, which would hide that of the other name
            return None
        raise AttributeError(_absent(name) if name in ABSENT else f"StatesOutput has no attribute {name!r}")

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            raise TypeError(f"a StatesOutput is read by name, .last_hidden_state, got position {key!r}")
        if key in ABSENT:
            raise KeyError(_absent(key))
        return super().__getitem__(key)


def _absent(name: str) -> str:
    return (
        f"{name} is not there: this model was patched by sdcore.patch and returns last_hidden_state. Undo the patch to "
        "have logits again"
    )


class _Patch:
    """Replaces the methods of one model, and counts how many patches want them replaced.

    They are bound methods of plain functions, because accelerate takes methods apart, a copy of a model binds them to
    itself and a pickle stores their names. So the functions look at the model that they are called on.
    """

    def __init__(self, body: Body) -> None:
        self.body, self.count, self.pauses = body, 0, 0
        model = body.causal_lm
        # The class's: who replaces the model's own forward may take anything and pass it on.
        signature = inspect.signature(type(model).forward)
        self.parameters = list(signature.parameters)[1:]
        if "logits_to_keep" not in self.parameters:
            raise UnsupportedModelError(f"{body.name} cannot be called without computing logits (no logits_to_keep)")
        self.before = {name: vars(model)[name] for name in REPLACED if name in vars(model)}
        self.inner: dict[str, Callable[..., Any]] = {name: getattr(model, name) for name in REPLACED}

        def forward(itself: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.forward(itself, args, kwargs)

        def generate(itself: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.pauses += 1
            try:
                return self.own(itself, "generate")(*args, **kwargs)
            finally:
                self.pauses -= 1

        # Trainers read off it which columns of a data set the model takes.
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.methods = {"forward": MethodType(forward, model), "generate": MethodType(generate, model)}

    def acquire(self) -> None:
        model = self.body.causal_lm
        if self.count == 0 and model not in _PATCHES:
            _PATCHES[model] = ref(self)
            for name, method in self.methods.items():
                setattr(model, name, method)
        self.count += 1

    def release(self) -> None:
        self.count -= 1
        model = self.body.causal_lm
        # Where somebody has wrapped a method since, it has to stay where it is, and passes on from now.
        if self.count or any(vars(model).get(name) is not method for name, method in self.methods.items()):
            return
        del _PATCHES[model]
        for name in REPLACED:
            delattr(model, name)
            if name in self.before:
                setattr(model, name, self.before[name])

    def own(self, model: nn.Module, name: str) -> Callable[..., Any]:
        """Returns what the method was, of the model or of a copy of it."""
        inner = self.inner[name]
        function = getattr(inner, "__func__", None)
        return inner if model is self.body.causal_lm or function is None else MethodType(function, model)

    def forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inner = self.own(model, "forward")
        if not self.count or self.pauses or model is not self.body.causal_lm:
            return inner(*args, **kwargs)
        kwargs = dict(zip(self.parameters, args, strict=False)) | kwargs
        if kwargs.get("labels") is not None:
            raise ArgumentError(
                "labels must not be given to a model that sdcore.patch has patched: its own loss needs logits, which "
                "are not computed. Take labels out of what the model is called with and make the loss of "
                "output.last_hidden_state (sdkernels.linear_logprobs is the cross-entropy), or undo the patch"
            )
        asked = kwargs.get("return_dict")
        if not (self.body.config.return_dict if asked is None else asked):
            raise ArgumentError("return_dict must be True for a model that sdcore.patch has patched, got False")
        kept = kwargs.pop("logits_to_keep", None)
        kept = 0 if kept is None else kept
        # A number of positions of 0 means all of them; a list of no positions means none.
        nowhere = torch.empty(0, dtype=torch.int64, device=self.body.device)
        seen: list[Tensor] = []
        hook = in_this_thread(self.body.base, lambda output: seen.append(output.last_hidden_state))
        try:
            output = inner(**kwargs, logits_to_keep=nowhere)
        finally:
            hook.remove()
        states = seen[-1][:, slice(-kept, None) if isinstance(kept, int) else kept, :]
        others = {name: value for name, value in output.items() if name not in ABSENT}
        if output.logits.requires_grad:
            # The logits of no positions: where DistributedDataParallel looks for weights that a call has not used, from
            # what it returns backwards, it finds the output layer's, which are used outside.
            others["empty_logits"] = output.logits
        return StatesOutput(states, **others)


# Weak on both sides: a patch lives in its model's methods.
_PATCHES: WeakKeyDictionary[nn.Module, ReferenceType[_Patch]] = WeakKeyDictionary()
