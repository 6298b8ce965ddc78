"""Raw sources in the forms that users bring: webdataset tars and JSONL, the same bytes on every run."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megachameleon.files import atomic_path


def write_tars(folder: Path, records: Sequence[tuple[str, Mapping[str, bytes]]], records_per_tar: int = 512) -> None:
    """Write webdataset tars `00000.tar`, `00001.tar`, … into `folder`.

    Args:
        records: key and, by extension, the bytes of each member: `("1f436", {"png": …, "txt": …})`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(records), records_per_tar)):
        with (
            atomic_path(folder / f"{number:05d}.tar") as path,
            tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for key, members in records[start : start + records_per_tar]:
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")  # its defaults hold no time and no owner
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON as UTF-8, for a member of a tar."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8")
