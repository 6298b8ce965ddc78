import base64
import errno
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from raw_sources import png, shard_bytes, write_jsonl, write_tar

from megachameleon.data.documents import DocumentOptions
from megachameleon.data.inspection import dataset_counts, write_page
from megachameleon.data.plan import PlannedInput, load_plan, make_units
from megachameleon.data.preprocessing.jobs import RunOptions, run_units
from megachameleon.data.preprocessing.plan_making import _split_root, plan_preprocessing
from megachameleon.data.preprocessing.unit_state import unit_states
from megachameleon.data.preprocessing.verification import verify_units
from megachameleon.data.shards.merging import merge_shards
from megachameleon.data.shards.reader import Dataset, ShardReader
from megachameleon.tokens.pictures import open_picture, prepare_picture
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vq import ImageTokenizer

REPOSITORY = Path(__file__).parents[2]


def test_records_become_documents_with_text_and_codes(make_plan, tokenizer_folder, image_tokenizer_folder):
    folder = make_plan()
    states = run_units(folder, RunOptions()).states
    assert [state.unit.name for state in states] == ["00000-mixed", "00001-pairs", "00002-text"]
    assert [state.manifest.num_documents for state in states] == [1, 40, 30]
    assert [state.manifest.num_images for state in states] == [2, 40, 0]
    tokenizer, image_tokenizer = TextTokenizer.load(tokenizer_folder), ImageTokenizer.load(image_tokenizer_folder)
    vocabulary = tokenizer.vocabulary
    dataset = Dataset.open(folder)
    assert tokenizer.decode(dataset.document(0)) == "seeand"
    (first, _), (second, _) = dataset.image_spans(0).tolist()
    for start, color in ((first, 0), (second, 12)):
        picture = prepare_picture(open_picture(png(color), "test"), 8)
        codes = image_tokenizer.encode(picture[None])[0].numpy()
        ids = dataset.document(0)[start : start + vocabulary.image_length]
        assert np.array_equal(ids, vocabulary.encode_image(codes))
    captions = [tokenizer.decode(dataset.document(i)) for i in range(1, 41)]
    assert captions == [text for i in range(20) for text in (f"red {i}", f"rot {i}")]
    assert {int(dataset.image_spans(i)[0, 0]) > 1 for i in range(1, 41)} == {True, False}  # both orders
    assert verify_units(folder) == []


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_workers_cache_or_interruptions(make_plan, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("megachameleon.data.preprocessing.unit_run.BATCH_RECORDS", 3)
    expected = make_plan("a")
    run_units(expected, RunOptions())
    cached = make_plan("b")
    options = RunOptions(code_caches=(tmp_path / "cache",))
    run_units(cached, options, number=1)
    with pytest.raises(ValueError, match="2 of 3 planned units are not finished"):
        Dataset.open(cached)
    run_units(cached, options)
    assert shard_bytes(cached) == shard_bytes(expected)
    again = make_plan("c")
    with monkeypatch.context() as patch:
        patch.setattr(ImageTokenizer, "encode", lambda self, pictures: pytest.fail("not from the cache"))
        run_units(again, options)
    assert shard_bytes(again) == shard_bytes(expected)
    parallel = make_plan("parallel")
    run_units(parallel, RunOptions(workers=workers))
    assert shard_bytes(parallel) == shard_bytes(expected)
    monkeypatch.undo()
    large_batches = make_plan("large")
    run_units(large_batches, RunOptions())
    assert shard_bytes(large_batches) == shard_bytes(expected)


def test_finished_units_are_left_alone_and_damaged_ones_made_again(make_plan):
    folder = make_plan()
    run_units(folder, RunOptions())
    before = shard_bytes(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    path = folder / "00002-text.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert [state.problem is None for state in unit_states(load_plan(folder))] == [True, True, False]
    run_units(folder, RunOptions())
    assert shard_bytes(folder) == before
    unchanged = {path.name for path, time in times.items() if path.stat().st_mtime_ns == time}
    assert unchanged == {"00000-mixed.bin", "00001-pairs.bin"}
    flipped = bytearray(path.read_bytes())
    flipped[5] ^= 1
    path.write_bytes(flipped)
    manifest = folder / "00002-text.json"
    (folder / "00000-mixed.spans").unlink()
    missing, changed = verify_units(folder, workers=2)
    assert "00000-mixed.spans: missing" in missing
    assert re.search(rf"text\.bin: its SHA-256.*remove {manifest} and preprocess again", changed)
    assert "its manifest is removed now" in verify_units(folder, discard=True)[1] and not manifest.exists()
    run_units(folder, RunOptions())
    index = bytearray((folder / "00001-pairs.idx").read_bytes())
    index[40] ^= 1
    (folder / "00001-pairs.idx").write_bytes(index)
    run_units(folder, RunOptions())
    assert verify_units(folder) == []
    assert shard_bytes(folder) == before


def test_what_killed_runs_left_is_removed_and_what_others_write_stays(make_plan):
    folder = make_plan()
    dead, host = subprocess.Popen(["true"]), socket.gethostname()
    dead.wait()
    orphan = folder / f".00002-text.bin.{host}.{dead.pid}.tmp"
    others = [
        folder / f".00002-text.bin.{host}.{os.getppid()}.tmp",
        folder / f".00002-text.bin.another-host.{dead.pid}.tmp",
        folder / f".notes.{dead.pid}.tmp",
    ]
    orphans = [orphan, folder / f".00001-pairs.json.{host}.{dead.pid}.tmp", folder / ".00000-mixed.lock"]
    for path in (*orphans, *others):
        path.touch()
    orphans[-1].write_text(f"{host} {dead.pid}")
    run_units(folder, RunOptions())
    assert sorted(folder.glob(".*")) == sorted(others)


def test_a_damaged_code_cache_is_named(make_plan, tmp_path):
    folder, options = make_plan(), RunOptions(code_caches=(tmp_path / "cache",))
    run_units(folder, options, number=0)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:4096] + b"\xff" * 8192)
    with pytest.raises(ValueError, match=r"codes-\w+\.sqlite: unusable code cache .* remove the file"):
        run_units(folder, options)


