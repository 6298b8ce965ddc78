"""Webdataset tars: samples are runs of members that share a key, the name up to the first dot of its last part.

Member names are only ever compared, never used as paths. Unlike Python's `tarfile`, an archive that ends anywhere but
at its end mark is an error, and so is one that goes on after it; long names are read within bounds; and the file is
read forwards only, once.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from megachameleon.data.records import Record
from megachameleon.data.sources.beside import FilesBeside
from megachameleon.data.sources.compression import open_unpacked
from megachameleon.data.sources.damage import damage_reported
from megachameleon.data.sources.locations import BUFFER_BYTES
from megachameleon.data.sources.raw import MAX_RECORD_BYTES, RawRecord, too_long
from megachameleon.data.sources.samples import is_picture, sample_record

MAX_HEADER_BYTES = 1 << 20
"""Longest extended header (a long name, or pax attributes)."""
_LONG_NAME, _EXTENDED = (tarfile.GNUTYPE_LONGNAME,), (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
# headers about links and about all members: nothing that a sample needs
_ABOUT_OTHERS = (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of a tar but a folder."""

    name: str
    size: int
    """Bytes of its content."""
    offset: int
    """Where its header begins in the unpacked archive."""
    is_file: bool
    """Whether it is an ordinary file: no link, device or sparse file."""
    read: Callable[[], bytes]
    """Its content; to be called before the next member is asked for."""


@dataclass(slots=True)
class _Sample:
    """The members of one key so far."""

    key: str
    offset: int
    members: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    error: str = ""

    def add(self, member: TarMember, extension: str) -> None:
        self.size += tarfile.BLOCKSIZE + len(extension) + member.size  # millions of empty ones are large too
        if not member.is_file:
            self.error = f"{member.name} is a link or a device, not a file"
        elif self.size > MAX_RECORD_BYTES:
            self.error = too_long(f"{member.name}, with the members before it,", self.size)
            # what is set aside is not needed, and others of its key may still come
            self.members.clear()
        elif extension in self.members:
            self.error = f"two members are named {member.name}"
        elif not self.error:
            self.members[extension] = member.read()

    def raw(self, source: str) -> RawRecord:
        place = f"{self.key}, byte {self.offset}"
        return RawRecord(source, "tar", place, self.offset, (self.key, self.members), self.error)


def read_raw_tar(source: str, file: BinaryIO) -> Iterator[RawRecord]:
    """The samples of a tar, unpacked as `file`."""
    sample: _Sample | None = None
    for member in _walk(file):
        key, extension = split_name(member.name)
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample.raw(source)
            sample = _Sample(key, member.offset)
        sample.add(member, extension)
    if sample is not None:
        yield sample.raw(source)


def parse_raw_tar(raw: RawRecord, beside: FilesBeside) -> Record:
    """Understand a sample.

    Raises:
        ValueError: it is of no known form.
    """
    key, members = raw.payload
    return sample_record(raw.place, key, members)


def count_raw_tar(raw: RawRecord) -> tuple[int, int]:
    """Bytes of text and JSON, and pictures."""
    _, members = raw.payload
    text = sum(len(content) for name, content in members.items() if not is_picture(name))
    return text, sum(is_picture(name) for name in members)


def walk_tar(source: str) -> Iterator[TarMember]:
    """Members of a tar but folders, in order.

    Raises:
        DamagedArchiveError: the archive is damaged or truncated.
    """
    with damage_reported(source), open_unpacked(source) as file:
        yield from _walk(file)


def split_name(name: str) -> tuple[str, str]:
    """`folder/key.a.png` is (`folder/key`, `a.png`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _walk(file: BinaryIO) -> Iterator[TarMember]:
    position = begin = 0
    attributes: dict[str, str] = {}  # of the next member, from headers before its own
    while (block := _exactly(file, tarfile.BLOCKSIZE, position)) != bytes(tarfile.BLOCKSIZE):
        header = _header(block, position)
        position += tarfile.BLOCKSIZE
        size = 0 if header.type in _WITHOUT_CONTENT else int(attributes.get("size", header.size))
        # contents are filled up to whole blocks
        length = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if header.type in (*_LONG_NAME, *_EXTENDED, *_ABOUT_OTHERS):
            if size > MAX_HEADER_BYTES:
                raise tarfile.ReadError(f"a header of {size:,} bytes at byte {position:,}")
            # read without the library, which would allocate whatever a header declares
            attributes |= _attributes(header.type, _exactly(file, length, position)[:size], position)
            position += length
            continue
        content = _Content(file, size, length, position)
        name = attributes.get("path", header.name)
        # folders are left out, as they would cut a sample's run of members in two
        if header.type != tarfile.DIRTYPE:
            yield TarMember(name, size, begin, _is_file(header, attributes), content.read)
        # by reading: a packed stream cannot seek, and a cut file is noticed
        content.skip()
        position += length
        begin, attributes = position, {}
    _require_end(file, position + tarfile.BLOCKSIZE)


@dataclass(slots=True)
class _Content:
    file: BinaryIO
    size: int
    length: int
    position: int
    done: bool = False

    def read(self) -> bytes:
        self.done = True
        return _exactly(self.file, self.length, self.position)[: self.size]

    def skip(self) -> None:
        for start in range(0, 0 if self.done else self.length, BUFFER_BYTES):
            _exactly(self.file, min(BUFFER_BYTES, self.length - start), self.position + start)


def _exactly(file: BinaryIO, count: int, position: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise tarfile.ReadError(f"no end mark; the file ends at byte {position + len(content):,}")
    return content


def _header(block: bytes, position: int) -> tarfile.TarInfo:
    try:
        # the library's own reading of the checksum and of octal and base-256 numbers
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise tarfile.ReadError(f"no header at byte {position:,}: {error}") from None
    if header.size < 0:
        raise tarfile.ReadError(f"a size below zero at byte {position:,}")
    return header


def _attributes(kind: bytes, content: bytes, position: int) -> dict[str, str]:
    if kind in _ABOUT_OTHERS:
        return {}
    if kind in _LONG_NAME:
        # GNU tar ends a long name by a zero byte
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    values: dict[str, str] = {}
    content, done = content.rstrip(b"\0"), 0
    while done < len(content):
        digits = content[done : done + 8].partition(b" ")[0]
        # at most 7 digits: longer ones exceed MAX_HEADER_BYTES, and int() of thousands takes long
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = content[done + len(digits) + 1 : done + length - 1].partition(b"=")
        if not equals or not len(digits) < length <= len(content) - done:
            raise tarfile.ReadError(f"damaged attributes at byte {position:,}")
        values[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        done += length
    if not (size := values.get("size", "0")).isdecimal() or len(size) > 20:
        raise tarfile.ReadError(f"damaged attributes at byte {position:,}")
    return values


def _is_file(header: tarfile.TarInfo, attributes: dict[str, str]) -> bool:
    sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in attributes)
    return header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and not sparse


def _require_end(file: BinaryIO, position: int) -> None:
    while rest := file.read(BUFFER_BYTES):
        # zeros are padding; anything else would be lost without a word
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"it goes on after its end mark, near byte {position:,}; two tars in one file?")
        position += len(rest)
