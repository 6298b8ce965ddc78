"""One unit of a plan into one shard: whole or not at all, any number of times, always the same bytes.

The main process finds raw records and hashes what it reads; workers make blocks of ids of them; the main process fills
in the codes of pictures and writes. Nothing depends on the number of workers or on what the code cache knows.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from megachameleon.data.plan import ORDINAL_BITS, Plan, PlannedInput, Unit
from megachameleon.data.preprocessing.block import Batch, Block
from megachameleon.data.preprocessing.picture_codes import CodeFiller
from megachameleon.data.preprocessing.plan_making import UNKNOWN_REFERENCES
from megachameleon.data.preprocessing.worker_pool import WorkerPool
from megachameleon.data.records import BadRecord
from megachameleon.data.shards.manifest import FileRecord, ShardManifest
from megachameleon.data.shards.reader import shard_file
from megachameleon.data.shards.writer import ShardWriter
from megachameleon.data.sources.beside import ReferenceHash
from megachameleon.data.sources.damage import DamagedArchiveError
from megachameleon.data.sources.locations import file_size
from megachameleon.data.sources.raw import RawRecord
from megachameleon.data.sources.registry import KINDS, kind_of_source
from megachameleon.data.sources.surveying import SourceHash, hash_source, read_hashed
from megachameleon.files import no_room_named, write_text

BATCH_BYTES = 1 << 20
"""Text of a batch, about; pictures count as `PICTURE_WEIGHT`."""
BATCH_RECORDS = 1024
"""Records of a batch at most."""
PICTURE_WEIGHT = BATCH_BYTES // 64
"""What a picture counts for in a batch, because it grows when it is prepared."""
_PICTURE_MARKS = MappingProxyType({"jsonl": b'"image', "html": b"<img", "markdown": b"!["})
ALWAYS_TOLERATED = 10
"""Bad records of a unit that never fail it, however few good ones it has, as long as there is one."""
FIRST_LOOK = 10_000
"""Records before which the share of bad ones fails no unit whose number of records is not known."""


@dataclass(slots=True)
class _Tally:
    """What is known of the records so far."""

    num_records: int
    num_filtered: int
    num_duplicates: int
    bad: list[BadRecord]


class UnitRun:
    """One pass over the records of a unit."""

    def __init__(
        self, plan: Plan, unit: Unit, pool: WorkerPool[Batch, Block], filler: CodeFiller, writer: ShardWriter
    ) -> None:
        self._plan, self._unit, self._pool, self._filler, self._writer = plan, unit, pool, filler, writer
        self._tally = _Tally(0, 0, 0, [])
        self._hashes: dict[int, SourceHash] = {}
        self._references = [ReferenceHash() for _ in unit.inputs]

    def run(self, max_bad: float, report: Callable[[int], None]) -> ShardManifest:
        """Make the shard, and `NAME.quarantine.jsonl` if records had to be set aside.

        Args:
            max_bad: share of bad records above which a unit with more than ten fails; at 0 the first one fails it.
            report: is told input bytes as they are done.

        Raises:
            ValueError: an input changed since the plan, or too many records are bad; then only
                `NAME.quarantine.jsonl` is left.
            NoRoomError: the disk is full.
        """
        # sizes alone, which cost nothing, tell most changes before any work
        self._require_there()
        advance = _Progress(self._unit, report)
        with no_room_named(self._writer.prefix), closing(self._pool.ordered(self._batches())) as blocks:
            for block in blocks:
                self._count(block)
                advance(block.input, block.position)
                # at each block, so that a bad unit does not run for hours
                self._require_tolerable(max_bad, done=False)
                self._write(self._filler.add(block))
            self._write(self._filler.finish())
        # only now: hashes come with the reading, and a second pass over the network would cost more
        self._require_unchanged()
        self._require_tolerable(max_bad, done=True)
        with no_room_named(self._writer.prefix):
            # codes before the shard: after a kill in between they need not be computed again
            self._filler.save()
            self._save_quarantine()
            manifest = self._writer.commit(
                inputs=file_records(self._unit),
                quarantined=dict(sorted(Counter(bad.file for bad in self._tally.bad).items())),
                filtered=self._tally.num_filtered,
                duplicates=self._tally.num_duplicates,
                options=shard_options(self._plan, self._unit),
            )
        advance.finish()
        return manifest

    def _batches(self) -> Iterator[Batch]:
        drops = self._plan.duplicates(self._unit)
        for number, item in enumerate(self._unit.inputs):
            records: list[RawRecord | BadRecord] = []
            first = weight = 0
            for record in self._records(number, item):
                records.append(record)
                weight += _weight(record)
                if weight >= BATCH_BYTES or len(records) >= BATCH_RECORDS:
                    yield _batch(number, records, first, drops[number])
                    first, weight, records = first + len(records), 0, []
            if records:
                yield _batch(number, records, first, drops[number])

    def _records(self, number: int, item: PlannedInput) -> Iterator[RawRecord | BadRecord]:
        def finish(found: SourceHash) -> None:
            self._hashes[number] = found

        try:
            yield from read_hashed(self._plan.input_path(item), finish)
        except DamagedArchiveError as error:
            if not self._plan.allow_damaged_archives:
                raise
            yield BadRecord(item.name, "end", error.reason)

    def _count(self, block: Block) -> None:
        item = self._unit.inputs[block.input]
        self._tally.num_records += block.num_records
        self._tally.num_filtered += block.num_filtered
        self._tally.num_duplicates += block.num_duplicates
        self._tally.bad += [replace(bad, file=item.name) for bad in block.bad]
        for name, found in block.references:
            self._references[block.input].add(name, found)

    def _write(self, blocks: Iterator[Block]) -> None:
        for block in blocks:
            if len(block.lengths):
                self._writer.add_block(block.ids, block.lengths)

    def _require_there(self) -> None:
        for item in self._unit.inputs:
            path = self._plan.input_path(item)
            # has no size of its own
            if kind_of_source(path) == "folder":
                continue
            size = file_size(path)
            if size is None:
                raise ValueError(
                    f"{path}: gone since the plan was made; bring it back or plan again into another folder"
                )
            if size != item.bytes:
                raise _changed(path)

    def _require_unchanged(self) -> None:
        for number, item in enumerate(self._unit.inputs):
            path = self._plan.input_path(item)
            found = self._hashes.get(number) or hash_source(path)  # a damaged archive was not read to its end
            if (found.bytes, found.sha256) != (item.bytes, item.sha256):
                raise _changed(path)
            if item.references not in (UNKNOWN_REFERENCES, self._references[number].value() or ""):
                raise ValueError(
                    f"{path}: a file that it names, such as a picture, changed since the plan was made; "
                    "plan again into another folder"
                )

    def _require_tolerable(self, max_bad: float, *, done: bool) -> None:
        bad, records = len(self._tally.bad), self._tally.num_records
        if not bad:
            return
        expected = records if done else self._expected_records()
        if (done and bad == records) or bad > (max_bad and max(ALWAYS_TOLERATED, max_bad * expected)):
            shown = "; ".join(f"{item.file}, {item.place}: {item.reason}" for item in self._tally.bad[:3])
            too_many = "" if bad == records else f", more than --max-bad {max_bad:g} allows"
            so_far = "" if done else " so far"
            remedy = "" if bad == records else ", or raise --max-bad"
            raise ValueError(
                f"unit {self._unit.name}: {bad} of {records} records{so_far} are bad{too_many} "
                f"({shown}{'; ...' if bad > 3 else ''}); all reasons are in {self._save_quarantine()}; "
                f"mend the input and plan again{remedy}"
            )

    def _expected_records(self) -> int:
        counts = [item.num_records for item in self._unit.inputs]
        known = sum(count for count in counts if count is not None)
        # of all records and not of those so far: a bad beginning must not fail a good unit
        return known if None not in counts else max(known, self._tally.num_records, FIRST_LOOK)

    def _save_quarantine(self) -> Path:
        path = shard_file(self._writer.prefix, ".quarantine.jsonl")
        if self._tally.bad:
            write_text(path, "".join(json.dumps(asdict(b), ensure_ascii=False) + "\n" for b in self._tally.bad))
        else:
            path.unlink(missing_ok=True)
        return path


class _Progress:
    """Turns positions in inputs into steps for a progress bar, never more in sum than the unit has."""

    def __init__(self, unit: Unit, report: Callable[[int], None]) -> None:
        sizes = [item.bytes for item in unit.inputs]
        self._sizes, self._before = sizes, (np.cumsum(sizes) - sizes).tolist()
        self._report, self._done = report, 0

    def __call__(self, number: int, position: int) -> None:
        self._advance(self._before[number] + min(position, self._sizes[number]))

    def finish(self) -> None:
        """All is done."""
        self._advance(sum(self._sizes))

    def _advance(self, done: int) -> None:
        if done > self._done:
            self._report(done - self._done)
            self._done = done


def file_records(unit: Unit) -> tuple[FileRecord, ...]:
    """The inputs of a unit as its manifest names them."""
    return tuple(FileRecord(name=item.name, bytes=item.bytes, sha256=item.sha256) for item in unit.inputs)


def shard_options(plan: Plan, unit: Unit) -> dict:
    """What of a plan decides a unit's bytes, beside inputs and tokenizers; kept in its manifest."""
    options = asdict(plan.options)
    # as JSON gives it back, for it is compared with a manifest that was read
    options["languages"] = list(plan.options.languages)
    kept = {"allow_damaged_archives": plan.allow_damaged_archives, "drop_duplicates": plan.drop_duplicates}
    dropped = {"duplicates_hash": unit.duplicates_hash} if plan.drop_duplicates else {}
    beside = {item.name: item.references for item in unit.inputs if item.references}
    return {**options, **kept, **dropped, **({"references": beside} if beside else {})}


def _changed(path: str) -> ValueError:
    return ValueError(f"{path}: changed since the plan was made; plan again into another folder")


def _batch(number: int, records: Sequence[RawRecord | BadRecord], first: int, drops: np.ndarray) -> Batch:
    # batches are cut by input alone, so each takes its share of the unit's sorted list
    low, high = np.searchsorted(drops, (first << ORDINAL_BITS, first + len(records) << ORDINAL_BITS))
    return Batch(number, records, drops[low:high] - (first << ORDINAL_BITS))


def _weight(record: RawRecord | BadRecord) -> int:
    """About how much memory and time a record will take, in bytes of text."""
    if isinstance(record, BadRecord):
        return 0
    payload = record.payload
    if payload is None:
        return 0
    if isinstance(payload, bytes):
        mark = _PICTURE_MARKS.get(record.kind)
        return len(payload) + (payload.count(mark) * PICTURE_WEIGHT if mark else 0)
    counted = KINDS[record.kind].count(record)
    return _size(payload) + PICTURE_WEIGHT * (1 if counted is None else counted[1])


def _size(value: object) -> int:
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
