"""Counts what the passes of a plan cost, naive and shared: tokens, FLOPs and bytes. Integers only.

What is counted. A linear layer costs 2 FLOPs per weight and token; attention 2 FLOPs per pair of a query and a key that
it may see, per entry of the head's key and value, with windows, exactly summed over the positions; linear attention its
state's matrix products. A pass with gradient costs three times its forward, four times under gradient checkpointing.
The lm_head is not part of a pass: it sees N rows either way, and is given separately.

What differs from a measurement: attention counts the lower triangle, though a kernel that is given a mask computes the
whole square; padding is none of a plan's; bytes are estimates of what the layers keep for backward. It is a guide to
what sharing can gain, and the bound that a benchmark is held against.

Not covered: weights without a gradient (LoRA: counted as if they had one), models sharded over devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import ArgumentError
from ..planner import Plan, Tree
from .sizes import LINEAR_CHUNK, LayerSizes, ModelSizes, model_sizes

# Branches at a time in a two-phase pass without gradient.
BRANCHES = 4
STRATEGIES = ("packed", "cached", "two_phase", "naive")


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Is one pass over all groups. `naive_…` is what it costs with every completion as a sequence of its own."""

    tokens: int
    naive_tokens: int
    flops: int
    naive_flops: int
    kept_bytes: int  # activations that backward needs at once; 0 for a pass without gradient
    naive_kept_bytes: int
    prompt_bytes: int  # keys, values and states of the trunks, for the completions or the teacher's pass; 0 for naive
    working_bytes: int  # of a pass without gradient: what its largest layer holds while it runs; 0 for one with

    @property
    def speedup(self) -> float:
        return _ratio(self.naive_flops, self.flops)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Sums up both passes of a plan, and the lm_head's part, which sharing does not change."""

    strategy: str
    student: PassCost
    teacher: PassCost | None
    head_flops: int

    @property
    def tokens(self) -> int:
        return self.student.tokens + (self.teacher.tokens if self.teacher else 0)

    @property
    def naive_tokens(self) -> int:
        return self.student.naive_tokens + (self.teacher.naive_tokens if self.teacher else 0)

    @property
    def flops(self) -> int:
        """Leaves out the lm_head, which `head_flops` counts."""
        return self.student.flops + (self.teacher.flops if self.teacher else 0)

    @property
    def naive_flops(self) -> int:
        """Leaves out the lm_head, as `flops` does."""
        return self.student.naive_flops + (self.teacher.naive_flops if self.teacher else 0)

    @property
    def speedup(self) -> float:
        """Compares the passes, without the lm_head."""
        return _ratio(self.naive_flops, self.flops)

    @property
    def step_speedup(self) -> float:
        """Compares the whole step: the passes and the lm_head."""
        return _ratio(self.naive_flops + self.head_flops, self.flops + self.head_flops)


class TreeSizes(NamedTuple):
    """Holds the lengths of a `Tree`, of the completions that have rows only."""

    trunk: int
    branches: tuple[int, ...]
    rows: tuple[int, ...]
    shared: int = 0

    @classmethod
    def of(cls, tree: Tree) -> TreeSizes:
        return cls(
            len(tree.trunk) if tree.active else 0,
            tuple(len(tree.branches[i]) for i in tree.active),
            tuple(tree.rows[i] for i in tree.active),
            tree.shared if tree.active else 0,
        )


def cost(
    plan: Plan,
    config: Any,
    *,
    strategy: str = "packed",
    teacher_shares: bool = True,
    training: bool = True,
    checkpointing: bool = False,
    micro_batch: int | None = None,
    dtype_bytes: int = 2,
) -> Cost:
    """Counts what the passes of a plan cost in a model, and what they would cost naively.

    `config` is a Hugging Face configuration or a `ModelSizes`. `teacher_shares`: the teacher has the student's weights
    and reads its states of the tokens that both prompts begin with (a live teacher). `training`: the student's pass has
    a gradient. `checkpointing` keeps each layer's input only and computes it again. `micro_batch` completions are in
    flight at a time in `two_phase` (None: all). `dtype_bytes` is the size of a parameter and activation. The strategies
    differ in bytes, not in FLOPs. Raises `ArgumentError`, and `UnsupportedModelError` for a configuration that does not
    say what a layer costs.
    """
    options = _Options(strategy, teacher_shares, training, checkpointing, micro_batch, dtype_bytes)
    student, teacher = ([TreeSizes.of(tree) for tree in trees] for trees in (plan.student, plan.teacher))
    return _cost(student, teacher, model_sizes(config), options)


