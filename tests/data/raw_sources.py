"""Builders of raw sources."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def png(red: int, green: int = 0, size: int = 12) -> bytes:
    """A picture of one colour with a corner of another."""
    image = Image.new("RGB", (size, size), (red, green, 90))
    image.paste((0, 255 - red, green), (0, 0, size // 2, size // 2))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | str | dict]) -> Path:
    """A tar of these members, in order; dictionaries become JSON."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def write_jsonl(path: Path, *lines: dict | bytes) -> Path:
    """A JSONL file of these lines; bytes are written as they are."""
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """What is in a folder of shards beside the plan, by name."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith("plan")}
