import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_sources import png

from megachameleon.data.records import BadRecord, CaptionedRecord, PictureSegment
from megachameleon.data.sources import DamagedArchiveError, parquet, read_source, survey_source, texts_of


def write(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_text_columns_and_places(tmp_path):
    path = write(tmp_path / "a.parquet", {"id": [1, 2, 3], "content": ["one", None, "three"]}, row_group_size=2)
    first, second, third = read_source(path)
    assert (texts_of(first), first.origin) == (["one"], "row group 0, row 0")
    assert isinstance(second, BadRecord) and "unknown form" in second.reason
    assert (texts_of(third), third.origin) == (["three"], "row group 1, row 0")
    assert survey_source(path).text_bytes == len("onethree") + 1


def test_pictures_inline_and_beside(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/x.png").write_bytes(png(3))
    structs = [{"bytes": png(1), "path": None}, {"bytes": None, "path": "p/x.png"}, {"bytes": None, "path": "../x.png"}]
    path = write(tmp_path / "a.parquet", {"image": structs, "text": ["a", "b", "c"]})
    first, second, third = read_source(path)
    assert isinstance(first, CaptionedRecord) and isinstance(second, CaptionedRecord)
    assert (first.picture.data, second.picture.data, texts_of(second)) == (png(1), png(3), ["b"])
    assert "outside" in third.reason
    survey = survey_source(path)
    assert survey.num_pictures == 2
    (tmp_path / "p/x.png").write_bytes(png(4))
    assert survey_source(path).references != survey.references
    assert survey_source(path).sha256 == survey.sha256
    path = write(tmp_path / "b.parquet", {"jpg": [png(1)], "captions": [[{"lang": "en", "text": "red"}]]})
    (record,) = read_source(path)
    assert (record.picture.data, record.captions[0].language) == (png(1), "en")


def test_interleaved_columns(tmp_path):
    kind = pa.list_(pa.struct([("text", pa.string()), ("image", pa.binary()), ("fit", pa.string())]))
    segments = [[{"text": "see"}, {"image": png(1), "fit": "pad"}, {"text": "end"}]]
    path = write(tmp_path / "a.parquet", {"segments": pa.array(segments, kind)})
    (record,) = read_source(path)
    assert (texts_of(record), record.segments[1].fit) == (["see", "end"], "pad")
    (tmp_path / "x.png").write_bytes(png(3))
    lists = {"texts": [[None, "b"], ["a", "b"], ["a"]], "images": [["x.png", None], ["x.png", None], [None, "x.png"]]}
    good, both, lengths = read_source(write(tmp_path / "b.parquet", lists))
    assert isinstance(good.segments[0], PictureSegment) and texts_of(good) == ["b"]
    assert "exactly one" in both.reason and "one length" in lengths.reason


def test_unknown_columns_are_told(tmp_path):
    path = write(tmp_path / "a.parquet", {"prompt": ["x"], "image": ["y"]})
    with pytest.raises(ValueError, match=r"a\.parquet: its columns \(prompt, image\) make no record; name them text"):
        survey_source(path)


def test_a_row_of_damaged_text_costs_one_record(tmp_path):
    texts = pa.array([b"one", b"\xff\xfe", b"three"]).view(pa.string())
    first, second, third = read_source(write(tmp_path / "a.parquet", {"text": texts}))
    assert (texts_of(first), texts_of(third)) == (["one"], ["three"])
    assert second == BadRecord("a.parquet", "row group 0, row 1", "not valid UTF-8 (at byte 0 of a text)")


def test_truncated_parquet_is_damaged(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": ["some text"] * 50})
    content = path.read_bytes()
    for keep in (0, 3, 4, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(DamagedArchiveError, match=r"a\.parquet: damaged"):
            survey_source(path)


def test_absurd_sizes_are_refused_or_decoded_a_few_rows_at_a_time(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"text": ["x" * 5000] * 300})  # one long value in a dictionary
    monkeypatch.setattr(parquet, "_EXPANDED_BYTES", 20_000)
    assert parquet._rows_at_once("a", 5000, 300) == 4
    assert [len(texts_of(record)[0]) for record in read_source(path)] == [5000] * 300
    monkeypatch.setattr(parquet, "MAX_RECORD_BYTES", 4000)
    assert all("row has" in record.reason for record in read_source(path))
    monkeypatch.setattr(parquet, "MAX_RECORD_BYTES", 10)
    with pytest.raises(ValueError, match="in 300 rows; write it again"):
        survey_source(path)
