"""The plan of a preprocessing: which inputs make which shard, with what tokenizers; frozen before any work.

`plan.json` names everything that all units share. The units are lines of a file beside it, with an index, so that one
job of a large array reads one line. Both carry the hash of their content in their names; `plan.json` is written last.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megachameleon.data.documents import DocumentOptions
from megachameleon.files import atomic_path, read_json, write_json

PLAN_FILE = "plan.json"
"""In the output folder."""
PLAN_VERSION = 2
"""Other versions are refused, not converted."""
ORDINAL_BITS = 16
"""A document is `record << 16 | number within the record`, both from 0, in lists of duplicates."""
_AGAIN = "make the plan again (preprocess_data.py plan --replace)"
_INDEX = np.dtype([("offset", "<i8"), ("bytes", "<i8"), ("name", "S104")])


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedInput:
    """One raw file, as it was when the plan was made."""

    name: str
    """Path below the plan's root."""
    bytes: int
    sha256: str
    """Of the file, in hexadecimal."""
    text_bytes: int
    """Unpacked bytes of text in it."""
    num_pictures: int
    """Pictures in its good records."""
    num_records: int | None = None
    """Good and bad ones; None where counting them would take reading everything."""
    references: str = ""
    """The sum of the SHA-256 of all pictures that lie in files of their own, modulo 2**256; "" without any."""
    num_duplicates: int = 0
    """Documents to leave out because an equal one comes earlier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What one job does: some inputs into one shard."""

    name: str
    inputs: tuple[PlannedInput, ...]
    """In the order of their records in the shard."""
    first_duplicate: int = 0
    """Where the unit's documents to leave out begin in the plan's list."""
    duplicates_hash: str = ""
    """`duplicates_hash` of them, where any may be left out: a shard without others is another one."""

    @property
    def bytes(self) -> int:
        """Size of the inputs."""
        return sum(item.bytes for item in self.inputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What all units of one output folder share; the units themselves are read one by one."""

    folder: Path = field(compare=False)
    root: str
    """Folder or URL that all inputs lie below; "" when there is none."""
    tokenizer: str
    """Folder of the text tokenizer."""
    tokenizer_fingerprint: str
    """As `TextTokenizer.fingerprint` was when the plan was made."""
    image_tokenizer: str | None
    """Folder of the picture tokenizer, if any."""
    image_tokenizer_fingerprint: str | None
    """As `ImageTokenizer.fingerprint`; None without one."""
    options: DocumentOptions
    """How records become documents."""
    allow_damaged_archives: bool
    """Whether records before the damage of an archive are kept."""
    drop_duplicates: bool
    """Whether documents that an earlier one equals are left out."""
    num_units: int
    """Shards of the output folder."""
    bytes: int
    """Size of all inputs."""
    units_hash: str
    """Of the list of units and of the documents to leave out."""

    def unit(self, number: int) -> Unit:
        """Read one unit.

        Raises:
            ValueError: no such unit, or a damaged plan.
        """
        if not 0 <= number < self.num_units:
            raise ValueError(f"--unit {number}: the plan in {self.folder} has units 0..{self.num_units - 1}")
        row = self._index()[number]
        with self._problems_named(), self._path(".units.jsonl").open("rb") as file:
            file.seek(int(row["offset"]))
            return _unit_of(file.read(int(row["bytes"])), row["name"].decode())
        # not reached; type checkers take the context manager for one that may swallow errors
        raise AssertionError

    def units(self) -> Iterator[Unit]:
        """Read all units in order.

        Raises:
            ValueError: a damaged plan.
        """
        with self._problems_named(), self._path(".units.jsonl").open("rb") as file:
            for row, line in zip(self._index(), file, strict=True):
                yield _unit_of(line, row["name"].decode())

    def unit_names(self) -> list[str]:
        """The names of all units, in order, without reading them.

        Raises:
            ValueError: a damaged plan.
        """
        return [name.decode() for name in self._index()["name"].tolist()]

    def duplicates(self, unit: Unit) -> list[np.ndarray]:
        """The documents of each input to leave out, int64 as in `ORDINAL_BITS`, sorted.

        Raises:
            ValueError: a damaged plan.
        """
        counts = [item.num_duplicates for item in unit.inputs]
        if not any(counts):
            return [np.empty(0, np.int64)] * len(counts)
        with self._problems_named():
            listed = np.load(self._path(".duplicates.npy"), mmap_mode="r", allow_pickle=False)
            # a copy, so that the result does not hold the map of the whole list
            own = np.array(listed[unit.first_duplicate : unit.first_duplicate + sum(counts)])
            if len(own) != sum(counts) or duplicates_hash(own) != unit.duplicates_hash:
                raise ValueError("another list of duplicates")
        return np.split(own, np.cumsum(counts)[:-1])

    def input_path(self, item: PlannedInput) -> str:
        """Where an input is: a path or a URL."""
        return f"{self.root.rstrip('/')}/{item.name}" if self.root else item.name

    def _index(self) -> np.ndarray:
        with self._problems_named():
            index = np.load(self._path(".index.npy"), mmap_mode="r", allow_pickle=False)
            if index.dtype != _INDEX or index.shape != (self.num_units,):
                raise ValueError("another index")
            return index

    def _path(self, suffix: str) -> Path:
        return self.folder / f"plan-{self.units_hash[:12]}{suffix}"

    def _problems_named(self) -> "_PlanProblems":
        return _PlanProblems(self.folder / PLAN_FILE)


class _PlanProblems:
    """Says of errors inside that the plan is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | TypeError | KeyError | FileNotFoundError):
            raise ValueError(f"{self._path}: damaged plan ({error}); {_AGAIN}") from None


