"""Parquet: one record a row, its columns found by name in the forms of `forms`; other columns are not read.

Row groups are read a few rows at a time, as few as their declared sizes say that memory allows.
"""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from megachameleon.data.records import Record
from megachameleon.data.sources.beside import FilesBeside
from megachameleon.data.sources.damage import DamagedArchiveError
from megachameleon.data.sources.forms import CAPTION_KEYS, FORM_KEYS, PICTURE_KEYS, TEXT_KEYS, record_of
from megachameleon.data.sources.raw import MAX_RECORD_BYTES, RawRecord, too_long

_BATCH_ROWS, _BATCH_BYTES, _EXPANDED_BYTES = 1024, 1 << 24, 1 << 30


def read_raw_parquet(source: str, file: BinaryIO) -> Iterator[RawRecord]:
    """The rows of a parquet file.

    Raises:
        DamagedArchiveError: it is damaged or truncated.
        ValueError: its columns make no record, or it declares absurd sizes.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{source}: reading parquet needs the package pyarrow; pip install pyarrow") from None
    try:
        # without read-ahead of whole row groups; pages have sums of their own, if the writer made any
        table = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
        columns = known_columns(source, table.schema_arrow.names)
        position = 0
        for group in range(table.num_row_groups):
            # of the group only: with a damaged footer, asking for a column's sizes aborts the interpreter
            layout = table.metadata.row_group(group)
            rows_at_once = _rows_at_once(source, layout.total_byte_size, layout.num_rows)
            row = 0
            # one thread: the pool's workers already use the cores, and order matters
            for batch in table.iter_batches(rows_at_once, row_groups=[group], columns=columns, use_threads=False):
                for values, error in _rows(batch):
                    # a row's own bytes are unknown; an even share is near enough for a progress bar
                    done = position + layout.total_byte_size * row // max(1, layout.num_rows)
                    yield RawRecord(source, "parquet", f"row group {group}, row {row}", done, values, error)
                    row += 1
            # fewer rows than declared are damage too, and must not go unnoticed
            if row != layout.num_rows:
                raise EOFError(f"row group {group} has {row} of {layout.num_rows} rows")
            position += layout.total_byte_size
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DamagedArchiveError(source, " ".join(str(error).split())) from None


def parse_raw_parquet(raw: RawRecord, beside: FilesBeside) -> Record:
    """Understand a row.

    Raises:
        ValueError: it is of no known form, or names a picture that is not there.
    """
    return record_of(raw.place, raw.payload, beside.read)


def count_raw_parquet(raw: RawRecord) -> tuple[int, int] | None:
    """Bytes of text, and no pictures; None for a row that may hold some."""
    present = {key: value for key, value in raw.payload.items() if value is not None}
    if len(present) != 1 or not set(present) <= set(TEXT_KEYS):
        return None
    (text,) = present.values()
    return (len(text.encode("utf-8", "replace")), 0) if isinstance(text, str) else None


def known_columns(source: str, names: Sequence[str]) -> list[str]:
    """The columns that make records.

    Raises:
        ValueError: there are none; names the columns and what they should be called.
    """
    present = set(names)
    interleaved = "segments" in present or {"texts", "images"} <= present
    captioned = bool(present.intersection(PICTURE_KEYS) and present.intersection(CAPTION_KEYS))
    if not (interleaved or captioned or present.intersection(TEXT_KEYS)):
        raise ValueError(
            f"{source}: its columns ({', '.join(names) or 'none'}) make no record; name them text or content, "
            f"a picture ({', '.join(PICTURE_KEYS)}) + caption, captions or text, segments, or texts + images"
        )
    return [name for name in names if name in FORM_KEYS]


def _rows(batch: Any) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Plain values of each row, or why there are none."""
    if batch.nbytes <= MAX_RECORD_BYTES:
        try:
            yield from [(values, "") for values in batch.to_pylist()]
            return
        except UnicodeDecodeError:
            pass  # in one of them: each alone
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        if row.nbytes > MAX_RECORD_BYTES:
            yield None, too_long("row", row.nbytes)
            continue
        try:
            yield row.to_pylist()[0], ""
        except UnicodeDecodeError as error:
            yield None, f"not valid UTF-8 (at byte {error.start} of a text)"


def _rows_at_once(source: str, num_bytes: int, num_rows: int) -> int:
    """Rows to decode together.

    Args:
        num_bytes: unpacked size that a row group declares. Asking the footer for that of each column is not safe: with
            a damaged one, pyarrow aborts the interpreter.
        num_rows: that it declares.

    Raises:
        ValueError: absurd sizes.
    """
    if num_bytes < 0 or num_rows < 0 or num_bytes > MAX_RECORD_BYTES * max(1, num_rows):
        raise ValueError(f"{source}: a row group declares {num_bytes:,} bytes in {num_rows:,} rows; write it again")
    # any row may repeat the longest value of a dictionary
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * num_rows // max(1, num_bytes), _EXPANDED_BYTES // max(1, num_bytes)))