def test_a_failed_unit_leaves_its_reason_and_the_others_are_made(make_plan, raw):
    folder = make_plan()
    content = (raw / "pairs.tar").read_bytes()
    (raw / "pairs.tar").write_bytes(content.replace(b"red 7", b"red 8"))
    with pytest.raises(ValueError, match=r"pairs\.tar: changed since the plan"):
        run_units(folder, RunOptions())
    states = list(unit_states(load_plan(folder)))
    assert [state.state for state in states] == ["finished", "failed", "finished"]
    assert "pairs.tar: changed" in states[1].problem
    assert {path.name for path in folder.glob("*00001*")} == {"00001-pairs.failed.txt"} and not list(folder.glob(".*"))
    (raw / "pairs.tar").write_bytes(content)
    assert all(state.manifest is not None for state in run_units(folder, RunOptions()).states)
    assert not list(folder.glob("*.failed.txt"))


def test_bad_records_are_set_aside_and_counted(make_plan, raw):
    members: dict = {f"{i}.txt": f"text {i}" for i in range(50)}
    members |= {"bad.json": "{", "torn.png": png(1)[:60], "torn.txt": "a torn picture"}
    write_tar(raw / "zebra.tar", members)
    folder = make_plan()
    state = run_units(folder, RunOptions()).states[-1]
    assert state.manifest.num_documents == 50
    assert state.manifest.quarantined == {"zebra.tar": 2}
    lines = (folder / "00003-zebra.quarantine.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert (first["file"], first["place"]) == ("zebra.tar", "bad, byte 51200") and "JSON" in first["reason"]
    assert second["place"].startswith("torn, byte ") and "damaged picture" in second["reason"]
    assert len(Dataset.open(folder)) == 121


def test_too_many_bad_records_fail_the_unit(make_plan, raw):
    write_jsonl(raw / "text.jsonl", *([{"text": "good"}] * 200), *([b"{"] * 11))
    folder = make_plan()
    with pytest.raises(
        ValueError, match=r"11 of 211 records so far are bad.*text\.jsonl, line 201, byte 3400: not valid JSON"
    ):
        run_units(folder, RunOptions())
    (left,) = folder.glob("00002*.jsonl")
    assert left.name == "00002-text.quarantine.jsonl" and len(left.read_text().splitlines()) == 11
    assert run_units(folder, RunOptions(max_bad=0.1)).states[-1].manifest.num_documents == 200
    write_jsonl(raw / "text.jsonl", *([{"text": "good"}] * 200), b"{")
    with pytest.raises(ValueError, match="1 of 201 records so far are bad, more than --max-bad 0 allows"):
        run_units(make_plan("strict"), RunOptions(max_bad=0))
    write_jsonl(raw / "text.jsonl", b"{", b"}")
    with pytest.raises(ValueError, match=r"2 of 2 records are bad \(.*quarantine\.jsonl; mend the input") as error:
        run_units(make_plan("other"), RunOptions(max_bad=1.0))
    assert "--max-bad" not in str(error.value)


def test_places_and_reasons_of_broken_pictures(make_plan, raw):
    broken = base64.b64encode(png(1)[:60]).decode()
    write_jsonl(raw / "text.jsonl", {"text": "good"}, {"segments": [{"text": "x"}, {"image_base64": broken}]})
    folder = make_plan()
    run_units(folder, RunOptions())
    entry = json.loads((folder / "00002-text.quarantine.jsonl").read_text())
    assert (entry["file"], entry["place"]) == ("text.jsonl", "line 2, byte 17")
    assert entry["reason"].startswith("segments[1].image_base64: damaged picture")


def test_inputs_without_records_are_refused(raw, tmp_path, tokenizer_folder):
    empty = raw / "empty.jsonl"
    for content in (b"", b"\n\n"):
        empty.write_bytes(content)
        with pytest.raises(ValueError, match=r"no records in|empty\.jsonl: no records"):
            plan_preprocessing([empty], tmp_path / "out", tokenizer_folder, None, DocumentOptions())
            run_units(tmp_path / "out", RunOptions())
    both = [empty, raw / "text.jsonl"]
    plan_preprocessing(both, tmp_path / "both", tokenizer_folder, None, DocumentOptions())
    assert [s.manifest.num_documents for s in run_units(tmp_path / "both", RunOptions()).states] == [0, 30]


def test_impossible_numbers_and_devices_are_refused(make_plan, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: PyTorch sees no GPU"):
        run_units(make_plan(), RunOptions(device="cuda"))
    with pytest.raises(ValueError, match="--units 0: must be at least 1"):
        make_plan(num_units=0)
    with pytest.raises(ValueError, match="--workers 0: must be at least 1"):
        run_units(make_plan(), RunOptions(workers=0))
    with pytest.raises(ValueError, match="--threads 0: must be at least 1"):
        RunOptions(num_threads=0)
    for share in (-1, float("nan"), 7):
        with pytest.raises(ValueError, match=r"--max-bad .* between 0 and 1"):
            RunOptions(max_bad=share)


def test_a_broken_plan_says_to_make_it_again(make_plan):
    folder = make_plan()
    for content in ("{", "[]", '{"version": 1, "units": 3}'):
        (folder / "plan.json").write_text(content)
        with pytest.raises(ValueError, match=r"plan\.json: .*make the plan again .*--replace"):
            load_plan(folder)
    make_plan(replace=True)


def test_what_another_run_is_making_is_said(make_plan):
    folder = make_plan()
    (folder / f".00002-text.bin.{socket.gethostname()}.{os.getppid()}.tmp").touch()
    assert [state.state for state in unit_states(load_plan(folder))] == ["missing", "missing", "running"]


def test_damaged_archives_fail_the_plan_or_give_what_is_whole(make_plan, raw):
    path = raw / "pairs.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"pairs\.tar: damaged or truncated.*--allow-damaged-archives"):
        make_plan()
    folder = make_plan(allow_damaged_archives=True)
    state = run_units(folder, RunOptions()).states[1]
    assert 0 < state.manifest.num_documents < 10
    assert state.manifest.quarantined == {"pairs.tar": 1}
    quarantined = json.loads((folder / "00001-pairs.quarantine.jsonl").read_text())
    assert quarantined == {
        "file": "pairs.tar",
        "place": "end",
        "reason": "damaged or truncated (no end mark; the file ends at byte 5,000)",
    }


def test_an_archive_that_was_damaged_after_the_plan_is_not_taken(make_plan, raw):
    folder = make_plan(allow_damaged_archives=True)
    path = raw / "pairs.tar"
    content = path.read_bytes()
    path.write_bytes(content[:5120] + b"?" * 512 + content[5632:])
    with pytest.raises(ValueError, match=r"pairs\.tar: changed since the plan"):
        run_units(folder, RunOptions())


def test_an_input_that_cannot_be_read_fails_its_unit_alone(make_plan, monkeypatch):
    folder = make_plan()
    read = Path.open

    def fail(self, *arguments, **options):
        if self.name == "pairs.tar":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return read(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.raises(ValueError, match=r"nput/output error.*pairs\.tar'; mend that"):
            run_units(folder, RunOptions())
    assert [state.state for state in unit_states(load_plan(folder))] == ["finished", "failed", "finished"]


def test_a_shard_that_cannot_be_read_is_a_problem_among_others(make_plan, monkeypatch):
    folder = make_plan()
    run_units(folder, RunOptions())
    (folder / "00001-pairs.json").write_text("{")

    def fail(self):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ShardReader, "verify", fail)
    first, second, third = verify_units(folder)
    assert "00001-pairs: " in second
    assert all("cannot be read" in problem and "nput/output error" in problem for problem in (first, third))


def test_an_output_among_the_inputs_is_refused(raw, tokenizer_folder):
    def plan(given: Path | str, output: Path) -> None:
        plan_preprocessing([given], output, tokenizer_folder, None, DocumentOptions())

    texts = raw / "texts"
    texts.mkdir()
    write_jsonl(texts / "a.jsonl", {"text": "red"})
    for given, output in ((texts, texts), (texts, texts / "inner/shards"), (f"{texts}/*.jsonl", texts)):
        with pytest.raises(ValueError, match=r"--output .*: lies in the same folder as the input .*choose"):
            plan(given, output)
    assert [path.name for path in texts.iterdir()] == ["a.jsonl"]
    plan(texts / "a.jsonl", texts)  # named alone, it is the only input whatever else lies there


def test_a_replaced_tokenizer_is_named(make_plan, tokenizer_folder):
    folder = make_plan()
    plan = folder / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"tokenizer_fingerprint": "another"}))
    with pytest.raises(ValueError, match=rf"^{tokenizer_folder}: this tokenizer changed since the plan"):
        run_units(folder, RunOptions())