def load_plan(folder: Path) -> Plan:
    """Read what the units of an output folder share; the time does not depend on how many there are.

    Raises:
        ValueError: missing, not JSON, or of another version or form.
    """
    path = folder / PLAN_FILE
    values = _read(folder)
    try:
        values["options"] = DocumentOptions(**values["options"])
        return Plan(folder=folder, **values)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged plan ({error}); {_AGAIN}") from None


def save_plan(
    folder: Path, shared: dict[str, Any], units: Sequence[Unit], duplicates: np.ndarray, *, replace: bool = False
) -> Plan:
    """Write a plan, unless the same one is there.

    Args:
        shared: the fields of `Plan` that are not made here.
        duplicates: of all units in order, int64 as in `ORDINAL_BITS`.
        replace: also over another one.

    Raises:
        ValueError: another plan is there.
    """
    lines = [json.dumps(asdict(unit), ensure_ascii=False).encode() + b"\n" for unit in units]
    digest = hashlib.sha256(duplicates.tobytes())
    for line in lines:
        digest.update(line)
    total = sum(unit.bytes for unit in units)
    plan = Plan(folder=folder, num_units=len(units), bytes=total, units_hash=digest.hexdigest(), **shared)
    path = folder / PLAN_FILE
    if path.exists() and not replace:
        if load_plan(folder) != plan:
            raise ValueError(f"{path}: another plan is there; choose another --output, or --replace it")
        return plan
    index = np.zeros(len(units), _INDEX)
    index["bytes"] = [len(line) for line in lines]
    index["offset"] = np.cumsum(index["bytes"]) - index["bytes"]
    index["name"] = [unit.name.encode() for unit in units]
    with atomic_path(plan._path(".units.jsonl")) as temporary, temporary.open("wb") as file:
        file.writelines(lines)
    # all files under names of their own before plan.json, so a reader never sees a mixture
    for suffix, array in ((".index.npy", index), (".duplicates.npy", duplicates)):
        with atomic_path(plan._path(suffix)) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    values = {name: value for name, value in asdict(plan).items() if name != "folder"}
    write_json(path, {"version": PLAN_VERSION, **values})
    kept = f"plan-{plan.units_hash[:12]}."
    # last, when plan.json no longer names them
    for old in folder.glob("plan-*.*"):
        if not old.name.startswith(kept) and re.fullmatch(
            r"plan-[0-9a-f]{12}\.(units\.jsonl|index\.npy|duplicates\.npy)", old.name
        ):
            old.unlink(missing_ok=True)
    return plan


def duplicates_hash(rows: np.ndarray) -> str:
    """A short hash of documents to leave out, int64 as in `ORDINAL_BITS`."""
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16]


def planned_units(folder: Path) -> list[str]:
    """The names of the units of an output folder, in order.

    Raises:
        ValueError: no plan there, or a damaged one.
    """
    return load_plan(folder).unit_names()


def make_units(
    inputs: Iterable[PlannedInput], *, count: int | None = None, unit_bytes: int | None = None
) -> tuple[Unit, ...]:
    """Share inputs among units of neighbours: one input each, `count` groups of about equal bytes, or groups of at
    least `unit_bytes` where there are enough of them.

    Unit names sort in the order of the inputs. A unit is at least one input.
    """
    items = list(inputs)
    if unit_bytes is not None:
        return _named(_groups_of_bytes(items, unit_bytes))
    if count is not None and count < len(items):
        return _named(_groups_by_count(items, count))
    # zeros in front, since shards are opened in the order of their names
    width = max(5, len(str(len(items) - 1)))
    return tuple(
        Unit(name=f"{number:0{width}d}-{_file_stem(item.name)}", inputs=(item,)) for number, item in enumerate(items)
    )


def _named(groups: list[list[PlannedInput]]) -> tuple[Unit, ...]:
    width = max(5, len(str(len(groups) - 1)))
    return tuple(Unit(name=f"{number:0{width}d}", inputs=tuple(group)) for number, group in enumerate(groups))


def _groups_by_count(items: list[PlannedInput], count: int) -> list[list[PlannedInput]]:
    total = sum(item.bytes for item in items) or 1
    groups: list[list[PlannedInput]] = [[] for _ in range(count)]
    done = 0
    for item in items:
        # by the bytes before it, so an input larger than a group's share leaves groups empty
        groups[min(count - 1, done * count // total)].append(item)
        done += item.bytes
    return [group for group in groups if group]


def _groups_of_bytes(items: list[PlannedInput], unit_bytes: int) -> list[list[PlannedInput]]:
    groups: list[list[PlannedInput]] = []
    filled = unit_bytes
    for item in items:
        if filled >= unit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += item.bytes
    return groups


def _file_stem(path: str) -> str:
    # dots too are replaced: what follows one in a shard's file name is its suffix
    return re.sub(r"[^A-Za-z0-9_-]+", "_", path.rpartition("/")[2].split(".")[0])[:80]


def _unit_of(line: bytes, name: str) -> Unit:
    values = json.loads(line)
    values["inputs"] = tuple(PlannedInput(**item) for item in values["inputs"])
    unit = Unit(**values)
    if unit.name != name:
        raise ValueError(f"unit {name} is {unit.name}")
    return unit


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
