"""What a caller may ask of the engine."""

import math
from dataclasses import dataclass, field

from megachameleon.generation.modality import MODALITIES, Modality
from megachameleon.generation.sampling import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings of one call of `generate`; the numbers are those of the released Chameleon's inference.

    Raises:
        ValueError: a value out of its range.
    """

    modality: Modality = "both"
    """What may be emitted: "text", "image" (pictures only), or "both"."""
    max_new_tokens: int | None = None
    """None goes on until the context is full."""
    max_pictures: int | None = None
    """Pictures per row; None is 1 in modality "image" and unlimited in "both"."""
    text: SamplingSettings = field(default_factory=lambda: SamplingSettings(repetition_penalty=1.2))
    """Of text ids."""
    image: SamplingSettings = field(default_factory=SamplingSettings)
    """Of picture codes."""
    guidance: float = 3.0
    """Scale of what the text of the context says about a picture; 1 is no guidance, and costs nothing."""
    image_guidance: float = 1.2
    """Scale of what earlier pictures of the context say about a picture; 1 is no guidance."""
    seed: int = 0
    """Of the draws, with the number of the row."""
    batch_size: int = 64
    """Rows at once; guidance doubles or triples what the model sees."""

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ValueError(f"modality={self.modality!r} is unknown; use one of {', '.join(MODALITIES)}")
        for name in ("max_new_tokens", "max_pictures", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("guidance", "image_guidance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number of at least 0; 1 is no guidance")

    @property
    def picture_limit(self) -> int | None:
        """Pictures per row, with the default of the modality."""
        return 1 if self.max_pictures is None and self.modality == "image" else self.max_pictures
