"""QK-norm's vectors for fewer or more groups of heads than there are."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from megachameleon.checkpoint.formats.plain import layer_of


def regrouped(values: Tensor, groups: int) -> Tensor:
    """Vectors [n, head_dim] for `groups` groups: repeated, or of each n / groups neighbours the one that they are.

    Where they differ, their mean. `groups` is a multiple or a divisor of n.
    """
    if groups >= len(values):
        return values.repeat_interleave(groups // len(values), 0)
    neighbours = values.unflatten(0, (groups, -1))
    # A mean of equal numbers need not be that number to the last bit; copies stay what they are.
    same = bool((neighbours == neighbours[:, :1]).all())
    return neighbours[:, 0] if same else neighbours.double().mean(1).to(values.dtype)


def largest_distance(values: Tensor, groups: int) -> float:
    """Between a vector and the first of those with which it would share a group; 0 where none would."""
    if groups >= len(values):
        return 0.0
    neighbours = values.double().unflatten(0, (groups, -1))
    return float((neighbours - neighbours[:, :1]).abs().max())


def averaging_note(origin: Path, distances: Mapping[str, float], *, averaged: bool, remedy: str) -> str | None:
    """What a reader is told of vectors that lose what makes them different; None: none do.

    Args:
        distances: `largest_distance` by plain name.
        averaged: whether somebody has asked for means.
        remedy: another way out.

    Raises:
        ValueError: vectors differ and nobody has asked for means; lists where.
    """
    apart = {name: distance for name, distance in distances.items() if distance}
    if not apart:
        return None
    worst = max(apart, key=lambda name: apart[name])
    if averaged:
        return f"QK-norms of the heads of a group were averaged; they were up to {apart[worst]:.3g} apart ({worst})"
    layers = ranges(sorted({layer_of(name)[0] or 0 for name in apart}))
    raise ValueError(
        f"{origin}: heads of a group differ in {len(apart)} QK-norm tensors (by up to {apart[worst]:.3g} in {worst}; "
        f"layers {layers}): {remedy}, or --average-qk-norm, which changes the model"
    )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words, such as `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
