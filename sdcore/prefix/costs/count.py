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
from typing import Any, NamedTuple, TypeAlias

from ...errors import ArgumentError
from ..planner import Plan
from ..tree import Tree
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
    prompt_bytes: int  # keys, values and states of nodes with children, of each tree's longest path; 0 for naive
    working_bytes: int  # of a pass without gradient: what its largest layer holds while it runs; 0 for one with

    @property
    def speedup(self) -> float:
        return _ratio(self.naive_flops, self.flops)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Sums up the passes of a plan, and the lm_head's part, which sharing does not change."""

    strategy: str
    student: PassCost
    teachers: tuple[PassCost, ...]  # of each that is told apart; none for a plan without
    head_flops: int

    @property
    def teacher(self) -> PassCost | None:
        """Is the last teacher's pass, the one that may read the student's states."""
        return self.teachers[-1] if self.teachers else None

    @property
    def tokens(self) -> int:
        return sum(of_pass.tokens for of_pass in (self.student, *self.teachers))

    @property
    def naive_tokens(self) -> int:
        return sum(of_pass.naive_tokens for of_pass in (self.student, *self.teachers))

    @property
    def flops(self) -> int:
        """Leaves out the lm_head, which `head_flops` counts."""
        return sum(of_pass.flops for of_pass in (self.student, *self.teachers))

    @property
    def naive_flops(self) -> int:
        """Leaves out the lm_head, as `flops` does."""
        return sum(of_pass.naive_flops for of_pass in (self.student, *self.teachers))

    @property
    def speedup(self) -> float:
        """Compares the passes, without the lm_head."""
        return _ratio(self.naive_flops, self.flops)

    @property
    def step_speedup(self) -> float:
        """Compares the whole step: the passes and the lm_head."""
        return _ratio(self.naive_flops + self.head_flops, self.flops + self.head_flops)


Span: TypeAlias = tuple[int, int]  # tokens at positions [start, end) of a sequence whose earlier tokens are known


