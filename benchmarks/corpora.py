"""Text that every machine with Python has: its standard library, as JSON lines."""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
"""sentencepiece alone reads it as a space, so ids would differ for a reason that is not speed."""


def write_library(path: Path, megabytes: float, document_bytes: int | None) -> None:
    """Sources of the standard library as lines of `{"text": ...}`, in the order of their names.

    Args:
        megabytes: UTF-8 text to stop at.
        document_bytes: cut files after the line that exceeds this; None leaves them whole.
    """
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in _documents(document_bytes):
            if written >= megabytes * 1e6:
                break
            written += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    if written < megabytes * 1e6 / 2:
        raise ValueError(f"--megabytes {megabytes:g}: the standard library holds {written / 1e6:.1f} MB; give --input")


def read_texts(path: Path) -> list[str]:
    """The texts of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _documents(document_bytes: int | None) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        # what is installed there differs from machine to machine
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # tests of encodings
            continue
        if SPACE_MARK not in text:
            yield from (part for part in _cut(text, document_bytes) if part.strip())


def _cut(text: str, document_bytes: int | None) -> Iterator[str]:
    part: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        part.append(line)
        size += len(line.encode())
        if document_bytes is not None and size > document_bytes:
            yield "".join(part)
            part, size = [], 0
    yield "".join(part)
