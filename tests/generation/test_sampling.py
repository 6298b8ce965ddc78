import pytest
import torch

from megachameleon.generation.sampling import SamplingSettings, choose, penalize_repetition, row_draws

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


def frequencies(settings, count=4000):
    draws = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chosen = choose(LOGITS.expand(count, -1), draws, settings)
    return torch.bincount(chosen, minlength=4) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0, "top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 1.0, "top_p": 0.75}, [0.625, 0.375, 0.0, 0.0]),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 3}, [0.526, 0.316, 0.158, 0.0]),
        ({"temperature": 0.5, "top_p": 1.0}, [0.685, 0.247, 0.0616, 0.0068]),
        ({"greedy": True}, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_frequencies(options, expected):
    found = frequencies(SamplingSettings(**options))
    torch.testing.assert_close(found, torch.tensor(expected), atol=0.025, rtol=0)
    assert ((found > 0) == (torch.tensor(expected) > 0)).all()


def test_forbidden_ids_are_never_chosen_even_at_the_ends():
    logits = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]])
    settings = SamplingSettings(temperature=1.0, top_p=1.0)
    for draw in (0.0, 0.5, 1 - 2**-53):
        assert choose(logits, torch.tensor([draw], dtype=torch.float64), settings).item() in (0, 2)


def test_draws_belong_to_the_row():
    both = row_draws(7, [3, 4], 5)
    torch.testing.assert_close(row_draws(7, [4], 5)[0], both[1], rtol=0, atol=0)
    assert (both[0] != both[1]).all()
    assert (row_draws(8, [7], 5) != row_draws(9, [7], 5)).all()


def test_neighbouring_seeds_share_no_draws():
    draws = torch.cat([row_draws(seed, range(8), 5) for seed in range(-1, 7)])
    assert len(draws.unique()) == draws.numel()


def test_repetition_penalty_lowers_both_signs():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0.0}]
)
def test_values_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingSettings(**options)