def test_changed_inputs_and_plans_are_refused(make_plan, raw, tokenizer_folder):
    folder = make_plan()
    make_plan()  # the same again is fine
    with pytest.raises(ValueError, match="another plan is there"):
        make_plan(options=DocumentOptions(seed=1))
    run_units(folder, RunOptions())
    make_plan(options=DocumentOptions(picture_first=1.0), replace=True)
    assert {state.problem for state in unit_states(load_plan(folder))} == {"made by another plan"}
    run_units(folder, RunOptions())
    dataset = Dataset.open(folder)
    assert all(dataset.image_spans(i)[0, 0] == 1 for i in range(1, 41))
    make_plan(replace=True)
    write_jsonl(raw / "text.jsonl", {"text": "new"})
    with pytest.raises(ValueError, match=r"text\.jsonl: changed since the plan"):
        run_units(folder, RunOptions())
    (raw / "text.jsonl").unlink()
    with pytest.raises(ValueError, match=r"text\.jsonl: gone since the plan"):
        run_units(folder, RunOptions())
    with pytest.raises(ValueError, match=r"units 0\.\.2"):
        run_units(folder, RunOptions(), number=3)
    with pytest.raises(ValueError, match="no plan there"):
        run_units(raw, RunOptions())


def test_tokenizers_that_do_not_fit_are_refused(raw, tmp_path, tokenizer_folder, image_tokenizer_folder):
    options = DocumentOptions()
    with pytest.raises(ValueError, match="give the picture tokenizer with --image-tokenizer"):
        plan_preprocessing([raw], tmp_path / "out", tokenizer_folder, None, options)
    other = tmp_path / "other"
    other.mkdir()
    vocabulary = TextTokenizer.load(tokenizer_folder).vocabulary
    (other / "text.model").write_bytes((tokenizer_folder / "text.model").read_bytes())
    replace(vocabulary, image_grid=(4, 4)).save(other)
    with pytest.raises(ValueError, match="--num-codes 8 --grid 2x2"):
        plan_preprocessing([raw], tmp_path / "out", other, image_tokenizer_folder, options)
    (raw / "pairs.tar").unlink()
    (raw / "mixed.tar").unlink()
    write_jsonl(raw / "text.jsonl", {"segments": [{"text": "see"}, {"image_base64": "AAAA"}]})
    with pytest.raises(ValueError, match=r"text\.jsonl: holds pictures; give the picture tokenizer"):
        plan_preprocessing([raw], tmp_path / "out", tokenizer_folder, None, options)
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_found_before_work(make_plan, monkeypatch):
    folder = make_plan()
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("megachameleon.files.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="writing the shards needs about"):
        run_units(folder, RunOptions())


def test_languages_filter_and_units_group(make_plan):
    folder = make_plan(options=DocumentOptions(languages=("fr",)), num_units=1)
    (state,) = run_units(folder, RunOptions()).states
    assert (state.unit.name, state.manifest.num_documents, state.manifest.filtered) == ("00000", 31, 20)
    assert load_plan(folder).options.languages == ("fr",)


def test_many_small_inputs_make_few_units(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr("megachameleon.data.preprocessing.plan_making.MANY_INPUTS", 5)
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for number in range(6):
        (raw / f"{number}.txt").write_text("text")
    plan = plan_preprocessing([raw], out, tokenizer_folder, None, DocumentOptions())
    assert plan.num_units == 1
    assert run_units(out, RunOptions()).states[0].manifest.num_documents == 6


def test_inputs_may_lie_behind_urls(raw, tmp_path, tokenizer_folder):
    system = fsspec.filesystem("memory")
    for name in ("a", "b"):
        system.pipe(f"/bucket/raw/{name}.jsonl", b'{"text": "%s"}\n{' % name.encode())
    out, urls = tmp_path / "out", ["memory://bucket/raw/a.jsonl", "memory://bucket/raw/b.jsonl"]
    plan = plan_preprocessing(urls, out, tokenizer_folder, None, DocumentOptions())
    assert [plan.input_path(item) for unit in plan.units() for item in unit.inputs] == urls
    states = run_units(out, RunOptions()).states
    assert [state.manifest.num_documents for state in states] == [1, 1]
    assert states[1].manifest.quarantined == {"b.jsonl": 1}
    system.pipe("/bucket/raw/b.jsonl", b'{"text": "c"}\n{')
    (out / "00001-b.json").unlink()
    with pytest.raises(ValueError, match=r"memory://bucket/raw/b\.jsonl: changed since the plan"):
        run_units(out, RunOptions())


@pytest.mark.parametrize(
    ("paths", "root"),
    [
        (["/a/b/x.jsonl", "/a/c/d/y.jsonl"], "/a"),
        (["/a/x.jsonl", "/b/y.jsonl"], ""),
        (["/x.jsonl"], ""),
        (["s3://one/x.jsonl", "s3://two/y.jsonl"], ""),
        (["s3://one/a/x.jsonl", "s3://one/a//y.jsonl"], "s3://one/a"),
        (["s3://one/x.jsonl", "/a/y.jsonl"], ""),
        (["/a/pictures", "/a/pictures/x.jsonl"], "/a"),
    ],
)
def test_inputs_are_named_below_what_they_share(paths, root):
    found, names = _split_root(paths)
    assert found == root
    assert [f"{root}/{name}" if root else name for name in names] == paths


def test_units_share_inputs_evenly_and_in_order():
    inputs = [PlannedInput(name=f"{i:03d}.txt", bytes=10, sha256="", text_bytes=10, num_pictures=0) for i in range(10)]
    units = make_units(inputs, count=4)
    assert [len(unit.inputs) for unit in units] == [3, 2, 3, 2]
    assert [item for unit in units for item in unit.inputs] == inputs
    names = [unit.name for unit in make_units(inputs)]
    assert names == sorted(names) and names[3] == "00003-003"


def test_merged_shards_hold_all_documents(make_plan, tmp_path):
    folder = make_plan()
    run_units(folder, RunOptions())
    dataset = Dataset.open(folder)
    merge_shards(dataset.shards, tmp_path / "merged/all")
    merged = Dataset.open(tmp_path / "merged/all")
    assert all(np.array_equal(merged.document(i), dataset.document(i)) for i in range(len(dataset)))
    assert dataset_counts(merged)["pictures"] == dataset_counts(dataset)["pictures"] == 42


def test_a_shard_that_was_changed_is_not_merged(make_plan, tmp_path):
    folder = make_plan()
    run_units(folder, RunOptions())
    path = folder / "00001-pairs.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"00001-pairs\.bin: its SHA-256 is not the manifest's"):
        merge_shards(Dataset.open(folder).shards, tmp_path / "merged/all")
    assert list((tmp_path / "merged").iterdir()) == []


def test_merged_shards_count_what_all_of_them_set_aside(make_plan, raw, tmp_path):
    for name, bad in (("a", 1), ("b", 2)):
        (raw / name).mkdir()
        write_jsonl(raw / name / "same.jsonl", {"text": "good"}, *([b"{"] * bad))
    folder = make_plan()
    run_units(folder, RunOptions())
    assert merge_shards(Dataset.open(folder).shards, tmp_path / "merged").quarantined == {
        "a/same.jsonl": 1,
        "b/same.jsonl": 2,
    }


def test_the_page_shows_text_and_pictures(make_plan, tmp_path, raw, tokenizer_folder, image_tokenizer_folder):
    write_jsonl(raw / "text.jsonl", {"text": "<script>alert(1)</script>"})
    folder = make_plan()
    run_units(folder, RunOptions())
    page = tmp_path / "page.html"
    tokenizers = TextTokenizer.load(tokenizer_folder), ImageTokenizer.load(image_tokenizer_folder)
    write_page(Dataset.open(folder), *tokenizers, page, num_documents=100)
    text = page.read_text()
    assert text.count("<article>") == 42 and text.count("data:image/png;base64,") == 42
    assert "rot 19" in text and "&lt;script&gt;" in text and "<script>" not in text


def test_the_tool_from_plan_to_page(raw, tmp_path, tokenizer_folder, image_tokenizer_folder, monkeypatch, capsys):
    def tool(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *map(str, arguments)])
        runpy.run_path(str(REPOSITORY / "tools/preprocess_data.py"), run_name="__main__")
        return capsys.readouterr().out

    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        tool("run", "--output", out)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {out}/plan.json: no plan there; run preprocess_data.py plan first\n"
    tokenizers = ("--tokenizer", tokenizer_folder, "--image-tokenizer", image_tokenizer_folder)
    with pytest.raises(SystemExit):
        tool("plan", "--input", raw, "--output", out, *tokenizers, "--languages", "")
    assert "--languages '': an empty code" in capsys.readouterr().err
    assert "3 units from 3 inputs" in tool("plan", "--input", raw, "--output", out, *tokenizers)
    assert "3 of 3 units are finished" in tool("run", "--output", out)
    assert "all shards are what their manifests say" in tool("verify", "--output", out)
    assert "pictures  42" in tool("inspect", out, "--page", tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()
    assert "71 documents" in tool("merge", out, "--prefix", tmp_path / "merged")
    pairs = raw / "pairs.tar"
    pairs.write_bytes(pairs.read_bytes()[:5000])
    told = tool("plan", "--input", raw, "--output", out, *tokenizers, "--replace", "--allow-damaged-archives")
    assert f"{pairs}: damaged; only what comes before the damage is kept" in told
