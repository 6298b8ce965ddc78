"""The raw data of the demo: the same bytes on every run, and held out means held out."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

PROJECT = Path(__file__).parents[2]
SIZES = ("--max-pictures", "40", "--text-megabytes", "0.1", "--interleaved-documents", "12", "--prompts-per-kind", "2")


def make_raw_data(output: Path) -> Path:
    command = [sys.executable, "-m", "examples.demo.make_raw_data", "--output", str(output), *SIZES]
    subprocess.run(command, check=True, cwd=PROJECT, capture_output=True)
    return output


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return make_raw_data(tmp_path_factory.mktemp("raw"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def captions(folder: Path) -> set[tuple[str, str, str]]:
    found = set()
    for name, data in members(folder).items():
        key = name.split(".")[0]
        if name.endswith(".txt"):
            found.add((key, "en", data.decode()))
        elif name.endswith(".json"):
            found |= {(key, caption["lang"], caption["text"]) for caption in json.loads(data)["captions"]}
    return found


def test_same_bytes_again(raw, tmp_path):
    again = make_raw_data(tmp_path)
    files = sorted(path.relative_to(raw) for path in raw.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert [path for path in files if (raw / path).read_bytes() != (again / path).read_bytes()] == []


def test_the_docstring_names_what_is_written(raw):
    from examples.demo import make_raw_data as module

    for path in raw.iterdir():
        assert (f"{path.name}/" if path.is_dir() else path.name) in module.__doc__


def test_held_out_captions_are_nowhere_in_training(raw):
    seen = captions(raw / "pairs_en") | captions(raw / "pairs_world") | captions(raw / "pairs_tones")
    held_out = {(row["key"], row["lang"], row["text"]) for row in rows(raw / "heldout" / "captions.jsonl")}
    assert held_out == captions(raw / "valid_world") | captions(raw / "valid_tones")
    assert not held_out & seen
    spelled = {(key, text.casefold()) for key, _, text in seen}
    assert not [caption for caption in held_out if (caption[0], caption[2].casefold()) in spelled]


def test_held_out_pictures_are_nowhere_in_training(raw):
    hidden = {data for name, data in members(raw / "valid_tones").items() if name.endswith(".png")}
    assert hidden
    for source in ("pairs_en", "pairs_world", "pairs_tones", "interleaved", "valid_interleaved"):
        assert not hidden & set(members(raw / source).values()), source


def test_text_is_held_out_by_document(raw):
    training = {row["source"] for path in (raw / "text").glob("*.jsonl") for row in rows(path)}
    validation = {row["source"] for path in (raw / "valid_text").glob("*.jsonl") for row in rows(path)}
    assert training
    assert validation
    assert not training & validation


def test_pictures_and_interleaved_documents_are_whole(raw):
    pictures = members(raw / "interleaved")
    documents = {name.split(".")[0]: json.loads(data) for name, data in pictures.items() if name.endswith(".json")}
    assert len(documents) == 12
    for key, document in documents.items():
        shown = [segment["image"] for segment in document["segments"] if "image" in segment]
        assert 3 <= len(shown) <= 6
        for name in shown:
            assert Image.open(io.BytesIO(pictures[f"{key}.{name}"])).size == (96, 96)


def test_fixed_prompts_are_captions_of_the_training_data(raw):
    fixed = json.loads((PROJECT / "examples/demo/prompts.json").read_text())["prompts"]
    drawn = rows(raw / "prompts" / "draw.jsonl")
    assert [row["text"] for row in drawn if row["kind"] == "fixed"] == fixed
    assert set(fixed) <= {text for _, _, text in captions(raw / "pairs_en")}
    assert all((raw / row["picture"]).is_file() for row in drawn)
