"""Reading sources in two steps: finding raw records, in order and cheaply, and understanding them, in any process."""

from collections.abc import Callable, Iterator
from pathlib import Path

from megachameleon.data.records import BadRecord, CaptionedRecord, PictureSegment, Record, TextSegment
from megachameleon.data.sources.beside import FilesBeside
from megachameleon.data.sources.compression import unpacked
from megachameleon.data.sources.damage import damage_reported
from megachameleon.data.sources.folder import NO_FILE
from megachameleon.data.sources.locations import base_name, folder_of, open_location, source_name
from megachameleon.data.sources.raw import MAX_RECORD_PICTURES, RawRecord
from megachameleon.data.sources.registry import KINDS, kind_of_source


def read_raw(source: str | Path) -> Iterator[RawRecord]:
    """Find the records of one source, in order, without understanding them.

    Raises:
        DamagedArchiveError: it is damaged or truncated; raised after its whole records.
        ValueError: it cannot be opened, or none of its columns is known.
    """
    name = source_name(source)
    kind = kind_of_source(name)
    if kind == "folder":
        yield from KINDS[kind].read(name, NO_FILE)
        return
    with damage_reported(name), open_location(name) as file, unpacked(file, name) as content:
        yield from KINDS[kind].read(name, content)


def parse_raw(
    raw: RawRecord, note: Callable[[str, bytes | None], None] = lambda name, content: None
) -> Record | BadRecord:
    """Understand a raw record; also reads the pictures beside the source that it names.

    Args:
        note: is told the name and content of each file that the record names; None for one that is not there.
    """
    kind = KINDS[raw.kind]
    folder = raw.source if raw.kind == "folder" else folder_of(raw.source)
    try:
        if raw.error:
            raise ValueError(raw.error)
        record = kind.parse(raw, FilesBeside(folder, note))
        _require_few_pictures(record)
        return record
    except ValueError as error:
        return BadRecord(base_name(raw.source), raw.place, str(error))


def _require_few_pictures(record: Record) -> None:
    if isinstance(record, CaptionedRecord):
        count = len(record.captions)
    else:
        count = sum(isinstance(segment, PictureSegment) for segment in record.segments)
    if count > MAX_RECORD_PICTURES:
        raise ValueError(f"its documents have {count:,} pictures, more than {MAX_RECORD_PICTURES:,}")


def read_source(
    source: str | Path, report: Callable[[int], None] = lambda position: None
) -> Iterator[Record | BadRecord]:
    """Read the records of one source, in order.

    Args:
        report: is told the position in the (unpacked) source, in bytes, at each record.

    Raises:
        DamagedArchiveError: it is damaged or truncated; raised after its whole records.
        ValueError: it cannot be opened, or none of its columns is known.
    """
    for raw in read_raw(source):
        report(raw.position)
        yield parse_raw(raw)


def texts_of(record: Record) -> list[str]:
    """All texts of a record: segments, or captions in every language."""
    if isinstance(record, CaptionedRecord):
        return [caption.text for caption in record.captions]
    return [segment.text for segment in record.segments if isinstance(segment, TextSegment)]
