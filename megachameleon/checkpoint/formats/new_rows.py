"""Rows of embedding and head for ids that a model has not met: the mean of its rows, and a little of their spread.

The mean keeps what the model says about old ids. An id whose row is the mean has the mean of all logits, and exp of a
mean is at most the mean of exp; so k such ids beside n old ones take at most k / (n + k) of the probability, and far
less where the model is sure. Zeros or small noise have logits about 0, which may exceed all old ones by far (J. Hewitt,
"Initializing New Word Embeddings for Pretrained Language Models", 2021; Mundra et al., arXiv 2407.05841, find rows
within the hull of the old ones as good as elaborate ways). The spread only tells new ids apart from each other.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megachameleon.checkpoint.boxes import Box

TABLES = ("embedding", "head")
BLOCK = 4_096
"""Rows that are measured at a time."""
SPREAD = 0.1
"""Of the rows' standard deviation in each dimension: new logits stay within a tenth of what old ones vary by."""


@dataclass(frozen=True, eq=False)
class NewRows:
    """What the new rows of one table are drawn from; the same whoever draws them, in whatever order."""

    table: str
    """Names the draws, so that embedding and head have their own."""
    mean: Tensor
    """fp32 [hidden]."""
    deviation: Tensor
    """fp32 [hidden], of old rows around their mean."""

    def row(self, number: int) -> Tensor:
        """The row of an id: fp32 [hidden]."""
        # A seed for each row: files are written in any order by several threads, a shard at a time.
        digest = hashlib.blake2b(f"{self.table}/{number}".encode(), digest_size=6).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.randn(len(self.mean), generator=generator).mul_(SPREAD * self.deviation).add_(self.mean)

    def fill(self, values: Tensor, numbers: Iterable[tuple[int, int]], box: Box) -> None:
        """Write rows into `values`, the box of a table.

        Args:
            numbers: row within `values`, and id.
        """
        columns = slice(box.offset[1], box.offset[1] + box.shape[1])
        for place, number in numbers:
            values[place] = self.row(number)[columns]


def new_rows(table: str, blocks: Iterable[Tensor]) -> NewRows:
    """Measure the rows of a table, [rows, hidden] at a time; one pass, and memory for a block."""
    count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for block in blocks:
        values = block.float()  # sums of blocks are exact enough in fp32; those of the table are kept in fp64
        count += len(values)
        total, squares = total + values.sum(0).double(), squares + values.square().sum(0).double()
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    return NewRows(table, mean.float(), deviation.float())
