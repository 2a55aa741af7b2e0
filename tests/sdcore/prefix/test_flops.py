"""The FLOPs that the shared passes do, as torch's counter sees them, are those of the cost model, to the last one.

Products of matrices are compared as they are. Attention is counted apart, by the pairs of query and key that are
visible: torch's `FlopCounterMode` has no formula for the CPU's fused kernel, counts rectangles where it has one, and
adds the scores that a kernel's backward computes again, which is the kernel's affair. Rotary angles are written as a
product of matrices and are no weights: they are the only products beside.

Padding is none of a plan's: where a strategy pads, completions are of one length per group here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from sdcore.models import Body, find_body
from sdcore.prefix.choice import STRATEGIES
from sdcore.prefix.costs.count import Cost, cost
from sdcore.prefix.costs.sizes import ModelSizes, model_sizes
from sdcore.prefix.planner import Plan, plan
from sdcore.prefix.strategies.cached import PromptStates
from sdcore.prefix.strategies.two_phase import micro_batches
from sdcore.prefix.tree import Tree
from tests.sdcore.prefix.models import VOCAB, checkpointed, tiny
from tests.sdcore.prefix.trees import conversations, random_plan

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Counted:
    """FLOPs of a pass."""

    products: int
    attention: int


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None) -> int:
    """Of the two products of attention over the visible pairs: those whose mask is finite, or the lower triangle."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    pairs = batch * heads * queries * keys
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask.isfinite() & (mask > torch.finfo(mask.dtype).min)
        pairs = int(visible.expand(batch, heads, queries, keys).sum())
    elif causal:
        assert queries == keys
        pairs = batch * heads * queries * (queries + 1) // 2
    return 2 * pairs * (width + value.shape[-1])


def _forward(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, **named: Any
) -> int:
    return _attention_flops(query, key, value, causal, named.get("attn_mask"))


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    **named: Any,
) -> int:
    """Two gradients of each of the two products."""
    return 2 * _attention_flops(query, key, value, causal, named.get("attn_mask"))


_forward._get_raw = _backward._get_raw = True  # type: ignore[attr-defined]  # formulas of tensors, not of shapes


def counted(model: PreTrainedModel, tokens: int, run: Callable[[], object]) -> Counted:
    """What `run` does, of which the model's rotary angles of so many tokens are taken off."""
    with FlopCounterMode(display=False, custom_mapping={ATTENTION: _forward, ATTENTION_BACKWARD: _backward}) as mode:
        run()
    flops = dict(mode.get_flop_counts()["Global"])
    # Half a head's frequencies times one position, per token; some versions of torch multiply elements instead.
    assert flops.pop(aten.bmm, 0) in (0, model.config.head_dim * tokens)
    attention = flops.pop(ATTENTION) + flops.pop(ATTENTION_BACKWARD, 0)
    products = flops.pop(aten.mm)
    assert not flops, f"operators that no test has accounted for: {flops}"
    return Counted(products, attention)


def expected(counts: Cost, made: Plan, sizes: ModelSizes, **options: Any) -> tuple[Counted, Counted]:
    """Student's and teacher's FLOPs by the cost model: weights, and what attention adds."""
    without = replace(sizes, layers=tuple(replace(layer, score_width=0) for layer in sizes.layers))
    products = cost(made, without, **options)
    assert counts.teacher is not None
    assert products.teacher is not None
    return tuple(  # type: ignore[return-value]
        Counted(of_products.flops, whole.flops - of_products.flops)
        for whole, of_products in ((counts.student, products.student), (counts.teacher, products.teacher))
    )


def student_pass(body: Body, trees: Sequence[Tree], strategy: str) -> Any:
    """Forward and backward; what a live teacher reads."""
    if strategy == "two_phase":
        recorded = []
        for part in micro_batches(body, trees, micro_batch=1, record=True):
            part.attach(part.hidden.square().sum()).backward()
            recorded += part.prompts.groups if part.prompts and part.group == len(recorded) else []
        return PromptStates(tuple(recorded))
    hidden, prompts = STRATEGIES[strategy].hidden_states(body, trees, record=strategy != "naive")
    hidden.square().sum().backward()
    return prompts


