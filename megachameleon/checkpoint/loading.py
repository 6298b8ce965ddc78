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
    read_manifest,
    verify_hashes,
)
from megachameleon.checkpoint.plain import from_plain
from megachameleon.checkpoint.state import sharded_state, unwrap
from megachameleon.checkpoint.tensors import index_from_json, read_part
from megachameleon.config import ModelConfig, RunConfig, load_config
from megachameleon.files import read_json
from megachameleon.parallel.context import ParallelContext
from megachameleon.parallel.device import optimizer_scope
from megachameleon.parallel.optimizer import keep_kernels
from megachameleon.tokens.vocabulary import Vocabulary


def load_checkpoint(
    checkpoint: Path, chunks: Sequence[torch.nn.Module], optimizer: Any | None, context: ParallelContext
) -> CheckpointManifest:
    """Fill a process's model chunks and, if given, their optimizer; all processes call it.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another model.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
    from megatron.core.dist_checkpointing.mapping import apply_factory_merges
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
    from megatron.core.dist_checkpointing.utils import extract_sharded_base

    manifest = read_manifest(checkpoint)
    _verify_share(checkpoint, manifest, context)
    index = index_from_json(read_json(checkpoint / INDEX_FILE), origin=str(checkpoint / INDEX_FILE))
    with optimizer_scope():
        wanted = sharded_state(chunks, optimizer, context.groups, is_loading=True)
    wanted, local, factories = load_preprocess(wanted)
    sharded, _ = extract_sharded_base(wanted)
    dict_list_map_inplace(lambda item: read_part(checkpoint, index, item), sharded)
    state = from_plain(read_json(checkpoint / COMMON_FILE)) if optimizer is not None else {}
    state.pop("model", None)  # the empty places of its tensors, by the chunks of the layout that wrote it
    merge(state, local)
    merge(state, sharded)
    state = apply_factory_merges(state, factories)
    for number, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(state["model"][str(number)], strict=True)
    if optimizer is not None:
        keep_kernels(optimizer, state["optimizer"])
        with optimizer_scope():
            optimizer.load_state_dict(state["optimizer"])
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
    free = {"dropout", "embedding_dropout", "context_length", "init_std", "depth_scaled_init"}
    for name in ModelConfig.__dataclass_fields__:
        a, b = getattr(saved, name), getattr(wanted, name)
        if a != b and name not in free:
            raise ValueError(
                f"{checkpoint}: was trained with model.{name}={a}, the configuration says {b}; "
                "set it back or choose another output_dir"
            )


def require_same_optimizer(checkpoint: Path, saved: RunConfig, wanted: RunConfig) -> None:
    """Refuse to resume with an optimizer whose state is stored otherwise.

    Raises:
        ValueError: precision or kind of optimizer differ.
    """
    pairs = {
        "parallel.distributed_optimizer": (saved.parallel.distributed_optimizer, wanted.parallel.distributed_optimizer),
        "training.precision": (saved.training.precision, wanted.training.precision),
    }
    for name, (a, b) in pairs.items():
        if a != b:
            raise ValueError(
                f"{checkpoint}: was trained with {name}={a}, the configuration says {b}, and the optimizer's state "
                f"does not carry over between them yet; set {name}={a}"
            )


def _verify_share(checkpoint: Path, manifest: CheckpointManifest, context: ParallelContext) -> None:
    """Check the hashes of this rank's share of the files; together the ranks check them all."""
    names = sorted(manifest.files)
    verify_hashes(checkpoint, names[context.rank :: context.world_size], manifest)
