"""What the decoder is trained on."""

from dataclasses import dataclass, field
from typing import Literal

from megachameleon.config.binding import nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """A stretch of training with one mixture of datasets."""

    weights: dict[str, float]
    """Shares by dataset name; scaled to sum to 1."""
    by: Literal["samples", "tokens"] = "samples"
    """What `weights` are shares of: samples, or labels with loss."""
    image_tokens: float | None = None
    """Wanted share of picture codes among the labels with loss; the weights are changed as little as reaches it."""
    samples: int | None = None
    """Length in samples; None in the last stage means to the end of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Datasets, their mixture and the shape of a sample."""

    tokenizer: str = ""
    """Folder of the text tokenizer with its vocabulary.json."""
    image_tokenizer: str | None = None
    """Folder of the image tokenizer; needed to draw pictures, not to train."""
    sequence_length: int = 4_096
    """Tokens in a sample."""
    packing: Literal["best_fit", "whole_pictures", "continuous"] = "best_fit"
    """How documents fill samples: whole ones, best fit; one after the other, cut where a sample ends but never inside a
    picture; or cut anywhere."""
    order: Literal["blend", "megatron"] = "blend"
    """Whose order of samples: ours, or that of megatron-core's GPTDataset and BlendedDataset, to compare with."""
    train: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Dataset name to its shards: folders or shard prefixes."""
    stages: tuple[StageConfig, ...] = ()
    """Mixtures, one after the other. A later stage may be appended without moving what came before."""
    validation: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Validation sets by name."""
    isolate_documents: bool = True
    """Documents packed in a sample do not attend to each other."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        # A label is the id that comes next: one id alone has none.
        if self.sequence_length < 2:
            raise ValueError(f"data.sequence_length: {self.sequence_length} must be at least 2")
        for i, stage in enumerate(self.stages):
            self._validate_stage(i, stage)
        if self.order == "megatron":
            self._validate_megatron()

    def _validate_megatron(self) -> None:
        if self.packing != "best_fit":
            raise ValueError(f"data.packing: {self.packing}, but data.order=megatron packs as it does; leave it out")
        if len(self.stages) > 1 or any(stage.samples is not None for stage in self.stages):
            raise ValueError("data.stages: data.order=megatron knows one mixture for a whole run; give one open stage")
        for stage in self.stages:
            if stage.by != "samples" or stage.image_tokens is not None:
                raise ValueError(
                    "data.stages[0]: `by` and `image_tokens` need data.order=blend; megatron blends by samples alone"
                )

    def _validate_stage(self, i: int, stage: StageConfig) -> None:
        key = f"data.stages[{i}]"
        for name, weight in stage.weights.items():
            if name not in self.train:
                raise ValueError(f"{key}.weights.{name}: no such dataset in data.train; {nearest(name, self.train)}")
            if weight < 0:
                raise ValueError(f"{key}.weights.{name}: {weight} must not be negative")
        if not sum(stage.weights.values()) > 0:
            raise ValueError(f"{key}.weights: all are zero; give at least one dataset a positive weight")
        if stage.image_tokens is not None and not 0 < stage.image_tokens < 1:
            raise ValueError(f"{key}.image_tokens: {stage.image_tokens} must be between 0 and 1")
        if stage.samples is None and i + 1 < len(self.stages):
            raise ValueError(f"{key}.samples: missing; only the last stage may be open-ended")
        if stage.samples is not None and stage.samples < 1:
            raise ValueError(f"{key}.samples: {stage.samples} must be at least 1")
