import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megachameleon.tokens.vq.network import PatchConfig
from megachameleon.tokens.vq.optimizer import MuonAdam, orthogonalise
from megachameleon.tokens.vq.quantizer import Codebook
from megachameleon.tokens.vq.training import Trainer, TrainingConfig, _epochs, psnr

SHAPE = PatchConfig(
    image_size=16, grid=4, code_dim=8, fine_channels=8, coarse_channels=8, encoder_blocks=1, decoder_blocks=1
)
CPU = torch.device("cpu")


def stripes(n=48):
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (n, 3, 4, 1), generator=generator)
    return colours.repeat_interleave(4, 2).expand(n, 3, 16, 16).to(torch.uint8).contiguous()


def test_training_learns_to_reconstruct():
    trainer = Trainer(SHAPE, TrainingConfig(steps=150, batch_size=16, num_codes=64, learning_rate=0.08), CPU)
    pictures = stripes()
    losses = [float(trainer.step(step, pictures)["loss"]) for step in range(150)]
    assert losses[-1] < 0.5 * losses[0]
    reconstructed, counts = trainer.reconstruct(pictures)
    mean = pictures.float().mean((0, 2, 3), keepdim=True).expand(pictures.shape)
    assert psnr(pictures, reconstructed) > psnr(pictures, mean) + 3
    assert counts.sum() == len(pictures) * 16 and (counts > 0).sum() > 16


def test_psnr_of_a_known_error():
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert psnr(black, black + 51) == pytest.approx(13.979, abs=1e-3)  # error 0.2: 20·log10(5)


def test_epochs_visit_every_picture_once_and_differ():
    order = list(_epochs(0, 30, 10, seed=0))
    assert [sorted(order[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert order[:10] != order[10:20]
    assert list(_epochs(7, 23, 10, seed=0)) == order[7:23]


def test_state_restores_the_next_step_bit_for_bit():
    config, pictures = TrainingConfig(steps=20, batch_size=8, num_codes=16), stripes()
    one = Trainer(SHAPE, config, CPU)
    for step in range(5):
        one.step(step, pictures)
    state = {name: tensor.clone() for name, tensor in one.state().items()}
    two = Trainer(SHAPE, config, CPU)
    two.load_state(state)
    for step in range(5, 8):
        one.step(step, pictures), two.step(step, pictures)
    assert all(torch.equal(tensor, two.state()[name]) for name, tensor in one.state().items())
    assert any(not torch.equal(tensor, state[name]) for name, tensor in one.state().items())


def test_kmeans_places_codes_among_the_vectors():
    torch.manual_seed(0)
    centres = 10 * torch.randn(12, 4)
    vectors = (centres[:, None] + 0.1 * torch.randn(12, 50, 4)).reshape(-1, 4)
    codebook = Codebook(12, 4)
    codebook.initialise(vectors, 100, torch.Generator().manual_seed(0))
    distance = torch.cdist(vectors, codebook.codes).min(1).values.median()
    by_chance = torch.cdist(vectors, vectors[torch.randperm(600)[:12]]).min(1).values.mean()
    assert distance < 0.3 < 3 < by_chance
    assert codebook.counts.sum() == pytest.approx(100)


def test_codes_follow_the_mean_and_dead_ones_are_revived():
    codebook = Codebook(2, 1)
    codebook.codes.copy_(torch.tensor([[0.0], [100.0]]))
    codebook.counts.copy_(torch.tensor([4.0, 1e-4]))
    codebook.sums.copy_(codebook.codes * codebook.counts[:, None])
    vectors = torch.tensor([[1.0], [3.0], [1.0], [9.0]])
    indices = codebook.nearest(vectors)
    codebook.update(vectors, indices, decay=0.5)
    assert codebook.codes[0].item() == pytest.approx(1.75)  # half of mean 0, half of mean 3.5
    codebook.revive(vectors, indices, torch.Generator().manual_seed(0))
    assert codebook.codes[1].item() in (1.0, 3.0, 9.0)
    assert codebook.codes[0].item() == pytest.approx(1.75)


def test_orthogonalise_evens_singular_values_and_keeps_vectors():
    torch.manual_seed(0)
    for shape in ((6, 20), (20, 6)):
        matrix = torch.randn(shape)
        result = orthogonalise(matrix)
        singular = torch.linalg.svdvals(result)
        assert singular.min() > 0.5 and singular.max() < 1.4
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(result.flatten(), (u @ vt).flatten(), dim=0) > 0.95


def test_optimizer_descends_kernels_and_vectors():
    torch.manual_seed(0)
    teacher, layer = torch.nn.Conv2d(2, 3, 3), torch.nn.Conv2d(2, 3, 3)
    optimizer, x = MuonAdam(layer), torch.randn(4, 2, 5, 5)
    losses = []
    for step in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.step(step, 0.05 * (1 - step / 150))
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("values", [{"steps": 0}, {"precision": "fp8"}, {"learning_rate": 2.0}])
def test_impossible_settings_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        TrainingConfig(**values)


def _train_together(rank, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    trainer = Trainer(SHAPE, TrainingConfig(steps=12, batch_size=8, num_codes=16, continuous_part=0.3), CPU)
    pictures = stripes()
    losses = [float(trainer.step(step, pictures)["loss"]) for step in range(12)]
    torch.save((losses, trainer.state()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_stay_identical_and_agree_with_one(tmp_path):
    mp.spawn(_train_together, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    (losses, state), (other_losses, other) = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert losses == other_losses
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    alone = Trainer(SHAPE, TrainingConfig(steps=12, batch_size=8, num_codes=16, continuous_part=0.3), CPU)
    alone_losses = [float(alone.step(step, stripes())["loss"]) for step in range(5)]
    assert losses[:5] == pytest.approx(alone_losses, rel=1e-4)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="batch-size 8 does not divide over 3"):
        Trainer(SHAPE, TrainingConfig(batch_size=8), CPU)
