"""What every program says to the person at the terminal: progress, one-line errors, exit status.

Exit status: 0 done, 1 failed, 2 bad usage or bad input; a program may have more, which its --help names.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megachameleon.ranks import own_place

UNITS = ("bytes", "kB", "MB", "GB", "TB")
PATH_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class FailureError(Exception):
    """A failure that says all in its own words: exit status 1, one line, no traceback to look for."""


def run_tool(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    *,
    intermixed: bool = False,
    quick_exit: bool = False,
) -> None:
    """Parse arguments, run `main`, and turn errors into one line and an exit status, which `main` may also return.

    `intermixed` lets options stand between positional arguments (not for parsers with subcommands).

    `ValueError` and paths that cannot be used are the user's to mend and exit with 2; anything else exits with 1.
    `--debug`, before or after a subcommand, shows the traceback of either. Notes of an exception (PEP 678) say whose it
    is and stand before its text; such a one is nobody else's, and is not held back.

    Args:
        quick_exit: end at once after an error, without waiting for threads and libraries, which may hang by then.
    """
    _add_debug(parser, default=False)
    arguments = parser.parse_intermixed_args() if intermixed else parser.parse_args()
    try:
        if status := main(arguments):
            sys.exit(status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells have it
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has left: nobody to tell.
        sys.exit(1)
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        notes = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
        if not notes:
            _let_rank_zero_speak_first()
        user_error = isinstance(error, (ValueError, *PATH_ERRORS))
        told = arguments.debug or user_error or isinstance(error, FailureError)
        hint = "" if told else " (--debug shows the traceback)"
        print(f"error: {notes}{describe_error(error)}{hint}", file=sys.stderr)
        status = 2 if user_error else 1
        if quick_exit:
            # os._exit flushes nothing.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)


def describe_error(error: Exception) -> str:
    """One line: what a person can act on, without Python's numbers and names where they say nothing."""
    if isinstance(error, PATH_ERRORS) and error.filename is not None:
        return f"{error.filename2 or error.filename}: {(error.strerror or 'not usable').lower()}; choose another path"
    text = printable(" ".join(str(error).split()))  # errors quote names that files say
    return text if isinstance(error, ValueError | FailureError) else f"{type(error).__name__}: {text}"


def printable(text: str) -> str:
    """Text of a file that may go to a terminal: without what would move the cursor or change colours."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _add_debug(parser: argparse.ArgumentParser, default: Any) -> None:
    """Add `--debug` to a parser and its subcommands, whose defaults must not overrule what came before them."""
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                _add_debug(subparser, default=argparse.SUPPRESS)


def _let_rank_zero_speak_first() -> None:
    """An error that all processes meet should be read once: torchrun stops the others while they wait here."""
    try:
        rank = own_place().rank
    except ValueError:
        return
    if rank:
        time.sleep(3)


def tool_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser whose --help ends with examples, in the same form for every program."""
    return argparse.ArgumentParser(
        description=description, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


class ProgressTask:
    """A running progress bar."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task  # type: ignore[var-annotated, unused-ignore]

    def advance(self, steps: float = 1) -> None:
        """Count `steps` more units as done."""
        self._progress.advance(self._task, steps)  # type: ignore[arg-type, unused-ignore]

    def note(self, text: str) -> None:
        """Replace the short text at the end of the line, such as the current loss."""
        self._progress.update(self._task, note=text)  # type: ignore[arg-type, unused-ignore]


@contextmanager
def progress_bar(description: str, total: int | None, *, enabled: bool = True, done: int = 0) -> Iterator[ProgressTask]:
    """A bar with counts, elapsed time and an ETA on stderr; silent unless stderr is a terminal.

    Args:
        total: number of units, or None when it is not known.
        enabled: False on every rank but one.
        done: units that an earlier, interrupted run has finished.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as progress:
        yield ProgressTask(progress, progress.add_task(description, total=total, completed=done, note=""))


def track(items: Sequence | Iterable, description: str, total: int | None = None) -> Iterator:
    """Iterate over `items` behind a progress bar."""
    length = total if total is not None else (len(items) if isinstance(items, Sequence) else None)
    with progress_bar(description, length) as bar:
        for item in items:
            yield item
            bar.advance()


def size_said(num_bytes: int) -> str:
    """Such as `4.61 GB`; powers of ten."""
    size, unit = float(num_bytes), 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{num_bytes:,} bytes" if not unit else f"{size:.3g} {UNITS[unit]}"
