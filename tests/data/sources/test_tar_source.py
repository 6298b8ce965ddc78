import gzip
import io
import tarfile

import pytest
from raw_sources import png, write_tar

from megachameleon.data.records import BadRecord, Caption, CaptionedRecord, PictureSegment
from megachameleon.data.sources import (
    DamagedArchiveError,
    raw,
    read_source,
    survey_source,
    tar,
    texts_of,
)
from megachameleon.data.sources.tar import split_name


def reasons(path):
    return [record.reason if isinstance(record, BadRecord) else None for record in read_source(path)]


def test_captioned_pictures_from_a_tar(tmp_path):
    captions = [{"lang": "en", "text": "red"}, {"lang": "de", "text": "rot"}]
    path = write_tar(
        tmp_path / "a.tar",
        {
            "one.png": png(1),
            "one.txt": "a red square\n",
            "sub/two.jpg": png(2),
            "sub/two.json": {"captions": captions, "id": 7},
            "three.json": {"caption": "blue"},
            "three.webp": png(3),
            "four.png": png(4),
            "four.txt": "not this",
            "four.json": {"captions": ["plain"]},
        },
    )
    records = list(read_source(path))
    assert all(isinstance(record, CaptionedRecord) for record in records)
    assert [record.captions for record in records] == [
        (Caption("a red square"),),
        (Caption("red", "en"), Caption("rot", "de")),
        (Caption("blue"),),
        (Caption("plain"),),
    ]
    assert [record.picture.data for record in records] == [png(1), png(2), png(3), png(4)]
    assert records[1].origin == "sub/two, byte 2048"
    assert texts_of(records[1]) == ["red", "rot"]
    assert survey_source(path).num_pictures == 4


def test_interleaved_documents_and_text_from_a_tar(tmp_path):
    segments = [{"text": "First"}, {"image": "1.png"}, {"text": "then"}, {"image": "0.png"}]
    members = {
        "d.json": {"segments": segments},
        "d.0.png": png(0),
        "d.1.png": png(1),
        "t.txt": "text",
        "u.json": {"text": "more"},
    }
    first, second, third = read_source(write_tar(tmp_path / "a.tar.gz", members))
    pictures = [segment.data for segment in first.segments if isinstance(segment, PictureSegment)]
    assert pictures == [png(1), png(0)]
    assert texts_of(first) == ["First", "then"]
    assert (texts_of(second), texts_of(third)) == (["text"], ["more"])


def test_bad_samples_in_a_tar_cost_one_record_each(tmp_path):
    members = {
        "a.png": png(1),
        "b.png": png(1),
        "b.json": "{not json",
        "c.json": {"segments": [{"image": "0.png"}]},
        "d.json": {"segments": [{"text": "x", "image": "0.png"}]},
        "e.cls": "5",
        "f.txt": b"\xff\xfe",
        "g.txt": "  ",
        "h.png": png(1),
        "h.jpg": png(2),
        "h.txt": "two pictures",
        "i.png": png(1),
        "i.json": {"captions": [{"lang": "en", "text": "\ud800"}]},
        "j.json": {"captions": "no list"},
        "k.json": "[]",
        "ok.txt": "fine",
    }
    expected = ["without a caption", "not valid JSON", "not among", "exactly one", "unknown form", "UTF-8", "empty"]
    expected += ["several pictures", "surrogates", "not a list", "not an object", None]
    for reason, part in zip(reasons(write_tar(tmp_path / "a.tar", members)), expected, strict=True):
        assert reason is part is None or part in reason


