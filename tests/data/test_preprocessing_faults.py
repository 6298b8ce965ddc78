"""Killed, run twice at once, without room, with changed inputs: whole shards with the same bytes, or none."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from raw_sources import png, shard_bytes, write_jsonl, write_tar

from megachameleon.data.documents import DocumentOptions
from megachameleon.data.plan import load_plan
from megachameleon.data.preprocessing.jobs import RunOptions, run_units
from megachameleon.data.preprocessing.plan_making import PlanOptions, plan_preprocessing
from megachameleon.data.preprocessing.unit_state import unit_states
from megachameleon.data.preprocessing.verification import verify_units
from megachameleon.data.shards import writer as shard_writer
from megachameleon.data.shards.reader import Dataset, ShardReader
from megachameleon.data.shards.writer import ShardWriter
from megachameleon.tokens.text import TextTokenizer

REPOSITORY = Path(__file__).parents[2]
WITHOUT_BAR = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def start_run(folder: Path, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "tools/preprocess_data.py"), "run", "--output", str(folder)]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=WITHOUT_BAR,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def plan_texts(tmp_path, tokenizer_folder):
    """A function that plans 12 units of text; some records are bad, so that there is a quarantine too."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        lines = ({"text": f"red green {i} squares {k} " * 20} for k in range(400))
        write_jsonl(folder / f"{i:02d}.jsonl", *lines, *([b"{"] * (i % 3)))

    def make(name: str) -> Path:
        plan_preprocessing([folder], tmp_path / name, tokenizer_folder, None, DocumentOptions())
        return tmp_path / name

    return make


def kill_at_random_moments(folder: Path, times: int, *arguments: object) -> None:
    """Kill runs, each some time after it has begun to write, and remove a finished unit now and then."""
    choose = random.Random(0)
    for _ in range(times):
        finished = sorted(folder.glob("*.bin"))
        if len(finished) > 6:
            shard = choose.choice(finished)
            shard.with_suffix(choose.choice((".json", ".bin", ".idx"))).unlink(missing_ok=True)
        before = seen(folder)
        process = start_run(folder, *arguments)
        while process.poll() is None and seen(folder) == before:
            time.sleep(0.002)
        time.sleep(choose.random() * 0.3)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def seen(folder: Path) -> set[tuple[str, int]]:
    """Names and ages of the files there."""
    return {(entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(folder) if _still_there(entry)}


def _still_there(entry: os.DirEntry) -> bool:
    try:
        return entry.stat() is not None  # remembered by the entry
    except FileNotFoundError:
        return False


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kills", "workers"), [(6, 1), pytest.param(35, 1, marks=SLOW), pytest.param(25, 2, marks=SLOW)]
)
def test_killed_at_any_moment_the_bytes_are_the_same(plan_texts, kills, workers):
    expected, folder = plan_texts("expected"), plan_texts("killed")
    run_units(expected, RunOptions())
    kill_at_random_moments(folder, kills, "--workers", workers)
    process = start_run(folder)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
    assert shard_bytes(folder) == shard_bytes(expected)
    assert verify_units(folder) == []


def test_two_runs_of_the_same_units_make_one_whole_result(plan_texts):
    expected, folder = plan_texts("expected"), plan_texts("twice")
    run_units(expected, RunOptions())
    runs = [start_run(folder), start_run(folder)]
    for process in runs:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    assert shard_bytes(folder) == shard_bytes(expected)


