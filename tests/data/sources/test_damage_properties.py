"""Whatever happens to a byte: whole records, bad records, or a clear error; nothing else, and nothing wrong."""

import gzip
import hashlib
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megachameleon.data.records import BadRecord
from megachameleon.data.sources import read_source, survey_source, texts_of

ANY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def signed(number: int) -> str:
    """A text that tells whether it was changed."""
    text = f"text {number} äöü"
    return text + " " + hashlib.sha256(text.encode()).hexdigest()[:16]


def is_whole(text: str) -> bool:
    body, _, digest = text.rpartition(" ")
    return hashlib.sha256(body.encode()).hexdigest()[:16] == digest


TEXTS = [signed(number) for number in range(6)]


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, text in enumerate(TEXTS):
            for name, data in ((f"{number}.json", json.dumps({"caption": text})), (f"{number}.png", f"picture {text}")):
                header = tarfile.TarInfo(name if number != 3 else "long/" * 40 + name)
                header.size = len(data.encode())
                archive.addfile(header, io.BytesIO(data.encode()))
    content = file.getvalue().rstrip(b"\0")
    return content + bytes(-len(content) % 512 + 512)  # without the padding, in which nothing matters


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS, "n": range(6)}), file, row_group_size=3, write_page_checksum=True)
    return file.getvalue()


JSONL = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
SOURCES = {
    "a.jsonl": JSONL,
    "a.tar": tar(),
    "a.parquet": parquet(),
    "a.jsonl.gz": gzip.compress(JSONL),
    "a.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(JSONL),
    "a.tar.gz": gzip.compress(tar()),
    "a.html": "".join(f"<p>{text}</p>" for text in TEXTS).encode(),
    "a.md": "\n\n".join(f"*{text}* ![a](data:,)" for text in TEXTS).encode(),
}


def read(path) -> tuple[list, str]:
    """Records, and the error that ended them; any other exception fails the test."""
    records, error = [], ""
    try:
        for record in read_source(path):
            records.append(record)
    except ValueError as problem:
        error = str(problem)
        assert path.name in error
    return records, error


def neighbours_are_whole(records, damaged_at_most: int) -> None:
    good = [record for record in records if not isinstance(record, BadRecord)]
    changed = [record for record in good if not all(is_whole(text) for text in texts_of(record))]
    assert len(changed) + len(records) - len(good) <= damaged_at_most


@pytest.mark.parametrize("name", SOURCES)
def test_the_undamaged_is_whole(tmp_path, name):
    (tmp_path / name).write_bytes(SOURCES[name])
    records, error = read(tmp_path / name)
    assert not error and not any(isinstance(record, BadRecord) for record in records)
    if name not in ("a.html", "a.md"):
        assert [text for record in records for text in texts_of(record)] == TEXTS


@pytest.mark.parametrize("name", SOURCES)
@given(data=st.data())
@ANY
def test_flipped_bytes(tmp_path, name, data):
    content = bytearray(SOURCES[name])
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / name).write_bytes(content)
    records, error = read(tmp_path / name)
    if name in ("a.jsonl", "a.tar"):  # packed ones may go wrong before their checksum comes; then there is an error
        neighbours_are_whole(records, 2)
    elif name not in ("a.html", "a.md") and not error:
        neighbours_are_whole(records, 0)
    try:
        survey = survey_source(tmp_path / name)
        assert not error and survey.bytes == len(content)
    except ValueError as problem:
        assert error and str(problem) == error


@pytest.mark.parametrize("name", SOURCES)
@given(data=st.data())
@ANY
def test_cut_files(tmp_path, name, data):
    content = SOURCES[name]
    keep = data.draw(st.integers(0, len(content) - 1))
    (tmp_path / name).write_bytes(content[:keep])
    records, error = read(tmp_path / name)
    if name in ("a.jsonl", "a.tar"):
        neighbours_are_whole(records, 1)
    elif name not in ("a.html", "a.md"):
        assert error or not records
        neighbours_are_whole(records, 1 if "jsonl" in name else 0)
    if name in ("a.tar", "a.parquet"):
        assert error


@given(lines=st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), max_size=8))
@ANY
def test_any_lines_between_good_ones(tmp_path, lines):
    path = tmp_path / "a.jsonl"
    good = JSONL.splitlines()
    path.write_bytes(b"\n".join([good[0], *lines, good[1]]) + b"\n")
    records, error = read(path)
    assert not error
    assert (texts_of(records[0]), texts_of(records[-1])) == ([TEXTS[0]], [TEXTS[1]])
    assert all(isinstance(record, BadRecord) for record in records[1:-1])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["text", "texts", "image", "images", "segments", "caption", "captions", "bytes", "path", "fit"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(value=JSON)
@ANY
def test_any_json_is_a_record_or_a_bad_one(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(value).encode() + b"\n" + JSONL)
    records, error = read(path)
    assert not error and len(records) == 1 + len(TEXTS)
    assert [text for record in records[1:] for text in texts_of(record)] == TEXTS
    if isinstance(records[0], BadRecord):
        json.dumps(records[0].reason, ensure_ascii=False).encode()
