"""What a run will see: tokens and pictures by stage, source and modality; epochs, repeats, fill rates."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from megachameleon.data.blending.blending import BlendedSamples

WINDOWS = 32
"""Global batches of each stage whose picture tokens are counted exactly."""
READ_AT_MOST = 20_000
"""Samples that are looked at for that, of each stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceForecast:
    """One dataset in one stage. Tokens are labels with loss; expected values where samples differ."""

    dataset: str
    samples: int
    tokens: float
    image_tokens: float
    """Picture codes among them."""
    pictures: float
    epochs: float
    """Of the dataset, from the start of the run to the end of the stage."""
    repeated: int
    """Samples read more than once by then."""
    most_reads: int
    """Of one sample by then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageForecast:
    """One stage."""

    first: int
    end: int
    """Positions of its samples."""
    sources: tuple[SourceForecast, ...]
    windows: tuple[float, ...]
    """Shares of picture tokens in global batches, spread evenly over the stage, counted exactly."""

    @property
    def tokens(self) -> float:
        """Labels with loss."""
        return sum(source.tokens for source in self.sources)

    @property
    def image_share(self) -> float:
        """The share of picture codes among them."""
        return sum(source.image_tokens for source in self.sources) / max(self.tokens, 1)


def forecast(samples: BlendedSamples, num_samples: int, batch_size: int) -> list[StageForecast]:
    """Look ahead.

    Args:
        num_samples: of the run.
        batch_size: samples of a global batch.

    Raises:
        ValueError: a shard is missing, or was changed since it was packed.
    """
    return [
        StageForecast(
            first=first,
            end=end,
            sources=tuple(_sources(samples, first, end)),
            windows=tuple(_windows(samples, first, end, batch_size)),
        )
        for first, end in samples.blend.stage_bounds(num_samples)
    ]


def _sources(samples: BlendedSamples, first: int, end: int) -> Iterator[SourceForecast]:
    before, after = samples.drawn_before(first), samples.drawn_before(end)
    for name, dataset in samples.datasets.items():
        drawn, total, size = after[name] - before[name], after[name], len(dataset)
        if drawn:
            share = drawn / size
            yield SourceForecast(
                dataset=name,
                samples=drawn,
                tokens=dataset.summary.labels * share,
                image_tokens=dataset.summary.image_labels * share,
                pictures=dataset.summary.images * share,
                epochs=total / size,
                repeated=min(max(total - size, 0), size),
                most_reads=ceil(total / size),
            )


def _windows(samples: BlendedSamples, first: int, end: int, size: int) -> Iterator[float]:
    starts = range(-(-first // size) * size, end - size + 1, size)  # global batches that lie in the stage as a whole
    count = max(1, min(WINDOWS, len(starts), READ_AT_MOST // size))
    for number in range(min(count, len(starts))):
        start = starts[number * len(starts) // count]
        labels = image_labels = 0
        for position in range(start, start + size):
            draw = samples.blend[position]
            more, more_image = samples.datasets[draw.dataset].labels_of(draw.index)
            labels, image_labels = labels + more, image_labels + more_image
        yield image_labels / max(labels, 1)


def describe(samples: BlendedSamples, stages: list[StageForecast]) -> str:
    """The forecast as text."""
    lines = ["datasets"]
    for name, dataset in samples.datasets.items():
        held = dataset.summary
        lines.append(
            f"  {name:<16} {held.shards:,} shards, {held.documents:,} documents, {held.images:,} pictures, "
            f"{held.tokens:,} ids in {len(dataset):,} samples ({dataset.fill_rate:.1%} filled, {held.mode}); "
            f"{float(dataset.image_share):.1%} picture tokens"
        )
    for number, stage in enumerate(stages):
        lines.append(
            f"stage {number}: samples {stage.first:,} to {stage.end - 1:,}, {stage.tokens:,.0f} tokens with loss, "
            f"{stage.image_share:.2%} of pictures" + _describe_windows(stage)
        )
        lines += [f"  {_describe_source(source, stage)}" for source in stage.sources]
    return "\n".join(lines)


def _describe_windows(stage: StageForecast) -> str:
    if not stage.windows:
        return ""
    return f" ({min(stage.windows):.2%} to {max(stage.windows):.2%} in {len(stage.windows)} global batches)"


def _describe_source(source: SourceForecast, stage: StageForecast) -> str:
    text = source.tokens - source.image_tokens
    repeats = (
        f"{source.repeated:,} samples repeated, up to {source.most_reads} reads" if source.repeated else "no repeats"
    )
    return (
        f"{source.dataset:<16} {source.samples:,} samples, {source.tokens / max(stage.tokens, 1):.2%} of tokens: "
        f"{text:,.0f} of text, {source.image_tokens:,.0f} of pictures ({source.pictures:,.0f} pictures); "
        f"{source.epochs:.3f} epochs by its end, {repeats}"
    )


def describe_position(samples: BlendedSamples, position: int, num_samples: int) -> str:
    """Which sample stands at a position, from where it comes, and where else in the run it is read.

    Raises:
        ValueError: the run does not reach the position.
    """
    if not 0 <= position < num_samples:
        raise ValueError(f"--position {position}: the run has {num_samples:,} samples; choose 0 to {num_samples - 1}")
    draw = samples.blend[position]
    place = samples.datasets[draw.dataset].place(draw.index)
    read_at = ", ".join(map(str, samples.blend.positions_of(draw.dataset, draw.index, num_samples)))
    return (
        f"position {position}: {draw.dataset}, epoch {draw.epoch}, sample {place.sample} of {place.shard}; "
        f"the run reads it at {read_at}"
    )
