"""Verifies, before a strategy is first used on a kind of model, that it computes what naive computes.

A few short made-up sequences run both ways, without gradient: answers of one token and of several, conversations that
fork twice, with a tool's output that carries no loss, and a teacher with a view of each turn. The views leave the
student's tree at its root and at inner nodes, and read the student's states or do not. A strategy that disagrees is not
used, and the caller says so with the numbers.

How much may differ is not a constant: it is four times what naive itself differs by between a padded batch and one
sequence at a time, and never less than eps^(2/3) of the dtype (2e-5 in float32, 4 % in bfloat16), which rounding does
not reach and a wrong position, a lost prefix token or completions that see each other exceed. Float64 models are held
to float32's, in which transformers computes norms and recurrences anyway. In 16 bits a router that is undecided between
two experts may take either, so of a mixture of experts the worst tenth of the states may differ more. Float32 models
whose products are rounded to fewer digits, by TF32 or autocast, are held to bfloat16's.

Not covered: what short sequences cannot show, such as a sliding window of thousands of tokens; `verify="always"`
compares on the plan itself, at the price of a naive pass. In 16 bits, a freshly initialised model hides such faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from sdkernels.types import in_float64

from ..errors import UnsupportedModelError
from ..models import Body, without_dropout
from .planner import Plan
from .strategies import naive, ranks
from .trajectories import View, plan_trajectories

Verify = Literal["once", "always", "off"]

# The problem of each (model class, attention implementation, dtype, device, what was verified), or None.
_VERDICTS: dict[tuple[object, ...], str | None] = {}


def disagreement(body: Body, strategy: ModuleType, own_plan: Plan, verify: Verify) -> str | None:
    """Says how much the strategy's module differs from naive; None where it computes the same."""
    if verify == "always":
        return _compare(body, strategy, own_plan)
    return once(body, strategy.__name__, lambda: _compare(body, strategy, short_plan(body)), together=True)


def once(body: Body, what: str, check: Callable[[], str | None], *, together: bool) -> str | None:
    """Returns what the check says of a kind of model, which is asked when it is first met.

    `together`: all ranks call this, and check where one of them has not met the kind, since a check has collectives.
    What is refused stays refused: the reason of an `UnsupportedModelError` is the verdict.
    """
    kind = _kind(body, what)
    anew = kind not in _VERDICTS
    if together:
        anew = bool(ranks.most(body, anew)[0])
    if anew:
        try:
            _VERDICTS[kind] = check()
        except UnsupportedModelError as error:
            _VERDICTS[kind] = str(error)
    return _VERDICTS[kind]


def _kind(body: Body, what: str) -> tuple[object, ...]:
    attention = getattr(body.config, "_attn_implementation", None)
    return type(body.causal_lm), attention, body.dtype, body.device.type, what


def forget() -> None:
    """Makes every next use a first one."""
    _VERDICTS.clear()


def short_plan(body: Body) -> Plan:
    """Makes seeded sequences that have one of everything, short enough to cost nothing."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        return torch.randint(body.vocab_size, (length,), generator=generator).to(body.device)

    question, answer, tool, other = ids(11), ids(6), ids(3), ids(6)
    forked = [question, answer, tool, ids(7), tool]
    # Every second part carries loss.
    conversations = [[question, ids(1)], [question, ids(9)], [other, ids(4)], [other, ids(4)]]
    conversations += [[question, answer, tool, ids(5)], [*forked, ids(5)], [*forked, ids(4)]]
    masks, views = [], []
    for i, parts in enumerate(conversations):
        masks.append(torch.cat([torch.full((len(part),), j % 2 == 1) for j, part in enumerate(parts)]))
        for j in range(1, len(parts), 2):
            before, context = torch.cat(parts[:j]), ids(4)
            read = torch.cat([before[:-2], context, before[-2:], parts[j]])
            tokens = torch.arange(len(before), len(before) + len(parts[j]))
            views.append(View(ids=read, trajectory=i, tokens=tokens, positions=tokens + len(context)))
    return plan_trajectories([torch.cat(parts) for parts in conversations], masks, views)


@torch.no_grad()
def _compare(body: Body, strategy: ModuleType, checked: Plan) -> str | None:
    """Runs a plan both ways, its teacher with and without the student's states; the same result on every rank."""
    name = strategy.__name__.rpartition(".")[2]
    with without_dropout(body.model, training=False), refusing(f"{body.name} cannot be run by strategy {name}"):
        groups = zip(*checked.teachers, strict=True)
        record = [sorted({span for tree in of_group for span in tree.reads}) for of_group in groups] or False
        student, prompts = ranks.hidden_states(body, strategy, checked.student, record=record)
        passes = [(student, checked.student)]
        for trees in checked.teachers:
            passes.append((ranks.hidden_states(body, strategy, trees, prompts=prompts)[0], trees))
            passes.append((ranks.hidden_states(body, strategy, trees)[0], trees))
        compared = [
            (
                states,
                ranks.hidden_states(body, naive, trees)[0],
                ranks.hidden_states(body, naive, trees, alone=True)[0],
            )
            for states, trees in passes
        ]
    exceeds, reason = departure(body, compared, student.dtype)
    # Ranks that chose differently would wait for each other for ever.
    return f"hidden states {reason}" if ranks.most(body, exceeds)[0] else None


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Makes an `UnsupportedModelError` of what a model raises that takes other things than it is given."""
    try:
        yield
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{what}: {type(error).__name__}: {error}") from error


def departure(
    body: Body, compared: Sequence[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype, *, undecided: float = 0.1
) -> tuple[bool, str]:
    """Says whether rows differ by more than rounding in this dtype, and by how much.

    They are compared as (rows, the same of a padded batch, the same of one sequence at a time); the last are exact. Of
    a mixture of experts in 16 bits the share `undecided` of the rows may differ more.
    """
    error = noise = 0.0
    share = undecided if _routes(body) and torch.finfo(dtype).bits == 16 else 0.0
    for rows, padded, alone in compared:
        error = max(error, _difference(rows, alone, share))
        noise = max(noise, _difference(padded, alone, share))
    # TF32 and autocast round float32 products to fewer digits, and may do it alike in what is the noise here.
    reduced = torch.get_float32_matmul_precision() != "highest" or torch.is_autocast_enabled(body.device.type)
    least = torch.finfo(torch.bfloat16 if reduced and dtype == torch.float32 else torch.float32).eps
    allowed = max(4 * noise, max(torch.finfo(dtype).eps, least) ** (2 / 3))
    return error > allowed, (
        f"differ by {error:.1e} of their size, where naive differs by {noise:.1e} from itself "
        f"and {allowed:.1e} is allowed"
    )


def _difference(states: Tensor, exact: Tensor, undecided: float) -> float:
    """Returns the largest difference of a row, relative to the row's norm; infinite where a state is not finite.

    The share `undecided` of the rows is left out, those that differ most.
    """
    if len(exact) == 0:
        return 0.0
    states, exact = in_float64(states), in_float64(exact)
    difference = (states - exact).norm(dim=-1) / exact.norm(dim=-1)
    if not bool(difference.isfinite().all()):
        return math.inf
    return float(difference.sort(descending=True).values[int(len(exact) * undecided)])


def _routes(body: Body) -> bool:
    """True for a mixture of experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(body.config, name, None) or 0) > 1 for name in names)
