"""Makes teachers of the student's own past: a snapshot, a copy that is renewed now and then, a moving average.

    teacher = EMA(model, update_rate=0.05)          # SDPO's teacher
    distill_step(model, plan, teacher=teacher); optimizer.step()
    teacher.update(model, step)                     # teacher ← (1 - 0.05)·teacher + 0.05·student
    teacher.save(checkpoint); teacher.load(checkpoint)

What differs from the obvious: there is no second module. Only what is trained is kept, and for the teacher's pass the
student itself runs with these tensors in the place of its own. So under LoRA the adapter alone is averaged, wrapped and
sharded students need nothing special, and what is frozen is never copied. The factors of an adapter start from the
student's, where one is drawn and the other is zero; averaged from zero both would lag, and their product twice (26 % of
the change instead of 51 % after 14 steps at rate 0.05). What is left, the covariance of the two factors within the
average's memory, is of second order.

Weights in bfloat16 are averaged in float32: with a rate of 0.01 a bfloat16 average stands still, because what is added
is less than half its last digit. The 16 bits that float32 has beyond bfloat16 are kept beside the weights, so that the
average takes 4 bytes per weight in all. Persistent buffers are averaged too (copied, if they are not floats).

Not covered: float16 weights, which no optimizer trains either; tensors that are partitioned by DeepSpeed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel

from ..errors import ArgumentError, UnsupportedModelError
from .weights import StatefulTeacher

FILE_NAME = "teacher.safetensors"
# Elements that are averaged at a time: bounds what is allocated beside the average.
PIECE = 2**24
# Names that wrappers inside a model add to those of its weights.
WRAPPED = ("_orig_mod.", "_checkpoint_wrapped_module.")
REST = "float32_rest:"


class Snapshot(StatefulTeacher):
    """Keeps the student's weights as they were when this was made: a frozen teacher without a second model.

    `device` is where they are kept; they are moved in for the teacher's pass. None: where the student's are. The same
    tensors of the student must be trained for as long as the teacher is used. Raises `ArgumentError` for a student of
    which nothing is trained, and `UnsupportedModelError` for float16 weights.
    """

    shares_weights = False

    def __init__(self, student: nn.Module, *, device: torch.device | str | None = None) -> None:
        if not isinstance(student, nn.Module):
            raise ArgumentError(f"student must be a module, got {type(student).__name__}")
        named = _named(student)
        if any(hasattr(tensor, "ds_id") for tensor in named.values()):
            raise UnsupportedModelError("student has its weights partitioned by DeepSpeed: a copy would be empty")
        if not any(tensor.requires_grad for tensor in named.values()):
            raise ArgumentError(
                f"student must have weights that are trained, since nothing else is kept; got a "
                f"{type(student).__name__} without any"
            )
        self.device = None if device is None else torch.device(device)
        self._kept = {name: _Kept(tensor, self.device) for name, tensor in named.items()}
        self._entered = False

    @contextmanager
    def weights(self, student: nn.Module) -> Iterator[nn.Module]:
        """Gives the student, with the kept tensors in the place of its own."""
        if self._entered:
            yield student
            return
        self._entered = True
        try:
            with ExitStack() as undo:
                for module in _sharded_modules(student):
                    # A root that stays gathered after its forward would be the teacher's in the student's forward too.
                    module.reshard()
                    undo.callback(module.reshard)
                    undo.callback(module.register_forward_hook(lambda unit, *_: unit.reshard()).remove)
                for kept, tensor in self._pairs(student):
                    undo.callback(kept.put_into(tensor))
                yield student
        finally:
            self._entered = False

    def save(self, directory: Path) -> None:
        """Writes `teacher.safetensors`, whole or not at all. To be called on every rank; rank 0 writes."""
        self._require_outside("save")
        tensors: dict[str, Tensor] = {}
        for name, kept in self._kept.items():
            tensors[name] = kept.whole(kept.value)
            if kept.rest is not None:
                tensors[REST + name] = kept.whole(kept.rest)
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            _write(Path(directory), tensors, {"teacher": type(self).__name__})

    def load(self, directory: Path) -> None:
        """Reads what `save` wrote, to the last bit. Raises `ArgumentError` for another teacher's or model's file."""
        self._require_outside("load")
        path = Path(directory) / FILE_NAME
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("teacher")
            if kind != type(self).__name__:
                raise ArgumentError(f"{path} must be of a teacher {type(self).__name__}, got {kind}")
            names = set(file.keys())
            saved = {name for name in names if not name.startswith(REST)}
            if saved != self._kept.keys():
                raise ArgumentError(f"{path} must have the student's trained weights: {_difference(self._kept, saved)}")
            for name, kept in self._kept.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != kept.shape:
                    raise ArgumentError(f"{path} must have {name} of shape {tuple(kept.shape)}, got {shape}")
            for name, kept in self._kept.items():
                kept.value = kept.local(file.get_tensor(name))
                kept.rest = kept.local(file.get_tensor(REST + name)) if REST + name in names else None

    def _pairs(self, student: nn.Module) -> list[tuple[_Kept, Tensor]]:
        """Pairs each kept tensor, made as the student's is (device, dtype, sharding), with the student's own."""
        named = _named(student, trained=self._kept)
        if named.keys() != self._kept.keys():
            raise ArgumentError(
                f"student must be the model that this teacher was made from, with the same weights trained: "
                f"{_difference(self._kept, named)}"
            )
        pairs = [(kept, named[name]) for name, kept in self._kept.items()]
        for kept, tensor in pairs:
            kept.follow(tensor)
        return pairs

    def _require_outside(self, name: str) -> None:
        if self._entered:
            raise RuntimeError(f"{name} must not be called during the teacher's pass")


class PeriodicSync(Snapshot):
    """Copies the student, and is renewed after every `every` optimizer steps."""

    def __init__(self, student: nn.Module, every: int, *, device: torch.device | str | None = None) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every must be a positive number of optimizer steps, got {every!r}")
        super().__init__(student, device=device)
        self.every = every

    def update(self, student: nn.Module, step: int) -> None:
        self._require_outside("update")
        if step % self.every == 0:
            for kept, tensor in self._pairs(student):
                kept.move(tensor, 1.0)


class EMA(Snapshot):
    """Moves by the exponential average: `teacher ← (1 - update_rate)·teacher + update_rate·student` per optimizer step.

    `update_rate` is in [0, 1], the share of the *student*: 0.01 in SDFT (arXiv:2601.19897), 0.05 in SDPO
    (arXiv:2601.20802). What others call the decay is `1 - update_rate`.
    """

    def __init__(self, student: nn.Module, update_rate: float, *, device: torch.device | str | None = None) -> None:
        if not 0.0 <= update_rate <= 1.0:
            raise ArgumentError(f"update_rate must be in [0, 1], got {update_rate}")
        super().__init__(student, device=device)
        self.update_rate = update_rate

    def update(self, student: nn.Module, step: int) -> None:
        self._require_outside("update")
        for kept, tensor in self._pairs(student):
            kept.move(tensor, self.update_rate)


class _Sharding(NamedTuple):
    """Says how FSDP2 has distributed a tensor."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]


