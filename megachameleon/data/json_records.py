"""Records written as JSON: `{"text": ...}` and `{"segments": [...]}`, in JSONL files and inside tars."""

import base64
import binascii
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from megachameleon.data.records import (
    BadRecord,
    PictureSegment,
    Record,
    Segment,
    SegmentsRecord,
    TextSegment,
    checked_text,
    decode_text,
    kind_of,
    require_segments,
)

MAX_LINE_BYTES = 1 << 28
MAX_PICTURE_BYTES = 1 << 28


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        ValueError: not UTF-8, not JSON, or not an object.
    """
    try:
        values = json.loads(decode_text(data))
    except UnicodeDecodeError:
        raise ValueError("not valid UTF-8") from None
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"JSON is {kind_of(values)}, not an object")
    return values


def segments_record(origin: str, entries: Any, picture_named: Callable[[Any], PictureSegment]) -> SegmentsRecord:
    """Build an interleaved record.

    Args:
        picture_named: finds the picture that an `image` entry names.

    Raises:
        ValueError: another form, or a picture that cannot be found.
    """
    segments: list[Segment] = []
    for number, entry in enumerate(require_segments(entries)):
        if "text" in entry:
            segments.append(TextSegment(checked_text(entry["text"], f"segments[{number}].text")))
        elif "image" in entry:
            segments.append(picture_named(entry["image"]))
        else:
            segments.append(_inline_picture(entry["image_base64"], f"segments[{number}]"))
    return SegmentsRecord(origin, tuple(segments))


def read_jsonl(path: Path, file: IO[bytes], report: Callable[[int], None]) -> Iterator[Record | BadRecord]:
    """Read the records of a JSONL file; pictures are named relative to its folder. Empty lines are skipped.

    Args:
        file: the opened content of `path`.
        report: is told the position in the content now and then.
    """
    for number, line in enumerate(_lines(file), start=1):
        report(file.tell())
        if line is None:
            yield BadRecord(path.name, f"line {number}", f"longer than {MAX_LINE_BYTES:,} bytes")
        elif line.strip():
            try:
                yield _parse(path, f"line {number}", parse_json(line))
            except ValueError as error:
                yield BadRecord(path.name, f"line {number}", str(error))


def count_pictures(file: IO[bytes]) -> int:
    """Pictures that the lines of JSONL name or hold; lines that cannot be read count for none."""
    count = 0
    for line in _lines(file):
        if line is not None and b'"image' in line:  # lines of text alone are not worth parsing
            with suppress(ValueError):
                entries = require_segments(parse_json(line).get("segments"))
                count += sum("text" not in entry for entry in entries)
    return count


def _parse(path: Path, origin: str, values: dict[str, Any]) -> SegmentsRecord:
    if "segments" in values:
        return segments_record(origin, values["segments"], lambda name: _picture_file(path.parent, name))
    if "text" in values:
        return SegmentsRecord(origin, (TextSegment(checked_text(values["text"], "text")),))
    raise ValueError(f"unknown form: neither text nor segments among the keys {sorted(values)}")


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines of bounded length; None stands for one that is longer."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield None


def _picture_file(folder: Path, name: Any) -> PictureSegment:
    """A picture beside a JSONL file; names that leave its folder are refused, also through links."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"image {name!r} is not a file name")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"image {name!r} lies outside the folder of the JSONL file")
    if not path.is_file():
        raise ValueError(f"image {name!r}: no such file beside the JSONL file")
    if path.stat().st_size > MAX_PICTURE_BYTES:
        raise ValueError(f"image {name!r} has {path.stat().st_size:,} bytes, more than {MAX_PICTURE_BYTES:,}")
    return PictureSegment(path.read_bytes(), name)


def _inline_picture(value: Any, origin: str) -> PictureSegment:
    try:
        return PictureSegment(base64.b64decode(value, validate=True), origin)
    except (TypeError, binascii.Error, ValueError):
        raise ValueError(f"{origin}.image_base64 is not base64") from None
