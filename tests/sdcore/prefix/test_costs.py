"""The cost model against brute-force counts, against torch's own FLOP counter, and against the design's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig, PreTrainedModel

from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.models import find_body
from sdcore.prefix.choice import STRATEGIES as RUNNERS
from sdcore.prefix.costs.count import STRATEGIES, Cost, TreeSizes, cost, cost_of_sizes
from sdcore.prefix.costs.sizes import LayerSizes, ModelSizes, model_sizes
from sdcore.prefix.planner import plan
from sdcore.prefix.strategies.two_phase import micro_batches
from sdcore.prefix.tree import Tree
from sdkernels.live_bytes import LiveBytes
from tests.sdcore.prefix.models import CONFIGS, HYBRIDS, WINDOW, tiny
from tests.sdcore.prefix.trees import level, random_plan

LLAMA_8B = ModelSizes.dense(
    layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256
)
# Some layers with a window, some without, one recurrent: numbers that share no factor.
MIXED = ModelSizes(
    layers=(
        LayerSizes(weights=7, score_width=3, kv_entries=5, window=4, kept=11, kept_float32=2),
        LayerSizes(weights=13, score_width=17, kv_entries=5, kept=11, kept_float32=2),
        LayerSizes(weights=19, state_flops=23, state_entries=29, kept=11, kept_float32=2),
    ),
    hidden=31,
    vocab=37,
)


def flops_token_by_token(positions: list[int]) -> int:
    """Of tokens at these positions, forward, in `MIXED`."""
    return sum(
        2 * (7 + 13 + 19) + 23 + 2 * 3 * min(position + 1, 4) + 2 * 17 * (position + 1) for position in positions
    )


def positions(trees: tuple[Tree, ...], *, shared: bool, read_shared: bool) -> list[int]:
    read: list[int] = []
    for tree in trees:
        trunk, branches = len(level(tree).trunk), level(tree).branches
        for i in tree.active:
            read += range(trunk if shared else 0, trunk + len(branches[i]))
        if shared and tree.active:
            read += range(tree.shared if read_shared else 0, trunk)
    return read


@pytest.mark.parametrize("teacher", ["one", "each"])
@pytest.mark.parametrize("live", [True, False])
def test_flops_and_tokens_are_those_of_every_single_token(teacher: str, live: bool) -> None:
    made = random_plan(1, teacher=teacher)
    counted = cost(made, MIXED, teacher_shares=live)
    assert counted.teacher is not None
    for got, trees, times, read_shared in (
        (counted.student, made.student, 3, False),
        (counted.teacher, made.teacher, 1, live),
    ):
        naive = positions(trees, shared=False, read_shared=False)
        once = positions(trees, shared=True, read_shared=read_shared)
        assert (got.naive_tokens, got.tokens) == (len(naive), len(once))
        assert got.naive_tokens == sum(tree.naive_tokens() for tree in trees)
        assert got.tokens == sum(tree.tokens(read_shared=read_shared) for tree in trees)
        assert got.naive_flops == times * flops_token_by_token(naive)
        assert got.flops == times * flops_token_by_token(once)
    assert counted.flops == counted.student.flops + counted.teacher.flops
    assert counted.head_flops == 2 * made.num_rows * 31 * 37 * 4


def test_naive_costs_what_it_is_compared_with() -> None:
    made = random_plan(1)
    naive, shared = cost(made, MIXED, strategy="naive"), cost(made, MIXED, strategy="packed")
    assert naive.flops == naive.naive_flops == shared.naive_flops > shared.flops
    assert naive.tokens == naive.naive_tokens == shared.naive_tokens > shared.tokens
    assert naive.student.kept_bytes == naive.student.naive_kept_bytes == shared.student.naive_kept_bytes
    assert naive.speedup == naive.step_speedup == 1.0
    assert naive.student.prompt_bytes == 0
    assert 1.0 < shared.step_speedup < shared.speedup


def test_without_training_nothing_is_kept_and_no_gradient_is_counted() -> None:
    made = random_plan(1, teacher="none")
    trained, read = cost(made, MIXED), cost(made, MIXED, training=False)
    assert trained.teacher is None
    assert read.student.flops * 3 == trained.student.flops
    assert read.head_flops * 3 == trained.head_flops
    assert read.student.kept_bytes == 0 < trained.student.kept_bytes


def test_checkpointing_computes_a_forward_more_and_keeps_less() -> None:
    made = random_plan(1)
    sizes = ModelSizes(layers=MIXED.layers * 8, hidden=3, vocab=MIXED.vocab)
    kept, again = cost(made, sizes), cost(made, sizes, checkpointing=True)
    assert again.student.flops * 3 == kept.student.flops * 4
    assert again.student.kept_bytes < kept.student.kept_bytes
    assert again.teacher is not None
    assert kept.teacher is not None
    assert again.teacher.flops == kept.teacher.flops


def test_a_plan_without_rows_costs_nothing() -> None:
    counted = cost(plan([[1, 2, 3]], [[[], []]], [[1, 2, 3, 4]]), MIXED)
    assert (counted.tokens, counted.naive_tokens, counted.flops, counted.head_flops) == (0, 0, 0, 0)
    assert counted.student.prompt_bytes == counted.student.kept_bytes == 0
    assert counted.speedup == counted.step_speedup == 1.0


@given(st.integers(1, 30), st.integers(0, 20), st.integers(1, 10), st.integers(1, 5), st.integers(0, 30), st.booleans())
def test_sizes_cost_what_a_plan_of_those_sizes_costs(
    prompt: int, context: int, completion: int, count: int, tail: int, each: bool
) -> None:
    tail = min(tail, prompt)
    student = torch.arange(prompt)
    completions = [torch.full((completion,), 7)] * count

    def with_context(i: int) -> torch.Tensor:
        return torch.cat([student[: prompt - tail], torch.full((context,), 1000 + i), student[prompt - tail :]])

    # Contexts that differ from the first token on, or none at all, in which case all prompts are alike.
    teacher = [[with_context(i) for i in range(count)]] if each else [with_context(0)]
    given_ = plan([student], [completions], teacher)
    if each and context == 0:
        each = False
    sizes = cost_of_sizes(
        MIXED,
        prompt_tokens=prompt,
        context_tokens=context,
        completion_tokens=completion,
        completions=count,
        tail_tokens=tail if context else 0,
        context_per_completion=each,
    )
    assert sizes == cost(given_, MIXED)


@pytest.mark.parametrize(
    ("prompt", "context", "completion", "frozen", "live"),
    [(500, 1000, 500, 2.0, 2.1), (16_000, 1000, 512, 6.3, 7.7), (1000, 1000, 4096, 1.2, 1.2)],
)
def test_an_8b_model_gains_what_the_design_expects(
    prompt: int, context: int, completion: int, frozen: float, live: float
) -> None:
    def speedup(teacher_shares: bool) -> float:
        counted = cost_of_sizes(
            LLAMA_8B,
            prompt_tokens=prompt,
            context_tokens=context,
            completion_tokens=completion,
            completions=8,
            teacher_shares=teacher_shares,
        )
        return round(counted.step_speedup, 1)

    assert (speedup(False), speedup(True)) == (frozen, live)


def matrix_entries(model: PreTrainedModel) -> int:
    """Of the decoder layers' matrices, experts counted by the share of them that a token is sent to."""
    config = model.config
    count = 0
    for name, parameter in model.base_model.layers.named_parameters():
        if "conv1d" in name or parameter.dim() < 2:
            continue
        share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
        count += round(parameter.numel() * share)
    return count


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_of_the_models_matrices(name: str) -> None:
    model = tiny(name)
    assert sum(layer.weights for layer in model_sizes(model.config).layers) == matrix_entries(model)


