import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megachameleon.tokens.vq import source
from megachameleon.tokens.vq.memory_feed import load_pictures
from megachameleon.tokens.vq.source import PictureInput, find_pictures, parse_input


def encoded(seed, format="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def load(path, **changes):
    return load_pictures(
        find_pictures([PictureInput(path)]).files, 8, **({"held_out": 4, "max_pictures": 1000, "seed": 0} | changes)
    )


def test_tars_and_folders_give_the_same_pictures(tmp_path):
    pictures = {f"{i:03d}.png": encoded(i) for i in range(40)}
    write_tar(tmp_path / "a.tar", pictures | {"000.txt": b"a caption", "001.json": b"{}"})
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    (folder / "000.txt").write_text("a caption")
    from_tar, from_folder = load(tmp_path / "a.tar"), load(tmp_path / "folder")
    assert from_tar.train.shape == (36, 3, 8, 8) and from_tar.held_out.shape == (4, 3, 8, 8)
    assert from_tar.fingerprint == from_folder.fingerprint
    both = load(tmp_path)
    assert both.fingerprint == from_tar.fingerprint and both.num_duplicates == 40 and both.num_files == 80


def test_damaged_pictures_are_set_aside_and_counted(tmp_path):
    members = {f"{i}.png": encoded(i) for i in range(40)} | {"bad.png": b"oops", "cut.jpg": encoded(3, "JPEG")[:90]}
    write_tar(tmp_path / "a.tar", members)
    pictures = load(tmp_path / "a.tar")
    assert len(pictures.train) + len(pictures.held_out) == 40
    assert [entry["origin"].rsplit("/", 1)[1] for entry in pictures.quarantine] == ["bad.png", "cut.jpg"]
    assert "not a picture" in pictures.quarantine[0]["reason"]


def test_held_out_pictures_are_not_trained_on(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{i}.png": encoded(i % 40) for i in range(80)})
    pictures = load(tmp_path / "a.tar")
    train = {picture.tobytes() for picture in pictures.train}
    assert len(train) == 36 and not any(picture.tobytes() in train for picture in pictures.held_out)


def test_memory_is_bounded_by_a_sample(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{i}.png": encoded(i) for i in range(80)})
    small, again, other = (load(tmp_path / "a.tar", max_pictures=40, seed=seed) for seed in (0, 0, 1))
    assert len(small.train) + len(small.held_out) == 40
    assert small.fingerprint == again.fingerprint != other.fingerprint


def test_unusable_inputs_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder"):
        find_pictures([PictureInput(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no \.png"):
        find_pictures([PictureInput(tmp_path / "empty")])
    write_tar(tmp_path / "a.tar", {f"{i}.png": encoded(i) for i in range(5)})
    with pytest.raises(ValueError, match="5 distinct usable pictures in 5 files"):
        load(tmp_path / "a.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    for name, data in {"cut.tar": whole[:1200], "noise.tar": b"x" * 3000}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}: not a whole uncompressed tar"):
            find_pictures([PictureInput(tmp_path / name)])


def test_long_files_are_set_aside(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {f"{i}.png": encoded(i) for i in range(40)})
    write_tar(tmp_path / "b.tar", {"long.png": encoded(0) + bytes(1000)})
    monkeypatch.setattr(source, "MAX_FILE_BYTES", 1000)
    assert ["long.png" in entry["origin"] for entry in load(tmp_path).quarantine] == [True]


def test_tags_come_from_inputs_and_json(tmp_path):
    picture = encoded(0)
    members = {
        "a.png": picture,
        "a.json": b'{"tags": ["face", "street"]}',
        "b.png": picture,
        "b.json": b'{"tag": "logo"}',
    }
    write_tar(tmp_path / "a.tar", members | {"c.png": picture, "c.json": b"{oops", "d.png": picture, "d.json": b"[1]"})
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "e.png").write_bytes(picture)
    (folder / "e.json").write_text('{"tag": "face"}')
    found = find_pictures([PictureInput(tmp_path / "a.tar", "mine"), PictureInput(folder)], read_tags=True)
    tags = [("mine", "face", "street"), ("mine", "logo"), ("mine",), ("mine",), ("face",)]
    assert [file.tags for file in found.files] == tags
    assert ["c.json" in entry["origin"] and "no tags" in entry["reason"] for entry in found.quarantine] == [True]
    assert find_pictures([PictureInput(folder)]).files[0].tags == ()


def test_an_input_may_name_a_tag(tmp_path):
    assert parse_input("faces=a/b.tar") == PictureInput(Path("a/b.tar"), "faces")
    assert parse_input("a/b=c.tar") == PictureInput(Path("a/b=c.tar"))
    (tmp_path / "x=y").mkdir()
    assert parse_input(str(tmp_path / "x=y")).tag == ""