def cost_of_sizes(
    config: Any,
    *,
    prompt_tokens: int,
    context_tokens: int,
    completion_tokens: int,
    completions: int,
    tail_tokens: int = 0,
    context_per_completion: bool = False,
    strategy: str = "packed",
    teacher_shares: bool = True,
    training: bool = True,
    checkpointing: bool = False,
    micro_batch: int | None = None,
    dtype_bytes: int = 2,
) -> Cost:
    """Counts the `cost` of one group of equal completions, without tokens: P, C, R and G.

    The teacher's prompt is the student's with the context put in before its last `tail_tokens` tokens (those of the
    generation prompt). `context_per_completion`: each completion has another context.
    """
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("context_tokens", context_tokens, 0),
        ("completion_tokens", completion_tokens, 1),
        ("completions", completions, 1),
        ("tail_tokens", tail_tokens, 0),
    ):
        if value < least:
            raise ArgumentError(f"{name} must be at least {least}, got {value}")
    if tail_tokens > prompt_tokens:
        raise ArgumentError(f"tail_tokens must be at most prompt_tokens={prompt_tokens}, got {tail_tokens}")
    options = _Options(strategy, teacher_shares, training, checkpointing, micro_batch, dtype_bytes)
    alike = prompt_tokens - tail_tokens
    read = (completion_tokens - 1,) * completions  # the last token is predicted, never read
    rows = (completion_tokens,) * completions
    if context_per_completion and completions > 1:
        own = tuple(context_tokens + tail_tokens + tokens for tokens in read)
        teacher = TreeSizes(alike, own, rows, max(0, alike - 1))
    else:
        trunk = prompt_tokens + context_tokens
        teacher = TreeSizes(trunk, read, rows, min(alike, trunk - 1))
    return _cost([TreeSizes(prompt_tokens, read, rows)], [teacher], model_sizes(config), options)


class _Options(NamedTuple):
    strategy: str
    teacher_shares: bool
    training: bool
    checkpointing: bool
    micro_batch: int | None
    dtype_bytes: int


def _cost(student: Sequence[TreeSizes], teacher: Sequence[TreeSizes], sizes: ModelSizes, options: _Options) -> Cost:
    if options.strategy not in STRATEGIES:
        raise ArgumentError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {options.strategy!r}")
    if options.micro_batch is not None and options.micro_batch < 1:
        raise ArgumentError(f"micro_batch must be at least 1, or None for all, got {options.micro_batch}")
    rows = sum(sum(tree.rows) for tree in student)
    projections = (2 if teacher else 1) + (2 if options.training else 0)
    return Cost(
        strategy=options.strategy,
        student=_pass_cost(student, sizes, options, gradient=options.training, read_shared=False),
        teacher=_pass_cost(teacher, sizes, options, gradient=False, read_shared=options.teacher_shares)
        if teacher
        else None,
        head_flops=2 * rows * sizes.hidden * sizes.vocab * projections,
    )


def _pass_cost(
    trees: Sequence[TreeSizes], sizes: ModelSizes, options: _Options, *, gradient: bool, read_shared: bool
) -> PassCost:
    naive = [(0, tree.trunk + branch) for tree in trees for branch in tree.branches]
    branches = [(tree.trunk, tree.trunk + branch) for tree in trees for branch in tree.branches]
    shared = [(tree.shared if read_shared else 0, tree.trunk) for tree in trees] + branches
    spans = naive if options.strategy == "naive" else shared
    times = (4 if options.checkpointing else 3) if gradient else 1
    prompts = [] if options.strategy == "naive" else [_prompt_bytes(tree, sizes, options) for tree in trees]
    return PassCost(
        tokens=_tokens(spans),
        naive_tokens=_tokens(naive),
        flops=times * _flops(spans, sizes),
        naive_flops=times * _flops(naive, sizes),
        kept_bytes=_kept_bytes(trees, naive, sizes, options) if gradient else 0,
        naive_kept_bytes=_bytes_of_layers(naive, sizes, options, strategy="naive") if gradient else 0,
        prompt_bytes=sum(prompts),
        working_bytes=0 if gradient else _working_bytes(trees, read_shared, sizes, options),
    )


def _tokens(spans: Sequence[tuple[int, int]]) -> int:
    return sum(end - start for start, end in spans)


def _flops(spans: Sequence[tuple[int, int]], sizes: ModelSizes) -> int:
    """Counts forward FLOPs of the tokens at positions [start, end) of sequences whose earlier tokens are known."""
    tokens = _tokens(spans)
    windows = {layer.window for layer in sizes.layers}
    pairs = {window: sum(_pairs(start, end, window) for start, end in spans) for window in windows}
    return sum(
        count * (tokens * (2 * layer.weights + layer.state_flops) + 2 * layer.score_width * pairs[layer.window])
        for layer, count in Counter(sizes.layers).items()
    )


def _pairs(start: int, end: int, window: int | None) -> int:
    """Sums over positions p in [start, end) the tokens that p sees: p + 1, or `window` where that is less."""
    full_until = end if window is None else max(start, min(end, window))
    below = (full_until * (full_until + 1) - start * (start + 1)) // 2
    return below + (end - full_until) * (window or 0)


def _prompt_bytes(tree: TreeSizes, sizes: ModelSizes, options: _Options) -> int:
    """Counts what the layers remember of a trunk."""
    if not tree.branches:
        return 0
    return options.dtype_bytes * sum(
        min(tree.trunk, layer.window or tree.trunk) * layer.kv_entries + layer.state_entries for layer in sizes.layers
    )


