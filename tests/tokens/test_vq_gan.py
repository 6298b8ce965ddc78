import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from megachameleon.tokens.vq import ImageTokenizer
from megachameleon.tokens.vq.gan_training import GanTrainer, GanTraining
from megachameleon.tokens.vq.job import Job
from megachameleon.tokens.vq.losses import discriminator_loss
from megachameleon.tokens.vq.running import run_job
from megachameleon.tokens.vq.source import PictureInput
from megachameleon.tokens.vq.tokenizer import flatten, to_float, unflatten
from megachameleon.tokens.vq.vqgan import VQGANConfig

CPU = torch.device("cpu")
SHAPE = VQGANConfig(
    image_size=16,
    base_channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    latent_channels=8,
    code_dim=8,
    num_codes=16,
)
TRAINING = GanTraining(
    steps=6,
    batch_size=4,
    learning_rate=1e-3,
    gan_start=3,
    codebook_start=1,
    discriminator_channels=32,
    discriminator_layers=1,
    l2_weight=0.5,
    gan_weight=0.75,
)


def pictures(n=24):
    chance = np.random.default_rng(0)
    coarse = torch.from_numpy(chance.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8))
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)


def train(trainer, steps, rank=0, world_size=1):
    """Batches that follow each other; process `rank` takes its share."""
    everything, size, seen = pictures(), trainer.config.batch_size, []
    share = size // world_size
    for step in steps:
        trainer.prepare(step, lambda count: everything[:count].split(8))
        start = step * size % len(everything) + rank * share
        seen.append({k: float(v) for k, v in trainer.step(step, everything[start : start + share]).items()})
    return seen


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.fixture
def settled():
    """A trainer that has seen codes, with a discriminator that is no longer what it was made as."""
    trainer = GanTrainer(SHAPE, TRAINING, CPU)
    train(trainer, range(5))
    return trainer


def test_gradients_are_those_of_the_whole_loss(settled):
    batch = to_float(pictures()[:4])
    network, discriminator = settled.network, settled.discriminator
    network.zero_grad(), discriminator.zero_grad()
    terms, _, _ = settled._part(5, batch, adversarial=True)
    mine, judged = gradients(network), gradients(discriminator)

    vectors = flatten(network.encode(batch))
    codes = settled.codebook.lookup(settled.codebook.nearest(vectors.detach()))
    output = network.decode(unflatten(vectors + (codes - vectors).detach(), settled.grid))
    likeness = (output - batch).abs().mean() + 0.5 * (output - batch).square().mean()
    adversarial = -discriminator(output).mean()
    lengths = [
        torch.autograd.grad(loss, network.last_layer, retain_graph=True)[0].norm() for loss in (likeness, adversarial)
    ]
    weight = 0.75 * (lengths[0] / (lengths[1] + 1e-4))
    network.zero_grad(), discriminator.zero_grad()
    commitment = (vectors - codes).square().mean()
    (likeness + 0.25 * commitment + weight.detach() * adversarial).backward()
    assert torch.allclose(mine, gradients(network), rtol=1e-3, atol=1e-6)
    assert terms["gan_weight"].item() == pytest.approx(weight.item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx((likeness + 0.25 * commitment).item(), rel=1e-5)

    discriminator.zero_grad()
    discriminator_loss(discriminator(batch), discriminator(output.detach())).backward()
    assert torch.allclose(judged, gradients(discriminator), rtol=1e-4, atol=1e-7)


def test_the_discriminator_has_a_rate_of_its_own(settled):
    train(settled, range(5, 6))
    rates = [settled.optimizers[name][0].param_groups[0]["lr"] for name in ("optimizer", "discriminator_optimizer")]
    assert rates == pytest.approx([settled.learning_rate(5), 2 * settled.learning_rate(5)])


def test_the_discriminator_waits_for_its_step():
    trainer = GanTrainer(SHAPE, TRAINING, CPU)
    before = [p.clone() for p in trainer.discriminator.parameters()]
    terms = train(trainer, range(3))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.discriminator.parameters(), strict=True))
    assert "gan" not in terms[-1] and terms[0]["commitment"] == 0 < terms[1]["commitment"]
    assert "gan" in train(trainer, range(3, 4))[0]
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.discriminator.parameters(), strict=True))


def test_a_batch_in_parts_is_the_same_batch():
    calm = replace(TRAINING, gan_weight=0.0)
    whole, parts = GanTrainer(SHAPE, calm, CPU), GanTrainer(SHAPE, replace(calm, accumulate=2), CPU)
    train(whole, range(1)), train(parts, range(1))
    assert torch.allclose(gradients(whole.network), gradients(parts.network), rtol=1e-3, atol=1e-7)


def test_averaged_weights_are_what_is_evaluated(settled):
    averaged, trained = settled.evaluated.state_dict(), settled.network.state_dict()
    assert settled.evaluated is settled.average.network is not settled.network
    assert all(not torch.equal(averaged[name], tensor) for name, tensor in trained.items())
    again, codes = settled.reconstruct(pictures()[:2])
    assert again.shape == (2, 3, 16, 16) and again.dtype == torch.uint8 and codes.shape == (2, 64)


