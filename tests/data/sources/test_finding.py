import pickle

import pytest
from raw_sources import write_jsonl, write_tar

from megachameleon.data.records import BadRecord
from megachameleon.data.sources import (
    DamagedArchiveError,
    base_name,
    find_sources,
    read_source,
    texts_of,
)


def test_damage_is_told_across_processes(tmp_path):
    error = DamagedArchiveError(tmp_path / "a.tar", "no end")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


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


def test_links_to_folders_are_followed_once(tmp_path):
    raw, elsewhere = tmp_path / "raw", tmp_path / "elsewhere"
    for folder in (raw / "own", raw / ".hidden", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "a.txt").touch()
    for name, target in {"again": elsewhere, "alias": raw / "own", "loop": raw, "there": elsewhere}.items():
        (raw / name).symlink_to(target)
    (elsewhere / "back").symlink_to(raw)
    assert find_sources([raw]) == [str(raw / "again/deep/a.txt"), str(raw / "own/a.txt")]
    (raw / "own/latest.txt").symlink_to(raw / "own/a.txt")
    with pytest.raises(ValueError, match=r"own/latest\.txt: given twice, also as .*own/a\.txt; .* links"):
        find_sources([raw])
    (raw / "own/b.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"own/b\.txt: a link to nothing"):
        find_sources([raw])


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