class TreeSizes(NamedTuple):
    """Holds the lengths of what is computed of a `Tree`; nothing where no state is asked for."""

    spans: tuple[Span, ...]  # of each node, depth first
    parents: tuple[int, ...]  # of each node; -1: none, or one that is borrowed
    sequences: tuple[int, ...]  # tokens of each sequence that has rows

    @classmethod
    def of(cls, tree: Tree, *, read_shared: bool) -> TreeSizes:
        tree = tree if read_shared else tree.alone
        if not tree.num_rows:
            return cls((), (), ())
        became = {i: n for n, i in enumerate(i for i, place in enumerate(tree.borrowed) if place < 0)}
        return cls(
            tuple((tree.begins[i], tree.begins[i] + len(tree.spans[i])) for i in became),
            tuple(became.get(tree.parents[i], -1) for i in became),
            tuple(length for length in tree.lengths if length),
        )

    @property
    def naive(self) -> list[Span]:
        return [(0, end) for end in self.sequences]

    def families(self) -> list[tuple[list[Span], list[Span]]]:
        """Lists what is in memory at a time, depth first: a path of nodes with children, and the leaves at its end."""
        inner = set(self.parents) - {-1} or ({0} if self.parents.count(-1) == 1 else set())
        leaves: dict[int, list[Span]] = {node: [] for node in sorted({-1, *inner})}
        for i, (span, parent) in enumerate(zip(self.spans, self.parents, strict=True)):
            if i not in inner:
                leaves[parent].append(span)
        paths: dict[int, list[Span]] = {-1: []}
        for node in sorted(inner):
            paths[node] = [*paths[self.parents[node]], self.spans[node]]
        return [(paths[node], sorted(ends, key=lambda end: end[0] - end[1])) for node, ends in leaves.items()]


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

    `config` is a Hugging Face configuration or a `ModelSizes`. `teacher_shares`: the last teacher has the student's
    weights and reads its states of the tokens that both prompts begin with (a live teacher). `training`: the student's
    pass has a gradient. `checkpointing` keeps each layer's input only and computes it again. `micro_batch` completions
    are in flight at a time in `two_phase` (None: all). `dtype_bytes` is the size of a parameter and activation. The
    strategies differ in bytes, not in FLOPs. Raises `ArgumentError`, and `UnsupportedModelError` for a configuration
    that does not say what a layer costs.
    """
    options = _Options(strategy, teacher_shares, training, checkpointing, micro_batch, dtype_bytes)
    student, *teachers = [
        [TreeSizes.of(tree, read_shared=reads) for tree in trees]
        for trees, reads in plan.sides(teacher_shares=teacher_shares)
    ]
    return _cost(student, teachers, plan.num_rows, model_sizes(config), options)


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
    read = completion_tokens - 1  # the last token is predicted, never read

    def of_group(trunk: int, branch: int, shared: int) -> TreeSizes:
        """Sizes a trunk, whose first tokens are read, and equal branches."""
        spans = [(min(shared, max(0, trunk - 1)) if teacher_shares else 0, trunk)] if trunk else []
        branches = [(trunk, trunk + branch)] * (completions if branch else 0)
        parents = [-1] * len(spans) + [len(spans) - 1] * len(branches)
        return TreeSizes((*spans, *branches), tuple(parents), (trunk + branch,) * completions)

    if context_per_completion and completions > 1:
        teacher = of_group(alike, context_tokens + tail_tokens + read, alike)
    else:
        teacher = of_group(prompt_tokens + context_tokens, read, alike)
    student = of_group(prompt_tokens, read, 0)
    return _cost([student], [[teacher]], completion_tokens * completions, model_sizes(config), options)


class _Options(NamedTuple):
    strategy: str
    teacher_shares: bool
    training: bool
    checkpointing: bool
    micro_batch: int | None
    dtype_bytes: int


def _cost(
    student: Sequence[TreeSizes],
    teachers: Sequence[Sequence[TreeSizes]],
    rows: int,
    sizes: ModelSizes,
    options: _Options,
) -> Cost:
    if options.strategy not in STRATEGIES:
        raise ArgumentError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {options.strategy!r}")
    if options.micro_batch is not None and options.micro_batch < 1:
        raise ArgumentError(f"micro_batch must be at least 1, or None for all, got {options.micro_batch}")
    projections = 1 + len(teachers) + (2 if options.training else 0)
    return Cost(
        strategy=options.strategy,
        student=_pass_cost(student, sizes, options, gradient=options.training),
        teachers=tuple(_pass_cost(trees, sizes, options, gradient=False) for trees in teachers),
        head_flops=2 * rows * sizes.hidden * sizes.vocab * projections,
    )


def _pass_cost(trees: Sequence[TreeSizes], sizes: ModelSizes, options: _Options, *, gradient: bool) -> PassCost:
    naive = [span for tree in trees for span in tree.naive]
    spans = naive if options.strategy == "naive" else [span for tree in trees for span in tree.spans]
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
        working_bytes=0 if gradient else _working_bytes(trees, sizes, options),
    )


def _tokens(spans: Sequence[Span]) -> int:
    return sum(end - start for start, end in spans)


def _flops(spans: Sequence[Span], sizes: ModelSizes) -> int:
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
    """Counts what the layers remember of the longest path of nodes with children."""
    return max((_remembered(path[-1][1], sizes, options) for path, _ in tree.families() if path), default=0)


def _remembered(tokens: int, sizes: ModelSizes, options: _Options) -> int:
    return options.dtype_bytes * sum(
        min(tokens, layer.window or tokens) * layer.kv_entries + layer.state_entries for layer in sizes.layers
    )


def _kept_bytes(trees: Sequence[TreeSizes], naive: Sequence[Span], sizes: ModelSizes, options: _Options) -> int:
    """Counts what a strategy keeps for backward at its peak; `naive` are the spans of whole sequences."""
    if options.strategy == "naive":
        return _bytes_of_layers(naive, sizes, options, strategy="naive")
    if options.strategy != "two_phase":
        return sum(_bytes_of_layers(tree.spans, sizes, options, strategy=options.strategy) for tree in trees)
    # One path at a time, and few of the leaves at its end; beside them the gradient of the path's keys and values,
    # which the micro-batches add to.
    return max(
        (
            _bytes_of_layers([*path, *leaves[: options.micro_batch]], sizes, options, strategy="two_phase")
            + (_remembered(path[-1][1], sizes, options) if path else 0)
            for tree in trees
            for path, leaves in tree.families()
        ),
        default=0,
    )


def _working_bytes(trees: Sequence[TreeSizes], sizes: ModelSizes, options: _Options) -> int:
    """Counts what the largest layer holds; without a gradient its tensors are gone when the next one runs."""
    if options.strategy == "naive":
        batches = [[span for tree in trees for span in tree.naive]]
    elif options.strategy == "packed":
        batches = [[span for tree in trees for span in tree.spans]]
    else:  # a node, then the leaves behind it, of which two_phase runs few at a time
        at_a_time = BRANCHES if options.strategy == "two_phase" else None
        families = [family for tree in trees for family in tree.families()]
        batches = [*(path[-1:] for path, _ in families), *(leaves[:at_a_time] for _, leaves in families)]
    own, wide = options.dtype_bytes, max(4, options.dtype_bytes)

    def held(layer: LayerSizes, batch: Sequence[Span]) -> int:
        kept = layer.kept * own + (layer.kept_float32 + layer.kept_chunked) * wide
        # Attention and feed-forward layer take turns: about two thirds of what backward would need is there at a time.
        held_bytes = _tokens(batch) * kept * 2 // 3
        if layer.score_heads and options.strategy != "packed":
            # The scores, with the mask, their exponentials and the probabilities.
            held_bytes += 3 * wide * layer.score_heads * sum((end - start) * end for start, end in batch)
        return held_bytes

    return max((held(layer, batch) for layer in set(sizes.layers) for batch in batches), default=0)


def _bytes_of_layers(spans: Sequence[Span], sizes: ModelSizes, options: _Options, *, strategy: str) -> int:
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


def _bytes_of_layer(layer: LayerSizes, spans: Counter[Span], options: _Options, strategy: str) -> int:
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
