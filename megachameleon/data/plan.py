"""The plan of a preprocessing: which inputs make which shard, with what tokenizers; frozen before any work."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megachameleon.data.documents import DocumentOptions
from megachameleon.files import read_json, write_json

PLAN_FILE = "plan.json"
PLAN_VERSION = 1
_AGAIN = "make the plan again (preprocess_data.py plan --replace)"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedInput:
    """One raw file, as it was when the plan was made."""

    path: str
    bytes: int
    sha256: str
    text_bytes: int
    num_pictures: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What one job does: some inputs into one shard."""

    name: str
    inputs: tuple[PlannedInput, ...]

    @property
    def bytes(self) -> int:
        """Size of the inputs."""
        return sum(item.bytes for item in self.inputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All units of one output folder."""

    tokenizer: str
    """Folder of the text tokenizer."""
    tokenizer_fingerprint: str
    image_tokenizer: str | None
    """Folder of the picture tokenizer, if any."""
    image_tokenizer_fingerprint: str | None
    options: DocumentOptions
    allow_damaged_archives: bool
    units: tuple[Unit, ...]

    def save(self, folder: Path, *, replace: bool = False) -> None:
        """Write the plan, unless the same one is there.

        Args:
            replace: also over another one.

        Raises:
            ValueError: another plan is there.
        """
        path = folder / PLAN_FILE
        if path.exists() and not replace:
            if Plan.load(folder) != self:
                raise ValueError(f"{path}: another plan is there; choose another --output, or --replace it")
            return
        write_json(path, {"version": PLAN_VERSION, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Read the plan of an output folder.

        Raises:
            ValueError: missing, not JSON, or of another version or form.
        """
        path = folder / PLAN_FILE
        values = _read(folder)
        try:
            values["options"] = DocumentOptions(**values["options"])
            values["units"] = tuple(
                Unit(name=unit["name"], inputs=tuple(PlannedInput(**item) for item in unit["inputs"]))
                for unit in values["units"]
            )
            return cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: damaged plan ({error}); {_AGAIN}") from None


def planned_units(folder: Path) -> list[str]:
    """The names of the units of an output folder, in order.

    Raises:
        ValueError: no plan there, or a damaged one.
    """
    return [unit.name for unit in Plan.load(folder).units]


def make_units(inputs: Sequence[PlannedInput], count: int | None) -> tuple[Unit, ...]:
    """Share inputs among units: one each, or `count` neighbourly groups of about equal bytes.

    Unit names sort in the order of the inputs.
    """
    if count is None or count >= len(inputs):
        return tuple(
            Unit(name=f"{number:05d}-{_file_stem(item.path)}", inputs=(item,)) for number, item in enumerate(inputs)
        )
    total = sum(item.bytes for item in inputs) or 1
    groups: list[list[PlannedInput]] = [[] for _ in range(count)]
    done = 0
    for item in inputs:
        groups[min(count - 1, done * count // total)].append(item)
        done += item.bytes
    filled = [group for group in groups if group]
    return tuple(Unit(name=f"{number:05d}", inputs=tuple(group)) for number, group in enumerate(filled))


def _file_stem(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path).name.split(".")[0])[:80]


def _read(folder: Path) -> dict[str, Any]:
    path = folder / PLAN_FILE
    if not path.exists():
        raise ValueError(f"{path}: no plan there; run preprocess_data.py plan first")
    try:
        values = read_json(path)
    except ValueError:
        raise ValueError(f"{path}: not valid JSON; {_AGAIN}") from None
    if not isinstance(values, dict) or values.pop("version", None) != PLAN_VERSION:
        raise ValueError(f"{path}: not a plan of version {PLAN_VERSION}; {_AGAIN}")
    return values
