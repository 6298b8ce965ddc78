"""Losses by modality on shards, by the pass that also validates during training."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megachameleon.config import RunConfig
from megachameleon.data.blending.blending import FirstSamples
from megachameleon.data.packing.packed import open_packed
from megachameleon.generation.loading import CheckpointInfo
from megachameleon.parallel.context import ParallelContext


def open_samples(data: Mapping[str, Path], info: CheckpointInfo, max_samples: int | None) -> dict[str, FirstSamples]:
    """Open datasets and pack their documents as validation does during training: equal samples in equal order.

    Args:
        data: folder of shards by the name to report.
        info: the checkpoint, which knows the sequence length, the packing and the tokenizers.
        max_samples: samples of each dataset, the first ones; None takes all.

    Raises:
        ValueError: a folder without complete shards, or shards of another vocabulary or other tokenizers.
    """
    settings = info.config.data
    samples = {}
    for name, path in data.items():
        dataset = open_packed([path], settings.sequence_length, settings.packing)
        info.vocabulary.require_same(dataset.vocabulary, "the checkpoint", f"dataset {name} ({path})")
        for kind, mine in (("text", dataset.summary.tokenizer), ("image", dataset.summary.image_tokenizer)):
            wanted = info.tokenizers.get(kind)
            # shards and checkpoints without pictures may name no image tokenizer
            if mine != wanted and None not in (mine, wanted):
                raise ValueError(
                    f"--data {name}={path}: made with another {kind} tokenizer ({mine}) than the data of checkpoint "
                    f"{info.path} ({wanted}); preprocess it with that one"
                )
        samples[name] = FirstSamples(dataset, max_samples)
    return samples


def shard_losses(
    model: Any,
    samples: Mapping[str, FirstSamples],
    config: RunConfig,
    context: ParallelContext,
    *,
    micro_batch_size: int,
) -> dict[str, dict[str, float]]:
    """Mean losses in nats per token by dataset, the same on every process; the fields are those of `LossReport`."""
    from megachameleon.training.step import validate

    config = replace(config, training=replace(config.training, micro_batch_size=micro_batch_size))
    reports = {name: asdict(validate([model], chosen, config, context)) for name, chosen in samples.items()}
    # `validate` leaves the model as training wants it, and generation may follow
    model.eval()
    return reports
