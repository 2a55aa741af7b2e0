"""What two ranks do for test_vocab_parallel.py: everything that the operations compute, with a head in two slices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sdkernels import (
    ImportanceClip,
    LogitTransform,
    TopK,
    TopKLogprobs,
    linear_divergence,
    linear_logprobs,
    linear_topk,
)
from sdkernels.testing import OBJECTIVES, Inputs, LiveBytes, make_arguments, make_inputs, relative_error, run_operation
from tests.sdkernels.ranks import Cases, error, in_float64, in_low_precision, piece, same_on_all_ranks, sharded, world

VOCAB = 44
# The slices of the head: rank 0's, then rank 1's.
SIZES = {"equal": (22, 22), "unequal": (9, 35), "one column": (43, 1)}
UNEQUAL = SIZES["unequal"]
HEAD = LogitTransform(scale=0.8, softcap=6.0, temperature=1.3)


def small(**changes: Any) -> Inputs:
    return make_inputs(7, 6, VOCAB, **{"masked": 0.2, "dtype": torch.float64} | changes)


def with_bias(head: LogitTransform) -> LogitTransform:
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return replace(head, bias=bias.requires_grad_())


def two_heads(objective: str) -> None:
    teacher_head = LogitTransform(bias=torch.linspace(-1, 1, VOCAB).double(), scale=1.2, softcap=8.0, temperature=0.7)
    heads = {"student_head": with_bias(HEAD), "teacher_head": teacher_head}
    in_float64(make_arguments(small(teacher_size=5), objective, gradient="recompute", **heads), UNEQUAL)


def one_head(objective: str) -> None:
    options = {"student_head": with_bias(LogitTransform(scale=0.7)), "temperature": 1.4, "reduction": "sum"}
    in_float64(make_arguments(small(noise=0.05), objective, **options), UNEQUAL)


def of_standard_deviation(objective: str, logit_std: float, limit: float) -> None:
    in_float64(make_arguments(small(logit_std=logit_std), objective), UNEQUAL, limit)


def with_levels(objective: str, level: float) -> None:
    """All logits are far from what has an exponential, one rank's a little further."""
    bias = torch.full((VOCAB,), level, dtype=torch.float64)
    bias[9:] *= 1.01
    arguments = make_arguments(small(), objective, student_head=LogitTransform(bias=bias.requires_grad_()))
    in_float64(arguments, UNEQUAL, 1e-8)


def with_a_wide_softcap(objective: str) -> None:
    """Capped logits that have no exponential."""
    head = with_bias(LogitTransform(softcap=300.0))
    in_float64(make_arguments(small(logit_std=200.0), objective, student_head=head), UNEQUAL, 1e-8)


def one_rank_keeps_what_the_other_loses(objective: str) -> None:
    """The gaps of one rank are small, but its log-ratios have no exponential: the mass is with the other."""
    for dtype in (torch.float64, torch.float32):
        inputs = small(noise=0.1, dtype=dtype)
        inputs.student_hidden.data[:, 0], inputs.teacher_hidden.data[:, 0] = 1.0, 0.0
        inputs.student_weight.data[:, 0] = 0.0
        inputs.student_weight.data[9:, 0] = 500.0
        if dtype == torch.float64:
            in_float64(make_arguments(inputs, objective), UNEQUAL, 1e-9)
        else:
            in_low_precision(make_arguments(inputs, objective), UNEQUAL, or_naive=True)


def close_on_one_rank_only(objective: str) -> None:
    """The gaps of one rank's columns are small in every row, those of the other's are not in some."""
    inputs = small(noise=0.1)
    inputs.student_weight.data[9:] *= 8
    in_float64(make_arguments(inputs, objective), UNEQUAL)


