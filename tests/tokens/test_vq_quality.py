import pytest
import torch

from megachameleon.tokens.vq.evaluation import evaluate
from megachameleon.tokens.vq.quality import perplexity, psnr, ssim

CPU = torch.device("cpu")


def noise(n=2, size=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 200, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def plain_ssim(x, y):
    """Window by window, from the definition."""
    offsets = torch.arange(11).double() - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = line[:, None] * line
    window = window / window.sum()
    values = []
    for top in range(x.shape[1] - 10):
        for left in range(x.shape[2] - 10):
            for channel in range(3):
                a = x[channel, top : top + 11, left : left + 11].double() / 255
                b = y[channel, top : top + 11, left : left + 11].double() / 255
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                above = (2 * mean_a * mean_b + 0.0001) * (2 * both + 0.0009)
                values.append(above / ((mean_a**2 + mean_b**2 + 0.0001) * (var_a + var_b + 0.0009)))
    return torch.stack(values).mean()


def test_psnr_of_a_known_error():
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert psnr(black, black + 51) == pytest.approx(13.979, abs=1e-3)  # error 0.2: 20·log10(5)


def test_ssim_is_that_of_the_definition():
    pictures = noise(1, 13)
    changed = (pictures.flip(3) // 2 + pictures // 2).to(torch.uint8)
    assert ssim(pictures, changed).item() == pytest.approx(plain_ssim(pictures[0], changed[0]).item(), abs=1e-12)
    assert ssim(pictures, pictures).item() == pytest.approx(1)


def test_perplexity_of_known_counts():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0])) == pytest.approx(1)
    assert perplexity(torch.zeros(3, dtype=torch.int64)) == 0


def test_scores_add_up_over_chunks():
    pictures = noise(5)

    def reconstruct(chunk):
        return chunk + 51, torch.arange(len(chunk))[:, None].expand(-1, 4)

    scores = evaluate(reconstruct, pictures.split(2), 8, CPU)
    assert scores.pictures == 5 and scores.psnr == pytest.approx(13.979, abs=1e-3)
    assert scores.ssim == pytest.approx(ssim(pictures, pictures + 51).mean().item())
    assert scores.counts.tolist() == [12, 8, 0, 0, 0, 0, 0, 0] and scores.codes_in_use == 2
    assert scores.rfid is None
    assert evaluate(reconstruct, noise(2, 8).split(2), 8, CPU).ssim is None