def test_windows_are_read_from_the_configuration() -> None:
    windows = {name: [layer.window for layer in model_sizes(CONFIGS[name]()).layers] for name in CONFIGS}
    assert windows["llama"] == windows["qwen2"] == [None, None]
    assert windows["mistral"] == [WINDOW, WINDOW]
    assert windows["gemma2"] == [WINDOW, None]
    assert windows["gemma3"] == [WINDOW, WINDOW, None]


def test_layers_of_mixed_kinds_are_told_apart() -> None:
    recurrent, full, _ = model_sizes(CONFIGS["qwen3_next"]()).layers
    assert (recurrent.score_width, recurrent.kv_entries) == (0, 0)
    assert recurrent.state_flops > 0 < recurrent.state_entries
    assert (full.state_flops, full.state_entries) == (0, 0)
    assert full.kv_entries == 2 * 2 * 12


def test_plain_numbers_are_a_dense_configuration() -> None:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    sizes = ModelSizes.dense(layers=3, hidden=32, intermediate=48, heads=4, kv_heads=2, vocab=61)
    assert model_sizes(config) == sizes
    assert model_sizes(sizes) is sizes


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt_neox"])
def test_flops_are_what_torch_counts_for_the_naive_pass(name: str) -> None:
    """Eager attention computes the square where the model counts the triangle: that is taken out, the rest is equal."""
    model = tiny(name, attn_implementation="eager")
    length, sequences = 24, 3
    made = plan(
        [torch.randint(61, (length - 4,)) for _ in range(sequences)],
        [[torch.randint(61, (5,))] for _ in range(sequences)],
    )
    counted = cost(made, model.config, strategy="naive")
    with FlopCounterMode(display=False) as counter:
        states = model.base_model(
            input_ids=torch.stack([tree.sequence(0) for tree in made.student]), use_cache=False
        ).last_hidden_state
        states.sum().backward()
    operators = counter.get_flop_counts()["Global"]
    square = operators[torch.ops.aten.bmm] - _rotary(model, length, sequences, operators)
    triangle = square * (length + 1) // (2 * length)
    assert counted.student.flops == operators[torch.ops.aten.mm] + operators.get(torch.ops.aten.addmm, 0) + triangle


