"""Damaged shards either open as they were or are refused; see `shard_fuzz` for what is done to them."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import shard_fuzz

from megachameleon.data.shards.reader import ShardReader


@pytest.fixture
def folder(tmp_path, write_shard, make_document):
    """A shard with pictures, `a/x`, and one without, `b/x`; in memory where there is room, for it is written often."""
    in_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if os.access(in_memory, os.W_OK) else tmp_path) as folder:
        yield _with_shards(Path(folder), write_shard, make_document)


def _with_shards(folder, write_shard, make_document):
    with_pictures = [make_document(*segments, seed=7) for segments in [(1,), (2,), (3, 0, 2), (4,), (0, 0, 4), (2, 0)]]
    write_shard(folder / "a" / "x", with_pictures)
    write_shard(folder / "b" / "x", [make_document(length, seed=length) for length in (4, 1, 9, 2, 7)])
    return folder


@pytest.mark.parametrize("suffix", [".idx", ".spans", ".json"])
def test_no_flipped_bit_is_believed(folder, suffix):
    prefix = folder / "a" / "x"
    original = shard_fuzz.content_of(prefix)
    content = (folder / "a" / f"x{suffix}").read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / "a" / f"x{suffix}").write_bytes(changed)
        assert shard_fuzz.outcome(prefix, original) == "refused", bit


def test_ten_thousand_damaged_shards_are_refused_or_open_as_they_were(folder):
    results = shard_fuzz.fuzz(folder, range(10_000), forged=False)
    assert results["wrong"] == 0
    assert results["refused"] > 9_000
    assert results["same"] > 50  # white space and the order of keys mean nothing


def test_damage_with_right_hashes_never_crashes_a_reader_of_little_memory(folder):
    program = Path(shard_fuzz.__file__)
    command = [sys.executable, str(program), str(folder), "4000"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout)
    assert sum(results.values()) == 4000
    assert results["wrong"] > 50  # so the fuzz would notice if nobody compared the hashes


@pytest.mark.parametrize("change", [shard_fuzz.swap_lengths, shard_fuzz.move_pictures])
def test_only_the_hashes_stand_between_a_consistent_change_and_wrong_documents(folder, change, monkeypatch):
    prefix = folder / "a" / "x"
    original, files = shard_fuzz.content_of(prefix), shard_fuzz.read_files(prefix)
    shard_fuzz.write_files(prefix, change(files))
    assert shard_fuzz.outcome(prefix, original) == "refused"
    monkeypatch.setattr(ShardReader, "_read_unchanged", lambda self, suffix: (folder / "a" / f"x{suffix}").read_bytes())
    assert shard_fuzz.outcome(prefix, original) == "wrong"


def test_shares_that_overflow_are_refused_by_structure_alone(folder):
    prefix = folder / "a" / "x"
    shard_fuzz.write_files(prefix, shard_fuzz.forge(shard_fuzz.overflowing_shares(shard_fuzz.read_files(prefix))))
    with pytest.raises(ValueError, match="shares of the pictures contradict"):
        ShardReader(prefix)
