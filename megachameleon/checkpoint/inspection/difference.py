"""How two checkpoints differ, of whatever formats and layouts."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megachameleon.checkpoint.inspection.naming import part_of
from megachameleon.checkpoint.inspection.report import Facts, Report
from megachameleon.checkpoint.inspection.statistics import AT_A_TIME, plain_number
from megachameleon.checkpoint.inspection.tensors import TensorInfo, Tensors
from megachameleon.console import ProgressTask

Status = Literal[
    "equal", "same values", "within tolerance", "different", "only in A", "only in B", "shape", "unreadable"
]
EQUAL: tuple[Status, ...] = ("equal", "same values", "within tolerance")
FREE = {"dropout", "embedding_dropout", "context_length", "init_std", "depth_scaled_init"}
"""Of a configuration, what does not change what the model computes of a sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDifference:
    """One tensor of two checkpoints."""

    name: str
    status: Status
    """`same values`: in another dtype."""
    detail: str = ""
    largest: float = 0.0
    """Largest absolute difference of two values."""
    distance: float = 0.0
    """Frobenius norm of A - B."""
    norm: float = 0.0
    """Of A."""
    cosine: float = 1.0
    """Of the angle between A and B, all values being one vector."""

    @property
    def relative(self) -> float:
        """The distance divided by the norm of A."""
        return self.distance / self.norm if self.norm else math.inf if self.distance else 0.0

    def as_plain(self) -> Facts:
        """For JSON."""
        values = {**asdict(self), "relative": self.relative}
        return {name: plain_number(value) if isinstance(value, float) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting that two checkpoints have differently."""

    name: str
    one: Any
    other: Any
    counts: bool
    """Whether the checkpoints are different for it."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """All that was compared."""

    one: Report
    other: Report
    tolerance: float
    settings: tuple[Setting, ...]
    tensors: tuple[TensorDifference, ...]
    by_plain_names: bool

    @property
    def is_equal(self) -> bool:
        """Whether both are the same model."""
        same = all(tensor.status in EQUAL for tensor in self.tensors)
        return same and bool(self.tensors) and not any(setting.counts for setting in self.settings)

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by status."""
        found: dict[str, int] = {}
        for tensor in self.tensors:
            found[tensor.status] = found.get(tensor.status, 0) + 1
        return found

    def as_plain(self) -> Facts:
        """For JSON."""
        return {
            "a": str(self.one.path),
            "b": str(self.other.path),
            "equal": self.is_equal,
            "tolerance": self.tolerance,
            "names": "plain" if self.by_plain_names else "as stored",
            "settings": [asdict(setting) for setting in self.settings],
            "counts": self.counts,
            "tensors": [tensor.as_plain() for tensor in self.tensors],
            "problems": {"a": self.one.problems, "b": self.other.problems},
        }


def compare(one: Report, other: Report, tolerance: float, bar: ProgressTask) -> Difference:
    """Compare settings and all tensors: by plain names where both are decoders of this kind, else by stored names.

    Args:
        tolerance: relative Frobenius distance up to which a tensor counts as equal.
    """
    plain = one.uses_plain and other.uses_plain
    pairs = [_sides(one.tensors if plain else one.stored, other.tensors if plain else other.stored)]
    if plain:
        pictures = [_only_pictures(report.stored) for report in (one, other)]
        if all(pictures):  # a decoder's formats need not have any
            pairs.append((one.stored, other.stored, list({**pictures[0], **pictures[1]})))
    found = []
    for mine, theirs, names in pairs:
        for name in names:
            found.append(_compare_tensor(name, mine, theirs, tolerance))
            info = mine.infos.get(name) or theirs.infos[name]
            bar.advance(info.num_bytes / 1e6)
    return Difference(
        one=one,
        other=other,
        tolerance=tolerance,
        settings=tuple(_settings(one, other, plain)),
        tensors=tuple(found),
        by_plain_names=plain,
    )


def total_bytes(one: Report, other: Report) -> int:
    """About how much `compare` reads of either side."""
    plain = one.uses_plain and other.uses_plain
    mine, theirs = (report.tensors.infos if plain else report.stored.infos for report in (one, other))
    return sum((mine.get(name) or theirs[name]).num_bytes for name in {**mine, **theirs})


def _sides(mine: Tensors, theirs: Tensors) -> tuple[Tensors, Tensors, list[str]]:
    return mine, theirs, list({**dict.fromkeys(mine.infos), **dict.fromkeys(theirs.infos)})


def _only_pictures(stored: Tensors) -> dict[str, TensorInfo]:
    return {name: info for name, info in stored.infos.items() if part_of(name) == "picture encoder"}


def _compare_tensor(name: str, mine: Tensors, theirs: Tensors, tolerance: float) -> TensorDifference:
    a, b = mine.infos.get(name), theirs.infos.get(name)
    if a is None or b is None:
        return TensorDifference(name=name, status="only in A" if b is None else "only in B")
    if a.problem or b.problem:
        side, problem = ("A", a.problem) if a.problem else ("B", b.problem)
        return TensorDifference(name=name, status="unreadable", detail=f"{side}: {problem}")
    if a.shape != b.shape:
        return TensorDifference(name=name, status="shape", detail=f"{list(a.shape)} and {list(b.shape)}")
    try:
        return difference_of(name, mine.read(name), theirs.read(name), tolerance)
    except (ValueError, OSError) as error:
        return TensorDifference(name=name, status="unreadable", detail=str(error))


def difference_of(name: str, one: Tensor, other: Tensor, tolerance: float) -> TensorDifference:
    """Two tensors of the same shape and any dtypes; sums are in fp64."""
    a, b = one.reshape(-1), other.reshape(-1)
    if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
        return TensorDifference(name=name, status="equal")
    largest, squares, norm_a, norm_b, product = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, len(a), AT_A_TIME):
        x, y = (values[start : start + AT_A_TIME].double() for values in (a, b))
        apart = x - y
        piece = float(apart.abs().max())
        largest = max(largest, math.inf if math.isnan(piece) else piece)
        squares += float(apart.dot(apart))
        norm_a, norm_b, product = norm_a + float(x.dot(x)), norm_b + float(y.dot(y)), product + float(x.dot(y))
    bad = not all(map(math.isfinite, (largest, squares, norm_a, norm_b)))
    found = TensorDifference(
        name=name,
        status="different",
        detail=f"{_dtype(one)} and {_dtype(other)}" if one.dtype != other.dtype else "not finite" if bad else "",
        largest=largest,
        distance=math.inf if bad else math.sqrt(squares),
        norm=math.sqrt(norm_a) if math.isfinite(norm_a) else math.inf,
        cosine=product / math.sqrt(norm_a * norm_b) if norm_a and norm_b and not bad else math.nan,
    )
    if not largest and one.dtype != other.dtype:
        return _with_status(found, "same values")
    return _with_status(found, "within tolerance") if not bad and found.relative <= tolerance else found


