"""How well an image tokenizer reconstructs pictures: PSNR, SSIM, rFID, code use."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megachameleon.tokens.vq.perceptual import FrechetDistance
from megachameleon.tokens.vq.processes import rank_and_world
from megachameleon.tokens.vq.quality import SSIM_SIDE, perplexity, psnr_of_error, ssim


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Measured over pictures of all processes."""

    pictures: int
    """How many were compared."""
    psnr: float
    """dB, from the mean squared error over all pictures together."""
    ssim: float | None
    """Mean of the pictures' structural similarities; None where not asked for, or smaller than its window."""
    rfid: float | None
    """Fréchet distance of Inception features; None without their weights, or with next to no pictures."""
    counts: Tensor
    """int64 [num_codes]: how often each code was used."""

    @property
    def codes_in_use(self) -> int:
        """Codes that occurred."""
        return int((self.counts > 0).sum())

    @property
    def perplexity(self) -> float:
        """How many equally likely codes would be as uncertain."""
        return perplexity(self.counts)


@torch.no_grad()
def evaluate(
    reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]],
    chunks: Iterable[Tensor],
    num_codes: int,
    device: torch.device,
    *,
    with_ssim: bool = True,
    frechet: FrechetDistance | None = None,
) -> Scores:
    """Reconstruct pictures and compare; every process of the group calls this with its own share.

    Args:
        reconstruct: uint8 [B, 3, S, S] to the same and codes int64 [B, cells].
        device: where to compare, and where sums over processes can be made.
    """
    counts = torch.zeros(num_codes, dtype=torch.int64, device=device)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # squared error, its numbers, SSIM, pictures
    for chunk in chunks:
        again, codes = reconstruct(chunk)
        counts += torch.bincount(codes.flatten().to(device), minlength=num_codes)
        pictures, again = chunk.to(device), again.to(device)
        with_ssim = with_ssim and min(pictures.shape[2:]) >= SSIM_SIDE
        similarity = float(ssim(pictures, again).sum()) if with_ssim else 0.0
        # fp64: squares of millions of pixels are summed over all pictures
        error = float((pictures.double() - again.double()).square().sum()) / 255**2
        sums += torch.tensor([error, pictures.numel(), similarity, len(pictures)], dtype=sums.dtype, device=device)
        if frechet is not None:
            frechet.add(pictures, again)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(counts)
    error, numbers, similarity, total = sums.tolist()
    return Scores(
        pictures=int(total),
        psnr=psnr_of_error(error / max(numbers, 1)),
        ssim=similarity / max(total, 1) if with_ssim else None,
        # with fewer pictures than processes, one of them would have none to bring
        rfid=frechet.take() if frechet is not None and total >= max(2, rank_and_world()[1]) else None,
        counts=counts.cpu(),
    )
