"""What the decoder is trained on."""

from dataclasses import dataclass, field

from megachameleon.config.binding import nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """A stretch of training with one mixture of datasets."""

    weights: dict[str, float]
    """Share of samples by dataset name; scaled to sum to 1."""
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
        if self.sequence_length < 2:
            raise ValueError(f"data.sequence_length: {self.sequence_length} must be at least 2")
        for i, stage in enumerate(self.stages):
            self._validate_stage(i, stage)

    def _validate_stage(self, i: int, stage: StageConfig) -> None:
        key = f"data.stages[{i}]"
        for name, weight in stage.weights.items():
            if name not in self.train:
                raise ValueError(f"{key}.weights.{name}: no such dataset in data.train; {nearest(name, self.train)}")
            if weight < 0:
                raise ValueError(f"{key}.weights.{name}: {weight} must not be negative")
        if not sum(stage.weights.values()) > 0:
            raise ValueError(f"{key}.weights: all are zero; give at least one dataset a positive weight")
        if stage.samples is None and i + 1 < len(self.stages):
            raise ValueError(f"{key}.samples: missing; only the last stage may be open-ended")
        if stage.samples is not None and stage.samples < 1:
            raise ValueError(f"{key}.samples: {stage.samples} must be at least 1")
