"""Processes that apply one function to a stream of tasks; results come in order, and only so many are under way.

A pool of one worker applies the function here. Larger pools start their processes, which compute with one thread each,
when the first task comes, and keep them until the pool is closed. They are as deterministic as the function: which
process did what cannot be seen.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2
"""Tasks that a process has at a time: while it sends one result, it works on the next."""
PATIENCE = 5.0
"""Seconds that tasks whose results nobody wants any more may take."""


class WorkerDiedError(RuntimeError):
    """A process ended without being asked to."""


class WorkerPool(Generic[Task, Result]):
    """Applies `make_work(*arguments)`, a function from a task to a result, in `workers` processes.

    Everything that crosses (`make_work`, arguments, tasks, results) is pickled between processes of this program.
    """

    def __init__(
        self, make_work: Callable[..., Callable[[Task], Result]], arguments: tuple[Any, ...], workers: int
    ) -> None:
        """
        Args:
            make_work: a function of a module; each process calls it once. What it makes may have a `close`.
            workers: 1 works in this process.

        Raises:
            ValueError: fewer than one worker.
        """
        if workers < 1:
            raise ValueError(f"--workers {workers}: must be at least 1")
        self._make_work, self._arguments = make_work, arguments
        self.workers = workers
        self._here: Callable[[Task], Result] | None = None
        self._processes: list[tuple[Any, Connection]] = []

    def __enter__(self) -> "WorkerPool[Task, Result]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, connection in self._processes:
            connection.close()  # an idle process ends when nobody can give it work
            if kind is not None:
                process.terminate()
        for process, _ in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes = []
        if (close := getattr(self._here, "close", None)) is not None:
            close()
        self._here = None

    def ordered(self, tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """The results of `tasks`, in order; tasks are drawn a little ahead, in other threads.

        An exception of the function, or of drawing tasks, is raised in its place.

        Raises:
            WorkerDiedError: a process was killed; within moments, whatever else is under way.
        """
        if self.workers == 1:
            self._here = self._here or self._make_work(*self._arguments)
            yield from map(self._here, tasks)
            return
        if not self._processes:
            self._start()
        stream = _Stream(tasks, self.workers)
        threads = [
            threading.Thread(target=stream.feed, args=(number, *item), daemon=True)
            for number, item in enumerate(self._processes)
        ]
        for thread in threads:
            thread.start()
        patience = PATIENCE
        try:
            yield from stream.results()
        except (WorkerDiedError, KeyboardInterrupt, SystemExit):
            patience = 0.0
            raise
        finally:
            stream.stop()
            self._settle(threads, patience)

    def _settle(self, threads: Sequence[threading.Thread], patience: float) -> None:
        """Wait for what is under way; processes that take too long are ended, and started anew when needed."""
        end = time.monotonic() + patience
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        # such a process is in the middle of a task and cannot be told to leave it
        if any(thread.is_alive() for thread in threads):
            for process, _ in self._processes:
                process.kill()
            for thread in threads:
                thread.join()
            self._processes = []

    def _start(self) -> None:
        # spawn, because forking a process that has started threads of PyTorch may hang
        context = multiprocessing.get_context("spawn")
        for number in range(self.workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, self._make_work, self._arguments), name=f"worker {number}", daemon=True
            )
            process.start()
            theirs.close()  # so that we see its end when it dies
            self._processes.append((process, ours))


class _Stream:
    """One pass over some tasks: threads of the processes put results in, the caller takes them out in order."""

    def __init__(self, tasks: Iterable[Any], workers: int) -> None:
        self._loads = [0] * workers
        self._tasks = iter(tasks)
        self._num_drawn = 0
        self._drawing = threading.Lock()
        # bounds what is done but not yet taken: one slow task must not let results pile up
        self._room = threading.Semaphore((AHEAD + 1) * workers)
        self._changed = threading.Condition()
        self._done: dict[int, tuple[bool, Any]] = {}
        self._last: int | None = None
        self._died: Exception | None = None
        self._stopped = False

    def results(self) -> Iterator[Any]:
        """What the tasks became, in order."""
        number = 0
        while True:
            with self._changed:
                # results that came before a death are still given out, in order
                while not (self._died is not None or number in self._done or number == self._last):
                    self._changed.wait()
                if number in self._done:
                    good, value = self._done.pop(number)
                elif self._died is not None:
                    raise self._died
                else:
                    return
            if not good:
                raise value
            yield value
            self._room.release()
            number += 1

    def stop(self) -> None:
        """Draw no more tasks; what is under way comes to its end."""
        self._stopped = True
        # whoever waits for room wakes up and finds that nothing is left to draw
        self._room.release(1_000_000)

    def feed(self, number: int, process: Any, connection: Connection) -> None:
        """Give one process tasks and take its results, until there are no more tasks."""
        under_way: deque[int] = deque()
        more = True
        try:
            while more or under_way:
                while more and self._may_draw(len(under_way)) and self._room.acquire(blocking=not under_way):
                    drawn = self._draw()
                    if drawn is None:
                        more = False
                    elif self._send(connection, *drawn):
                        under_way.append(drawn[0])
                        self._loads[number] = len(under_way)
                if under_way:
                    self._put(under_way[0], *connection.recv())
                    under_way.popleft()
                    self._loads[number] = len(under_way)
        except (EOFError, OSError):
            process.join(2)
            self._report_death(process)
        except Exception as error:  # a result that cannot be made anew here; without word of it, all would wait
            self._give_up(error)

    def _send(self, connection: Connection, number: int, task: Any) -> bool:
        try:
            # by hand, so that what cannot be pickled is the error of its task and not of the pool
            data = pickle.dumps(task, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            self._put(number, False, error)
            return False
        connection.send_bytes(data)
        return True

    def _may_draw(self, num_under_way: int) -> bool:
        return num_under_way == 0 or (num_under_way < AHEAD and 0 not in self._loads)  # first a task for everybody

    def _draw(self) -> tuple[int, Any] | None:
        with self._drawing:
            if self._stopped or self._last is not None:
                return None
            number = self._num_drawn
            try:
                task = next(self._tasks)
            except StopIteration:
                self._finish(number)
                return None
            except Exception as error:
                self._put(number, False, error)
                self._finish(number + 1)
                return None
            self._num_drawn += 1
            return number, task

    def _finish(self, last: int) -> None:
        with self._changed:
            self._last = last
            self._changed.notify_all()

    def _put(self, number: int, good: bool, value: Any) -> None:
        with self._changed:
            self._done[number] = (good, value)
            self._changed.notify_all()

    def _report_death(self, process: Any) -> None:
        if self._stopped:
            return
        code = process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        self._give_up(
            WorkerDiedError(
                f"{process.name} died ({how}; out of memory?); finished units stay: run again, with fewer --workers "
                "if memory was short"
            )
        )

    def _give_up(self, error: Exception) -> None:
        with self._changed:
            self._died = self._died or error
            self._changed.notify_all()


def _serve(connection: Connection, make_work: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    """What a process does: tasks in, results out, until the other end closes."""
    os.environ["OMP_NUM_THREADS"] = "1"  # there are as many of us as the user wants cores to work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a terminal interrupts all of us
    # a signal that the parent ignores stays ignored in its children, and terminate() must end us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # sent by a thread: megabytes of pixels would otherwise stop the work meanwhile
    outgoing: queue.Queue[bytes] = queue.Queue(maxsize=1)
    threading.Thread(target=_send_all, args=(connection, outgoing), daemon=True).start()
    try:
        work = make_work(*arguments)
    except Exception as error:
        failure = error

        def work(task: Any) -> Any:
            raise failure

    with suppress(EOFError, OSError):
        while True:
            task = connection.recv()
            try:
                answer: tuple[bool, Any] = (True, work(task))
            except Exception as error:
                answer = (False, error)
            outgoing.put(_pickled(answer))


def _pickled(answer: tuple[bool, Any]) -> bytes:
    try:
        data = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
        if not answer[0]:
            pickle.loads(data)  # not every exception can be made anew from its pickle
        return data
    except Exception:
        return pickle.dumps((False, RuntimeError(repr(answer[1]))), pickle.HIGHEST_PROTOCOL)


def _send_all(connection: Connection, outgoing: "queue.Queue[bytes]") -> None:
    with suppress(OSError):
        while True:
            connection.send_bytes(outgoing.get())


def _end_with_parent() -> None:
    """End when the parent is killed, also in the middle of a task."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # not sys.exit, which would end this thread alone
    os._exit(1)
