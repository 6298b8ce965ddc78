"""What a training of an image tokenizer is made of: the job, and its trainer and pictures."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megachameleon.console import progress_bar
from megachameleon.tokens.vq.feed import Feed, FeedConfig, picture_weights
from megachameleon.tokens.vq.gan_training import GanTrainer, GanTraining
from megachameleon.tokens.vq.memory_feed import MemoryFeed, load_pictures
from megachameleon.tokens.vq.network import PatchConfig
from megachameleon.tokens.vq.patch_training import PatchTrainer, PatchTraining
from megachameleon.tokens.vq.source import PictureInput, find_pictures
from megachameleon.tokens.vq.stream_feed import Augmentation, StreamFeed, split_files
from megachameleon.tokens.vq.trainer import Trainer
from megachameleon.tokens.vq.vqgan import VQGANConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything that decides the result, and how often to save and look on the way."""

    inputs: tuple[PictureInput, ...]
    """Where pictures lie."""
    output: Path
    """Folder of the tokenizer, its report and checkpoint."""
    shape: PatchConfig | VQGANConfig = field(default_factory=PatchConfig)
    training: PatchTraining | GanTraining = field(default_factory=PatchTraining)
    """`PatchTraining` for a `PatchConfig`, `GanTraining` for a `VQGANConfig`."""
    weights: dict[str, float] = field(default_factory=dict)
    """How often pictures of a tag are drawn, relative to others."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Of a VQ-GAN's training pictures."""
    held_out: int = 200
    """Pictures that are not trained on, at most a tenth of all."""
    max_pictures: int | None = 50_000
    """More are sampled down to these."""
    fid_weights: Path | None = None
    """Of the network that the rFID needs."""
    workers: int = 4
    """Threads of a process that decode pictures."""
    checkpoint_every: int = 100
    """Steps."""
    evaluate_every: int = 0
    """Steps between evaluations of held-out pictures; 0 for the end alone."""
    pictures_every: int = 0
    """Steps between sheets of reconstructions; 0 for the end alone."""
    log_every: int = 20
    """Steps."""

    def __post_init__(self) -> None:
        smallest = {"held_out": 1, "max_pictures": 1, "workers": 1, "checkpoint_every": 1, "log_every": 1}
        for name, least in (smallest | {"evaluate_every": 0, "pictures_every": 0}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")

    @property
    def flags(self) -> dict[str, Any]:
        """The plain values that a resumed run must share."""
        training = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self.training).items()}
        return {
            "inputs": [str(given) for given in self.inputs],
            "shape": asdict(self.shape),
            "training": training,
            "weights": self.weights,
            "augmentation": asdict(self.augmentation),
            "held_out": self.held_out,
            "max_pictures": self.max_pictures,
        }

    @property
    def missing(self) -> list[str]:
        """What is left out for want of weights, and how to have it."""
        notes: list[str] = []
        if isinstance(self.training, PatchTraining):
            return notes  # it is judged by its pixels
        if self.fid_weights is None:
            notes.append("rFID: no weights of Inception; give --fid-weights")
        if self.training.perceptual is None:
            notes.append("perceptual term: off, no weights of VGG-16; give --perceptual")
        return notes


def make_trainer(job: Job, device: torch.device) -> Trainer:
    """The trainer of a job's network.

    Raises:
        ValueError: settings that do not go together.
    """
    if isinstance(job.shape, VQGANConfig):
        assert isinstance(job.training, GanTraining)
        return GanTrainer(job.shape, job.training, device)
    assert isinstance(job.training, PatchTraining)
    return PatchTrainer(job.shape, job.training, device)


def open_feed(job: Job, trainer: Trainer, *, progress: bool = False) -> Feed:
    """The job's pictures: decoded in advance for the small network, on the way for the VQ-GAN.

    Raises:
        ValueError: no usable pictures.
    """
    found = find_pictures(job.inputs, read_tags=bool(job.weights))
    training = job.training
    config = FeedConfig(
        image_size=job.shape.image_size,
        steps=training.steps,
        batch_size=training.batch_size,
        seed=training.seed,
        chunk=trainer.evaluation_batch,
    )
    if isinstance(job.shape, VQGANConfig):
        split = split_files(found.files, held_out=job.held_out, max_pictures=job.max_pictures)
        split.quarantine.extend(found.quarantine)
        weights = picture_weights(split.train, job.weights)
        return StreamFeed(split, config, job.augmentation, weights=weights, workers=job.workers)
    with progress_bar("reading pictures", len(found.files), enabled=progress) as bar:
        pictures = load_pictures(
            found.files,
            job.shape.image_size,
            held_out=job.held_out,
            max_pictures=job.max_pictures or len(found.files),
            seed=training.seed,
            weights=picture_weights(found.files, job.weights),
            advance=bar.advance,
        )
    pictures.quarantine.extend(found.quarantine)
    return MemoryFeed(pictures, config)