def _rotary(model: PreTrainedModel, length: int, sequences: int, operators: Any) -> int:
    """The rotary angles are an outer product of positions and frequencies, written as a product of matrices."""
    with FlopCounterMode(display=False) as counter:
        model.base_model.rotary_emb(torch.zeros(1, 1, 1), position_ids=torch.arange(length)[None])
    return counter.get_total_flops()


# Of every family as large that what a layer keeps is far more than what a model keeps once.
KEPT: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 168, "head_dim": 24, "max_position_embeddings": 512}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_kept_bytes_are_near_what_a_strategy_keeps(name: str, dtype: torch.dtype, strategy: str) -> None:
    config = CONFIGS[name]()
    for field, value in KEPT.items():
        if hasattr(config, field):
            setattr(config, field, value)
    eager = getattr(config, "attn_logit_softcapping", None) is not None
    model = Auto.from_config(config, dtype=dtype, attn_implementation="eager" if eager else "sdpa").train()
    body = find_body(model)
    if strategy == "packed" and name in HYBRIDS:
        pytest.skip("recurrent layers cannot be packed")
    made = plan([torch.randint(61, (150,))], [[torch.randint(61, (33,)) for _ in range(3)]])
    with LiveBytes() as probe:
        if strategy == "two_phase":
            parts = micro_batches(body, made.student, micro_batch=1)
            held: Any = parts, next(parts)
        else:
            held = RUNNERS[strategy].hidden_states(body, made.student)
        kept = probe._live_bytes
    del held
    estimate = cost(made, config, strategy=strategy, micro_batch=1, dtype_bytes=dtype.itemsize).student.kept_bytes
    assert 0.9 <= estimate / kept <= 1.3


def test_two_phase_keeps_least_and_cached_most_of_the_shared() -> None:
    def kept(strategy: str, micro_batch: int | None = None) -> int:
        return cost_of_sizes(
            LLAMA_8B,
            prompt_tokens=512,
            context_tokens=0,
            completion_tokens=128,
            completions=8,
            strategy=strategy,
            micro_batch=micro_batch,
        ).student.kept_bytes

    assert kept("two_phase", 1) < kept("two_phase", 2) < kept("packed") < kept("cached") < kept("naive")
    assert kept("two_phase", 1) < kept("naive") / 5
    # Keys and values of 512 tokens, in bfloat16: their gradient.
    assert kept("two_phase") - kept("cached") == 512 * 32 * 2 * 8 * 128 * 2


def test_the_bytes_of_a_prompt_are_its_keys_values_and_states() -> None:
    made = plan([[1, 2, 3, 4, 5, 6]], [[[7], [8]]])
    expected = 2 * (5 * 4 + 5 * 6 + 29)  # the first layer's window is 4, the last has a state instead
    assert cost(made, MIXED).student.prompt_bytes == expected
    for strategy in STRATEGIES:
        assert cost(made, MIXED, strategy=strategy).student.prompt_bytes == (0 if strategy == "naive" else expected)


def test_the_sizes_of_a_tree_are_those_of_its_active_branches() -> None:
    tree = random_plan(0, teacher="one").teacher[0]
    spans = ((15, 18), (15, 21))  # of the completions one has no token to read, and one none at all
    assert TreeSizes.of(tree, read_shared=True) == (((7, 15), *spans), (-1, 0, 0), (18, 15, 21))
    assert TreeSizes.of(tree, read_shared=False) == (((0, 15), *spans), (-1, 0, 0), (18, 15, 21))


def of_sizes(**changed: int) -> Callable[[], Cost]:
    good = {"prompt_tokens": 4, "context_tokens": 2, "completion_tokens": 3, "completions": 2}
    return lambda: cost_of_sizes(MIXED, **(good | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_sizes(prompt_tokens=0), "prompt_tokens must be at least 1, got 0"),
        (of_sizes(context_tokens=-1), "context_tokens must be at least 0, got -1"),
        (of_sizes(completion_tokens=0), "completion_tokens must be at least 1, got 0"),
        (of_sizes(completions=0), "completions must be at least 1, got 0"),
        (of_sizes(tail_tokens=5), "tail_tokens must be at most prompt_tokens=4, got 5"),
        (of_sizes(micro_batch=0), "micro_batch must be at least 1, or None for all, got 0"),
        (lambda: cost(random_plan(0), MIXED, strategy="fast"), "strategy must be one of 'packed', .*, got 'fast'"),
    ],
)
def test_bad_options_are_refused_by_name(make: Callable[[], Cost], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_configuration_that_does_not_say_its_sizes_is_refused() -> None:
    class Unknown:
        model_type = "unknown"
        hidden_size = 4

    with pytest.raises(UnsupportedModelError, match="got Unknown: num_hidden_layers, num_attention_heads, vocab_size"):
        model_sizes(Unknown())
    latent = LlamaConfig()
    latent.kv_lora_rank = 4
    with pytest.raises(UnsupportedModelError, match="got LlamaConfig: the sizes of multi-head latent attention"):
        model_sizes(latent)
