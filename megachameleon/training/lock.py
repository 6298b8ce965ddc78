"""One trainer in an output folder at a time."""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

LOCK_FILE = ".lock"


@contextlib.contextmanager
def run_lock(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the folder; the system lets go of it when the process ends, however it ends.

    File systems without locks are left alone.

    Args:
        patience: seconds to wait for another process to let go. A file server learns late of a node that has died.

    Raises:
        ValueError: another process trains in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Not "w", which would erase who holds it before the lock is ours.
    with (folder / LOCK_FILE).open("a+") as file:
        if not _take(file, folder, patience):
            yield
            return
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def _take(file: TextIOWrapper, folder: Path, patience: float) -> bool:
    """Whether the lock is ours; False where the file system has none."""
    until, said = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        # Another holds it; any other OSError says that this file system has no locks.
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
        except OSError:
            return False
        if time.monotonic() >= until:
            raise ValueError(
                f"output_dir: {folder} is in use by process {holder}; "
                "wait for it, stop it, or choose another output_dir"
            ) from None
        if not said:
            said = True
            print(f"{folder}: in use by process {holder}; waiting up to {patience:.0f} s for it", file=sys.stderr)
        time.sleep(0.5)
