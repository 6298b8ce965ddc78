"""The codebook: nearest code of a vector, and its training by exponential moving averages.

It is trained without gradients. Codes follow the mean of the vectors assigned to them; codes that nothing is assigned
to are revived at vectors that are represented badly. With several processes the sums are added over all of them and
vectors are drawn from all of them, so that every process keeps the same codebook, bit for bit.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megachameleon.tokens.vq.processes import gathered, rank_and_world

CHUNK = 8192
"""Vectors that are compared with all codes at once."""
KMEANS_ROUNDS = 12
"""Of Lloyd's algorithm when codes are first placed."""
REVIVE_BELOW = 0.03
"""A code is dead when its share of vectors falls below this part of the even share."""
COUNT_FLOOR = 1e-3
"""Codes with fewer vectors a step stay where they are."""
REVIVED_SHARE = 0.3
"""Share of the even share with which a revived code starts, so that it is not declared dead at once."""


class Codebook(nn.Module):
    """Code vectors [num_codes, code_dim] and their running statistics (in vectors a step, over all processes)."""

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(num_codes, code_dim))
        # not persistent: a finished tokenizer needs the codes alone
        self.register_buffer("counts", torch.zeros(num_codes), persistent=False)
        self.register_buffer("sums", torch.zeros(num_codes, code_dim), persistent=False)

    @property
    def num_codes(self) -> int:
        """Number of codes."""
        return self.codes.shape[0]

    def nearest(self, vectors: Tensor) -> Tensor:
        """Vectors float [N, code_dim] to the index int64 [N] of the code at the smallest Euclidean distance."""
        norms, codes = self.codes.square().sum(1), self.codes.t()
        # Chunks bound the memory of the distances; a vector's own norm is the same for all codes.
        return torch.cat([torch.addmm(norms, part, codes, alpha=-2).argmin(1) for part in vectors.split(CHUNK)])

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices int64 [...] to code vectors [..., code_dim]."""
        return self.codes[indices]

    @torch.no_grad()
    def initialise(self, vectors: Tensor, vectors_per_step: int, generator: torch.Generator) -> None:
        """Place the codes by k-means over vectors [N, code_dim]; process 0's result counts.

        Args:
            vectors_per_step: number of vectors that one training step brings, to scale the statistics.
            generator: of the CPU.
        """
        # In the order that they came in: to sort distinct ones first would let rounding decide which are drawn. Codes
        # that are equal are dead but for one, and so find another place.
        chosen = torch.randint(len(vectors), (self.num_codes,), generator=generator)
        if len(vectors) >= self.num_codes:
            chosen = torch.randperm(len(vectors), generator=generator)[: self.num_codes]
        self.codes.copy_(vectors[chosen.to(vectors.device)])
        for _ in range(KMEANS_ROUNDS):
            indices = self.nearest(vectors)
            counts, sums = self._statistics(vectors, indices)
            means = sums / counts.clamp(min=1)[:, None]
            self.codes.copy_(torch.where(counts[:, None] > 0, means, self.codes))
            # a code with one vector only copies it
            dead = (counts < 2).nonzero().flatten()
            if len(dead):
                errors = (vectors - self.codes[indices]).square().sum(1)
                self.codes[dead] = vectors[_by_weight(errors, len(dead), generator)]
        counts, _ = self._statistics(vectors, self.nearest(vectors))
        self.counts.copy_(counts * (vectors_per_step / len(vectors)))
        self.sums.copy_(self.codes * self.counts[:, None])
        # sums on a GPU may differ in their last bits, and codebooks must be equal on all processes
        self._take_from_process_0()

    @torch.no_grad()
    def update(self, vectors: Tensor, indices: Tensor, decay: float) -> None:
        """Move the codes towards the means of their vectors of this step, those of all processes together."""
        counts, sums = self._statistics(vectors, indices)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        # moving averages of sums and counts (van den Oord et al., 2017, appendix A.1)
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        self.sums.mul_(decay).add_(sums, alpha=1 - decay)
        used = self.counts[:, None] > COUNT_FLOOR  # others would sink to 0
        self.codes.copy_(torch.where(used, self.sums / self.counts.clamp(min=COUNT_FLOOR)[:, None], self.codes))

    @torch.no_grad()
    def revive(self, vectors: Tensor, indices: Tensor, generator: torch.Generator) -> None:
        """Move codes that are hardly used to vectors of this step, of any process, that are badly represented.

        Args:
            vectors: [N, code_dim], as many on every process.
            generator: of the CPU, in the same state on every process.
        """
        share = float(self.counts.sum()) / self.num_codes
        dead = (self.counts < REVIVE_BELOW * share).nonzero().flatten()
        if len(dead) == 0:
            return
        errors = gathered((vectors - self.codes[indices]).square().sum(1))
        fresh = _rows(vectors, _by_weight(errors, len(dead), generator))
        self.codes[dead] = fresh
        self.counts[dead] = REVIVED_SHARE * share
        self.sums[dead] = REVIVED_SHARE * share * fresh

    def _statistics(self, vectors: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.bincount(indices, minlength=self.num_codes).to(vectors.dtype)
        return counts, torch.zeros_like(self.codes).index_add_(0, indices, vectors)

    def _take_from_process_0(self) -> None:
        if dist.is_initialized():
            for tensor in (self.codes, self.counts, self.sums):
                dist.broadcast(tensor, src=0)


def _by_weight(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` places int64 in weights [N], drawn in proportion to them."""
    finite = torch.nan_to_num(weights.cpu(), nan=0.0, posinf=0.0) + 1e-9  # what diverges is noticed where it is logged
    return torch.multinomial(finite, n, replacement=True, generator=generator).to(weights.device)


def _rows(vectors: Tensor, places: Tensor) -> Tensor:
    """Rows of all processes' vectors, one process after the other, by place int64 [n]."""
    rank, world_size = rank_and_world()
    if world_size == 1:
        return vectors[places]
    local = places - rank * len(vectors)
    mine = (local >= 0) & (local < len(vectors))
    # every row has one owner, so the sum over processes is an exact copy
    rows = torch.where(mine[:, None], vectors[local.clamp(0, len(vectors) - 1)], 0.0)
    dist.all_reduce(rows)
    return rows
