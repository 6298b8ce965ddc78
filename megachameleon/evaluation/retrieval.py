"""Is the drawing the picture that was asked for? The nearest real picture, in pixels, decides."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megachameleon.evaluation.gallery import Gallery, NamedPrompt
from megachameleon.evaluation.statistics import wilson_interval

CHUNK = 256
"""Gallery pictures compared at once."""


def squared_distances(drawings: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Squared L2 distances between pictures uint8 [A, …] and [B, …], float64 [A, B].

    They are whole numbers below 2**53, so float64 holds them exactly and no order of summing changes them.
    """
    a = drawings.reshape(len(drawings), -1).astype(np.float64)
    squares = np.square(a).sum(1)
    distances = np.empty((len(drawings), len(gallery)))
    for start in range(0, len(gallery), CHUNK):
        b = gallery[start : start + CHUNK].reshape(-1, a.shape[1]).astype(np.float64)
        # |a|^2 + |b|^2 - 2ab, a matrix product; differences of all pairs would need their size in memory
        distances[:, start : start + CHUNK] = squares[:, None] + np.square(b).sum(1)[None] - 2 * (a @ b.T)
    return distances


def ranks(distances: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The rank of each target among the gallery, int64 [drawings]; 1 is nearest.

    Pictures at exactly the same distance share the middle of their ranks, rounded up: a gallery of identical pictures
    earns no more than chance.

    Args:
        distances: [drawings, gallery].
        targets: gallery positions, int64 [drawings].
    """
    own = distances[np.arange(len(distances)), targets][:, None]
    nearer, equal = (distances < own).sum(1), (distances == own).sum(1)
    return nearer + (equal + 2) // 2


def summarize(prompts: Sequence[NamedPrompt], found: np.ndarray, gallery_size: int) -> list[dict[str, Any]]:
    """One row for each kind of prompt, in the order of first appearance, and one for all together at the end.

    Args:
        found: ranks, int64 [prompts].
    """
    kinds = list(dict.fromkeys(prompt.kind for prompt in prompts))
    rows = [_row(kind, found[[prompt.kind == kind for prompt in prompts]], gallery_size) for kind in kinds]
    return rows if len(kinds) == 1 else [*rows, _row("all", found, gallery_size)]


def _row(name: str, found: np.ndarray, gallery_size: int) -> dict[str, Any]:
    count = len(found)
    row: dict[str, Any] = {
        "name": name,
        "held_out": name.startswith("held-out"),
        "prompts": count,
        "median_rank": float(np.median(found)),
        "chance": 1 / gallery_size,
    }
    for k in (1, 5):
        hits = int((found <= k).sum())
        row[f"top{k}"] = hits / count
        row[f"top{k}_interval"] = list(wilson_interval(hits, count))
        row[f"chance_top{k}"] = min(k, gallery_size) / gallery_size
    return row


def retrieval_report(
    prompts: Sequence[NamedPrompt], drawings: np.ndarray, gallery: Gallery, reconstructed: np.ndarray, origin: str
) -> dict[str, Any]:
    """The whole report.

    Args:
        drawings: uint8 [prompts, 3, size, size].
        reconstructed: the gallery's pictures after the image tokenizer, of the same shape.
        origin: where the prompts came from, for errors.

    Returns:
        `groups`: drawings against real pictures; `groups_among_reconstructions`: against what the image tokenizer
        leaves of them; `ceiling`: the prompted pictures' own reconstructions against real pictures, which no model that
        draws with these codes can be expected to beat; `drawings`: one row a prompt.
    """
    targets = gallery.positions([prompt.key for prompt in prompts], origin)
    size = len(gallery.pictures)
    distances = squared_distances(drawings, gallery.pictures)
    found = ranks(distances, targets)
    among = ranks(squared_distances(drawings, reconstructed), targets)
    ceiling = ranks(squared_distances(reconstructed[targets], gallery.pictures), targets)
    return {
        "prompts": len(prompts),
        "gallery": size,
        "groups": summarize(prompts, found, size),
        "groups_among_reconstructions": summarize(prompts, among, size),
        "ceiling": summarize(prompts, ceiling, size),
        "drawings": [
            {**asdict(prompt), "rank": int(rank), "nearest": gallery.keys[position]}
            for prompt, rank, position in zip(prompts, found, distances.argmin(1), strict=True)
        ],
    }
