"""Records what is alive during a computation and what it is for: every allocation of every operator, in order.

    with TimeLine(model, optimizer=optimizer) as line:
        loss = loss_of(model)             # line.enter("loss") before what is neither of the model's own passes
        line.enter("backward")
        loss.backward()
    lives = line.finished()
    lives.peak, lives.at_peak["logits"]

The clock counts allocations and releases, so that a curve is the same on every run and machine. What a storage is for
is told by where it was made and how long it lived; see `CATEGORIES`. So nothing is said before the computation ended.

What differs from the obvious: a forward's tensors that are gone when it ends are `temporary`, those that outlive it
`activations`, whoever holds them. Keys and values of a shared prefix are `prompt cache` where a strategy stores them by
themselves; a packed row reads them where its layers keep them, and stores none.

Not covered: what a library allocates below torch, the inside of compiled graphs (see `sdkernels.live_bytes`), the
allocator's rounding and fragmentation, storages from before that are no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sdkernels.live_bytes import LiveBytes

from ..errors import ArgumentError
from ..models import find_body
from ..models.names import cache_among

# From the bottom of a stacked plot to its top. Of a storage the first that fits is said, in the order of `_category`.
CATEGORIES: Final = (
    "weights",  # parameters and buffers, there from the start
    "optimizer",  # its states, likewise
    "gradients",  # what ends as a parameter's .grad, and tensors shaped like the output layer made on the way there
    "activations",  # made in a forward that they outlive
    "prompt cache",  # keys, values and states of shared prefixes, stored for themselves, and their gradients
    "workspace",  # inside an sdkernels operator, and what else a loss makes and keeps
    "logits",  # has a dimension as long as the vocabulary, and is none of the above
    "temporary",  # the rest: within a forward, within a backward
)
PHASES: Final = ("student forward", "teacher forward", "loss", "backward", "optimizer", "rest")
FORWARDS: Final = ("student forward", "teacher forward")


class Phase(NamedTuple):
    """Names one stretch of the clock."""

    name: str  # one of PHASES
    start: int
    end: int


@dataclass(slots=True, eq=False)
class _Storage:
    """Records the life of one storage."""

    size: int
    born: int
    phase: int  # index of the phase it was born in
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    category: str | None = None  # None: to be told at the end
    inside: bool = False  # an sdkernels operator made it
    after_model: bool = False  # made in a forward's phase, but by who called the model
    is_prompt: bool = False
    died: int | None = None


@dataclass(frozen=True, kw_only=True)
class Lives:
    """Counts the bytes that are alive after each tick of the clock, by category."""

    bytes: Mapping[str, np.ndarray]  # category -> (ticks + 1,) int64
    phases: tuple[Phase, ...]

    @property
    def total(self) -> np.ndarray:
        """Adds up the categories to (ticks + 1,) int64."""
        return np.sum(list(self.bytes.values()), axis=0)

    @property
    def peak_at(self) -> int:
        """Returns the first tick at which most is alive."""
        return int(self.total.argmax())

    @property
    def peak(self) -> int:
        return int(self.total.max())

    @property
    def at_peak(self) -> dict[str, int]:
        """Says what the peak is made of."""
        return {name: int(values[self.peak_at]) for name, values in self.bytes.items()}

    def phase_at(self, tick: int) -> str:
        """Returns the name of the first phase that the tick is in."""
        return next((phase.name for phase in self.phases if phase.start <= tick <= phase.end), "rest")

    def thinned(
        self, points: int, *, start: int = 0, end: int | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Cuts [start, end] into `points` stretches at most: first ticks, and the bytes where the total is highest.

        `end` None is the last tick. A peak of a single tick thus fills its stretch, and is seen.
        """
        total = self.total[start : None if end is None else end + 1]
        edges = np.unique(np.linspace(0, len(total), min(points, len(total)) + 1).astype(int))
        highest = [start + int(first + total[first:last].argmax()) for first, last in pairwise(edges)]
        return start + edges[:-1], {name: values[highest] for name, values in self.bytes.items()}