class _Kept:
    """Keeps a tensor in the student's dtype, this rank's part of it, and what float32 has beyond bfloat16."""

    def __init__(self, tensor: Tensor, device: torch.device | None) -> None:
        if tensor.dtype == torch.float16:
            raise UnsupportedModelError(
                "student has float16 weights that are trained; train float32 ones under autocast, or bfloat16 ones"
            )
        self.device = device  # None: the student's
        self.shape = tuple(tensor.shape)
        self.sharding = _sharding(tensor)
        own = _own(tensor)
        self.value = torch.empty(own.shape, dtype=own.dtype, device=device or own.device).copy_(own)
        self.rest: Tensor | None = (
            torch.zeros_like(self.value, dtype=torch.int16) if own.dtype == torch.bfloat16 else None
        )

    def follow(self, tensor: Tensor) -> None:
        """Brings it to the student's device, dtype and sharding, if they have changed since."""
        sharding, own = _sharding(tensor), _own(tensor)
        if sharding != self.sharding:
            value, rest = self.whole(self.value), None if self.rest is None else self.whole(self.rest)
            self.sharding = sharding
            self.value, self.rest = self.local(value), None if rest is None else self.local(rest)
        if own.dtype != self.value.dtype:
            precise = self.value if self.rest is None else _joined(self.value, self.rest)
            self.value, self.rest = precise.to(own.dtype), None
            if own.dtype == torch.bfloat16:
                self.value, self.rest = _split(precise.to(torch.float32))
        if self.device is None and own.device != self.value.device:
            self.value = self.value.to(own.device)
            self.rest = None if self.rest is None else self.rest.to(own.device)

    @torch.no_grad()
    def move(self, tensor: Tensor, rate: float) -> None:
        """Moves towards the student's tensor; a rate of 1, and what is no float, is a copy."""
        values, news = (own.reshape(-1).split(PIECE) for own in (self.value, _own(tensor)))
        rests = [None] * len(values) if self.rest is None else self.rest.view(-1).split(PIECE)
        for value, rest, new in zip(values, rests, (new.to(self.value.device) for new in news), strict=True):
            if rate == 1.0 or not value.is_floating_point():
                value.copy_(new)
                if rest is not None:
                    rest.zero_()
            elif rest is None:
                value.lerp_(new, rate)
            else:
                rounded, remainder = _split(_joined(value, rest).lerp_(new.to(torch.float32), rate))
                value.copy_(rounded)
                rest.copy_(remainder)

    def put_into(self, tensor: Tensor) -> Callable[[], None]:
        """Makes it the student's tensor's content; returns how to undo that."""
        if self.sharding is not None:
            # FSDP2 gathers from memory that it has a view of, so the contents have to change places.
            self._exchange(tensor)
            return lambda: self._exchange(tensor)
        own = tensor.data
        tensor.data = self.value.to(own.device)
        return lambda: setattr(tensor, "data", own)

    @torch.no_grad()
    def _exchange(self, tensor: Tensor) -> None:
        own = _own(tensor).detach()
        for value, other in zip(self.value.view(-1).split(PIECE), own.view(-1).split(PIECE), strict=True):
            kept = value.to(own.device, copy=True)
            value.copy_(other)
            other.copy_(kept)

    def whole(self, local: Tensor) -> Tensor:
        """Joins all ranks' parts."""
        if self.sharding is None:
            return local
        mesh, placements, shape, stride = self.sharding
        local = local.to(mesh.device_type)
        parts = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
        return parts.full_tensor()

    def local(self, whole: Tensor) -> Tensor:
        """Returns this rank's part, where it is kept."""
        if self.sharding is not None:
            mesh, placements, _, _ = self.sharding
            on_mesh = whole.to(mesh.device_type)
            whole = distribute_tensor(on_mesh, mesh, placements, src_data_rank=None).to_local()
        device = self.value.device if self.device is None else self.device
        return torch.empty(whole.shape, dtype=whole.dtype, device=device).copy_(whole)


