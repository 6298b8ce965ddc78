"""A checkpoint and its tokenizers, ready to generate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megachameleon.checkpoint.folder import read_manifest, resolve_checkpoint
from megachameleon.config import ParallelConfig, RunConfig
from megachameleon.generation.stepper import Stepper
from megachameleon.parallel.context import ParallelContext, parallel_context
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary
from megachameleon.tokens.vq.tokenizer import ImageTokenizer


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of itself, read without its weights."""

    path: Path
    """The checkpoint's folder."""
    step: int
    """Optimizer steps done."""
    config: RunConfig
    """Resolved, as the run was trained."""
    vocabulary: Vocabulary
    """Of its ids."""
    tokenizers: dict[str, str | None]
    """Fingerprints of the `text` and `image` tokenizers of its data."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its weights, in evaluation mode."""

    model: Any
    """This rank's part of the decoder."""
    stepper: Stepper
    """Over `model`, with a key-value cache."""
    context: ParallelContext
    """Valid until `open_model` ends."""


def read_checkpoint_info(path: Path) -> CheckpointInfo:
    """Find a checkpoint from itself or its run's folder and read its configuration and vocabulary.

    Raises:
        ValueError: there is no complete checkpoint, or it is damaged.
    """
    from megachameleon.checkpoint.loading import saved_config, saved_vocabulary

    checkpoint = resolve_checkpoint(path)
    manifest = read_manifest(checkpoint)
    return CheckpointInfo(
        path=checkpoint,
        step=manifest.step,
        config=saved_config(checkpoint),
        vocabulary=saved_vocabulary(checkpoint, manifest),
        tokenizers=manifest.tokenizers,
    )


def load_text_tokenizer(info: CheckpointInfo, folder: Path | None) -> TextTokenizer:
    """The text tokenizer in `folder`, or the one that the checkpoint names.

    Raises:
        ValueError: it is missing, or has another vocabulary than the checkpoint.
    """
    found = folder or Path(info.config.data.tokenizer)
    if not found.is_dir():
        raise ValueError(f"{found}: no such tokenizer folder; give --tokenizer DIR")
    tokenizer = TextTokenizer.load(found)
    info.vocabulary.require_same(tokenizer.vocabulary, f"checkpoint {info.path}", f"tokenizer {found}")
    _require_fingerprint(info, "text", tokenizer.fingerprint, found)
    return tokenizer


def load_image_tokenizer(info: CheckpointInfo, folder: Path | None) -> ImageTokenizer:
    """The image tokenizer in `folder`, or the one that the checkpoint names.

    Raises:
        ValueError: it is missing, or its grid or codebook is not the vocabulary's.
    """
    named = info.config.data.image_tokenizer
    if folder is None and named is None:
        raise ValueError(f"checkpoint {info.path} names no image tokenizer; give --image-tokenizer DIR")
    found = folder or Path(str(named))
    if not found.is_dir():
        raise ValueError(f"{found}: no such image tokenizer folder; give --image-tokenizer DIR")
    tokenizer = ImageTokenizer.load(found)
    mine = (tuple(tokenizer.grid), tokenizer.num_codes)
    wanted = (info.vocabulary.image_grid, info.vocabulary.num_image_codes)
    if mine != wanted:
        raise ValueError(
            f"{found}: grid {mine[0]} with {mine[1]} codes, but checkpoint {info.path} was trained with grid "
            f"{wanted[0]} and {wanted[1]} codes; give the image tokenizer that made its data"
        )
    _require_fingerprint(info, "image", tokenizer.fingerprint, found)
    return tokenizer


def _require_fingerprint(info: CheckpointInfo, kind: str, mine: str, folder: Path) -> None:
    wanted = info.tokenizers.get(kind)
    if wanted not in (None, mine):
        raise ValueError(
            f"{folder}: is not the {kind} tokenizer that made the data of checkpoint {info.path} "
            f"(fingerprint {mine}, not {wanted}); give that one"
        )


@contextmanager
def open_model(info: CheckpointInfo, parallel: ParallelConfig) -> Iterator[LoadedModel]:
    """Join the processes of this program and load the weights in the layout `parallel`, any that divides the model.

    Raises:
        ValueError: the layout does not divide, or the checkpoint is damaged.
    """
    # before processes are joined, for an error of one rank would leave the others waiting
    parallel.validate(info.config.model, info.config.data.sequence_length)
    with parallel_context(parallel) as context:
        from megachameleon.checkpoint.inference import load_for_inference
        from megachameleon.generation.model_steppers import CachedStepper

        trained = load_for_inference(info.path, context)
        stepper = CachedStepper([trained.model], info.config.model.context_length)
        yield LoadedModel(model=trained.model, stepper=stepper, context=context)
