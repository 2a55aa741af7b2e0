"""Has ranks that train one model do alike what they do together, so that none waits for another for ever.

Whoever calls a model through its wrapper takes part in what the ranks do together. Two things must be the same on all
of them, though their plans are not: what was chosen, and under FSDP2, which gathers the weights in every forward and
every backward, how often the model is run. So the ranks ask each other how often that will be, and who has less to run
adds runs of one token, without rows.

`DistributedDataParallel` only reduces gradients together, once a step, but also sends rank 0's buffers around before a
forward: here before the first of a pass, however many follow.

Not covered: meshes on which not all ranks hold the same model, since what is asked is asked of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...models import Body
from ..tree import Tree
from . import cached, naive, packed


def together(body: Body) -> bool:
    """True where other ranks take part in this model's runs."""
    return body.through is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def most(body: Body, *values: float) -> list[float]:
    """Returns of each value the largest that any rank gives. To be called by all of them; one synchronisation."""
    if not together(body):
        return list(values)
    largest = torch.tensor(values, dtype=torch.float32, device=body.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def runs_of_all(body: Body, runs: Sequence[int]) -> list[int]:
    """Returns at each place of a list of numbers of runs, which may be shorter on some ranks, the largest of all.

    Where the ranks need not run the model equally often, the list as it is.
    """
    if body.sharded is None or not together(body):
        return list(runs)
    length = int(most(body, len(runs))[0])
    return [int(count) for count in most(body, *runs, *[0] * (length - len(runs)))] if length else []


def idle(body: Body, runs: int) -> list[Tensor]:
    """Runs one token so many times: (0, H) each, connected to the model."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=body.device)
    return [body(token)[0, :0] for _ in range(runs)]


def hidden_states(body: Body, strategy: ModuleType, trees: Sequence[Tree], **options: Any) -> tuple[Tensor, Any]:
    """Calls `strategy.hidden_states(...)`, with as many runs of the model as on the rank that needs most."""
    if body.sharded is None or not together(body):
        with _one_broadcast(body):
            return strategy.hidden_states(body, trees, **options)
    own = _runs(body, strategy, trees, options)
    (wanted,) = runs_of_all(body, [own])
    hidden, prompts = strategy.hidden_states(body, trees, **options)
    return torch.cat([hidden, *idle(body, wanted - own)]), prompts


@contextmanager
def _one_broadcast(body: Body) -> Iterator[None]:
    """Lets `DistributedDataParallel` send buffers before the first forward only, while entered."""
    wrapper = body.through
    if not isinstance(wrapper, DistributedDataParallel) or not torch.is_grad_enabled():
        yield
        return

    def sent(*_: Any) -> None:
        wrapper.require_forward_param_sync = False

    handle = wrapper.register_forward_hook(sent)
    try:
        yield
    finally:
        handle.remove()
        wrapper.require_forward_param_sync = wrapper.require_backward_grad_sync


def _runs(body: Body, strategy: ModuleType, trees: Sequence[Tree], options: Mapping[str, Any]) -> int:
    """Counts how often a strategy runs the model."""
    if strategy is packed:
        return 1
    if strategy is naive:
        lengths = [length for tree in trees for length in tree.lengths if length]
        return max(1, len(naive.length_buckets(body, lengths, alone=options.get("alone", False))))
    options = {"micro_batch": getattr(strategy, "MICRO_BATCH", None), **options}
    return max(1, sum(plan.runs for plan in cached.schedules(body, trees, **options)))
