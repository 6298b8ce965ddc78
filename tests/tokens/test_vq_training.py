import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megachameleon.tokens.vq import quantizer
from megachameleon.tokens.vq.chance import generator
from megachameleon.tokens.vq.feed import FeedConfig
from megachameleon.tokens.vq.memory_feed import MemoryFeed, PictureSet
from megachameleon.tokens.vq.network import PatchConfig
from megachameleon.tokens.vq.optimizer import MuonAdam, orthogonalise
from megachameleon.tokens.vq.patch_training import PatchTrainer, PatchTraining
from megachameleon.tokens.vq.quality import psnr
from megachameleon.tokens.vq.quantizer import Codebook

SHAPE = PatchConfig(
    image_size=16, grid=4, code_dim=8, fine_channels=8, coarse_channels=8, encoder_blocks=1, decoder_blocks=1
)
CPU = torch.device("cpu")


def feed_of(pictures, config):
    pictures = PictureSet(
        train=pictures.numpy(),
        held_out=pictures[:1].numpy(),
        weights=None,
        quarantine=[],
        num_files=0,
        num_duplicates=0,
    )
    size = pictures.train.shape[-1]
    shared = {"steps": config.steps, "batch_size": config.batch_size, "seed": config.seed}
    return MemoryFeed(pictures, FeedConfig(image_size=size, **shared))


def train(trainer, pictures, steps):
    feed = feed_of(pictures, trainer.config)
    losses = []
    for step in steps:
        trainer.prepare(step, feed.sample)
        losses.append(float(trainer.step(step, feed.batch(step))["loss"]))
    return losses


def stripes(n=48):
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (n, 3, 4, 1), generator=generator)
    return colours.repeat_interleave(4, 2).expand(n, 3, 16, 16).to(torch.uint8).contiguous()


def test_training_learns_to_reconstruct():
    trainer = PatchTrainer(SHAPE, PatchTraining(steps=150, batch_size=16, num_codes=64, learning_rate=0.08), CPU)
    pictures = stripes()
    losses = train(trainer, pictures, range(150))
    assert losses[-1] < 0.5 * losses[0]
    reconstructed, codes = trainer.reconstruct(pictures)
    mean = pictures.float().mean((0, 2, 3), keepdim=True).expand(pictures.shape)
    assert psnr(pictures, reconstructed) > psnr(pictures, mean) + 3
    assert codes.shape == (len(pictures), 16) and len(codes.unique()) > 16


def test_state_restores_the_next_step_bit_for_bit():
    config, pictures = PatchTraining(steps=20, batch_size=8, num_codes=16), stripes()
    one = PatchTrainer(SHAPE, config, CPU)
    train(one, pictures, range(5))
    state = {name: tensor.clone() for name, tensor in one.state().items()}
    two = PatchTrainer(SHAPE, config, CPU)
    two.load_state(state)
    train(one, pictures, range(5, 8)), train(two, pictures, range(5, 8))
    assert all(torch.equal(tensor, two.state()[name]) for name, tensor in one.state().items())
    assert any(not torch.equal(tensor, state[name]) for name, tensor in one.state().items())


def test_kmeans_places_codes_among_the_vectors():
    torch.manual_seed(0)
    centres = 10 * torch.randn(12, 4)
    vectors = (centres[:, None] + 0.1 * torch.randn(12, 50, 4)).reshape(-1, 4)
    codebook = Codebook(40, 4)
    codebook.initialise(vectors, 100, torch.Generator().manual_seed(0))
    distance = torch.cdist(vectors, codebook.codes).min(1).values.mean()
    by_chance = torch.cdist(vectors, vectors[torch.randperm(600)[:40]]).min(1).values.mean()
    assert distance < 0.3 < 1 < by_chance
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


def test_codes_that_nothing_uses_stay_where_they_are():
    codebook = Codebook(2, 1)
    codebook.codes.copy_(torch.tensor([[0.0], [100.0]]))
    codebook.counts.fill_(1.0)
    codebook.sums.copy_(codebook.codes)
    vectors = torch.ones(4, 1)
    for _ in range(100):
        codebook.update(vectors, codebook.nearest(vectors), decay=0.5)
    assert codebook.codes.flatten().tolist() == pytest.approx([1.0, 100.0], rel=0.01)


def test_reconstructions_are_measured_without_tf32(monkeypatch):
    trainer, seen = PatchTrainer(SHAPE, PatchTraining(num_codes=16), CPU), []
    encode = trainer.network.encode

    def watch(pixels):
        seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return encode(pixels)

    monkeypatch.setattr(trainer.network, "encode", watch)
    trainer.reconstruct(stripes(2))
    assert seen == [("ieee", "ieee")]


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


IMPOSSIBLE = [{"steps": 0}, {"precision": "fp8"}, {"learning_rate": 2.0}, {"codebook_decay": 1.0}, {"commitment": -1.0}]


@pytest.mark.parametrize("values", IMPOSSIBLE)
def test_impossible_settings_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        PatchTraining(**values)


def _train_together(rank, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    trainer = PatchTrainer(SHAPE, PatchTraining(steps=12, batch_size=8, num_codes=16, continuous_part=0.3), CPU)
    losses = train(trainer, stripes(), range(12))
    torch.save((losses, trainer.state()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_stay_identical_and_agree_with_one(tmp_path):
    mp.spawn(_train_together, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    (losses, state), (other_losses, other) = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert losses == other_losses
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    alone = PatchTrainer(SHAPE, PatchTraining(steps=12, batch_size=8, num_codes=16, continuous_part=0.3), CPU)
    assert losses == pytest.approx(train(alone, stripes(), range(12)), rel=1e-3)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="batch-size 8 does not divide over 3"):
        PatchTrainer(SHAPE, PatchTraining(batch_size=8), CPU)


def test_generators_differ_by_seed_purpose_and_number():
    drawn = [torch.rand(3, generator=generator(*key)) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert len({tuple(values.tolist()) for values in drawn}) == 4
    assert torch.equal(torch.rand(3, generator=generator(0, "a", 0)), drawn[0])


def test_revived_codes_come_from_the_vectors_of_all_processes(monkeypatch):
    """Seen from the second of two processes: places 0 to 2 are the first one's vectors, which it adds."""
    vectors, summed = torch.tensor([[3.0], [4.0], [5.0]]), []
    monkeypatch.setattr(quantizer, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(dist, "all_reduce", summed.append)
    rows = quantizer._rows(vectors, torch.tensor([4, 1, 3]))
    assert rows.tolist() == [[4.0], [0.0], [3.0]] and summed[0] is rows