class TimeLine(LiveBytes):
    """Records, inside a `with` block, what lives and what for.

    The passes of the model are noticed; what else is a phase of its own is said with `enter`. `finished` is called
    after the block, with gradients in place.
    """

    def __init__(self, model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().__init__()
        self._model, self._body = model, find_body(model)
        self._head: Tensor = self._body.causal_lm.get_output_embeddings().weight  # (V, H)
        self._clock = 0
        self._changes: list[tuple[str, int]] = [("rest", 0)]
        self._storages: list[_Storage] = []
        self._by_address: dict[int, _Storage] = {}
        self._operators = 0  # sdkernels operators that are running, one in another
        self._after_model = False
        self._hooks: list[Any] = []
        self._depth = 0  # a custom operator's kernel runs with the mode entered once more
        self._resident: list[Tensor] = []  # keeps their addresses from being used again
        states = [] if optimizer is None else [v for state in optimizer.state.values() for v in state.values()]
        self._know("weights", [*model.parameters(), *model.buffers()])
        self._know("optimizer", (state for state in states if isinstance(state, Tensor)))
        self._know("gradients", (p.grad for p in model.parameters() if p.grad is not None))

    def enter(self, name: str) -> None:
        """Begins a phase, one of `PHASES`."""
        if name not in PHASES:
            raise ArgumentError(f"name must be one of {', '.join(PHASES)}, got {name!r}")
        self._after_model = False
        self._changes.append((name, self._clock))

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._hooks = [
                self._body.base.register_forward_pre_hook(self._before_model),
                self._body.base.register_forward_hook(self._behind_model, with_kwargs=True, always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            while self._hooks:
                self._hooks.pop().remove()

    def finished(self) -> Lives:
        """Returns the curves. To be called while the parameters still have their gradients."""
        grads = (p.grad for p in self._model.parameters() if p.grad is not None)
        gradients = {id(self._by_address.get(grad.untyped_storage()._cdata)) for grad in grads}
        ends = [start for _, start in self._changes[1:]] + [self._clock]
        phases = [Phase(name, start, end) for (name, start), end in zip(self._changes, ends, strict=True)]
        deltas = {name: np.zeros(self._clock + 1, dtype=np.int64) for name in CATEGORIES}
        for storage in self._storages:
            phase = phases[storage.phase]
            curve = deltas[storage.category or self._category(storage, phase, is_gradient=id(storage) in gradients)]
            curve[storage.born] += storage.size
            if storage.died is not None:
                curve[storage.died] -= storage.size
        shown = tuple(phase for phase in phases if phase.end > phase.start)
        return Lives(bytes={name: curve.cumsum() for name, curve in deltas.items()}, phases=shown)

    def _category(self, storage: _Storage, phase: Phase, *, is_gradient: bool) -> str:
        outlives = storage.died is None or storage.died > phase.end
        like_head = storage.shape == self._head.shape and phase.name not in FORWARDS
        if is_gradient or (like_head and storage.dtype == self._head.dtype):
            return "gradients"
        # Like the head in another dtype: its gradient is summed up in float32, or it is multiplied in float32.
        if storage.inside or like_head:
            return "workspace"
        if self._head.shape[0] in storage.shape:
            return "logits"
        # The gradients of a prefix's states outlive the backward that they come from; so do copies made for a teacher.
        is_state = len(storage.shape) == 4 and outlives and (storage.after_model or phase.name == "backward")
        if storage.is_prompt or is_state:
            return "prompt cache"
        if phase.name == "loss":
            return "workspace"
        return "activations" if phase.name in FORWARDS and outlives else "temporary"

    def _before_model(self, *_: Any) -> None:
        self.enter("student forward" if torch.is_grad_enabled() else "teacher forward")

    def _behind_model(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any], _output: Any) -> None:
        self._after_model = True
        # Strategies that store a prefix by itself hand it to the model as its cache.
        for layer in getattr(cache_among(kwargs), "layers", ()):
            for state in tree_leaves((getattr(layer, "prefix", None), getattr(layer, "recorded", tuple)())):
                if state is not None and (storage := self._by_address.get(state.untyped_storage()._cdata)) is not None:
                    storage.is_prompt = True

    def _know(self, category: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._resident.append(tensor)
            storage = tensor.untyped_storage()
            if tensor.device.type != "meta" and storage._cdata not in self._by_address:
                known = _Storage(storage.nbytes(), 0, 0, category=category)
                self._storages.append(known)
                self._by_address[storage._cdata] = known

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours = func.namespace == "sdkernels"
        self._operators += ours
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._operators -= ours

    def _see(self, tensor: Tensor, *, is_new: bool, origin: Any = None) -> None:
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            return
        address, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        before = self._sizes.get(address)
        super()._see(tensor, is_new=is_new, origin=origin)
        if (before is None and is_new) or (before and before != size):
            self._die(address)
            self._clock += 1
            made = _Storage(size, self._clock, len(self._changes) - 1, tensor.shape, tensor.dtype)
            made.inside, made.after_model = self._operators > 0, self._after_model
            self._storages.append(made)
            self._by_address[address] = made

    def _forget(self, address: int) -> None:
        super()._forget(address)
        self._die(address)

    def _die(self, address: int) -> None:
        storage = self._by_address.get(address)
        if storage is not None and storage.category is None:
            self._clock += 1
            storage.died = self._clock
            del self._by_address[address]
