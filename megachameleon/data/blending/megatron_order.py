"""Samples exactly as megatron-core's GPTDataset and BlendedDataset give them, to compare runs with.

Its order depends on the number of samples of the run, is built in memory by every process, cuts pictures, and repeats
and skips when the mixture changes. Datasets of several shards share their weight out by tokens, as megatron's users do
by hand. Index caches are not used: they outlive the shards that they were made from.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from megachameleon.data.packing.pack_file import content_of
from megachameleon.data.samples import Sample, stack
from megachameleon.data.shards.manifest import ShardManifest
from megachameleon.data.shards.reader import shard_file, shard_prefixes
from megachameleon.tokens.vocabulary import Vocabulary

SURPLUS = 0.005
"""Samples that megatron-core builds beyond those of a dataset's share (`mid_level_dataset_surplus`)."""


@dataclass(frozen=True)
class _Ids:
    """What GPTDataset asks of a tokenizer."""

    vocabulary: Vocabulary

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def pad(self) -> int:
        return self.vocabulary.pad

    @property
    def eod(self) -> int:
        return self.vocabulary.eos

    eos = eod

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"vocabulary": self.vocabulary.fingerprint}


class MegatronSamples:
    """Position → sample in megatron-core's order."""

    def __init__(self, source: Any, vocabulary: Vocabulary, owners: Sequence[str], contents: Mapping[str, str]) -> None:
        """
        Args:
            source: a GPTDataset or BlendedDataset.
            owners: our dataset of each of its parts.
            contents: what decided its samples, by dataset.
        """
        self.source, self._vocabulary = source, vocabulary
        self._owners, self._contents = owners, dict(contents)

    @classmethod
    def of(
        cls,
        datasets: Mapping[str, Sequence[Path | str]],
        weights: Mapping[str, float],
        *,
        num_samples: int,
        sequence_length: int,
        seed: int,
        isolate_documents: bool,
    ) -> "MegatronSamples":
        """Build it as BlendedMegatronDatasetBuilder does.

        Args:
            datasets: shards by name.
            num_samples: of the whole run; another number is another order.
            isolate_documents: stands for megatron's --reset-position-ids, --reset-attention-mask and --eod-mask-loss.

        Raises:
            ValueError: no shards, or more than megatron-core can blend.
        """
        from megatron.core.datasets.blended_dataset import BlendedDataset
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
        from megatron.core.datasets.utils import normalize

        used = {name: [p for path in paths for p in shard_prefixes(Path(path))] for name, paths in datasets.items()}
        used = {name: prefixes for name, prefixes in used.items() if weights.get(name)}
        manifests = {name: [ShardManifest.load(shard_file(p, ".json")) for p in ps] for name, ps in used.items()}
        parts = [
            (name, prefix, weights[name] * manifest.num_tokens / sum(m.num_tokens for m in manifests[name]))
            for name, prefixes in used.items()
            for prefix, manifest in zip(prefixes, manifests[name], strict=True)
            if manifest.num_tokens
        ]
        vocabulary = next(iter(manifests.values()))[0].vocabulary
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            tokenizer=_Ids(vocabulary),
            reset_position_ids=isolate_documents,
            reset_attention_mask=isolate_documents,
            eod_mask_loss=isolate_documents,
            create_attention_mask=False,
        )
        config.mock = True  # without a blend of its own: no cache beside the shards
        shares = normalize([weight for _, _, weight in parts])
        sizes = [ceil(num_samples * share) for share in shares]
        if len(parts) == 1:
            source = _part(parts[0][1], num_samples, config)
        else:
            # as its builder does, or members end before the blend has drawn its share
            surplus = [ceil(size * (1 + SURPLUS)) for size in sizes]
            members = [_part(prefix, size, config) for (_, prefix, _), size in zip(parts, surplus, strict=True)]
            source = BlendedDataset(members, shares, sum(sizes), config)
        settings = [seed, sequence_length, num_samples, isolate_documents]
        contents = {
            name: f"{_hash([settings, weights[name], [content_of(manifest) for manifest in manifests[name]]])} "
            f"{len(manifests[name])} shards, seed, length, number of samples, isolate_documents {settings}"
            for name in used
        }
        return cls(source, vocabulary, [name for name, _, _ in parts], contents)

    @property
    def num_samples(self) -> int:
        """Length of the run."""
        return len(self.source)

    def __getitem__(self, position: int) -> Sample:
        values = self.source[position]
        tokens, labels = values["tokens"].numpy(), values["labels"].numpy()
        # an eos belongs to the document that it ends, so the next id is the first of another
        starts = np.append(0, np.cumsum(tokens == self._vocabulary.eos)[:-1])
        return Sample(
            tokens=tokens,
            labels=labels,
            loss_mask=values["loss_mask"].numpy(),
            document_ids=starts.astype(np.int32),
            position_ids=values["position_ids"].numpy(),
            image_mask=self._vocabulary.is_image_code(labels),
        )

    def batch(self, positions: Sequence[int]) -> Sample:
        """The samples at several positions as one batch [B, S]."""
        return stack([self[position] for position in positions])

    def drawn_before(self, position: int) -> dict[str, int]:
        """How many samples of each dataset stand before a position."""
        # a single dataset is not blended and has no such index
        parts = getattr(self.source, "dataset_index", np.zeros(position, dtype=np.int64))[:position]
        counts = np.bincount(parts, minlength=len(self._owners)).tolist()
        drawn = dict.fromkeys(self._owners, 0)
        for name, count in zip(self._owners, counts, strict=True):
            drawn[name] += count
        return drawn

    def history(self, position: int) -> str:
        """What decided all samples, as JSON; as `BlendedSamples.history`, but of the whole run."""
        return json.dumps({"order": "megatron", "datasets": self._contents}, sort_keys=True)


def _part(prefix: Path, num_samples: int, config: Any) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    indexed = GPTDataset.build_low_level_dataset(str(prefix), config)
    # all documents: validation has datasets of its own, so nothing is split off
    documents = np.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=np.int32)
    return GPTDataset(indexed, str(prefix), documents, num_samples, Split.train, config)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
