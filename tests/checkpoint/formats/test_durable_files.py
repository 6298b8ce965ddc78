"""Files written past the page cache: the bytes, the hashes, and what file systems refuse."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from megachameleon.checkpoint.formats import writing
from megachameleon.checkpoint.formats.writing import DurableFile

PAGE = 4096
SIZES = (0, 1, PAGE, 2 * PAGE - 1, 2 * PAGE, 5 * PAGE, 5 * PAGE + 3)


@pytest.fixture(autouse=True)
def small_stride(monkeypatch):
    monkeypatch.setattr(writing, "STRIDE", 2 * PAGE)


def write(path, data, step=1000):
    with DurableFile(path, ("sha256", "md5")) as file:
        for start in range(0, len(data), step):
            file.write(data[start : start + step])
        assert file.size == len(data)
    return file.digests()


def refuse_when_opened(monkeypatch):
    real = os.open

    def refuse(path, flags, mode=0o777):
        if flags & writing.DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)


def refuse_when_written(monkeypatch):
    real, calls = os.write, []

    def refuse(descriptor, data):
        calls.append(len(data))
        if len(calls) == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", refuse)


def write_little_at_a_time(monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:PAGE]))


@pytest.mark.parametrize(
    "system",
    [lambda _: None, refuse_when_opened, refuse_when_written, write_little_at_a_time],
    ids=lambda f: f.__name__,
)
def test_bytes_and_hashes_are_those_that_were_given(system, tmp_path, monkeypatch):
    system(monkeypatch)
    for size in SIZES:
        data = os.urandom(size)
        for step in (1000, 3 * PAGE):
            digests = write(tmp_path / "file", data, step)
            assert (tmp_path / "file").read_bytes() == data
            assert digests == {"sha256": hashlib.sha256(data).hexdigest(), "md5": hashlib.md5(data).hexdigest()}


def test_what_is_given_may_change_afterwards(tmp_path):
    data = bytearray(range(256)) * (PAGE // 64)
    with DurableFile(tmp_path / "file") as file:
        for _ in range(4):
            file.write(memoryview(data))
            data[:] = bytes(len(data))
    assert (tmp_path / "file").read_bytes() == bytes(range(256)) * (PAGE // 64) + bytes(3 * len(data))


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EINVAL])
def test_a_disk_that_refuses_is_told(call, number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, "refused")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="refused"):
        write(tmp_path / "file", bytes(PAGE))


def test_files_are_closed_and_threads_ended_whatever_happens(tmp_path):
    before, threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    with pytest.raises(KeyError), DurableFile(tmp_path / "file") as file:
        file.write(bytes(5 * PAGE))
        raise KeyError
    assert len(list(Path("/proc/self/fd").iterdir())) == before and threading.active_count() == threads