def padded(objective: str, vocab_size: int, sizes: tuple[int, ...]) -> None:
    """Columns from `vocab_size` on hold NaN and are as good as not there."""
    inputs = small(teacher_size=5)
    inputs.target_ids.remainder_(vocab_size)
    arguments = make_arguments(inputs, objective, vocab_size=vocab_size, student_head=with_bias(HEAD))
    for name in ("student_weight", "teacher_weight"):
        if arguments[name] is not None:
            arguments[name].data[vocab_size:] = math.nan
    if "cached" in objective:
        arguments["teacher"] = TopKLogprobs(arguments["teacher"].ids % vocab_size, arguments["teacher"].logprobs)
    in_float64(arguments, sizes)


def near(objective: str, noise: float, dtype: torch.dtype) -> None:
    arguments = make_arguments(make_inputs(16, 64, 1000, noise=noise, dtype=dtype, masked=0.2), objective)
    in_low_precision(arguments, (300, 700))


def near_with_a_head_of_its_own(objective: str) -> None:
    """The teacher's logits are there as such, and not as their difference from the student's."""
    inputs = make_inputs(16, 64, 1000, noise=0.003, masked=0.2)
    inputs = inputs._replace(teacher_weight=inputs.student_weight.detach() * 1.0001)
    in_low_precision(make_arguments(inputs, objective), (300, 700))


