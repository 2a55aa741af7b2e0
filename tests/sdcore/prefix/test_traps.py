"""Mistakes that give wrong states without an error, each shown to be one and shown not to be ours.

Where a test says what transformers does, it is there to fail when transformers stops doing it: the way around it can
then go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from sdcore.errors import UnsupportedModelError
from sdcore.models import Body, find_body
from sdcore.models.names import set_checkpointing
from sdcore.prefix.strategies import caches
from sdcore.prefix.strategies.caches import PrefixCache, run_reading, run_recording
from tests.sdcore.prefix import models
from tests.sdcore.prefix.models import CONFIGS, HYBRIDS, SLIDING, VOCAB, WINDOW, tiny

pytestmark = pytest.mark.usefixtures("in_double_precision")

TRUNK, BRANCH = 15, 5


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def checkpointed(name: str) -> Body:
    return find_body(models.checkpointed(tiny(name)))


def expected(body: Body, trunk: Tensor, branches: Tensor) -> Tensor:
    """(G, L, H) of the branches, each computed with its trunk."""
    whole = torch.cat([trunk.expand(len(branches), -1), branches], dim=1)
    return body(whole)[:, len(trunk) :]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def test_a_dynamic_cache_grows_when_a_second_branch_reads_it() -> None:
    body = find_body(tiny("llama"))
    trunk, branches = ids(TRUNK), ids(2, BRANCH, seed=1)
    cache = DynamicCache(config=body.config)
    with torch.no_grad():
        body(trunk[None], cache=cache)
        hidden = [body(branch[None], cache=cache) for branch in branches]
        assert cache.get_seq_length() == TRUNK + 2 * BRANCH
        assert difference(hidden[0], expected(body, trunk, branches)[:1]) < 1e-10
        assert difference(hidden[1], expected(body, trunk, branches)[1:]) > 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prefix_is_the_same_after_it_was_read(name: str) -> None:
    body = find_body(tiny(name))
    trunk, branches = ids(TRUNK), ids(2, BRANCH, seed=1)
    with torch.no_grad():
        states, _ = run_recording(body, trunk)
        before = [state.clone() for state in states.tensors()]
        # A single token takes the decoding path of recurrent layers, which writes into their states.
        for length in (BRANCH, 1, BRANCH):
            hidden = run_reading(body, branches[:, :length], states)
            assert difference(hidden, expected(body, trunk, branches[:, :length])) < 1e-10
    assert all(torch.equal(old, new) for old, new in zip(before, states.tensors(), strict=True))


def test_checkpointing_drops_a_cache_without_an_error() -> None:
    """A branch of several tokens has a mask that no longer fits; one of a single token has none."""
    body = checkpointed("llama")
    trunk, branch = ids(TRUNK), ids(1, 1, seed=1)
    cache = DynamicCache(config=body.config)
    body(trunk[None], cache=cache)
    assert cache.get_seq_length() == 0
    states, _ = run_recording(find_body(tiny("llama")), trunk)
    reading = PrefixCache(body, states, batch=1, recording=False)
    hidden = body(branch, position_ids=torch.tensor([[TRUNK]]), cache=reading)
    assert difference(hidden, expected(body, trunk, branch)) > 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dropped_cache_is_an_error_of_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = checkpointed(name)
    states, _ = run_recording(body, ids(TRUNK))
    monkeypatch.setattr(GradientCheckpointingLayer, "__setattr__", without("_can_checkpoint_with_cache"))
    monkeypatch.setattr(GradientCheckpointingLayer, "__delattr__", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"did not use the cache of its layer 0"):
        run_recording(body, ids(TRUNK))
    if name not in SLIDING | HYBRIDS:
        with pytest.raises(UnsupportedModelError, match=r"did not use the cache of its layer 0"):
            run_reading(body, ids(2, 1, seed=1), states)


def without(dropped: str) -> Callable[[Any, str, Any], None]:
    """A `__setattr__` that ignores one name."""

    def set_attribute(module: Any, name: str, value: Any) -> None:
        if name != dropped:
            torch.nn.Module.__setattr__(module, name, value)

    return set_attribute


def test_checkpointed_layers_may_keep_a_cache_only_during_a_pass() -> None:
    body = checkpointed("llama")
    run_recording(body, ids(TRUNK))
    assert not any("_can_checkpoint_with_cache" in vars(module) for module in body.base.modules())


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
def test_running_a_checkpointed_layer_again_records_nothing_new(name: str) -> None:
    body = checkpointed(name)
    cache = PrefixCache(body, None, batch=1, recording=True)
    with body.keeping_caches():
        hidden = body(ids(1, TRUNK), cache=cache)
    recorded = [state for layer in cache.recorded() for state in layer]
    hidden.sum().backward()
    assert all(old is new for old, new in zip(recorded, (s for layer in cache.recorded() for s in layer), strict=True))
    assert cache.get_seq_length() == 0


def test_reentrant_checkpointing_loses_the_gradient_through_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why it is refused: let through, its states are right and its gradients wrong."""

    def trunk_gradient(body: Body) -> Tensor:
        states, _ = run_recording(body, ids(TRUNK))
        run_reading(body, ids(2, BRANCH, seed=1), states).sum().backward()
        return body.base.layers[0].self_attn.k_proj.weight.grad

    right = trunk_gradient(find_body(tiny("llama")))
    model = tiny("llama")
    set_checkpointing(model, True, use_reentrant=True)
    with pytest.raises(UnsupportedModelError, match="use_reentrant=True"):
        trunk_gradient(find_body(model))
    monkeypatch.setattr("sdcore.models.body._refuse_reentrant", lambda *_: None)
    assert float((trunk_gradient(find_body(model)) - right).norm() / right.norm()) > 0.05