def test_state_restores_the_next_steps_bit_for_bit(settled):
    state = {name: tensor.clone() for name, tensor in settled.state().items()}
    other = GanTrainer(SHAPE, replace(TRAINING, seed=1), CPU)
    other.config = other._config = TRAINING
    other.load_state(state)
    assert train(settled, range(5, 6)) == train(other, range(5, 6))
    restored = other.state()
    assert all(torch.equal(tensor, restored[name]) for name, tensor in settled.state().items())
    prefixes = {"network", "averaged", "discriminator", "codebook", "optimizer", "discriminator_optimizer"}
    assert {name.partition(".")[0] for name in state} == prefixes


@pytest.fixture
def job(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(pictures(40)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return Job(
        inputs=(PictureInput(folder, "squares"),),
        output=tmp_path / "out",
        shape=SHAPE,
        training=TRAINING,
        weights={"squares": 2.0},
        held_out=4,
        checkpoint_every=2,
        evaluate_every=2,
        pictures_every=2,
        log_every=1,
        workers=2,
    )


def run(job):
    lines = []
    run_job(job, CPU, say=lines.append)
    return "\n".join(lines)


def test_an_interrupted_job_ends_bit_equal(job, tmp_path, monkeypatch):
    whole = replace(job, output=tmp_path / "whole")
    said = run(whole)
    assert "rFID: no weights of Inception" in said and "perceptual term: off" in said
    step = GanTrainer.step

    def interrupted(self, number, batch):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GanTrainer, "step", interrupted)
        run(job)
    assert "going on from step 4 of 6" in run(job)
    name = "image_tokenizer.safetensors"
    assert (job.output / name).read_bytes() == (whole.output / name).read_bytes()

    report = json.loads((job.output / "report.json").read_text())
    assert report["num_held_out"] == 4 and report["rfid_held_out"] is None and report["ssim_held_out"] <= 1
    entries = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert {"psnr_held_out", "perplexity"} <= entries[1].keys() and "psnr_held_out" not in entries[2]
    assert {"gan_weight", "discriminator"} <= entries[-1].keys()
    assert sorted(path.name for path in (job.output / "pictures").iterdir()) == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    page = (job.output / "report.html").read_text()
    assert "rFID: no weights" in page and "step-00000004.png" in page and "<polyline" in page
    tokenizer = ImageTokenizer.load(job.output)
    assert tokenizer.encode(pictures()[:1]).shape == (1, 64)
    assert not (job.output / "checkpoint.safetensors").exists()


def test_numbers_that_are_not_finite_stop_the_job(job, monkeypatch):
    monkeypatch.setattr(GanTrainer, "learning_rate", lambda self, step: 1e30)
    with pytest.raises(ValueError, match=r"step \d: \w+ is (nan|inf); the last checkpoint"):
        run(job)


def test_weights_that_are_not_finite_are_never_saved(job, monkeypatch):
    step = GanTrainer.step

    def spoils_weights(self, number, batch):
        terms = step(self, number, batch)
        if number == 1:
            self.network.last_layer.data[0] = float("nan")
        return terms

    monkeypatch.setattr(GanTrainer, "step", spoils_weights)
    with pytest.raises(ValueError, match=r"step 2: network.decoder.conv_out.weight is nan"):
        run(replace(job, evaluate_every=0, pictures_every=0))
    assert not (job.output / "checkpoint.safetensors").exists()


WITHOUT_CODES = replace(TRAINING, steps=7, codebook_start=6, gan_start=0)


def _train_together(rank, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for name, config in (("codes", TRAINING), ("plain", WITHOUT_CODES)):
        trainer = GanTrainer(SHAPE, config, CPU)
        seen = train(trainer, range(6), rank, 2)
        state = {key: tensor.contiguous() for key, tensor in trainer.state().items()}
        torch.save((seen, state), f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    mp.spawn(_train_together, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    # At first only sums round otherwise. Then Adam turns gradients near zero into whole steps, L1 has a sign a pixel,
    # and a nearest code may turn out another: runs drift apart by fractions of a percent.
    for name, config in (("plain", WITHOUT_CODES), ("codes", TRAINING)):
        ranks = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
        (seen, state), (other_seen, other) = ranks
        assert seen == other_seen and all(torch.equal(tensor, other[key]) for key, tensor in state.items())
        alone = GanTrainer(SHAPE, config, CPU)
        for step, (mine, theirs) in enumerate(zip(train(alone, range(6)), seen, strict=True)):
            tolerance = 2e-2 if step else 2e-5
            assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance / 10), step
        codes = alone.state()["codebook.codes"]
        assert (codes - state["codebook.codes"]).abs().max() <= 1e-2 * codes.abs().max()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gan_start": 6}, "gan_start=6 must lie between 0 and steps=6"),
        ({"accumulate": 3}, "accumulate=3 does not divide batch_size=4"),
        ({"l1_weight": 0.0, "l2_weight": 0.0}, "both 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"gan_weight": -1.0}, "gan_weight=-1.0 must not be negative"),
        ({"discriminator_channels": 40}, "discriminator_channels=40 must be a multiple of 16"),
        ({"discriminator_layers": 0}, "discriminator_layers=0 must be at least 1"),
        ({"discriminator_layers": 3}, "--discriminator-layers 3 needs pictures of at least 24 pixels, not 16"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GanTrainer(SHAPE, replace(TRAINING, **values), CPU)


def test_starts_follow_the_number_of_steps():
    long, short = GanTraining(), GanTraining(steps=100)
    assert (long.warmup_steps, long.first_quantized_step, long.first_adversarial_step) == (2000, 2000, 25_000)
    assert (short.warmup_steps, short.first_quantized_step, short.first_adversarial_step) == (5, 20, 10)
