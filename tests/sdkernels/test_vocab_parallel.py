"""A head in slices, or rows on several ranks: two gloo processes get what one process gets.

The processes run all cases of vocab_parallel_cases.py once; each test here reads both ranks' verdict on one of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdkernels.vocab_parallel.moments import merge_exponentials, merge_topk
from tests.sdkernels.ranks import verdicts
from tests.sdkernels.vocab_parallel_cases import cases, cases_of_four

NOT_REACHED = "it was not reached: the ranks hung, or died, in a case before"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return verdicts(cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", cases())
def test_two_ranks_get_what_one_process_gets(case: str, found: list[dict[str, str]]) -> None:
    for rank, results in enumerate(found):
        assert results.get(case, NOT_REACHED) == "", f"rank {rank}"


@pytest.mark.slow
def test_slices_and_rows_of_four_ranks_go_together(tmp_path: Path) -> None:
    for rank, results in enumerate(verdicts(cases_of_four, tmp_path, ranks=4)):
        assert results.get("both groups", NOT_REACHED) == "", f"rank {rank}"


@given(
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    level=st.sampled_from([0.0, -1e4, 1e4]),
    spread=st.sampled_from([1.0, 30.0, 3000.0]),
    lowered=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_sums_of_parts_merge_to_those_of_the_whole(
    cuts: list[int], level: float, spread: float, lowered: list[bool]
) -> None:
    """Whatever each part was lowered by, as long as its exponentials exist."""
    z = level + spread * torch.randn(3, sum(cuts), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = []
    for part, own in zip(z.split(cuts, dim=1), lowered, strict=False):
        usual = spread == 1.0 and level == 0.0 and not own
        shift = torch.zeros(3, 1, dtype=torch.float64) if usual else part.amax(1, keepdim=True)
        weights = (part - shift).exp()
        parts.append((shift[:, 0], weights.sum(1), (weights * (part - shift)).sum(1)))
    merged = merge_exponentials(*(torch.stack(column) for column in zip(*parts, strict=True)))
    log_p = z.log_softmax(1)
    torch.testing.assert_close(merged.level, z.logsumexp(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.entropy, -(log_p.exp() * log_p).sum(1), rtol=1e-9, atol=1e-9)


def test_of_equal_values_the_lower_id_is_chosen_first() -> None:
    values = torch.tensor([[[2.0, 1.0]], [[2.0, 3.0]], [[2.0, -torch.inf]]])  # (R, C, M)
    ids = torch.tensor([[[5.0, 1.0]], [[9.0, 8.0]], [[12.0, 13.0]]])
    chosen, places = merge_topk(values, ids, 4)
    assert chosen.tolist() == [[8, 5, 9, 12]]
    assert places.tolist() == [[3, 0, 2, 4]]
