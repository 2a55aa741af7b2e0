"""`FusedLinearDivergence` hands process groups through; what they mean is tested in tests/sdkernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from sdcore.losses import FusedLinearDivergence
from sdkernels import TopK


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("support", [None, TopK(3)])
def test_a_group_of_one_changes_nothing(alone: dist.ProcessGroup, support: TopK | None) -> None:
    hidden, teacher, weight = torch.randn(5, 4), torch.randn(5, 4), torch.randn(9, 4)
    loss = FusedLinearDivergence(alpha=0.3, support=support)
    expected = loss(hidden, weight, teacher)
    for groups in ({"process_group": alone}, {"normalizer_group": alone}):
        torch.testing.assert_close(loss(hidden, weight, teacher, **groups)[:-1], expected[:-1])


def test_groups_reach_the_operation() -> None:
    for name in ("process_group", "normalizer_group"):
        with pytest.raises(TypeError, match=f"{name} must be a torch.distributed.ProcessGroup or None, got int"):
            FusedLinearDivergence()(torch.randn(5, 4), torch.randn(9, 4), torch.randn(5, 4), **{name: 1})
