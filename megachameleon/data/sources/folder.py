"""Folders of pictures with captions beside them: the files that a tar would hold, not packed.

A caption file is `KEY.txt` or `KEY.json`; its pictures are `KEY.png`, or `KEY.0.png` and so on for JSON with segments,
as in a tar. A folder with `metadata.jsonl` or `metadata.parquet` is read through that instead.
"""

import io
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from megachameleon.data.records import Record
from megachameleon.data.sources.beside import FilesBeside
from megachameleon.data.sources.locations import base_name, list_folder
from megachameleon.data.sources.raw import RawRecord
from megachameleon.data.sources.samples import is_picture, sample_record

NO_FILE: BinaryIO = io.BytesIO()
"""What stands for the content of a folder."""
_CAPTIONS = (".txt", ".json")
_REFERRING = (".jsonl", ".ndjson", ".parquet", ".html", ".htm", ".md", ".markdown", ".gz", ".zst")


def captions_beside_pictures(names: Sequence[str]) -> set[str]:
    """Of the names of a folder's files, the caption files that have a picture."""
    return {file for files in _samples(names).values() for file in files if not is_picture(file)}


def described_by_metadata(names: Sequence[str]) -> bool:
    """Whether a folder has a file of metadata, which then takes the place of captions beside pictures."""
    return any(name.startswith("metadata.") and name.endswith((".jsonl", ".parquet")) for name in names)


def folder_contents(folder: str) -> list[tuple[str, int]]:
    """Names and sizes of the files that make up the records of a folder."""
    files = [(base_name(path), size) for path, size in list_folder(folder, deep=False)]
    used = {name for sample in _samples([name for name, _ in files]).values() for name in sample}
    return [(name, size) for name, size in files if name in used or is_picture(name)]


def read_raw_folder(source: str, file: BinaryIO) -> Iterator[RawRecord]:
    """The samples of a folder, as names of files, and pictures of no sample where nothing else can refer to them."""
    sizes = {base_name(path): size for path, size in list_folder(source, deep=False)}
    names = list(sizes)
    samples = _samples(names)
    position = 0
    for key, files in samples.items():
        yield RawRecord(source, "folder", key, position, (key, tuple(files)))
        position += sum(sizes[name] for name in files)
    used = {name for files in samples.values() for name in files}
    # a page or table in the folder may refer to pictures that have no caption of their own
    if not any(name.lower().endswith(_REFERRING) for name in names):
        for name in names:
            if is_picture(name) and name not in used:
                yield RawRecord(source, "folder", name, position, None, "a picture without a caption")


def parse_raw_folder(raw: RawRecord, beside: FilesBeside) -> Record:
    """Read the files of a sample and understand them.

    Raises:
        ValueError: they are too long or of no known form.
    """
    key, files = raw.payload
    members = {name[len(key) + 1 :].lower(): beside.read(name) for name in files}
    # file systems may keep A.png and a.png apart; extensions of samples are in lower case
    if len(members) < len(files):
        raise ValueError(f"two of {', '.join(files)} have one name but for capital letters")
    return sample_record(raw.place, key, members)


def _samples(names: Sequence[str]) -> dict[str, list[str]]:
    """Files by key, in the order of keys; only keys with both a caption file and a picture."""
    keys = {name.rpartition(".")[0] for name in names if name.lower().endswith(_CAPTIONS)}
    samples: dict[str, list[str]] = {key: [] for key in sorted(keys)}
    for name in sorted(names):
        if name.lower().endswith(_CAPTIONS):
            samples[name.rpartition(".")[0]].append(name)
        elif is_picture(name) and (key := _key_of(name, keys)) is not None:
            samples[key].append(name)
    return {key: files for key, files in samples.items() if any(map(is_picture, files))}


def _key_of(picture: str, keys: set[str]) -> str | None:
    """The longest key that a picture's name begins with."""
    stem = picture
    while "." in stem:
        stem = stem.rpartition(".")[0]
        if stem in keys:
            return stem
    return None