def test_writers_of_different_bytes_are_never_mixed(tmp_path, vocabulary):
    """As two machines whose pictures' codes differ by a rounding would write: one of them wins, whole."""
    script = """
import sys, pathlib, numpy as np
from megachameleon.data.shards.writer import ShardWriter
from megachameleon.tokens.vocabulary import Vocabulary
vocabulary = Vocabulary.compact(num_text_ids=113, num_image_codes=8, image_grid=(2, 2))
fill = 60 + int(sys.argv[1])
for _ in range(40):
    with ShardWriter(pathlib.Path("shard"), vocabulary, tokenizer="t") as writer:
        writer.add_block(np.full(2000, fill), np.full(200 if fill % 2 else 100, 10 if fill % 2 else 20))
        writer.commit()
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(number)], cwd=tmp_path, env=WITHOUT_BAR)
        for number in range(3)
    ]
    whole = 0
    while any(process.poll() is None for process in processes):
        if _is_whole(tmp_path / "shard"):
            whole += 1
    assert [process.returncode for process in processes] == [0, 0, 0]
    ShardReader(tmp_path / "shard").verify()
    assert {path.name for path in tmp_path.iterdir()} == {"shard.bin", "shard.idx", "shard.spans", "shard.json"}


def test_a_writer_waits_while_another_renames(tmp_path, vocabulary, monkeypatch):
    renaming, go_on = threading.Event(), threading.Event()
    sync = shard_writer.sync_directory

    def pause(folder):
        sync(folder)
        if threading.current_thread().name == "first":
            renaming.set()
            assert go_on.wait(20)

    def write(fill: int) -> None:
        with ShardWriter(tmp_path / "x", vocabulary, tokenizer="t") as writer:
            writer.add([0, fill, 2])
            writer.commit()

    monkeypatch.setattr(shard_writer, "sync_directory", pause)
    threads = [threading.Thread(target=write, args=(70 + i,), name=name) for i, name in enumerate(("first", "second"))]
    threads[0].start()
    assert renaming.wait(20)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert ShardReader(tmp_path / "x").document(0).tolist() == [0, 71, 2]


def _is_whole(prefix: Path) -> bool:
    try:
        return len(set(ShardReader(prefix).document(0).tolist())) == 1
    except (ValueError, OSError):
        return False


def test_what_a_dead_writer_held_is_taken_over(tmp_path, vocabulary, monkeypatch):
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock = tmp_path / ".x.lock"
    lock.write_text(f"{os.uname().nodename} {dead.pid}")
    for holder in ("another-machine 1", f"{os.uname().nodename} {os.getpid()}", ""):  # the second has our number only
        with ShardWriter(tmp_path / "x", vocabulary, tokenizer="t") as writer:
            writer.add([0, 70, 2])
            writer.commit()
        lock.write_text(holder)
        os.utime(lock, (psutil.boot_time() - 1000,) * 2)
    assert (tmp_path / "x.json").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_what_was_complete(plan_texts, monkeypatch, code):
    folder = plan_texts("full")
    write, calls = ShardWriter.add_block, []

    def fail_in_the_third(self, ids, lengths):
        calls.append(self.prefix.name)
        if len(set(calls)) == 3:
            raise OSError(code, os.strerror(code))
        write(self, ids, lengths)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add_block", fail_in_the_third)
        reason = "the disk is full" if code == errno.ENOSPC else "the quota is used up"
        with pytest.raises(ValueError, match=rf"cannot write 00002-02, {reason}.*finished units stay: free some room"):
            run_units(folder, RunOptions())
    assert sorted({path.name.split(".")[0] for path in folder.glob("0*")}) == ["00000-00", "00001-01"]
    assert not list(folder.glob(".*"))
    run_units(folder, RunOptions())
    assert verify_units(folder) == []


def test_a_limit_of_the_system_ends_a_run_with_one_line(plan_texts):
    folder = plan_texts("limited")
    command = [sys.executable, str(REPOSITORY / "tools/preprocess_data.py"), "run", "--output", str(folder)]
    run = subprocess.run(
        command,
        check=False,
        env=WITHOUT_BAR,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "cannot write 00000-00, files may not grow so (File too large); finished units stay" in run.stderr
    assert [path.name for path in folder.iterdir() if not path.name.startswith("plan")] == []


def test_a_real_disk_that_is_full(plan_texts, tmp_path, monkeypatch):
    monkeypatch.setattr("megachameleon.data.preprocessing.jobs.require_free_space", lambda *arguments: None)
    expected, small = plan_texts("expected"), tmp_path / "small"
    run_units(expected, RunOptions())
    size = sum(path.stat().st_size for path in expected.iterdir()) // 2
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        for path in expected.glob("plan*"):
            (small / path.name).write_bytes(path.read_bytes())
        with pytest.raises(ValueError, match=r"small: cannot write \S+, the disk is full .* finished units stay"):
            run_units(small, RunOptions())
        complete = [state.unit.name for state in unit_states(load_plan(small)) if state.problem is None]
        assert 3 < len(complete) < 12
        for name in (f"{unit}{suffix}" for unit in complete for suffix in (".bin", ".idx", ".spans", ".json")):
            assert (small / name).read_bytes() == (expected / name).read_bytes()
        assert not list(small.glob(".*.tmp"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_killed_worker_fails_the_run_within_seconds(plan_texts):
    folder = plan_texts("bereft")
    process = start_run(folder, "--workers", 2)
    parent = psutil.Process(process.pid)
    workers: list[psutil.Process] = []
    while len(workers) < 2:
        workers = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
    workers[0].kill()
    start = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and time.monotonic() - start < 10
    assert "died (killed by signal 9" in error and "run again" in error
    assert not psutil.pid_exists(workers[1].pid) or not workers[1].is_running()
    run_units(folder, RunOptions())


def test_a_changed_picture_beside_the_input_is_found(tmp_path, tokenizer_folder, image_tokenizer_folder):
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(50 * number))
    lines = ({"segments": [{"text": "see"}, {"image": f"{number}.png"}]} for number in range(3))
    write_jsonl(folder / "a.jsonl", *lines)
    out = tmp_path / "out"
    arguments = [folder / "a.jsonl"], out, tokenizer_folder, image_tokenizer_folder, DocumentOptions()
    plan_preprocessing(*arguments)
    (folder / "1.png").write_bytes(png(51))
    with pytest.raises(ValueError, match=r"a\.jsonl: a file that it names, such as a picture, changed since the plan"):
        run_units(out, RunOptions())
    (folder / "1.png").unlink()
    with pytest.raises(ValueError, match=r"a\.jsonl: a file that it names|1 of 3 records are bad"):
        run_units(out, RunOptions())
    (folder / "1.png").write_bytes(png(50))
    assert run_units(out, RunOptions()).states[0].manifest.num_images == 3
    (folder / "1.png").write_bytes(png(51))
    plan_preprocessing(*arguments, replace_plan=True)
    assert [state.problem for state in unit_states(load_plan(out))] == ["made by another plan"]


def test_many_bad_records_fail_a_unit_early(tmp_path, tokenizer_folder, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", *([b"{"] * 200), *({"text": f"text {i}"} for i in range(20_000)))
    plan_preprocessing([path], tmp_path / "out", tokenizer_folder, None, DocumentOptions())
    run_units(tmp_path / "out", RunOptions())  # 200 of 20,200 are fewer than one in a hundred, wherever they stand
    entries = [json.loads(line) for line in (tmp_path / "out/00000-a.quarantine.jsonl").read_text().splitlines()]
    assert len(entries) == 200 and entries[7]["place"] == "line 8, byte 14"
    path = write_jsonl(tmp_path / "b.jsonl", *([b"{"] * 210), *({"text": f"text {i}"} for i in range(20_000)))
    plan_preprocessing([path], tmp_path / "two", tokenizer_folder, None, DocumentOptions())
    with pytest.raises(ValueError, match=r"210 of 1024 records so far are bad, more than --max-bad 0\.01 allows"):
        run_units(tmp_path / "two", RunOptions())


def test_a_plan_that_drops_other_duplicates_makes_another_shard(tmp_path, tokenizer_folder):
    out, earlier, later = tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_jsonl(later, {"text": "one"}, {"text": "two"})
    tokenizer, how = TextTokenizer.load(tokenizer_folder), PlanOptions(drop_duplicates=True)
    for first, second in (("one", "two"), ("two", "one")):
        write_jsonl(earlier, {"text": first})
        plan_preprocessing([earlier, later], out, tokenizer_folder, None, DocumentOptions(), how, replace_plan=True)
        run_units(out, RunOptions())
        dataset = Dataset.open(out)
        assert [tokenizer.decode(dataset.document(i)) for i in range(len(dataset))] == [first, second]
    (path,) = out.glob("plan-*.duplicates.npy")
    np.save(path, np.load(path) + 1)
    (out / "00001-b.json").unlink()
    with pytest.raises(ValueError, match=r"damaged plan \(another list of duplicates\); make the plan again"):
        run_units(out, RunOptions())


def test_duplicates_are_dropped_over_all_units(tmp_path, tokenizer_folder, image_tokenizer_folder):
    folder = tmp_path / "raw"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", {"text": "one"}, {"text": "two"}, b"{", {"text": "one"}, {"text": "three"})
    write_jsonl(folder / "b.jsonl", {"text": "two"}, {"text": "four"}, {"text": "Two"})
    captions = [{"lang": "en", "text": "red"}, {"lang": "de", "text": "rot"}, {"lang": "en", "text": "red"}]
    first = {"k.png": png(1), "k.json": {"captions": captions}}
    again = {"m.png": png(1), "m.txt": "rot", "n.png": png(2), "n.txt": "rot", "o.txt": "four"}
    write_tar(folder / "c.tar", first)
    write_tar(folder / "d.tar", again)
    results = []
    tokenizer = TextTokenizer.load(tokenizer_folder)
    for units, workers in ((None, 1), (1, 2), (2, 1)):
        out = tmp_path / f"out{units}"
        how = PlanOptions(drop_duplicates=True, num_units=units)
        tokenizers = tokenizer_folder, image_tokenizer_folder
        plan = plan_preprocessing([folder], out, *tokenizers, DocumentOptions(), how, workers=workers)
        states = run_units(out, RunOptions()).states
        assert sum(item.num_duplicates for unit in plan.units() for item in unit.inputs) == 5
        assert sum(state.manifest.duplicates for state in states) == 5
        dataset = Dataset.open(out)
        results.append(np.concatenate([dataset.document(i) for i in range(len(dataset))]).tolist())
        texts = [tokenizer.decode(dataset.document(i)) for i in range(len(dataset))]
        assert texts == ["one", "two", "three", "four", "Two", "red", "rot", "rot"]  # the first of the plan stay
        # made anew without the plan's list, it would be another dataset
        assert states[0].manifest.options["drop_duplicates"] is True
    assert results[0] == results[1] == results[2]