def _named(student: nn.Module, trained: Mapping[str, object] | None = None) -> dict[str, Tensor]:
    """Names what is kept of a student: trained weights, each once, and persistent buffers.

    `trained`: names that are kept whether they are trained at this moment or not.
    """
    model = student
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    named: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad or (trained is not None and _plain(name) in trained):
            named[_plain(name)] = weight
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                named[_plain(f"{prefix}.{name}" if prefix else name)] = buffer
    return named


def _plain(name: str) -> str:
    for wrapped in WRAPPED:
        name = name.replace(wrapped, "")
    return name


def _sharded_modules(student: nn.Module) -> list[Any]:
    return [module for module in student.modules() if isinstance(module, FSDPModule)]


def _sharding(tensor: Tensor) -> _Sharding | None:
    if not isinstance(tensor, DTensor):
        return None
    return _Sharding(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())


def _own(tensor: Tensor) -> Tensor:
    """Returns this rank's part."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _split(precise: Tensor) -> tuple[Tensor, Tensor]:
    """Splits float32 into the nearest bfloat16 and how many float32 steps that is away: in [-2^15, 2^15), an int16.

    A bfloat16 is the upper half of a float32, and neighbouring floats are neighbouring integers.
    """
    bits = precise.contiguous().view(torch.int32)
    upper = (bits + 2**15) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def _joined(value: Tensor, rest: Tensor) -> Tensor:
    """Returns what `_split` was given."""
    return ((value.view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


def _difference(wanted: Mapping[str, object], given: Mapping[str, object] | set[str]) -> str:
    lacks, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    return f"lacks {len(lacks)} ({', '.join(lacks[:3])}), has {len(extra)} more ({', '.join(extra[:3])})"


def _write(directory: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes beside the file first, so that one that is there is replaced by a whole one or stays."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{FILE_NAME}.{os.getpid()}"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, directory / FILE_NAME)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
