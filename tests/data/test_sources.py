import base64
import gzip
import io
import pickle
import tarfile

import pytest
from raw_sources import png, write_jsonl, write_tar

from megachameleon.data.records import BadRecord, Caption, CaptionedRecord, PictureSegment, SegmentsRecord, TextSegment
from megachameleon.data.sources import (
    DamagedArchiveError,
    base_name,
    find_sources,
    read_source,
    survey_source,
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


def test_pictures_of_jsonl_are_counted_where_they_count(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    lines = [
        {"segments": [{"text": '"image": no'}, {"image": "a.png"}, {"image_base64": "AAAA"}]},
        {"text": "a text", "images": "metadata.png"},
        {"segments": [{"image": "a.png", "text": "malformed"}]},
        b'{"image',
    ]
    assert survey_source(write_jsonl(tmp_path / "a.jsonl", *lines)).num_pictures == 2


def test_damage_is_told_across_processes(tmp_path):
    error = DamagedArchiveError(tmp_path / "a.tar", "no end")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_jsonl_records(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/x.png").write_bytes(png(5))
    inline = base64.b64encode(png(6)).decode()
    segments = [{"text": "a"}, {"image": "pictures/x.png"}, {"image_base64": inline}]
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "plain"}, b"", {"segments": segments})
    plain, interleaved = read_source(path)
    assert plain == SegmentsRecord("line 1, byte 0", (TextSegment("plain"),))
    assert [s.data for s in interleaved.segments[1:]] == [png(5), png(6)]
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes().splitlines()[0]))
    assert [texts_of(record) for record in read_source(packed)] == [["plain"]]


def test_bad_jsonl_lines_cost_one_record_each(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "inside/link.png").symlink_to(tmp_path / "secret.png")
    lines = [
        b"{",
        b'{"text": "\xff"}',
        {"text": ""},
        {"text": 5},
        {"html": "x"},
        b"[1]",
        {"segments": []},
        {"segments": [{"image": "../secret.png"}]},
        {"segments": [{"image": "link.png"}]},
        {"segments": [{"image": "/etc/passwd"}]},
        {"segments": [{"image": "gone.png"}]},
        {"segments": [{"image_base64": "***"}]},
        b"[" * 100_000,
        {"text": "fine"},
    ]
    expected = ["JSON", "UTF-8", "empty", "text is a number, not text", "unknown form", "not an object", "not a list"]
    expected += ["outside", "outside", "outside", "no such file", "not base64", "nested too deeply", None]
    for reason, part in zip(reasons(write_jsonl(tmp_path / "inside/a.jsonl", *lines)), expected, strict=True):
        assert reason is part is None or part in reason


def test_places_of_bad_records(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "x"}, b"{")
    assert [r.place for r in read_source(path) if isinstance(r, BadRecord)] == ["line 2, byte 14"]
    path = write_tar(tmp_path / "a.tar", {"x.txt": "x", "folder/key.json": "{"})
    assert [r.place for r in read_source(path) if isinstance(r, BadRecord)] == ["folder/key, byte 1024"]
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    assert list(read_source(tmp_path / "a.txt")) == [BadRecord("a.txt", "byte 0", "not valid UTF-8 (at its byte 2)")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.tar"])
def test_a_byte_order_mark_costs_nothing(tmp_path, name):
    mark, path = b"\xef\xbb\xbf", tmp_path / name
    if name == "a.tar":
        write_tar(path, {"x.txt": mark + b"one", "y.json": mark + b'{"text": "two"}'})
    else:
        path.write_bytes(mark + (b'{"text": "one"}\n{"text": "two"}\n' if name == "a.jsonl" else b"one"))
    texts = [text for record in read_source(path) for text in texts_of(record)]
    assert texts == (["one"] if name == "a.txt" else ["one", "two"])


def test_find_sources(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.tar", "sub/c.txt", "readme.md", ".hidden.txt", "x.csv"):
        (tmp_path / name).touch()
    assert [base_name(path) for path in find_sources([tmp_path])] == ["a.tar", "b.jsonl", "c.txt"]
    assert [base_name(path) for path in find_sources([tmp_path / "readme.md", f"{tmp_path}/*.jsonl"])] == [
        "readme.md",
        "b.jsonl",
    ]
    for paths, message in [
        ([tmp_path / "gone"], "no such file or folder"),
        ([tmp_path / "x.csv"], "unknown kind"),
        ([tmp_path / "*.csv"], "by this pattern"),
        ([tmp_path, tmp_path / "a.tar"], "given twice"),
        ([], "no inputs"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_sources(paths)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="in this folder"):
        find_sources([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a.png", ("a", "png")), ("x.y/a.0.PNG", ("x.y/a", "0.png")), ("a", ("a", "")), ("./k.json", ("./k", "json"))],
)
def test_split_name(name, parts):
    assert split_name(name) == parts
