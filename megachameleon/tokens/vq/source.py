"""The pictures that an image tokenizer is trained on: from tars and folders into one array in memory.

Equal pictures are kept once, so that a held-out picture is never one that was trained on. Which pictures are held out
depends on their pixels alone, not on the order or the names of the files.
"""

import hashlib
import random
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megachameleon.tokens.pictures import PICTURE_SUFFIXES, open_picture, prepare_picture

MAX_FILE_BYTES = 2**28
"""Longer encoded pictures are set aside."""
MIN_PICTURES = 32


@dataclass(frozen=True, slots=True)
class PictureFile:
    """Where the bytes of one encoded picture lie."""

    origin: str
    """`folder/a.png` or `shard.tar/a.png`."""
    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
            ValueError: too long, or the file ends before it does.
        """
        if self.size > MAX_FILE_BYTES:
            raise ValueError(f"{self.origin}: {self.size:,} bytes exceed the limit of {MAX_FILE_BYTES:,}")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise ValueError(f"{self.origin}: {len(data)} of {self.size} bytes are there")
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSet:
    """Prepared pictures and how they came about."""

    train: np.ndarray
    """uint8 [N, 3, size, size]."""
    held_out: np.ndarray
    """uint8 [M, 3, size, size], no picture of `train` among them."""
    quarantine: list[dict[str, str]]
    """`origin` and `reason` of each file that could not be used."""
    num_files: int
    """Picture files found, the unusable ones included."""
    num_duplicates: int
    """Usable files whose prepared pixels equal those of an earlier one."""

    @property
    def fingerprint(self) -> str:
        """A hash of all pixels."""
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(self.held_out.tobytes())
        return digest.hexdigest()[:16]


def find_pictures(inputs: Sequence[Path]) -> list[PictureFile]:
    """List the .png, .jpg, .jpeg and .webp files in uncompressed tars and, at any depth, in folders (tars there too).

    Raises:
        ValueError: an input is missing, a tar is damaged, or no picture is there at all.
    """
    files: list[PictureFile] = []
    for path in inputs:
        if path.is_dir():
            for inner in sorted(path.rglob("*")):
                if inner.suffix.lower() in PICTURE_SUFFIXES and inner.is_file():
                    files.append(PictureFile(str(inner), inner, 0, inner.stat().st_size))
                elif inner.suffix == ".tar" and inner.is_file():
                    files.extend(_list_tar(inner))
        elif path.is_file():
            files.extend(_list_tar(path))
        else:
            raise ValueError(f"--input {path}: no such file or folder")
    if not files:
        names = ", ".join(map(str, inputs))
        raise ValueError(f"--input {names}: no {', '.join(PICTURE_SUFFIXES)} files there; name tars or folders of them")
    return files


def load_pictures(
    files: Sequence[PictureFile],
    size: int,
    *,
    held_out: int,
    max_pictures: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> PictureSet:
    """Decode and prepare pictures; set unusable ones aside; keep distinct ones, split in two.

    Args:
        files: of `find_pictures`.
        size: side in pixels.
        held_out: pictures to hold out; at most a tenth of all.
        max_pictures: of more distinct pictures, a uniform sample of this size (a reservoir) is kept, to bound memory.
        seed: of that sample.
        advance: called once for each file.

    Raises:
        ValueError: fewer than `MIN_PICTURES` distinct usable pictures.
    """
    chance = random.Random(seed)
    kept: list[tuple[bytes, np.ndarray]] = []
    seen: set[bytes] = set()
    quarantine: list[dict[str, str]] = []
    for file in files:
        advance()
        try:
            pixels = prepare_picture(open_picture(file.read(), file.origin), size)
        except (ValueError, OSError) as error:
            quarantine.append({"origin": file.origin, "reason": str(error)})
            continue
        digest = hashlib.sha256(pixels.tobytes()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if len(kept) < max_pictures:
            kept.append((digest, pixels))
        elif (place := chance.randrange(len(seen))) < max_pictures:
            kept[place] = (digest, pixels)
    if len(kept) < MIN_PICTURES:
        raise ValueError(
            f"--input: {len(kept)} distinct usable pictures in {len(files)} files ({len(quarantine)} set aside"
            f"{', the first: ' + quarantine[0]['reason'] if quarantine else ''}); "
            f"an image tokenizer needs at least {MIN_PICTURES}"
        )
    kept.sort(key=lambda item: item[0])
    split = max(1, min(held_out, len(kept) // 10))
    pictures = np.stack([pixels for _, pixels in kept])
    return PictureSet(
        train=pictures[split:],
        held_out=pictures[:split],
        quarantine=quarantine,
        num_files=len(files),
        num_duplicates=len(files) - len(quarantine) - len(seen),
    )


def _list_tar(path: Path) -> list[PictureFile]:
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
        _require_end_mark(path, members)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a whole uncompressed tar ({error}); copy or unpack it again") from None
    return [
        PictureFile(f"{path}/{member.name}", path, member.offset_data, member.size)
        for member in members
        if member.isreg() and not member.issparse() and member.name.lower().endswith(PICTURE_SUFFIXES)
    ]


def _require_end_mark(path: Path, members: Sequence[tarfile.TarInfo]) -> None:
    """A tar ends with blocks of zeros; `tarfile` itself takes one that was cut within a header for whole."""
    block = tarfile.BLOCKSIZE
    end = max((m.offset_data + -(-(m.size if m.isreg() else 0) // block) * block for m in members), default=0)
    with path.open("rb") as file:
        file.seek(end)
        if file.read(block) != bytes(block):
            raise tarfile.ReadError("it ends without the mark of its end")
