import json
import pickle
import sys
import uuid
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_sources import png, write_tar

from megachameleon.data.records import BadRecord
from megachameleon.data.sources import (
    absolute_source,
    file_size,
    find_sources,
    hash_source,
    parse_raw,
    read_raw,
    read_source,
    source_name,
    survey_source,
    texts_of,
)
from megachameleon.files import sha256_of


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    """A folder behind a URL, and how to put files there."""
    root = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}"

    def put(name: str, data: bytes) -> str:
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(data)
        return f"{root}/{name}"

    return root, put


def fill(store, tmp_path):
    root, put = store
    put("p/x.png", png(1))
    put(
        "a.jsonl",
        b'{"text": "one"}\n{"image": "p/x.png", "caption": "two"}\n{"image": "../y.png", "caption": "three"}\n',
    )
    put("b.tar", write_tar(tmp_path / "plain", {"k.png": png(2), "k.txt": "four"}).read_bytes())
    pq.write_table(pa.table({"image": ["p/x.png"], "text": ["five"]}), tmp_path / "table")
    put("c.parquet", (tmp_path / "table").read_bytes())
    put("d.html", b"<p>six<img src=p/x.png>")
    put("e/k.png", png(3))
    put("e/k.txt", b"seven")
    (tmp_path / "plain").unlink()
    (tmp_path / "table").unlink()
    return root


def test_every_kind_is_read_through_a_url(store, tmp_path):
    root = fill(store, tmp_path)
    sources = find_sources([root])
    assert [source.rpartition("/")[2] for source in sources] == ["a.jsonl", "b.tar", "c.parquet", "d.html", "e"]
    texts, bad, pictures = [], [], 0
    for source in sources:
        for raw in read_raw(source):
            record = parse_raw(pickle.loads(pickle.dumps(raw)))
            if isinstance(record, BadRecord):
                bad.append(record)
            else:
                texts += texts_of(record)
        pictures += survey_source(source).num_pictures
    assert texts == ["one", "two", "four", "five", "six", "seven"] and pictures == 5
    assert [(record.file, record.place) for record in bad] == [("a.jsonl", "line 3, byte 55")]
    assert "outside" in bad[0].reason


def test_patterns_sizes_and_hashes(store, tmp_path):
    root = fill(store, tmp_path)
    (source,) = find_sources([f"{root}/*.jsonl"])
    with fsspec.open(source, "rb") as file:
        content = file.read()
    local = tmp_path / "copy"
    local.write_bytes(content)
    survey = survey_source(source)
    assert (survey.bytes, survey.sha256) == (len(content), sha256_of(local)) == (file_size(source), survey.sha256)
    assert hash_source(source).sha256 == survey.sha256
    assert file_size(f"{root}/gone.jsonl") is None
    with pytest.raises(ValueError, match="no such file or folder"):
        find_sources([f"{root}/gone.jsonl"])
    with pytest.raises(ValueError, match="given twice"):
        find_sources([root, f"{root}/a.jsonl"])


def test_a_changed_picture_beside_changes_the_survey(store, tmp_path):
    root = fill(store, tmp_path)
    for name in ("a.jsonl", "c.parquet", "d.html", "e"):
        before = survey_source(f"{root}/{name}")
        assert survey_source(f"{root}/{name}") == before
        store[1]("e/k.png" if name == "e" else "p/x.png", png(50 + len(name)))
        assert survey_source(f"{root}/{name}").references != before.references


def test_names_of_sources():
    assert source_name(Path("s3://bucket/a.tar")) == source_name("s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert source_name("file:///a/b.tar") == source_name(Path("file:///a/b.tar")) == "/a/b.tar"
    assert absolute_source("s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert absolute_source("a.tar") == str(Path("a.tar").resolve())


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"nosuch://a/b\.tar: cannot be read .*nosuch"):
        list(read_source("nosuch://a/b.tar"))
    with pytest.raises(ValueError, match=r"memory://nowhere/b\.jsonl: no such file"):
        list(read_source("memory://nowhere/b.jsonl"))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://a/b\.tar: cannot be read \(its file system is not installed .*s3fs"):
        find_sources(["s3://a/b.tar"])


@pytest.mark.parametrize(
    "name", ["s3://b/x.png", "http://a/x.png", "../x.png", "/x.png", "p/../../x.png", "a\0.png", ""]
)
def test_a_record_behind_a_url_names_nothing_outside_its_folder(store, name):
    _, put = store
    (record,) = read_source(put("inner/a.jsonl", json.dumps({"image": name, "caption": "c"}).encode()))
    assert isinstance(record, BadRecord)
    assert any(part in record.reason for part in ("outside", "is a URL", "not a file name"))
