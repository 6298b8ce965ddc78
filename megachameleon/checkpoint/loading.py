"""Reading a checkpoint into a model of any parallel layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megachameleon.checkpoint.folder import (
    COMMON_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    PROGRESS_FILE,
    CheckpointManifest,
    parse_manifest,
    verify_hashes,
    verify_sizes,
)
from megachameleon.checkpoint.state import load_state
from megachameleon.checkpoint.tensors import index_from_json
from megachameleon.config import ModelConfig, RunConfig, load_config
from megachameleon.files import read_json
from megachameleon.parallel.context import ParallelContext
from megachameleon.tokens.vocabulary import Vocabulary


def load_checkpoint(
    checkpoint: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: Any | None,
    context: ParallelContext,
    *,
    verified: bool = False,
    fresh: bool = False,
) -> CheckpointManifest:
    """Fill a process's model chunks and, if given, their optimizer; all processes call it.

    Args:
        verified: hashes have been compared already.
        fresh: give the optimizer its masters only; for the rest it stays new.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another model.
    """
    manifest = parse_manifest(checkpoint)
    if not verified:
        verify_share(checkpoint, manifest, context)
    index = index_from_json(read_json(checkpoint / INDEX_FILE), origin=str(checkpoint / INDEX_FILE))
    common = read_json(checkpoint / COMMON_FILE)
    load_state(checkpoint, index, common, chunks, optimizer, context.groups, fresh=fresh)
    return manifest


def load_progress(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's next step depends on besides tensors."""
    return read_json(checkpoint / PROGRESS_FILE)


def saved_config(checkpoint: Path) -> RunConfig:
    """The resolved configuration that a checkpoint was trained with."""
    return load_config(str(checkpoint / CONFIG_FILE))


def saved_vocabulary(checkpoint: Path, manifest: CheckpointManifest) -> Vocabulary:
    """The vocabulary that a checkpoint was trained with."""
    return Vocabulary.from_dict(manifest.vocabulary, origin=str(checkpoint))


def require_same_model(checkpoint: Path, saved: ModelConfig, wanted: ModelConfig) -> None:
    """Refuse to resume with another model.

    Raises:
        ValueError: names the first field that differs.
    """
    # what no tensor depends on may change between stages of a training
    free = {"dropout", "embedding_dropout", "context_length", "init_std", "depth_scaled_init"}
    for name in ModelConfig.__dataclass_fields__:
        a, b = getattr(saved, name), getattr(wanted, name)
        if a != b and name not in free:
            raise ValueError(
                f"{checkpoint}: was trained with model.{name}={a}, the configuration says {b}; "
                "set it back or choose another output_dir"
            )


def verify_share(checkpoint: Path, manifest: CheckpointManifest, context: ParallelContext) -> None:
    """Check sizes and hashes of this rank's share of the files; together the ranks check them all.

    Raises:
        DamagedCheckpointError: a file is missing or another than was written.
    """
    # each file is read once over all ranks, and not once by each
    names = sorted(manifest.files)[context.rank :: context.world_size]
    # sizes first: a cut file is told without reading it
    verify_sizes(checkpoint, names, manifest)
    verify_hashes(checkpoint, names, manifest)
