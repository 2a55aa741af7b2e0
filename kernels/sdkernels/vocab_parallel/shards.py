"""Says which columns of a sharded vocabulary are whose, and carries what the ranks of a group tell each other.

The head is cut into consecutive slices in the order of the ranks. Row statistics are gathered, not reduced: they are
small, one collective carries all of a stage, and every rank merges the same numbers in the same order, so that losses,
choices of ids and by-products agree to the last bit whatever the collective's own order of summation is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Places(NamedTuple):
    """Where ids of (C, K) lie in one shard: which row, which of the K, which column of the shard."""

    row: Tensor
    position: Tensor
    column: Tensor

    def of(self, block: slice) -> Places:
        """Returns the places in a block of rows, with rows counted from its start."""
        inside = (self.row >= block.start) & (self.row < block.stop)
        return Places(self.row[inside] - block.start, self.position[inside], self.column[inside])


class Shards:
    """Knows the slices of `sizes` rows of a head, over the ranks of the group of this name.

    Columns from `vocab` on are padding.

    The slices of the last ranks may consist of padding only: those ranks take part in every collective, and `gather`
    leaves out what they contribute.
    """

    def __init__(self, group_name: Any, sizes: Sequence[int], vocab: int) -> None:
        # By its name an operator, whose arguments are plain, is told of a group.
        self.group = dist.distributed_c10d._resolve_process_group(group_name)
        self.rank, self.sizes, self.vocab = self.group.rank(), sizes, vocab
        starts = [0, *accumulate(sizes)]
        self.widths = [min(max(vocab - start, 0), size) for start, size in zip(starts, sizes, strict=False)]
        self.first_id, self.width, self.widest = starts[self.rank], self.widths[self.rank], max(self.widths)
        self.ranks = len(sizes)
        self.occupied = sum(width > 0 for width in self.widths)

    def gather(self, part: Tensor) -> Tensor:
        """Returns (R, C, F): the (C, F) of every rank that has columns."""
        whole = part.new_empty((self.ranks, *part.shape))
        dist.all_gather(list(whole.unbind()), part.contiguous(), group=self.group)
        return whole[: self.occupied]

    def add_up_(self, part: Tensor) -> None:
        """Sums over all ranks, in place."""
        dist.all_reduce(part, group=self.group)

    def places(self, ids: Tensor) -> Places:
        """Finds which of (C, K) ids are columns of this rank; ids below 0 or beyond the vocabulary are nobody's."""
        columns = ids - self.first_id
        row, position = ((columns >= 0) & (columns < self.width)).nonzero(as_tuple=True)
        return Places(row, position, columns[row, position])