def test_a_sliding_layer_of_transformers_forgets_and_cannot_be_cropped() -> None:
    layer = DynamicSlidingWindowLayer(sliding_window=WINDOW)
    layer.update(torch.zeros(1, 1, TRUNK, 2), torch.zeros(1, 1, TRUNK, 2))
    with pytest.raises(RuntimeError, match="crop"):
        layer.crop(-1)


@pytest.mark.parametrize("name", sorted(SLIDING))
@pytest.mark.parametrize("length", [1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, TRUNK])
def test_a_sliding_layer_reads_the_tail_of_the_prefix_and_no_more(name: str, length: int) -> None:
    body = find_body(tiny(name))
    trunk, branches = ids(TRUNK), ids(2, BRANCH, seed=1)
    with torch.no_grad():
        states, _ = run_recording(body, trunk)
        hidden = run_reading(body, branches, states.up_to(length, body))
        assert difference(hidden, expected(body, trunk[:length], branches)) < 1e-10
    cache = PrefixCache(body, states.up_to(length, body), batch=1, recording=False)
    sliding = body.windows.index(WINDOW)
    keys, _ = cache.update(*(torch.zeros(1, 2, BRANCH, 12, dtype=torch.float64) for _ in range(2)), sliding)
    assert keys.shape[2] == min(length, WINDOW - 1) + BRANCH == cache.get_mask_sizes(BRANCH, sliding)[0]


@pytest.mark.parametrize("name", sorted(SLIDING))
def test_states_cut_to_the_window_serve_branches_as_well(name: str) -> None:
    body = find_body(tiny(name))
    trunk, branches = ids(TRUNK), ids(2, BRANCH, seed=1)
    with torch.no_grad():
        states = run_recording(body, trunk)[0].reachable(body)
        assert {layer[0].shape[2] for layer in states.layers} <= {WINDOW - 1, TRUNK}
        assert difference(run_reading(body, branches, states), expected(body, trunk, branches)) < 1e-10
        # What was cut off cannot be had again.
        assert states.up_to(TRUNK - 1, body) is None


def test_one_mask_for_all_layers_drops_the_window() -> None:
    """Why no mask is passed: the model makes one per layer type, from the lengths that the cache gives."""
    body = find_body(tiny("gemma3"))
    tokens = ids(1, TRUNK)
    causal = torch.ones(TRUNK, TRUNK, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        assert difference(body(tokens, attention_mask=causal), body(tokens)) > 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_a_position_off_by_one_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of std 0.02 it hardly would: then the tests that compare strategies could not fail."""
    body = find_body(tiny(name))
    trunk, branches = ids(TRUNK), ids(2, BRANCH, seed=1)
    right = caches.positions
    with torch.no_grad():
        states, _ = run_recording(body, trunk)
        monkeypatch.setattr(caches, "positions", lambda start, tokens: right(start + 1, tokens))
        assert difference(run_reading(body, branches, states), expected(body, trunk, branches)) > 0.05
