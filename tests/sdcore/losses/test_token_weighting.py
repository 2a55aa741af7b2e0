"""The four aggregations: their definitions on padded batches, and that no split changes the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sdcore.errors import ArgumentError
from sdcore.losses import Aggregation, over_ranks, per_completion, spread, token_weights

LENGTHS = (4, 1, 0, 7, 5, 3)
NORM_LENGTH = 8
AGGREGATIONS: list[Any] = list(get_args(Aggregation))


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(N,) losses and which count; of the fifth completion none does."""
    draw = torch.Generator().manual_seed(seed)
    losses = torch.rand(sum(LENGTHS), dtype=torch.float64, generator=draw)
    mask = torch.rand(sum(LENGTHS), generator=draw) < 0.7
    mask[12:17] = False
    return losses, mask


def padded(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """(S, longest), as trainers hold them."""
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(list(lengths))), batch_first=True)


def by_definition(aggregation: Aggregation, losses: Tensor, mask: Tensor) -> Tensor:
    """As TRL and verl write them, on padded (S, R) matrices."""
    loss, kept = padded(losses, LENGTHS), padded(mask.double(), LENGTHS)
    sums, counts = (loss * kept).sum(1), kept.sum(1)
    active = counts > 0
    return {
        "token-mean": sums.sum() / counts.sum(),
        "seq-mean-token-mean": (sums[active] / counts[active]).mean(),
        "seq-mean-token-sum": sums[active].mean(),
        "sum-norm": sums.sum() / (len(LENGTHS) * NORM_LENGTH),
    }[aggregation]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_aggregation_is_its_definition(aggregation: Aggregation) -> None:
    losses, mask = rows()
    weights, normalizer = token_weights(aggregation, LENGTHS, mask, norm_length=NORM_LENGTH)
    assert weights.dtype == torch.float32
    assert torch.allclose((weights * losses).sum() / normalizer, by_definition(aggregation, losses, mask), rtol=1e-6)
    assert not weights[~mask].any()


@pytest.mark.parametrize("parts", [((0, 1, 2), (3, 4, 5)), ((0,), (1, 2), (3,), (4,), (5,)), ((2, 5, 0, 4), (3, 1))])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_split_changes_the_loss(aggregation: Aggregation, parts: tuple[tuple[int, ...], ...]) -> None:
    """Micro-batches, accumulation steps and ranks: normalizers add up. A part may have nothing that counts."""
    losses, mask = rows()
    pieces, kept = losses.split(LENGTHS), mask.split(LENGTHS)
    weighted = [
        (
            token_weights(
                aggregation,
                [LENGTHS[i] for i in part],
                torch.cat([kept[i] for i in part]),
                norm_length=NORM_LENGTH,
            ),
            torch.cat([pieces[i] for i in part]),
        )
        for part in parts
    ]
    normalizer = sum(own for (_, own), _ in weighted)
    total = sum(((weights * loss).sum() / normalizer for (weights, _), loss in weighted), start=torch.zeros(()))
    assert torch.allclose(total, by_definition(aggregation, losses, mask), rtol=1e-6)
    means = [(weights * loss).sum() / (own or 1.0) for (weights, own), loss in weighted]
    if aggregation != "sum-norm" and len(parts) == 5:  # the trap, where parts are unlike each other
        assert not torch.allclose(sum(means, torch.zeros(())) / len(parts), total, rtol=1e-3)


def test_nothing_that_counts_has_a_normalizer_of_0() -> None:
    for aggregation in AGGREGATIONS[:3]:
        weights, normalizer = token_weights(aggregation, (2, 0), torch.zeros(2, dtype=torch.bool))
        assert not weights.any()
        assert normalizer == 0


def test_values_of_completions_and_of_their_rows_are_each_others_counterparts() -> None:
    assert per_completion(torch.tensor([1.0, 2.0, 3.0]), (2, 0, 1)).tolist() == [3.0, 0.0, 3.0]
    assert spread(torch.tensor([5.0, 6.0, 7.0]), (2, 0, 1)).tolist() == [5.0, 5.0, 7.0]


def test_a_single_rank_divides_by_its_own_normalizer() -> None:
    assert over_ranks(3.0, "cpu") == 3.0


@pytest.mark.parametrize(
    ("aggregation", "lengths", "mask", "options", "message"),
    [
        ("mean", (2,), torch.ones(2).bool(), {}, "aggregation must be one of 'token-mean'.* got 'mean'"),
        ("token-mean", (2, 1), torch.ones(2).bool(), {}, "lengths must be those .* got 3 tokens in 2"),
        ("token-mean", (3, -1), torch.ones(2).bool(), {}, "lengths must be"),
        ("token-mean", (2,), torch.ones(2), {}, "mask must be bool, got torch.float32"),
        ("sum-norm", (2,), torch.ones(2).bool(), {}, "norm_length must be a positive number .* got None"),
        ("sum-norm", (2,), torch.ones(2).bool(), {"norm_length": 0}, "norm_length must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    aggregation: Any, lengths: tuple[int, ...], mask: Tensor, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        token_weights(aggregation, lengths, mask, **options)
