"""Ours, as the trainer runs it: a configuration, its model and optimizer, and the trainer's own step."""

import torch

from benchmarks.contestants.base import BETAS, CLIP, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Z_LOSS, Settings
from benchmarks.contestants.gpt_weights import load_gpt
from benchmarks.same_weights import Weights
from megachameleon import __version__
from megachameleon.config import RunConfig, load_config
from megachameleon.model.decoder import build_chunks
from megachameleon.model.kernels.table import choose_kernels
from megachameleon.parallel.device import optimizer_scope
from megachameleon.parallel.optimizer import build_optimizer, build_schedule
from megachameleon.parallel.replicas import wrap_replicas
from megachameleon.training.step import TrainingState, train_step


class Ours:
    """See the module."""

    same_function = True

    def __init__(self, settings: Settings) -> None:
        self.settings, self.config = settings, _config(settings)
        config, context = self.config, settings.context
        kernels = choose_kernels(config.kernels)
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        chunks = build_chunks(config.model, config.parallel, kernels, context.groups, dtype=dtype, seed=None)
        self.decoder = chunks[0].to(context.device)
        model = wrap_replicas([self.decoder], config.parallel)
        optimizer = build_optimizer(model, config.optimizer, config.parallel, kernels.resolved)
        schedule = build_schedule(optimizer, config.optimizer, config.training.num_steps)
        self.state = TrainingState(model=model, optimizer=optimizer, schedule=schedule)

    @property
    def title(self) -> str:
        """For the table."""
        precision = "fp32" if self.settings.precision == "fp32" else "bf16, fp32 masters and gradients"
        overrides = f" with {' '.join(self.settings.overrides)}" if self.settings.overrides else ""
        return f"megachameleon {__version__}, {precision}{overrides}"

    def load(self, weights: Weights) -> None:
        """See `Contestant.load`."""
        load_gpt(self.decoder, weights, qk_bias=True)
        with optimizer_scope():
            self.state.optimizer.reload_model_params()

    def step(self, number: int) -> float:
        """See `Contestant.step`: the trainer's own, with batching, checks and sums for the report."""
        consumed = number * self.config.training.global_batch_size
        report = train_step(
            self.state, self.settings.samples, self.config, self.settings.context, step=number, consumed=consumed
        )
        return report.losses.loss


def build(settings: Settings, *, variant: str) -> Ours:
    """The contestant."""
    return Ours(settings)


def _config(settings: Settings) -> RunConfig:
    """The run whose step is measured; everything that is not here has the defaults of a real run."""
    shape = settings.shape
    values = {
        "model.vocab_size": shape.vocab,
        "model.num_layers": shape.layers,
        "model.hidden_size": shape.hidden,
        "model.num_attention_heads": shape.heads,
        "model.num_query_groups": shape.kv_groups,
        "model.ffn_hidden_size": shape.ffn,
        "model.context_length": shape.sequence_length,
        "model.norm_eps": shape.norm_eps,
        "model.rope_theta": shape.rope_theta,
        "data.sequence_length": shape.sequence_length,
        "optimizer.lr": LEARNING_RATE,
        "optimizer.beta1": BETAS[0],
        "optimizer.beta2": BETAS[1],
        "optimizer.eps": EPSILON,
        "optimizer.weight_decay": WEIGHT_DECAY,
        "optimizer.clip_grad": CLIP,
        "optimizer.warmup_steps": 0,
        "optimizer.decay": "constant",
        "training.num_steps": 1_000_000,
        "training.global_batch_size": shape.micro_batch_size,
        "training.micro_batch_size": shape.micro_batch_size,
        "training.precision": settings.precision,
        "training.z_loss": Z_LOSS,
    }
    return load_config("debug", [*(f"{key}={value!r}" for key, value in values.items()), *settings.overrides])
