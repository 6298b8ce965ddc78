import gzip
import io

import pytest
import zstandard
from raw_sources import png, write_tar

from megachameleon.data.records import BadRecord
from megachameleon.data.sources import DamagedArchiveError, compression, jsonl, read_source, survey_source, texts_of
from megachameleon.data.sources.compression import unpacked


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def content(tmp_path, kind):
    if kind == "tar":
        return write_tar(tmp_path / "plain.tar", {"a.png": png(1), "a.txt": "one", "b.txt": "two"}).read_bytes()
    lines = {"jsonl": b'{"text": "one"}\n{"text": "two"}\n', "txt": b"one two", "html": b"<p>one<p>two"}
    return lines.get(kind, b"one\n\ntwo")


@pytest.mark.parametrize("kind", ["tar", "jsonl", "txt", "html", "md"])
@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_packed_sources_hold_the_same_records(tmp_path, kind, suffix, pack):
    data = content(tmp_path, kind)
    (tmp_path / f"a.{kind}").write_bytes(data)
    (tmp_path / f"a.{kind}.{suffix}").write_bytes(pack(data))
    records = list(read_source(tmp_path / f"a.{kind}"))
    assert records == list(read_source(tmp_path / f"a.{kind}.{suffix}")) and texts_of(records[0])
    plain, packed = survey_source(tmp_path / f"a.{kind}"), survey_source(tmp_path / f"a.{kind}.{suffix}")
    assert (plain.text_bytes, plain.num_pictures) == (packed.text_bytes, packed.num_pictures)
    assert packed.bytes == len(pack(data))


def test_short_suffixes(tmp_path):
    data = content(tmp_path, "tar")
    (tmp_path / "a.tgz").write_bytes(gzip.compress(data))
    (tmp_path / "a.tzst").write_bytes(zstd(data))
    assert list(read_source(tmp_path / "a.tgz")) == list(read_source(tmp_path / "a.tzst"))


def test_several_frames_are_one_file(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path.write_bytes(skippable + zstd(b'{"text": "o') + zstd(b"") + zstd(b'ne"}\n{"text": "two"}') + skippable)
    assert [texts_of(record) for record in read_source(path)] == [["one"], ["two"]]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "o') + gzip.compress(b'ne"}\n'))
    assert [texts_of(record) for record in read_source(path)] == [["one"]]


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_cut_or_changed_files_are_damaged(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl.{suffix}"
    packed = pack(b"".join(b'{"text": "%d"}\n' % number for number in range(5000)))
    half = len(packed) // 2
    for damaged in (packed[:half], packed[:-1], packed + b"rest", packed[:half] + b"\0\0\0\0" + packed[half + 4 :]):
        path.write_bytes(damaged)
        with pytest.raises(DamagedArchiveError, match=rf"a\.jsonl\.{suffix}: damaged"):
            survey_source(path)


def test_bombs_cost_one_record_and_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_RECORD_BYTES", 1 << 16)
    for suffix, pack in (("gz", gzip.compress), ("zst", zstd)):
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(pack(b'{"text": "before"}\n' + b"0" * (1 << 24) + b'\n{"text": "after"}\n'))
        before, bomb, after = read_source(path)
        assert (texts_of(before), texts_of(after)) == (["before"], ["after"])
        assert isinstance(bomb, BadRecord) and bomb.reason == "longer than 65,536 bytes"
    packed = zstd(bytes(1 << 28))
    with unpacked(io.BytesIO(packed), "a.zst") as file:
        assert file.read(10) == bytes(10)
        largest = len(file.raw._content)
    assert largest <= compression._ZSTD_INPUT_BYTES * 45_000 < 1 << 26
