"""Raw sources by file name: webdataset tars, JSONL and plain text, plain or gzipped."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megachameleon.data.json_records import count_pictures, read_jsonl
from megachameleon.data.records import (
    BadRecord,
    CaptionedRecord,
    Record,
    SegmentsRecord,
    TextSegment,
    checked_text,
    decode_text,
)
from megachameleon.data.tar_source import damage_reported, opened, read_tar, split_name, walk_tar
from megachameleon.tokens.pictures import PICTURE_SUFFIXES

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
TEXT_SUFFIXES = (".txt",)
KNOWN_SUFFIXES = TAR_SUFFIXES + JSONL_SUFFIXES + TEXT_SUFFIXES


@dataclass(frozen=True, slots=True)
class Survey:
    """What a look at the outside of a source tells."""

    text_bytes: int
    """Bytes of text and JSON; of a gzipped JSONL, its packed size."""
    num_pictures: int


def find_sources(paths: Iterable[Path]) -> list[Path]:
    """The source files that `paths` name, folders searched, in the order given and then of names.

    Raises:
        ValueError: a path is missing, a folder holds no source, a file is of no known kind, or comes twice.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.name.endswith(KNOWN_SUFFIXES) and file.is_file())
            if not inside:
                raise ValueError(f"{path}: no {', '.join(KNOWN_SUFFIXES)} files in this folder; check the path")
            found += inside
        elif not path.exists():
            raise ValueError(f"{path}: no such file or folder; check the path")
        elif not path.name.endswith(KNOWN_SUFFIXES):
            raise ValueError(f"{path}: unknown kind of file; known are {', '.join(KNOWN_SUFFIXES)}")
        else:
            found.append(path)
    seen: set[Path] = set()
    for file in found:
        if file.resolve() in seen:
            raise ValueError(f"{file}: given twice; name each input once")
        seen.add(file.resolve())
    if not found:
        raise ValueError("no inputs given; name files or folders")
    return found


def read_source(path: Path, report: Callable[[int], None] = lambda position: None) -> Iterator[Record | BadRecord]:
    """Read the records of one source file.

    Args:
        report: is told the position in the (unpacked) file now and then.

    Raises:
        DamagedArchiveError: the file is damaged or truncated; raised after its whole records.
    """
    if path.name.endswith(TAR_SUFFIXES):
        yield from read_tar(path, report)
        return
    with damage_reported(path), opened(path) as file:
        if path.name.endswith(JSONL_SUFFIXES):
            yield from read_jsonl(path, file, report)
        else:
            yield _plain_text(path, file.read())


def survey_source(path: Path) -> Survey:
    """Count text and pictures from the outside, and find a damaged archive before any work.

    Raises:
        DamagedArchiveError: the file is damaged or truncated.
    """
    if path.name.endswith(JSONL_SUFFIXES):
        with damage_reported(path), opened(path) as file:
            return Survey(path.stat().st_size, count_pictures(file))
    if not path.name.endswith(TAR_SUFFIXES):
        return Survey(path.stat().st_size, 0)
    text_bytes = num_pictures = 0
    for member, _ in walk_tar(path):
        if split_name(member.name)[1].endswith(tuple(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)):
            num_pictures += 1
        else:
            text_bytes += member.size
    return Survey(text_bytes, num_pictures)


def texts_of(record: Record) -> list[str]:
    """All texts of a record: segments, or captions in every language."""
    if isinstance(record, CaptionedRecord):
        return [caption.text for caption in record.captions]
    return [segment.text for segment in record.segments if isinstance(segment, TextSegment)]


def _plain_text(path: Path, content: bytes) -> Record | BadRecord:
    try:
        return SegmentsRecord("byte 0", (TextSegment(checked_text(decode_text(content), "text")),))
    except UnicodeDecodeError as error:
        return BadRecord(path.name, f"byte {error.start}", "not valid UTF-8")
    except ValueError as error:
        return BadRecord(path.name, "byte 0", str(error))
