"""Named real pictures, and prompts that ask for them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from megachameleon.console import track
from megachameleon.data.sources.damage import DamagedArchiveError
from megachameleon.data.sources.tar import walk_tar
from megachameleon.tokens.pictures import MAX_PIXELS, PICTURE_SUFFIXES, open_picture, prepare_picture

MAX_BYTES = 4 * MAX_PIXELS
"""Largest encoded picture that is read from a tar."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Real pictures, all prepared as the model saw them. Identical ones, such as some flags, are one picture."""

    pictures: np.ndarray
    """uint8 [pictures, 3, size, size]."""
    keys: tuple[str, ...]
    """The first key of each picture."""
    position: dict[str, int]
    """Where the picture of each key stands."""

    @classmethod
    def of(cls, pictures: dict[str, np.ndarray]) -> "Gallery":
        """Merge pictures uint8 [3, size, size] by key."""
        position: dict[str, int] = {}
        places: dict[bytes, int] = {}
        keys: list[str] = []
        # sorted: which of equal pictures lends its key must not depend on the file system
        for key in sorted(pictures):
            position[key] = places.setdefault(pictures[key].tobytes(), len(keys))
            if position[key] == len(keys):
                keys.append(key)
        return cls(pictures=np.stack([pictures[key] for key in keys]), keys=tuple(keys), position=position)

    def positions(self, keys: Sequence[str], origin: str) -> np.ndarray:
        """Where pictures stand, int64 [keys].

        Raises:
            ValueError: a key without picture; `origin` names who asked.
        """
        missing = sorted({key for key in keys if key not in self.position})
        if missing:
            raise ValueError(
                f"{origin}: {len(missing)} keys have no picture in the gallery, such as {missing[0]!r}; "
                "the gallery needs KEY.png for each key"
            )
        return np.array([self.position[key] for key in keys], dtype=np.int64)

    def merge_names(self, prompts: Sequence["NamedPrompt"]) -> list["NamedPrompt"]:
        """The same prompts, with one key for identical pictures: the name of one is a name of the other."""
        return [
            replace(prompt, key=self.keys[self.position[prompt.key]]) if prompt.key in self.position else prompt
            for prompt in prompts
        ]


@dataclass(frozen=True, kw_only=True)
class NamedPrompt:
    """A caption and the picture that it is of."""

    text: str
    """The caption."""
    key: str
    """Of the picture that it is of."""
    kind: str
    """What is reported apart, such as "seen English"."""
    lang: str
    """Language of the caption; "" where it is not told."""


def read_named_prompts(path: Path) -> list[NamedPrompt]:
    """Read a JSONL file of {"text", "key", "kind", "lang"}; the last two may be left out, further fields are ignored.

    Raises:
        ValueError: the file is missing or empty, or a line is not such an object; names the line.
    """
    if not path.is_file():
        raise ValueError(f'{path}: no such file; write a JSONL file with "text" and "key" in each line')
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if line.strip():
            prompts.append(_parse(line, f"{path}:{number}"))
    if not prompts:
        raise ValueError(f"{path}: no prompts; write one JSON object per line")
    return prompts


def _parse(line: str, origin: str) -> NamedPrompt:
    try:
        value: Any = json.loads(line)
        fields = {name: value.get(name, "") for name in ("kind", "lang")}
        prompt = NamedPrompt(text=value["text"], key=value["key"], **fields)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        prompt = None
    if prompt is None or not all(isinstance(v, str) for v in (prompt.text, prompt.key, prompt.kind, prompt.lang)):
        raise ValueError(f'{origin}: not a prompt; write {{"text": "red heart", "key": "2764", "kind": "seen"}}')
    return prompt


def load_gallery(path: Path, size: int) -> Gallery:
    """Read KEY.png (or .jpg, .webp) from a folder, a tar, or all tars of a folder, in the order of their keys.

    Raises:
        ValueError: nothing there, a damaged picture or tar, or two pictures with one key.
    """
    found: dict[str, np.ndarray] = {}
    for key, data, origin in track(_picture_files(path), f"reading {path.name}"):
        if key in found:
            raise ValueError(f"{origin}: a second picture with the key {key!r}; keys must be unique")
        found[key] = prepare_picture(open_picture(data, origin), size)
    if not found:
        raise ValueError(f"{path}: no pictures ({', '.join(PICTURE_SUFFIXES)}); give a folder or a tar with KEY.png")
    return Gallery.of(found)


def _picture_files(path: Path) -> Iterator[tuple[str, bytes, str]]:
    """(key, bytes, origin) of every picture."""
    if not path.exists():
        raise ValueError(f"{path}: no such folder or tar; give the pictures that drawings are compared with")
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
    for tar in tars:
        yield from _pictures_of_tar(tar)
    for file in sorted(path.iterdir()) if path.is_dir() else []:
        if file.suffix.lower() in PICTURE_SUFFIXES:
            yield file.stem, file.read_bytes(), str(file)


def _pictures_of_tar(path: Path) -> Iterator[tuple[str, bytes, str]]:
    try:
        for member in walk_tar(str(path)):
            name = PurePosixPath(member.name)
            if not member.is_file or name.suffix.lower() not in PICTURE_SUFFIXES:
                continue
            if member.size > MAX_BYTES:
                raise ValueError(f"{path}:{member.name}: {member.size:,} bytes exceed {MAX_BYTES:,}; shrink it")
            yield name.stem, member.read(), f"{path}:{member.name}"
    except DamagedArchiveError as error:
        raise ValueError(f"{path}: {error.reason}; copy or write it again") from None
