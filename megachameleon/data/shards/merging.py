"""Several shards as one, for megatron-core without this package; copied byte by byte."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megachameleon.console import ProgressTask, progress_bar
from megachameleon.data.shards.manifest import ShardManifest
from megachameleon.data.shards.reader import ShardReader, shard_file
from megachameleon.data.shards.writer import ShardWriter, remove_orphans
from megachameleon.files import no_room_named, require_free_space

PIECE_BYTES = 1 << 24
"""Copied at a time."""


def merge_shards(shards: Sequence[ShardReader], prefix: Path) -> ShardManifest:
    """Write the documents of several shards, in order, as one.

    Raises:
        ValueError: `prefix` is one of the shards, their vocabularies or tokenizers differ, one was changed since it
            was made, or the disk is too small.
    """
    image_tokenizer = _require_mergeable(shards, prefix)
    first = shards[0]
    size = sum(shard.manifest.files[".bin"].bytes for shard in shards)
    require_free_space(prefix.parent, size, "merging")
    remove_orphans(prefix.parent)
    with (
        progress_bar("merging (bytes)", size) as bar,
        no_room_named(prefix),
        ShardWriter(
            prefix, first.vocabulary, tokenizer=first.manifest.tokenizer, image_tokenizer=image_tokenizer
        ) as writer,
    ):
        for shard in shards:
            writer.copy(_content(shard, bar), shard.lengths, shard.num_images, shard.all_image_spans)
        quarantined: Counter[str] = Counter()  # a file's name may be that of others in other folders
        for shard in shards:
            quarantined.update(shard.manifest.quarantined)
        return writer.commit(
            inputs=[record for shard in shards for record in shard.manifest.inputs],
            quarantined=quarantined,
            filtered=sum(shard.manifest.filtered for shard in shards),
            duplicates=sum(shard.manifest.duplicates for shard in shards),
            options=first.manifest.options,
        )


def _content(shard: ShardReader, bar: ProgressTask) -> Iterator[bytes]:
    path, digest = shard_file(shard.prefix, ".bin"), hashlib.sha256()
    # opening compares only the size of .bin, and a new manifest must not vouch for changed ids
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            bar.advance(len(piece))
            yield piece
    if digest.hexdigest() != shard.manifest.files[".bin"].sha256:
        raise ValueError(
            f"{path}: its SHA-256 is not the manifest's, so the file was changed; "
            f"remove {shard_file(shard.prefix, '.json')} and preprocess again (preprocess_data.py run)"
        )


def _require_mergeable(shards: Sequence[ShardReader], prefix: Path) -> str | None:
    """The image tokenizer of all of them."""
    first = shards[0]
    if any(shard.prefix.resolve() == prefix.resolve() for shard in shards):
        raise ValueError(f"{prefix}: is one of the shards to merge; choose another name")
    for shard in shards[1:]:
        first.vocabulary.require_same(shard.vocabulary, str(first.prefix), str(shard.prefix))
        if shard.manifest.dtype != first.manifest.dtype:
            raise ValueError(
                f"{shard.prefix}: ids of {shard.manifest.dtype}, but {first.prefix} of {first.manifest.dtype}"
            )
        if shard.manifest.tokenizer != first.manifest.tokenizer:
            raise ValueError(
                f"{shard.prefix}: made with another tokenizer than {first.prefix}; preprocess both with one"
            )
    image_tokenizers = {shard.manifest.image_tokenizer for shard in shards if shard.manifest.image_tokenizer}
    if len(image_tokenizers) > 1:
        raise ValueError(
            f"{prefix}: shards of several image tokenizers {sorted(image_tokenizers)}; preprocess all with one"
        )
    return next(iter(image_tokenizers), None)
