import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from megachameleon.evaluation.gallery import Gallery, NamedPrompt, load_gallery, read_named_prompts
from megachameleon.evaluation.retrieval import ranks, retrieval_report, squared_distances, summarize
from megachameleon.evaluation.statistics import wilson_interval


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def prompt(key, kind="seen"):
    return NamedPrompt(text=key, key=key, kind=kind, lang="en")


def test_distances_are_exact():
    a, b = pictures(3), pictures(300, seed=1)
    expected = np.square(a[:, None].astype(np.int64) - b[None].astype(np.int64)).sum((2, 3, 4))
    assert (squared_distances(a, b) == expected).all()


def test_ranks_count_what_is_nearer_and_share_ties():
    distances = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [5.0, 1.0, 1.0]])
    assert ranks(distances, np.array([0, 0, 1])).tolist() == [3, 2, 2]


def test_report_finds_slightly_changed_pictures_and_not_others():
    gallery = Gallery.of({f"{i:03d}": picture for i, picture in enumerate(pictures(50))})
    prompts = [prompt(f"{i:03d}") for i in range(10)] + [prompt(f"{i:03d}", "held-out tone") for i in range(10)]
    right = np.clip(gallery.pictures[:10].astype(int) + 9, 0, 255).astype(np.uint8)
    wrong = gallery.pictures[20:30]
    report = retrieval_report(prompts, np.concatenate((right, wrong)), gallery, gallery.pictures, "prompts")
    seen, held_out, together = report["groups"]
    assert (seen["name"], seen["top1"], seen["held_out"]) == ("seen", 1.0, False)
    assert (held_out["name"], held_out["top1"], held_out["held_out"]) == ("held-out tone", 0.0, True)
    assert together["top1"] == 0.5
    assert together["chance"] == 1 / 50
    assert together["top1_interval"][0] < 0.5 < together["top1_interval"][1]
    assert report["ceiling"][-1]["top1"] == 1.0
    assert report["drawings"][10]["nearest"] == "020"


def test_top5_and_chance_of_a_small_gallery():
    [row] = summarize([prompt("a"), prompt("b")], np.array([1, 3]), 3)
    assert (row["top1"], row["top5"], row["chance_top5"], row["median_rank"]) == (0.5, 1.0, 1.0, 2.0)


def test_a_tar_cut_off_between_two_pictures_is_refused(tmp_path):
    """Python's tarfile takes the end of the file for the end of the archive."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(data := png(pictures(1)[0]))
            archive.addfile(member, io.BytesIO(data))
    with tarfile.open(path) as archive:
        second = archive.getmember("b.png").offset
    assert len(load_gallery(path, 8).position) == 2
    path.write_bytes(path.read_bytes()[:second])
    with pytest.raises(ValueError, match=r"x\.tar: damaged or truncated \(no end mark"):
        load_gallery(path, 8)


def test_gallery_from_folder_and_tar(tmp_path):
    first, second, third = pictures(3)
    (tmp_path / "a.png").write_bytes(png(first))
    (tmp_path / "note.txt").write_text("not a picture")
    with tarfile.open(tmp_path / "more.tar", "w") as archive:
        for name, picture in (("deep/b.png", second), ("c.png", first), ("../d.png", third)):
            data = png(picture)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    gallery = load_gallery(tmp_path, 8)
    assert gallery.keys == ("a", "b", "d")
    assert gallery.positions(["c", "b"], "here").tolist() == [0, 1]
    assert (gallery.pictures[0] == first).all()
    assert [p.key for p in gallery.merge_names([prompt("c"), prompt("b"), prompt("x")])] == ["a", "b", "x"]
    assert not (tmp_path.parent / "d.png").exists()
    with pytest.raises(ValueError, match="here: 1 keys have no picture in the gallery, such as 'x'"):
        gallery.positions(["x"], "here")


def test_galleries_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="no such folder or tar"):
        load_gallery(tmp_path / "none", 8)
    with pytest.raises(ValueError, match="no pictures"):
        load_gallery(tmp_path, 8)
    (tmp_path / "x.tar").write_bytes(b"not a tar")
    with pytest.raises(ValueError, match=r"x\.tar: damaged or truncated .*copy or write it again"):
        load_gallery(tmp_path, 8)


def test_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "sun", "key": "1", "picture": "x"}\n')
    assert read_named_prompts(path) == [NamedPrompt(text="sun", key="1", kind="", lang="")]
    path.write_text('{"text": "sun", "key": "1"}\n{"text": "sun"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: not a prompt"):
        read_named_prompts(path)


def test_wilson_interval():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-3)
    assert high == pytest.approx(0.9433, abs=1e-3)
    assert wilson_interval(10, 10)[1] == 1.0