def live_bytes(objective: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(300, 16, 16000, dtype=dtype, masked=0.2)
    arguments = sharded(make_arguments(inputs, objective, workspace_mb=24), (6000, 10000))
    weight = arguments["student_weight"]
    uncounted = [t.numel() * t.element_size() for t in (inputs.student_hidden, weight)]
    if dtype != torch.float32:
        uncounted.append(4 * weight.numel())
    with LiveBytes(uncounted_bytes=uncounted) as probe:
        run_operation(linear_divergence, **arguments)
    assert probe.largest_numel < 300 * len(weight), probe.largest_origin
    assert probe.peak_bytes <= 24 << 20, f"{probe.peak_bytes / (1 << 20):.1f} MiB"
    projections = {"trust region": 3}.get(objective, 1 if "cached" in objective else 2)
    assert abs(probe.matmul_count(240, 16, len(weight)) - projections - 2) < 1e-9


def in_many_chunks(objective: str) -> None:
    """A workspace for few rows of the wider slice; the narrower would have it for more."""
    inputs = make_inputs(200, 8, 3000, dtype=torch.float64, masked=0.2)
    in_float64(make_arguments(inputs, objective, workspace_mb=20), (500, 2500))


def not_reduced(objective: str, frozen: bool) -> None:
    inputs = small()
    inputs.student_weight.requires_grad_(not frozen)
    upstream = torch.linspace(-1.0, 2.0, 7, dtype=torch.float64)
    in_float64(make_arguments(inputs, objective, reduction="none"), UNEQUAL, upstream=upstream)


def only_what_is_trained(hidden: bool, weight: bool) -> None:
    inputs = small()
    inputs.student_hidden.requires_grad_(hidden)
    inputs.student_weight.requires_grad_(weight)
    for gradient in ("in_forward", "recompute"):
        in_float64(make_arguments(inputs, "JSD", gradient=gradient), UNEQUAL)


def nothing_to_do() -> None:
    in_float64(make_arguments(small(), "JSD", token_weights=torch.zeros(7)), UNEQUAL)
    in_float64(make_arguments(make_inputs(0, 6, VOCAB, dtype=torch.float64), "reverse KL"), UNEQUAL)


def autocast() -> None:
    arguments = make_arguments(make_inputs(7, 6, VOCAB), "JSD")
    with torch.autocast("cpu"):
        whole = run_operation(linear_divergence, **arguments)
        mine = run_operation(linear_divergence, **sharded(arguments, UNEQUAL))
    same_on_all_ranks(mine)
    assert relative_error(mine.output.loss, whole.output.loss) < 1e-5


def logprobs(sizes: tuple[int, ...], head: LogitTransform | None, targets: bool) -> None:
    inputs = small()
    inputs.student_hidden.data[3] *= 500  # beyond what has an exponential
    results = []
    for own in (lambda tensor: tensor, lambda tensor: piece(tensor, sizes)):
        hidden, weight = inputs.student_hidden.detach().requires_grad_(), own(inputs.student_weight.detach())
        weight.requires_grad_()
        bias = None if head is None or head.bias is None else own(head.bias.detach().clone()).requires_grad_()
        out = linear_logprobs(
            hidden,
            weight,
            inputs.target_ids if targets else None,
            head=None if head is None else replace(head, bias=bias),
            temperature=0.9,
            process_group=None if len(weight) == VOCAB else world(),
        )
        loss = (out.entropy * torch.arange(7)).sum()
        if out.logprobs is not None:
            loss = loss + (out.logprobs * torch.linspace(-1, 1, 7, dtype=torch.float64)).sum()
        grads = torch.autograd.grad(loss, [leaf for leaf in (hidden, weight, bias) if leaf is not None])
        results.append(([out.entropy, *([out.logprobs] if targets else []), grads[0]], grads[1:]))
    (whole, whole_slices), (mine, slices) = results
    pairs = [*zip(mine, whole, strict=True), *zip(slices, (piece(s, sizes) for s in whole_slices), strict=True)]
    assert [error(*pair) for pair in pairs if not error(*pair) < 1e-10] == []


def topk(k: int, sizes: tuple[int, ...], vocab_size: int | None = None) -> None:
    inputs, head = small(requires_grad=False), with_bias(HEAD)
    whole = linear_topk(inputs.student_hidden, inputs.student_weight, k, head=head, vocab_size=vocab_size)
    own, weight = replace(head, bias=piece(head.bias, sizes)), piece(inputs.student_weight, sizes)
    mine = linear_topk(inputs.student_hidden, weight, k, head=own, vocab_size=vocab_size, process_group=world())
    assert torch.equal(mine.ids, whole.ids)
    assert error(mine.logprobs, whole.logprobs) < 1e-10


def ties() -> None:
    """Between ranks the lower id is the more likely; within one, `torch.topk` chooses, as in one process."""
    inputs = small(requires_grad=False)
    inputs.student_hidden.abs_().round_()  # so that all products are the same to the last bit
    inputs.student_weight.zero_()
    inputs.student_weight[[3, 30]] = 1.0
    for sizes in ((4, 40), (22, 22)):
        found = linear_topk(inputs.student_hidden, piece(inputs.student_weight, sizes), 2, process_group=world())
        assert found.ids.tolist() == [[3, 30]] * 7, found.ids


def not_finite() -> None:
    inputs = small()
    inputs.student_weight.data[VOCAB - 1, 0] = math.inf
    arguments = sharded(make_arguments(inputs, "JSD"), UNEQUAL)
    assert linear_divergence(**arguments).loss.isnan()
    refused(arguments | {"on_nonfinite": "raise"}, FloatingPointError, "not finite")


class Traffic:
    """The collectives of this process, each with the bytes that it contributes."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __enter__(self) -> Traffic:
        self.originals = dist.all_gather, dist.all_reduce

        def all_gather(outputs: list[Tensor], part: Tensor, group: Any = None) -> Any:
            self.seen.append(("gather", part.numel() * part.element_size()))
            return self.originals[0](outputs, part, group=group)

        def all_reduce(part: Tensor, group: Any = None) -> Any:
            self.seen.append(("reduce", part.numel() * part.element_size()))
            return self.originals[1](part, group=group)

        dist.all_gather, dist.all_reduce = all_gather, all_reduce
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather, dist.all_reduce = self.originals


# Float64 numbers a row in each gather of a chunk; the table of docs/integrations/vocab-parallel.md.
NUMBERS: dict[str, list[int]] = {
    "forward KL": [6, 2],
    "reverse KL": [6, 2],
    "JSD": [6, 2],
    "forward KL, student top-k": [6 + 3 * 5, 2],
    "JSD, student top-k without tail": [6 + 3 * 5],
    "sampled": [6 + 2],
    "JSD, importance clip": [6 + 2, 2],
    "forward KL, entry clip": [6, 2],
    "trust region": [6, 2],
    "JSD, cached teacher": [3 + 4, 1],
}


def traffic(objective: str) -> None:
    """One collective for the call; for each of its two chunks those of the table and one (C, H) for the gradient."""
    arguments = sharded(make_arguments(make_inputs(8, 6, VOCAB), objective), UNEQUAL)
    with Traffic() as traffic:
        run_operation(linear_divergence, **arguments)
    of_a_chunk = [("gather", 4 * 8 * numbers) for numbers in NUMBERS[objective]] + [("reduce", 4 * 6 * 4)]
    (kind, size), *others = traffic.seen
    assert others == 2 * of_a_chunk, others
    assert kind == "gather"
    assert size < 1024


def spread(rows: tuple[int, ...], weights: str, objective: str = "JSD", **changes: Any) -> None:
    """The ranks' parts of a mean, and their gradients, add up to those of one process with all rows."""
    inputs = small(masked=0.3 if weights == "some" else 0.0)
    token_weights = None if weights == "none" else inputs.token_weights
    if weights == "zero on rank 0":
        inputs.token_weights[: rows[0]] = 0.0
    elif weights == "zero":
        inputs.token_weights.zero_()
    arguments = make_arguments(inputs, objective, token_weights=token_weights, **changes)
    whole = run_operation(linear_divergence, **arguments)
    by_row = ("student_hidden", "teacher_hidden", "token_weights", "target_ids")
    own = arguments | {name: piece(arguments.get(name), rows) for name in by_row}
    if isinstance(own.get("importance"), ImportanceClip):
        own["importance"] = replace(own["importance"], old_logprobs=piece(own["importance"].old_logprobs, rows))
    mine = run_operation(linear_divergence, **own, normalizer_group=world())
    for part, all_of_it in ((mine.output.loss, whole.output.loss), (mine.weight_gradient, whole.weight_gradient)):
        total = part.clone()
        dist.all_reduce(total)
        assert error(total, all_of_it) < 1e-12
    assert error(mine.hidden_gradient, piece(whole.hidden_gradient, rows)) < 1e-12


def both_groups_of_two_ranks() -> None:
    """Slices over both ranks and a mean over this one, then the other way round."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    arguments = make_arguments(small(), "JSD")
    whole = run_operation(linear_divergence, **arguments)
    mine = run_operation(linear_divergence, **sharded(arguments, UNEQUAL), normalizer_group=alone)
    assert error(mine.output.loss, whole.output.loss) < 1e-12
    assert error(mine.weight_gradient, piece(whole.weight_gradient, UNEQUAL)) < 1e-10
    mine = run_operation(linear_divergence, **arguments, process_group=alone, normalizer_group=world())
    assert error(2 * mine.output.loss, whole.output.loss) < 1e-12
    assert error(2 * mine.weight_gradient, whole.weight_gradient) < 1e-10


def both_groups_of_four_ranks() -> None:
    """Slices over ranks 0, 1 and 2, 3; rows over 0, 2 and 1, 3."""
    rank, rows = dist.get_rank(), (2, 5)
    slices = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    replicas = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][rank % 2]
    arguments = make_arguments(small(), "JSD")
    whole = run_operation(linear_divergence, **arguments)
    own = sharded(arguments, UNEQUAL, rank % 2) | {"process_group": slices, "normalizer_group": replicas}
    for name in ("student_hidden", "teacher_hidden", "token_weights"):
        own[name] = piece(own[name], rows, rank // 2)
    mine = run_operation(linear_divergence, **own)
    loss, weight_gradient = mine.output.loss.clone(), mine.weight_gradient.clone()
    for part in (loss, weight_gradient):
        dist.all_reduce(part, group=replicas)
    assert error(loss, whole.output.loss) < 1e-12
    assert error(weight_gradient, piece(whole.weight_gradient, UNEQUAL, rank % 2)) < 1e-10
    assert error(mine.hidden_gradient, piece(whole.hidden_gradient, rows, rank // 2)) < 1e-10


def cases_of_four() -> Cases:
    return {"both groups": both_groups_of_four_ranks}


def refused(arguments: dict[str, Any], error_type: type[Exception], *words: str) -> None:
    with pytest.raises(error_type) as caught:
        linear_divergence(**arguments)
    missing = [word for word in words if word not in str(caught.value)]
    assert missing == [], f"{missing} not in {caught.value}"


def double(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


UNSHARDED = {"process_group": None, "student_weight": double(VOCAB, 6)}
# What rank 0 changes of a call, what rank 1 does, and what both are told.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "no rows of the head": ({}, {"student_weight": double(0, 6)}, ValueError, ("student_weight", "none on rank 1")),
    "other rows": ({}, {"student_hidden": double(8, 6)}, ValueError, ("student_hidden", "(7, 6)", "(8, 6)", "rank 1")),
    "another width": ({}, {"student_weight": double(35, 5)}, ValueError, ("student_weight", "(9, 6)", "(35, 5)")),
    "another dtype": ({}, {"student_weight": torch.ones(35, 6)}, ValueError, ("student_weight", "float64", "float32")),
    "other weighted rows": ({}, {"token_weights": torch.eye(7)[0]}, ValueError, ("rows with a weight", "7 on", "1 on")),
    "another option": ({"alpha": 0.4}, {"alpha": 0.6}, ValueError, ("every option of the call", "rank 1")),
    "a teacher here only": ({}, {"teacher_hidden": None}, ValueError, ("teacher_hidden", "no tensor on rank 1")),
    "no tensor": ({"student_weight": 3}, {"student_weight": 3}, TypeError, ("student_weight", "torch.Tensor", "int")),
    "a triton backend": ({"backend": "triton"}, {"backend": "triton"}, ValueError, ("backend", "process_group")),
    "no group": ({"process_group": "tp"}, {"process_group": "tp"}, TypeError, ("process_group", "ProcessGroup", "str")),
    "NaN weights elsewhere": (
        UNSHARDED | {"normalizer_group": world},
        UNSHARDED | {"normalizer_group": world, "token_weights": torch.full((7,), math.nan)},
        ValueError,
        ("token_weights", "finite", "normalizer_group"),
    ),
    "weights that cancel": (
        UNSHARDED | {"normalizer_group": world, "token_weights": torch.ones(7)},
        UNSHARDED | {"normalizer_group": world, "token_weights": -torch.ones(7)},
        ValueError,
        ("token_weights", "positive sum over normalizer_group"),
    ),
    **{
        name: (changes, changes, error_type, words)
        for name, changes, error_type, words in [
            ("too large a k", {"support": TopK(VOCAB + 1)}, ValueError, ("topk", "V=44", "45")),
            ("too large a vocab_size", {"vocab_size": 45}, ValueError, ("vocab_size", "V=44", "45")),
            ("an id outside", {"target_ids": torch.full((7,), 44)}, ValueError, ("target_ids", "V=44", "44")),
            (
                "the whole bias",
                {"student_head": LogitTransform(bias=double(VOCAB))},
                ValueError,
                ("student_head.bias", "44"),
            ),
            (
                "no group of rows",
                UNSHARDED | {"normalizer_group": 1},
                TypeError,
                ("normalizer_group", "ProcessGroup", "int"),
            ),
            (
                "a sum over a group",
                UNSHARDED | {"normalizer_group": world, "reduction": "sum"},
                ValueError,
                ("normalizer_group", "reduction='mean'", "'sum'"),
            ),
        ]
    },
}


def refuse(name: str) -> None:
    *of_ranks, error_type, words = REFUSED[name]
    changes = {key: value() if value is world else value for key, value in of_ranks[dist.get_rank()].items()}
    refused(sharded(make_arguments(small(masked=0.0), "JSD"), UNEQUAL) | changes, error_type, *words)


def cases() -> Cases:
    """Every case has a name, and is run by both ranks in the same order."""
    found: Cases = {}

    def add(name: str, run: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        assert name not in found, name
        found[name] = lambda: run(*args, **kwargs)

    for objective in OBJECTIVES:
        for label, sizes in SIZES.items():
            add(
                f"{objective}, {label} slices", lambda o, s: in_float64(make_arguments(small(), o), s), objective, sizes
            )
        add(f"{objective}, two heads with bias and soft-cap, recomputed", two_heads, objective)
        add(f"{objective}, one head with bias and temperature, sum", one_head, objective)
        add(f"{objective}, logits of 60", of_standard_deviation, objective, 60.0, 1e-9)
        add(f"{objective}, logits of 1000", of_standard_deviation, objective, 1e3, 1e-8)
        for level in (-1e4, 300.0, 1e4):
            add(f"{objective}, all logits about {level:g}", with_levels, objective, level)
        add(f"{objective}, close on one rank only", close_on_one_rank_only, objective)
        add(f"{objective}, one rank keeps what the other loses", one_rank_keeps_what_the_other_loses, objective)
        add(f"{objective}, a wide soft-cap", with_a_wide_softcap, objective)
        add(f"{objective}, padding on the last rank", padded, objective, 40, (15, 29))
        add(f"{objective}, padding fills the last rank", padded, objective, 20, (24, 20))
        add(f"{objective}, noise 0.003, a head of its own", near_with_a_head_of_its_own, objective)
        for dtype in (torch.float32, torch.bfloat16):
            add(f"{objective}, noise 0.3, {dtype}", near, objective, 0.3, dtype)
            add(f"{objective}, noise 0.003, {dtype}", near, objective, 0.003, dtype)
            add(f"{objective}, live bytes, {dtype}", live_bytes, objective, dtype)
    for objective in ("forward KL", "reverse KL", "JSD", "reverse KL, teacher top-k without tail", "sampled"):
        add(f"{objective}, many chunks", in_many_chunks, objective)
        add(f"{objective}, not reduced", not_reduced, objective, False)
        add(f"{objective}, not reduced, frozen head", not_reduced, objective, True)
    for hidden, weight in ((True, False), (False, True), (False, False)):
        add(f"hidden states trained {hidden}, head trained {weight}", only_what_is_trained, hidden, weight)
    add("no rows to do", nothing_to_do)
    add("autocast", autocast)
    for label, sizes in SIZES.items():
        for targets in (True, False):
            for head in (None, with_bias(HEAD)):
                name = f"log-probabilities, {label} slices, targets {targets}, {'no head' if head is None else 'head'}"
                add(name, logprobs, sizes, head, targets)
        for k in (1, 5, 30, VOCAB):
            add(f"top {k}, {label} slices", topk, k, sizes)
    add("top 5 of a padded vocabulary", topk, 5, (24, 20), vocab_size=20)
    add("equal logits", ties)
    add("not finite", not_finite)
    for objective in NUMBERS:
        add(f"{objective}, traffic", traffic, objective)
    for rows in ((3, 4), (7, 0), (0, 7), (1, 6)):
        for weights in ("none", "some", "zero on rank 0", "zero"):
            add(f"rows {rows}, weights {weights}", spread, rows, weights)
    for gradient in ("in_forward", "recompute"):
        add(f"rows with importance, {gradient}", spread, (2, 5), "some", "JSD, importance clip", gradient=gradient)
    add("both groups", both_groups_of_two_ranks)
    for name in REFUSED:
        add(f"refused: {name}", refuse, name)
    return found