def _bits(values: Tensor) -> Tensor:
    """As whole numbers, so that -0 is not 0 and NaN is itself."""
    return values.contiguous().view(torch.uint8)


def _with_status(found: TensorDifference, status: Status) -> TensorDifference:
    return TensorDifference(**{**asdict(found), "status": status})


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _settings(one: Report, other: Report, plain: bool) -> list[Setting]:
    """Model, vocabulary and tokenizers; what one side does not know is no difference."""
    found = []
    pictures = [bool(_only_pictures(report.stored)) for report in (one, other)]
    if pictures[0] != pictures[1]:  # there are formats that have none
        found.append(Setting(name="picture encoder", one=pictures[0], other=pictures[1], counts=not plain))
    if one.model is not None and other.model is not None:
        # By plain names QK-norms are compared head by head, whatever number of groups they are stored in.
        free = FREE | ({"qk_norm_groups"} if plain else set())
        for name in type(one.model).__dataclass_fields__:
            a, b = getattr(one.model, name), getattr(other.model, name)
            if a != b:
                found.append(Setting(name=f"model.{name}", one=a, other=b, counts=name not in free))
    sides: tuple[tuple[str, Mapping[str, Any] | None, Mapping[str, Any] | None], ...] = (
        ("vocabulary", one.vocabulary, other.vocabulary),
        ("tokenizer", one.tokenizers, other.tokenizers),
    )
    for title, mine, theirs in sides:
        for name in {**(mine or {}), **(theirs or {})}:
            a, b = (side.get(name) if side else None for side in (mine, theirs))
            if isinstance(a, tuple | list) and isinstance(b, tuple | list):
                a, b = list(a), list(b)
            if a is not None and b is not None and a != b:
                found.append(Setting(name=f"{title}.{name}", one=a, other=b, counts=True))
    return found
