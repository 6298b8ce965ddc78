"""What can go wrong in a life of a run: one rank is killed or told to stop at a chosen place, or the disk fills up."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

PLACES = {
    "start": "megachameleon.parallel.context:_init_process_group",
    "index": "megachameleon.training.batches:open_packed",
    "build": "megachameleon.training.trainer:Trainer._build",
    "load": "megachameleon.training.checkpointing:Checkpointer.load",
    "step": "megachameleon.training.trainer:train_step",
    "update": "megachameleon.training.step:optimizer_step",
    "save": "megachameleon.training.checkpointing:Checkpointer.save",
    "validate": "megachameleon.training.trainer:validate",
    "fsync": "os:fsync",
    "replace": "os:replace",
    "rename": "os:rename",
    "unlink": "os:unlink",
}
"""Functions at whose n-th call a fault strikes. `anywhere` counts from the start of the process instead."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Strikes one rank, `delay` seconds after the n-th call of a place."""

    kind: str
    """A signal's name, or `no_room`: from then on the disk takes nothing more."""
    rank: int
    place: str
    call: int = 1
    delay: float = 0.0

    def __str__(self) -> str:
        when = f"{self.place} {self.call}" if self.place != "anywhere" else "anywhere"
        return f"{self.kind} of rank {self.rank} at {when} + {self.delay * 1000:.0f} ms"


def arm(fault: Fault, folder: Path) -> None:
    """Make the fault happen in this process.

    Args:
        folder: where the run writes; `no_room` fills the disk that holds it.
    """
    strike = _strike(fault, folder)
    if fault.place == "anywhere":
        _after(fault.delay, strike)
        return
    module_name, _, path = PLACES[fault.place].partition(":")
    owner: Any = import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, _at_call(getattr(owner, name), fault, strike))


def _at_call(function: Callable[..., Any], fault: Fault, strike: Callable[[], None]) -> Callable[..., Any]:
    calls = [0]

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == fault.call:
            _after(fault.delay, strike)
        return function(*args, **kwargs)

    return counted


def _after(delay: float, strike: Callable[[], None]) -> None:
    if delay == 0:
        strike()
        return

    def wait() -> None:
        time.sleep(delay)
        strike()

    threading.Thread(target=wait, daemon=True).start()


def _strike(fault: Fault, folder: Path) -> Callable[[], None]:
    if fault.kind == "no_room":
        return lambda: _fill(folder)
    number = signal.Signals[fault.kind]
    return lambda: os.kill(os.getpid(), number)


BALLAST = "ballast"


def _fill(folder: Path) -> None:
    """Leave no room on a disk of its own (a small tmpfs); elsewhere let writes be refused as if there were none."""
    if os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize < 1 << 27:
        with (folder.parent / BALLAST).open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError:
                return

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = refuse