def teacher_pass(body: Body, trees: Sequence[Tree], strategy: str, prompts: Any) -> None:
    with torch.no_grad():
        STRATEGIES[strategy].hidden_states(body, trees, prompts=prompts)


def run_both(model: PreTrainedModel, made: Plan, counts: Cost, strategy: str, *, live: bool) -> tuple[Counted, Counted]:
    """What the student's and the teacher's pass do."""
    assert counts.teacher is not None
    body, prompts = find_body(model), []
    student = counted(model, counts.student.tokens, lambda: prompts.append(student_pass(body, made.student, strategy)))
    teacher = counted(
        model,
        counts.teacher.tokens,
        lambda: teacher_pass(body, made.teacher, strategy, prompts[0] if live else None),
    )
    return student, teacher


def equal_lengths() -> Plan:
    """Two groups of three and two completions; the teacher's context stands before the last two tokens."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCAB, (length,), generator=draw) for length in (23, 61)]
    completions = [
        [torch.randint(VOCAB, (length,), generator=draw) for _ in range(count)] for length, count in ((9, 3), (14, 2))
    ]
    contexts = [torch.randint(VOCAB, (length,), generator=draw) for length in (17, 6)]
    teacher = [torch.cat([p[:-2], c, p[-2:]]) for p, c in zip(prompts, contexts, strict=True)]
    return plan(prompts, completions, teacher)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pass_does_the_flops_of_the_cost_model(strategy: str, live: bool) -> None:
    made = equal_lengths()
    model = tiny("llama")
    options: dict[str, Any] = {"strategy": strategy, "teacher_shares": live}
    counts = cost(made, model.config, **options)
    assert counts.teacher is not None
    student, teacher = run_both(model, made, counts, strategy, live=live)
    assert (student, teacher) == expected(counts, made, model_sizes(model.config), **options)


@pytest.mark.parametrize("teacher", ["one", "each"])
def test_a_packed_row_has_no_padding(teacher: str) -> None:
    """Groups of every odd shape, completions without a token among them."""
    made = random_plan(1, teacher=teacher)
    model = tiny("llama")
    counts = cost(made, model.config)
    assert run_both(model, made, counts, "packed", live=True) == expected(counts, made, model_sizes(model.config))


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("live", [True, False])
def test_a_packed_row_of_turns_does_the_flops_of_the_trie(depth: int, live: bool) -> None:
    made = conversations(Random(depth), depth).plan
    model = tiny("llama")
    counts = cost(made, model.config, teacher_shares=live)
    done = run_both(model, made, counts, "packed", live=live)
    assert done == expected(counts, made, model_sizes(model.config), teacher_shares=live)


@pytest.mark.parametrize("strategy", ["packed", "cached", "two_phase"])
def test_sharing_saves_the_share_that_it_promises(strategy: str) -> None:
    """Counted FLOPs of both passes, shared over naive, against the cost model's speedup: no more than that is done."""
    made = equal_lengths()

    def done(strategy: str) -> tuple[int, Cost]:
        model = tiny("llama")
        counts = cost(made, model.config, strategy=strategy)
        both = run_both(model, made, counts, strategy, live=True)
        return sum(flops.products + flops.attention for flops in both), counts

    (naive, _), (shared, promised) = done("naive"), done(strategy)
    assert shared * promised.naive_flops <= naive * promised.flops
    assert promised.speedup > 1.5


@pytest.mark.parametrize("strategy", ["packed", "cached", "two_phase"])
def test_checkpointing_is_a_forward_more_but_for_what_no_gradient_needs(strategy: str) -> None:
    made = equal_lengths()
    model = tiny("llama")
    checkpointed(model)
    options: dict[str, Any] = {"strategy": strategy, "checkpointing": True}
    counts = cost(made, model.config, **options)
    student, _ = run_both(model, made, counts, strategy, live=True)
    most, _ = expected(counts, made, model_sizes(model.config), **options)
    # The second forward of a layer ends where backward has all that it needs: before the last matrix.
    config = model.config
    last_matrices = 2 * counts.student.tokens * config.intermediate_size * config.hidden_size * config.num_hidden_layers
    assert student.attention == most.attention
    assert student.products == most.products - last_matrices
