"""A trained decoder, ready to generate or to be evaluated."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megachameleon.checkpoint.folder import read_manifest, resolve_checkpoint
from megachameleon.checkpoint.loading import load_checkpoint, saved_config, saved_vocabulary
from megachameleon.config import KernelsConfig, RunConfig
from megachameleon.model.decoder import Decoder, build_decoder
from megachameleon.model.kernels.table import choose_kernels
from megachameleon.parallel.context import ParallelContext
from megachameleon.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A decoder in evaluation mode and what it was trained with."""

    model: Decoder
    """This rank's part."""
    config: RunConfig
    """Resolved, as it was trained."""
    vocabulary: Vocabulary
    """Of its ids."""
    checkpoint: Path
    """Its folder."""
    step: int
    """Optimizer steps done."""


def load_for_inference(path: Path, context: ParallelContext) -> TrainedModel:
    """Load weights only, in the precision of training, at the layout of `context`, whatever layout wrote them.

    Args:
        path: a checkpoint, a run's `checkpoints` folder, or a run's folder (its newest checkpoint).

    Raises:
        ValueError: no complete checkpoint, or a damaged one.
    """
    checkpoint = resolve_checkpoint(path)
    config = saved_config(checkpoint)
    vocabulary = saved_vocabulary(checkpoint, read_manifest(checkpoint))
    context.config.validate(config.model, config.data.sequence_length)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    # default kernels: those of training may not be installed where the model is used
    model = build_decoder(
        config.model, context.config, choose_kernels(KernelsConfig()), context.groups, dtype=dtype, seed=None
    ).to(context.device, dtype)
    manifest = load_checkpoint(checkpoint, [model], None, context)
    model.eval()
    return TrainedModel(model=model, config=config, vocabulary=vocabulary, checkpoint=checkpoint, step=manifest.step)