def test_links_in_a_tar_are_not_followed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("x.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        escaping = tarfile.TarInfo("../../y.txt")
        escaping.size = 4
        archive.addfile(escaping, io.BytesIO(b"text"))
    link_record, text_record = read_source(path)
    assert "link" in link_record.reason
    assert texts_of(text_record) == ["text"]


@pytest.mark.parametrize("keep", [0, 100, 600, 1536, 2000, 2048, 4000])
def test_truncated_tars_are_errors_after_their_whole_records(tmp_path, keep):
    members = {f"{i}.txt": f"text {i}" for i in range(5)}
    path = write_tar(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[:keep])
    records = []
    with pytest.raises(DamagedArchiveError, match=r"a\.tar: damaged or truncated"):
        records.extend(read_source(path))
    assert [text for record in records for text in texts_of(record)] == list(members.values())[: len(records)]
    with pytest.raises(DamagedArchiveError):
        survey_source(path)


def test_damaged_headers_and_gzips_are_errors(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.txt": f"text {i}" for i in range(5)})
    content = bytearray(path.read_bytes())
    content[2 * 1024 + 20] ^= 255  # in the header of the third member
    path.write_bytes(content)
    with pytest.raises(DamagedArchiveError):
        list(read_source(path))
    packed = gzip.compress(b'{"text": "x"}\n' * 1000)
    for content in (packed[:-20], b"not a gzip", packed[:60] + b"\xff" + packed[61:]):
        (tmp_path / "b.jsonl.gz").write_bytes(content)
        with pytest.raises(DamagedArchiveError, match=r"b\.jsonl\.gz"):
            list(read_source(tmp_path / "b.jsonl.gz"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a.png", ("a", "png")), ("x.y/a.0.PNG", ("x.y/a", "0.png")), ("a", ("a", "")), ("./k.json", ("./k", "json"))],
)
def test_split_name(name, parts):
    assert split_name(name) == parts


def entry(name: str, data: bytes = b"", **fields) -> bytes:
    """A member as bytes, header and content."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    for key, value in fields.items():
        setattr(header, key, value)
    return header.tobuf(fields.get("format", tarfile.GNU_FORMAT)) + data + bytes(-len(data) % 512)


END = bytes(1024)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_big_headers_of_every_format(tmp_path, form):
    path, names = tmp_path / "a.tar", ["short", "d/" * 60 + "long", "ü" * 40]
    names = names[:2] if form == tarfile.USTAR_FORMAT else [*names, "n" * 300]
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "of all"}) as archive:
        for name in names:
            header = tarfile.TarInfo(name + ".txt")
            header.size, header.mtime = len(name), 1.5
            archive.addfile(header, io.BytesIO(name.encode()[: len(name)]))
    assert [record.origin.rpartition(", byte ")[0] for record in read_source(path)] == names


def test_names_that_are_no_text_can_still_be_written(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(entry("x\udcff.json", b"{") + END)
    (record,) = read_source(path)
    assert record.place == "x\\udcff, byte 0"


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"?"])
def test_members_that_are_no_files_cost_one_record(tmp_path, kind):
    path = tmp_path / "a.tar"
    path.write_bytes(entry("a.txt", type=kind) + entry("folder", type=tarfile.DIRTYPE) + entry("b.txt", b"text") + END)
    first, second = read_source(path)
    assert isinstance(first, BadRecord) and "link or a device" in first.reason
    assert texts_of(second) == ["text"]


def test_two_members_of_one_name_and_sparse_files_cost_one_record(tmp_path):
    path = tmp_path / "a.tar"
    sparse = entry("b.txt", b"22 GNU.sparse.major=1\n", type=tarfile.XHDTYPE) + entry("b.txt", b"map and text")
    path.write_bytes(entry("a.txt", b"one") + entry("a.TXT", b"two") + sparse + entry("c.txt", b"text") + END)
    twice, holes, good = read_source(path)
    assert twice.reason == "two members are named a.TXT" and "link or a device" in holes.reason
    assert texts_of(good) == ["text"]


def test_members_of_absurd_size_cost_one_record(tmp_path, monkeypatch):
    path = write_tar(
        tmp_path / "a.tar",
        {
            "a.txt": "x" * 3000,
            "b.png": b"x" * 600,
            "b.txt": b"y" * 600,
            "c.txt": "c",
            **{f"d.{number}.txt": "" for number in range(4)},
        },
    )
    monkeypatch.setattr(tar, "MAX_RECORD_BYTES", 2000)
    monkeypatch.setattr(raw, "MAX_RECORD_BYTES", 2000)
    first, second, third, fourth = read_source(path)
    assert first.reason == "a.txt, with the members before it, has 3,515 bytes, more than 2,000"
    assert second.reason == "b.txt, with the members before it, has 2,230 bytes, more than 2,000"
    assert texts_of(third) == ["c"]
    assert "d.3.txt, with the members before it, has 2,068 bytes" in fourth.reason


@pytest.mark.parametrize(
    ("content", "damage"),
    [
        (entry("a.txt", size=1 << 60), "no end mark; the file ends"),
        (entry("a", b"n" * (1 << 21), type=b"L") + entry("b.txt", b"x") + END, "a header of 2,097,152 bytes"),
        (entry("a", b"9999 path=x\n", type=b"x") + END, "damaged attributes"),
        (entry("a", b"12 size=-5x\n", type=b"x") + END, "damaged attributes"),
        (entry("a", b"1" * 5000 + b" path=x\n", type=b"x") + END, "damaged attributes"),
        (entry("a.txt", b"x") + END + entry("b.txt", b"x") + END, "goes on after its end mark"),
        (entry("a.txt", b"x") + entry("b.txt", b"x")[512:] + END, "no header at byte 1,024"),
        (b"", "no end mark"),
        (b"not a tar" * 1000, "no header at byte 0"),
    ],
)
def test_what_is_wrong_with_an_archive_is_told(tmp_path, content, damage):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DamagedArchiveError, match=damage):
        survey_source(path)
