"""Training Chameleon's VQ-GAN: pixels, LPIPS and a patch discriminator, by Adam, with averaged weights.

The losses are those of Esser et al. (https://arxiv.org/abs/2012.09841). Chameleon published no weights of terms, rates,
batch or steps of its image tokenizer; the defaults here are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megachameleon.tokens.vq.averaging import AveragedWeights
from megachameleon.tokens.vq.discriminator import NORM_GROUPS, PatchDiscriminator
from megachameleon.tokens.vq.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradients_at_output,
    reconstruction_terms,
)
from megachameleon.tokens.vq.perceptual import PerceptualLoss
from megachameleon.tokens.vq.processes import average
from megachameleon.tokens.vq.tokenizer import flatten, unflatten
from megachameleon.tokens.vq.trainer import Trainer, TrainingConfig
from megachameleon.tokens.vq.vqgan import VQGAN, VQGANConfig

BETAS = (0.5, 0.9)
"""Of both Adams, those of the VQ-GAN's authors."""
EVALUATION_PIXELS = {"cuda": 1 << 22, "cpu": 1 << 20}
"""Of all pictures that pass through the network at once when it is not trained: 16 of 512 x 512 on CUDA."""


@dataclass(frozen=True, kw_only=True)
class GanTraining(TrainingConfig):
    """How a `VQGAN` is trained."""

    steps: int = 250_000
    batch_size: int = 128
    accumulate: int = 1
    """Parts that a process divides its share of a batch into, to save memory."""
    learning_rate: float = 1e-4
    """Peak; warmed up, then a cosine down to a tenth."""
    warmup: int | None = None
    """Steps; by default 2,000, at most a twentieth of all."""
    codebook_start: int | None = None
    """First step with codes; by default 2,000, at most a fifth of all. Codes that come before the autoencoder knows
    colours keep it from learning them."""
    l1_weight: float = 1.0
    l2_weight: float = 0.0
    perceptual: Path | None = None
    """Weights of VGG-16 for LPIPS; without them there is no perceptual term."""
    perceptual_weight: float = 1.0
    gan_weight: float = 0.2
    """Of the adversarial term, times the adaptive weight; 0 trains no discriminator. Larger ones may leave the
    discriminator behind for good: its loss is then 1, and real and drawn pictures have the same score."""
    discriminator_rate: float = 2.0
    """The discriminator's learning rate as a multiple of the network's."""
    gan_start: int | None = None
    """First step with a discriminator; by default after a tenth of the steps."""
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    ema_decay: float = 0.9999
    """Of the averaged weights, each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")
        for name in ("warmup", "codebook_start", "gan_start"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.steps:
                raise ValueError(f"{name}={value} must lie between 0 and steps={self.steps}")
        if self.discriminator_channels < 1 or 2 * self.discriminator_channels % NORM_GROUPS:
            multiple = NORM_GROUPS // 2  # the first norm comes after the first doubling
            raise ValueError(f"discriminator_channels={self.discriminator_channels} must be a multiple of {multiple}")
        if self.discriminator_layers < 1:
            raise ValueError(f"discriminator_layers={self.discriminator_layers} must be at least 1")
        for name in ("l1_weight", "l2_weight", "perceptual_weight", "gan_weight", "discriminator_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not self.l1_weight + self.l2_weight > 0:
            raise ValueError("l1_weight and l2_weight are both 0; pixels need one of them")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie between 0 and 1, as 0.9999 does")

    @property
    def first_quantized_step(self) -> int:
        """The step from which on codes are used."""
        return min(2000, self.steps // 5) if self.codebook_start is None else self.codebook_start

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return min(2000, self.steps // 20) if self.warmup is None else self.warmup

    @property
    def first_adversarial_step(self) -> int:
        """Steps before the discriminator comes in."""
        return self.steps // 10 if self.gan_start is None else self.gan_start


class GanTrainer(Trainer):
    """See the module's docstring."""

    def __init__(self, shape: VQGANConfig, config: GanTraining, device: torch.device) -> None:
        super().__init__(shape, config, shape.num_codes, device)
        share = config.batch_size // self.world_size
        if share % config.accumulate:
            raise ValueError(f"--accumulate {config.accumulate} does not divide a process's {share} pictures a step")
        smallest = PatchDiscriminator.smallest_picture(config.discriminator_layers)
        if config.gan_weight and shape.image_size < smallest:
            raise ValueError(
                f"--discriminator-layers {config.discriminator_layers} needs pictures of at least {smallest} pixels, "
                f"not {shape.image_size}; give fewer layers"
            )
        self.config = config
        # bounded by pixels: activations, not weights, fill the memory
        self.evaluation_batch = max(1, min(64, EVALUATION_PIXELS[device.type] // shape.image_size**2))
        # before the network is made, so that all processes start from the same weights
        torch.manual_seed(config.seed)
        channels_last = {"memory_format": torch.channels_last}
        self.network = VQGAN(shape).to(device, **channels_last)  # type: ignore[call-overload]
        self.discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_layers)
        self.discriminator.to(device, **channels_last)  # type: ignore[call-overload]
        self.perceptual = PerceptualLoss(config.perceptual).to(device) if config.perceptual else None
        self.average = AveragedWeights(self.network, config.ema_decay)
        self.optimizers = {
            "optimizer": (_adam(self.network), self.network),
            "discriminator_optimizer": (_adam(self.discriminator), self.discriminator),
        }

    @property
    def trained(self) -> VQGAN:
        """What gradients move."""
        return self.network

    @property
    def evaluated(self) -> VQGAN:
        """The average of the weights, which is kept in the end."""
        return self.average.network

    def step(self, step: int, pictures: Tensor) -> dict[str, Tensor]:
        """See `Trainer.step`. The adaptive weight is one for each part of the batch, the same on all processes."""
        parts = pictures.chunk(self.config.accumulate)
        adversarial = self.config.gan_weight > 0 and step >= self.config.first_adversarial_step
        self.network.zero_grad(set_to_none=True)
        self.discriminator.zero_grad(set_to_none=True)
        seen = [self._part(step, self.to_device(part), adversarial) for part in parts]
        reported = {name: torch.stack([terms[name] for terms, _, _ in seen]).mean() for name in seen[0][0]}
        # both updates come after all parts, so each part has seen the same weights
        self._update("optimizer", step, list(reported.values()))
        if adversarial:
            self._update("discriminator_optimizer", step)
        self.average.update(self.network, step)
        # the codebook follows after the update, by the vectors that this step has seen
        indices = [codes for _, _, codes in seen if codes is not None]
        if indices:
            self.follow(torch.cat([vectors for _, vectors, _ in seen]), torch.cat(indices), step)
        return reported

    def learning_rate(self, step: int) -> float:
        """Warm-up, then a cosine down to a tenth."""
        # + 1, so that the first step already has a rate above zero
        warmup = min(1.0, (step + 1) / (self.config.warmup_steps + 1))
        return self.config.learning_rate * warmup * (0.55 + 0.45 * math.cos(math.pi * step / self.config.steps))

    def state(self) -> dict[str, Tensor]:
        """Everything that a resume needs, by name."""
        modules: dict[str, nn.Module] = {
            "network": self.network,
            "averaged": self.average.network,
            "discriminator": self.discriminator,
        }
        tensors = {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}
        for part, (optimizer, module) in self.optimizers.items():
            for name, parameter in module.named_parameters():
                tensors |= {f"{part}.{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        return tensors | self.codebook_state()

    def _part(self, step: int, batch: Tensor, adversarial: bool) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """Add the gradients of one part of a batch; returns its terms, vectors and codes."""
        with self.autocast():
            vectors = flatten(self.network.encode(batch))
        used, commitment, indices = self.quantize(vectors, step)
        with self.autocast():
            output = self.network.decode(unflatten(used, self.grid)).float()
        # The terms meet the network at its output only, so each is differentiated to there, and the network once.
        drawn = output.detach().requires_grad_()
        terms, reconstruction = self._reconstruction(drawn, batch)
        gradient = gradients_at_output(reconstruction, drawn)
        if adversarial:
            more, gan_gradient = self._adversarial(drawn, output, gradient)
            terms |= more
            gradient = gradient + gan_gradient
        share = 1 / self.config.accumulate
        # output and commitment together: the encoder is differentiated once
        torch.autograd.backward(
            [output, commitment] if indices is not None else [output],
            [gradient * share, torch.full_like(commitment, self.config.commitment * share)][
                : 1 + (indices is not None)
            ],
        )
        if adversarial:
            # detached: the discriminator's loss must not reach the network
            (self._judge(batch, drawn.detach(), terms) * share).backward()
        total = reconstruction + self.config.commitment * commitment
        terms = {"loss": total, **terms, "commitment": commitment}
        return {name: term.detach() for name, term in terms.items()}, vectors.detach(), indices

    def _reconstruction(self, drawn: Tensor, batch: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of likeness, and their weighted sum."""
        c = self.config
        pixels = reconstruction_terms(drawn, batch)
        terms = {"l1": pixels["l1"], "l2": pixels["l2"]}
        total = c.l1_weight * terms["l1"] + c.l2_weight * terms["l2"]
        if self.perceptual is not None:
            with self.autocast():
                terms["perceptual"] = self.perceptual(drawn, batch).float()
            total = total + c.perceptual_weight * terms["perceptual"]
        return terms, total

    def _adversarial(self, drawn: Tensor, output: Tensor, gradient: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The generator's term and its weighted gradient at the output, `gradient` being the reconstruction's there."""
        with self.autocast():
            loss = generator_loss(self.discriminator(drawn).float())
        at_output = gradients_at_output(loss, drawn)
        at_weight = [
            torch.autograd.grad(output, self.network.last_layer, part, retain_graph=True)[0]
            for part in (gradient, at_output)
        ]
        # before lengths are taken, so the weight is that of the global batch
        average(at_weight)
        weight = self.config.gan_weight * adaptive_weight(*at_weight)
        return {"gan": loss, "gan_weight": weight}, weight * at_output

    def _judge(self, real: Tensor, drawn: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """The discriminator's loss; adds it and the mean scores to `terms`."""
        with self.autocast():
            real_scores, drawn_scores = self.discriminator(real).float(), self.discriminator(drawn).float()
        loss = discriminator_loss(real_scores, drawn_scores)
        terms |= {"discriminator": loss, "score_real": real_scores.mean(), "score_drawn": drawn_scores.mean()}
        return loss

    def _update(self, name: str, step: int, also_averaged: Sequence[Tensor] = ()) -> None:
        optimizer, module = self.optimizers[name]
        average([*(p.grad for p in module.parameters() if p.grad is not None), *also_averaged])
        rate = self.config.discriminator_rate if module is self.discriminator else 1.0
        for group in optimizer.param_groups:
            group["lr"] = rate * self.learning_rate(step)
        optimizer.step()


def _adam(module: nn.Module) -> torch.optim.Adam:
    """Adam whose state is there from the start, so that it can be restored before the first step."""
    optimizer = torch.optim.Adam(module.parameters(), betas=BETAS, fused=True)
    for parameter in module.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer
