import json
import shutil

import pytest
from raw_sources import png, write_jsonl

from megachameleon.data.records import BadRecord, CaptionedRecord
from megachameleon.data.sources import find_sources, read_source, survey_source, texts_of


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cats"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    (folder / "a.txt").write_text("a cat")
    (folder / "b.v2.jpg").write_bytes(png(2))
    (folder / "b.v2.json").write_text(json.dumps({"caption": "two cats"}))
    (folder / "c.0.png").write_bytes(png(3))
    (folder / "c.json").write_text(json.dumps({"segments": [{"text": "see"}, {"image": "0.png"}]}))
    return folder


def test_captions_beside_pictures(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("a text of its own")
    assert find_sources([tmp_path]) == [str(folder), str(tmp_path / "notes.txt")]
    a, b, c = read_source(folder)
    assert isinstance(a, CaptionedRecord) and isinstance(b, CaptionedRecord)
    assert (a.picture.data, texts_of(a), a.origin) == (png(1), ["a cat"], "a")
    assert (b.picture.data, texts_of(b)) == (png(2), ["two cats"])
    assert (c.segments[1].data, texts_of(c)) == (png(3), ["see"])
    survey = survey_source(folder)
    assert (survey.num_pictures, survey.text_bytes) == (3, len("a cattwo catssee"))


def test_whatever_changes_in_a_folder_changes_its_survey(folder):
    survey = survey_source(folder)
    (folder / "unrelated.csv").touch()
    assert survey_source(folder) == survey
    (folder / "a.png").write_bytes(png(9)[:-1] + b"x" if len(png(9)) == len(png(1)) else png(9))
    assert survey_source(folder) != survey
    shutil.copy(folder / "c.0.png", folder / "d.png")
    assert survey_source(folder).bytes == sum(f.stat().st_size for f in folder.iterdir())


def test_pictures_without_caption_are_bad_unless_another_source_may_name_them(folder):
    (folder / "d.png").write_bytes(png(4))
    assert [record for record in read_source(folder) if isinstance(record, BadRecord)] == [
        BadRecord("cats", "d.png", "a picture without a caption")
    ]
    write_jsonl(folder / "x.jsonl", {"image": "d.png", "caption": "d"})
    assert not any(isinstance(record, BadRecord) for record in read_source(folder))
    assert find_sources([folder]) == [str(folder), str(folder / "x.jsonl")]


def test_imagefolder_metadata_take_the_place_of_captions_beside(folder):
    write_jsonl(folder / "metadata.jsonl", {"file_name": "a.png", "text": "from metadata"})
    (source,) = find_sources([folder])
    (record,) = read_source(source)
    assert source == str(folder / "metadata.jsonl")
    assert (record.picture.data, texts_of(record)) == (png(1), ["from metadata"])


def test_names_that_differ_in_capitals_are_one_bad_record(folder):
    (folder / "a.PNG").write_bytes(png(5))
    bad = [record for record in read_source(folder) if isinstance(record, BadRecord)]
    assert [record.place for record in bad] == ["a"] and "capital" in bad[0].reason


def test_a_folder_without_captions_is_no_source(tmp_path):
    (tmp_path / "x.png").write_bytes(png(1))
    with pytest.raises(ValueError, match="no pictures with captions"):
        find_sources([tmp_path])