def _kept_bytes(
    trees: Sequence[TreeSizes], naive: Sequence[tuple[int, int]], sizes: ModelSizes, options: _Options
) -> int:
    """Counts what a strategy keeps for backward at its peak; `naive` are the spans of whole sequences."""
    if options.strategy == "naive":
        return _bytes_of_layers(naive, sizes, options, strategy="naive")
    if options.strategy != "two_phase":
        return sum(_bytes_of_tree(tree, tree.branches, sizes, options) for tree in trees)
    # One group at a time, and few of its completions; beside them the gradient of the prompt's keys and values, which
    # the micro-batches add to.
    return max(
        (
            _bytes_of_tree(tree, sorted(tree.branches, reverse=True)[: options.micro_batch], sizes, options)
            + _prompt_bytes(tree, sizes, options)
            for tree in trees
        ),
        default=0,
    )


def _working_bytes(trees: Sequence[TreeSizes], read_shared: bool, sizes: ModelSizes, options: _Options) -> int:
    """Counts what the largest layer holds; without a gradient its tensors are gone when the next one runs."""
    first = [(tree.shared if read_shared else 0, tree.trunk) for tree in trees if tree.branches]
    rest = [sorted(((tree.trunk, tree.trunk + n) for n in tree.branches), reverse=True) for tree in trees]
    if options.strategy == "naive":
        batches = [[(0, end) for spans in rest for _, end in spans]]
    elif options.strategy == "packed":
        batches = [[*first, *(span for spans in rest for span in spans)]]
    else:  # a trunk, then its branches, of which two_phase runs few at a time
        at_a_time = BRANCHES if options.strategy == "two_phase" else None
        batches = [*([span] for span in first), *(spans[:at_a_time] for spans in rest)]
    own, wide = options.dtype_bytes, max(4, options.dtype_bytes)

    def held(layer: LayerSizes, batch: Sequence[tuple[int, int]]) -> int:
        kept = layer.kept * own + (layer.kept_float32 + layer.kept_chunked) * wide
        # Attention and feed-forward layer take turns: about two thirds of what backward would need is there at a time.
        held_bytes = _tokens(batch) * kept * 2 // 3
        if layer.score_heads and options.strategy != "packed":
            # The scores, with the mask, their exponentials and the probabilities.
            held_bytes += 3 * wide * layer.score_heads * sum((end - start) * end for start, end in batch)
        return held_bytes

    return max((held(layer, batch) for layer in set(sizes.layers) for batch in batches), default=0)


def _bytes_of_tree(tree: TreeSizes, branches: Sequence[int], sizes: ModelSizes, options: _Options) -> int:
    spans = [(0, tree.trunk), *((tree.trunk, tree.trunk + branch) for branch in branches)]
    return _bytes_of_layers(spans, sizes, options, strategy=options.strategy)


def _bytes_of_layers(spans: Sequence[tuple[int, int]], sizes: ModelSizes, options: _Options, *, strategy: str) -> int:
    """Counts what is kept of the tokens at positions [start, end) of sequences whose earlier tokens are read."""
    tokens, counted = _tokens(spans), Counter(spans)
    kinds = {layer: _bytes_of_layer(layer, counted, options, strategy) for layer in set(sizes.layers)}
    of_layers = [kinds[layer] for layer in sizes.layers]
    # The last norm, and what it gives.
    ends = tokens * sizes.hidden * (max(4, options.dtype_bytes) + 2 * options.dtype_bytes)
    if options.checkpointing:
        # Of each layer its input, and one layer that is being computed again.
        return ends + tokens * sizes.hidden * options.dtype_bytes * len(of_layers) + max(of_layers, default=0)
    return ends + sum(of_layers)


def _bytes_of_layer(layer: LayerSizes, spans: Counter[tuple[int, int]], options: _Options, strategy: str) -> int:
    own, wide = options.dtype_bytes, max(4, options.dtype_bytes)
    kept_bytes = 0
    for (start, end), count in spans.items():
        tokens = end - start
        chunks = -(-tokens // LINEAR_CHUNK) * LINEAR_CHUNK
        kept_bytes += count * (
            tokens * (layer.kept * own + layer.kept_float32 * wide) + chunks * layer.kept_chunked * wide
        )
        if strategy == "packed" or not layer.score_width or not tokens:
            continue
        read = start if layer.window is None else min(start, layer.window - 1)
        keys = read + tokens
        if layer.score_heads:
            # Probabilities in float32 and, where that is wider, in the model's dtype; tanh of the scores.
            scores = wide + (own if own < wide else 0) + (own if layer.softcapped else 0)
            kept_bytes += count * layer.score_heads * tokens * keys * scores
        elif read or (layer.window is not None and layer.window < tokens):
            kept_bytes += count * tokens * keys * own  # the mask, as numbers to add, of each sequence
        else:
            continue
        # Keys and values, also those of the prefix, once for each head that reads them.
        kept_bytes += count * (keys * layer.groups - tokens) * layer.kv_entries * own
    return kept_bytes


def _ratio(naive: int, shared: int) -> float:
    return naive / shared if shared else 1.0
