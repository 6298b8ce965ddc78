"""One piece of work at a time in a thread beside training."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs work and keeps its result, or its error, until it is asked for.

    The thread is a daemon: a process that ends with an error does not wait for ranks that are no more.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._results: list[T] = []
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether work is being done."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], T]) -> None:
        """Begin; what was begun before must have ended."""
        # two saves at once would share one buffer of host memory
        assert not self.busy, "one piece of work at a time"
        self._thread = threading.Thread(target=self._run, args=(work,), name=self._name, daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Return when nothing is being done, or after so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = self._thread if self._thread.is_alive() else None

    def results(self) -> list[T]:
        """What has been finished since this was last asked, without waiting.

        Raises:
            BaseException: what the work raised, once.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error
        results, self._results = self._results, []
        return results

    def _run(self, work: Callable[[], T]) -> None:
        try:
            result = work()
            self._results.append(result)  # not in one: `results` may have put a new list there while work was done
        except BaseException as error:  # also SystemExit: nothing may be lost in a thread
            self._error = error
