import base64
import gzip
import json
import pickle

import pytest
from raw_sources import png, write_jsonl

from megachameleon.data.records import BadRecord, CaptionedRecord, PictureSegment, SegmentsRecord, TextSegment
from megachameleon.data.sources import (
    beside,
    json_values,
    jsonl,
    parse_raw,
    read_raw,
    read_source,
    survey_source,
    texts_of,
)


def reasons(path):
    return [record.reason if isinstance(record, BadRecord) else None for record in read_source(path)]


def test_pictures_of_jsonl_are_counted_where_they_count(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    lines = [
        {"segments": [{"text": '"image": no'}, {"image": "a.png"}, {"image_base64": "AAAA"}]},
        {"text": "a text", "images": "metadata.png"},
        {"segments": [{"image": "a.png", "text": "malformed"}]},
        b'{"image',
    ]
    assert survey_source(write_jsonl(tmp_path / "a.jsonl", *lines)).num_pictures == 2


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


def written(tmp_path, *lines):
    (tmp_path / "x.png").write_bytes(png(1))
    return list(read_source(write_jsonl(tmp_path / "a.jsonl", *lines)))


@pytest.mark.parametrize(
    "line",
    [
        {"image": "x.png", "caption": "red", "text": "not this"},
        {"image": "x.png", "text": "red", "caption": None, "segments": None},
        {"file_name": "x.png", "text": "red"},
        {"image": "x.png", "captions": [{"lang": "en", "text": "red"}]},
        {"image": {"path": "x.png", "bytes": None}, "text": "red"},
        {"image_base64": base64.b64encode(png(1)).decode(), "text": "red"},
        {"image": "data:image/png;base64," + base64.b64encode(png(1)).decode(), "text": "red"},
    ],
)
def test_captioned_pictures(tmp_path, line):
    (record,) = written(tmp_path, line)
    assert isinstance(record, CaptionedRecord) and record.picture.data == png(1)
    assert texts_of(record) == ["red"]


def test_text_under_its_other_name_and_parallel_lists(tmp_path):
    text, lists = written(tmp_path, {"content": "code"}, {"texts": ["a", None], "images": [None, "x.png"]})
    assert texts_of(text) == ["code"]
    assert [type(segment) for segment in lists.segments] == [TextSegment, PictureSegment]


def test_how_a_picture_is_fitted(tmp_path):
    segments = [{"image": "x.png"}, {"image": "x.png", "fit": "pad"}]
    record, bad = written(tmp_path, {"segments": segments}, {"segments": [{"image": "x.png", "fit": "stretch"}]})
    assert [segment.fit for segment in record.segments] == ["crop", "pad"]
    assert bad.reason == "segments[0].fit is 'stretch', neither crop nor pad"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a", "text": "b"}', "has the key 'text' twice"),
        (b'{"text": "\\ud800"}', "lone surrogates"),
        (b'{"segments": [{"image": "\\ud800.png"}]}', ""),
        (b'{"\\ud800": 1}', "unknown form"),
        (b'{"image": "x.png"}', "without a caption"),
        (b'{"image": "https://example.org/x.png", "text": "a"}', "is a URL"),
        (b'{"image": 5, "text": "a"}', "not a file name"),
        (b'{"image": "' + b"long" * 80 + b'.png", "text": "a"}', "no such file"),
        (b'{"image": "' + b"deep/" * 800 + b'x.png", "text": "a"}', "no such file"),
        (b'{"image": "' + b"/9j/4AAQ" * 250_000 + b'", "text": "a"}', "belongs under image_base64"),
        (b'{"' + b"key" * 250_000 + b'": "a"}', "unknown form"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "integer"),
        (b'{"texts": ["a"], "images": []}', "one length"),
        (b'{"texts": [null], "images": [null]}', "exactly one of texts[0]"),
    ],
)
def test_hostile_lines_are_bad_records_that_can_be_written(tmp_path, line, reason):
    (record,) = written(tmp_path, line)
    assert isinstance(record, BadRecord) and reason in record.reason and len(record.reason) < 1100
    json.dumps([record.file, record.place, record.reason], ensure_ascii=False).encode()


def test_links_in_a_circle_cost_one_record(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("circle", "circle/x.png"):
        (record,) = written(tmp_path, {"image": name, "text": "a"})
        assert isinstance(record, BadRecord) and "no such file" in record.reason


def test_lines_of_absurd_size_cost_one_record(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_RECORD_BYTES", 30)
    first, long, last = written(tmp_path, {"text": "a"}, {"text": "b" * 100}, {"text": "c"})
    assert long == BadRecord("a.jsonl", "line 2, byte 14", "longer than 30 bytes")
    assert (texts_of(first), texts_of(last), last.origin) == (["a"], ["c"], "line 3, byte 127")


def test_lines_of_absurdly_many_values_are_refused_unparsed(tmp_path, monkeypatch):
    monkeypatch.setattr(json_values, "_SURELY_FEW", 10)
    monkeypatch.setattr(json_values, "MAX_VALUES", 50)
    (record,) = written(tmp_path, {"text": "a", "x": list(range(100))})
    assert "more than 50" in record.reason


def test_pictures_of_one_record_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "MAX_RECORD_BYTES", int(len(png(1)) * 2.5))
    two, three = written(tmp_path, *({"segments": [{"image": "x.png"}] * count} for count in (2, 3)))
    assert len(two.segments) == 2 and "with those before it" in three.reason


def test_records_of_absurdly_many_pictures_are_set_aside(tmp_path):
    many, few = [{"image": "x.png"}] * 2049, [{"image": "x.png"}] * 2048
    captions = {"image": "x.png", "captions": ["red"] * 2049}
    *bad, good = written(tmp_path, {"segments": many}, captions, {"segments": few})
    assert {record.reason for record in bad} == {"its documents have 2,049 pictures, more than 2,048"}
    assert len(good.segments) == 2048


def test_raw_records_are_understood_elsewhere(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"image": "x.png", "text": "red"}, b"{")
    (tmp_path / "x.png").write_bytes(png(1))
    raws = list(read_raw(path))
    assert [raw.position for raw in raws] == [0, len(path.read_bytes()) - 2]
    assert [parse_raw(pickle.loads(pickle.dumps(raw))) for raw in raws] == list(read_source(path))
