"""What the samples of one shard, or of many, hold in all."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from megachameleon.data.packing.pack_file import content_of
from megachameleon.data.packing.packing import PACKING_VERSION, Packing, PackingMode
from megachameleon.data.shards.manifest import ShardManifest
from megachameleon.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSummary:
    """Counts and identity of samples."""

    mode: PackingMode
    sequence_length: int
    packing_version: int
    vocabulary: Vocabulary
    """Of the ids."""
    tokenizer: str
    """Fingerprint of the text tokenizer."""
    image_tokenizer: str | None
    """Fingerprint of the picture tokenizer; None when all shards were made without one."""
    shards: int
    """How many there are."""
    documents: int
    """In all shards."""
    tokens: int
    """All ids of all documents."""
    images: int
    """Pictures in all documents."""
    labels: int
    """Labels with loss."""
    image_labels: int
    """Picture codes among them."""
    strata: list[int]
    """Samples by stratum."""
    content: str
    """Hash over the data files of all shards, in order."""

    @property
    def samples(self) -> int:
        """All samples."""
        return sum(self.strata)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what the samples are."""
        # neither counts nor strata: they follow from these
        content = [self.mode, self.sequence_length, self.packing_version, self.content, self.vocabulary.fingerprint]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def shard_summary(manifest: ShardManifest, packing: Packing, sequence_length: int, mode: PackingMode) -> PackSummary:
    """Of one shard."""
    return PackSummary(
        mode=mode,
        sequence_length=sequence_length,
        packing_version=PACKING_VERSION,
        vocabulary=manifest.vocabulary,
        tokenizer=manifest.tokenizer,
        image_tokenizer=manifest.image_tokenizer,
        shards=1,
        documents=manifest.num_documents,
        tokens=manifest.num_tokens,
        images=manifest.num_images,
        labels=int(packing.labels.sum()),
        image_labels=int(packing.image_labels.sum()),
        strata=packing.strata.tolist(),
        content=content_of(manifest),
    )


def total(summaries: Sequence[PackSummary], origin: str) -> PackSummary:
    """Several as one.

    Args:
        origin: names them in errors.

    Raises:
        ValueError: no documents, or different vocabularies or tokenizers.
    """
    first = summaries[0]
    for other in summaries:
        first.vocabulary.require_same(other.vocabulary, f"the first shard of {origin}", "another one")
    tokenizers = {}
    for kind in ("tokenizer", "image_tokenizer"):
        found = {getattr(summary, kind): None for summary in summaries}
        # shards without pictures may have been made without an image tokenizer
        found.pop(None, None)
        if len(found) > 1:
            raise ValueError(
                f"{origin}: shards of different {kind}s ({', '.join(found)}); preprocess all with the same"
            )
        tokenizers[kind] = next(iter(found), None)
    names = ("shards", "documents", "tokens", "images", "labels", "image_labels")
    counts = {name: sum(getattr(summary, name) for summary in summaries) for name in names}
    if not counts["tokens"]:
        raise ValueError(f"{origin}: the shards hold no documents; check the inputs")
    return PackSummary(
        mode=first.mode,
        sequence_length=first.sequence_length,
        packing_version=first.packing_version,
        vocabulary=first.vocabulary,
        tokenizer=tokenizers["tokenizer"] or "",
        image_tokenizer=tokenizers["image_tokenizer"],
        strata=[sum(counts) for counts in zip(*(summary.strata for summary in summaries), strict=True)],
        content=hashlib.sha256("\n".join(summary.content for summary in summaries).encode()).hexdigest()[:32],
        **counts,
    )
