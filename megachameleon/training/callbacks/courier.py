"""Calls to services that may be slow or away, made in the background so that training neither waits nor stops."""

import contextlib
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

ROOM = 1_000
"""Calls that may wait; behind them new ones are dropped, since memory is not for a service that is away."""


class Courier:
    """Makes calls one after another in a thread of its own. The first that fails is reported, the others are not."""

    def __init__(self, name: str, *, patience: float = 10.0) -> None:
        """
        Args:
            name: of the service, for the warning.
            patience: seconds that `close` waits for calls that are still to be made.
        """
        self.name, self.patience = name, patience
        self._calls: queue.Queue[Callable[[], Any] | None] = queue.Queue(ROOM)
        self._warned = False
        # A daemon, so that a service that hangs cannot keep a finished run from ending.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def send(self, call: Callable[[], Any]) -> None:
        """Have a call made some time later; it is dropped where a thousand are waiting already."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._warn(f"does not keep up; {ROOM} messages are waiting, and newer ones are dropped")

    def close(self) -> None:
        """Wait a while for what is left, then give up."""
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)
        self._thread.join(self.patience)
        if self._thread.is_alive():
            self._warn(f"does not answer; after {self.patience:.0f} s the rest was given up")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                self._warn(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            print(f"warning: {self.name}: {what}; training goes on, this is said once", file=sys.stderr, flush=True)
