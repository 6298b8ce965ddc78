"""Writing a checkpoint together from all processes."""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megachameleon
from megachameleon.checkpoint.folder import (
    COMMON_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    PROGRESS_FILE,
    CheckpointManifest,
    delete_old,
    publish,
    temporary_folder,
)
from megachameleon.checkpoint.state import common_state, training_state
from megachameleon.checkpoint.tensors import index_to_json, merge_indexes, write_parts
from megachameleon.config import RunConfig, save_config
from megachameleon.files import atomic_path, sha256_of, write_json
from megachameleon.parallel.context import ParallelContext
from megachameleon.tokens.vocabulary import Vocabulary


def save_checkpoint(
    root: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    config: RunConfig,
    vocabulary: Vocabulary,
    context: ParallelContext,
    *,
    step: int,
    consumed_samples: int,
    data_fingerprint: str,
    tokenizers: dict[str, str | None],
    progress: dict[str, Any],
) -> Path:
    """Save the state after `step` steps; all processes call it. Returns the checkpoint's folder.

    Args:
        chunks: this process's model chunks, with all weights in place.
        progress: plain values that the next step depends on besides the tensors.
    """
    temporary = temporary_folder(root, step)
    if context.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    context.barrier()
    path = temporary / f"tensors_{context.rank:05d}.safetensors"
    with atomic_path(path) as partial:
        index = write_parts(partial, training_state(chunks, optimizer, context.groups), path.name)
    gathered: list[Any] = [None] * context.world_size
    dist.all_gather_object(gathered, (path.name, _record(path), index))
    final = root / temporary.name
    if context.is_main:
        write_json(temporary / INDEX_FILE, index_to_json(merge_indexes(entries for _, _, entries in gathered)))
        write_json(temporary / COMMON_FILE, common_state(optimizer))
        write_json(temporary / PROGRESS_FILE, progress)
        save_config(config, temporary / CONFIG_FILE)
        small = {name: _record(temporary / name) for name in (INDEX_FILE, COMMON_FILE, CONFIG_FILE, PROGRESS_FILE)}
        manifest = CheckpointManifest(
            step=step,
            consumed_samples=consumed_samples,
            data_fingerprint=data_fingerprint,
            versions=versions(),
            vocabulary=asdict(vocabulary),
            tokenizers=tokenizers,
            files={**{name: record for name, record, _ in gathered}, **small},
        )
        final = publish(temporary, root, manifest, asdict)
        delete_old(root, config.checkpoint.keep_last)
    context.barrier()
    return final


def versions() -> dict[str, str]:
    """Versions of what computes, and the commit of a checkout, for the record."""
    packages = ("torch", "megatron-core", "numpy", "sentencepiece")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {
        "megachameleon": megachameleon.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **found,
    }


def _commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def _record(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}
