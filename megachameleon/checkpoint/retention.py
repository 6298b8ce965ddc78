"""What leaves the folder of checkpoints: old ones, damaged ones, and what killed processes have left.

Nothing is deleted under the name of a checkpoint: it is renamed first, so at no moment is there one that is half there.
Hidden names end with who made them, as `.step_00000100.HOST-PID-TOKEN-1.tmp`:

- `.tmp`: being written. With a manifest in it, it is complete and needs only its name.
- `.replaced`: gave its name to a newer one of the same step.
- `.deleting`: what its name says.
"""

import os
import re
import secrets
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from megachameleon.checkpoint.folder import (
    DAMAGED,
    LATEST_FILE,
    checkpoint_name,
    complete_checkpoints,
    is_whole,
    named_checkpoints,
    step_of,
)
from megachameleon.files import sync_directory, write_text

HIDDEN = re.compile(
    r"\.(?P<name>step_\d{8,})\.(?P<host>.+)-(?P<pid>\d+)-(?P<token>[0-9a-f]+)-\d+\.(?P<state>tmp|replaced|deleting)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which checkpoints are kept."""

    keep_last: int
    """Newest ones that stay; at least one does."""
    keep_every: int = 0
    """Steps; 0: none is kept for good."""

    def keeps_for_good(self, step: int) -> bool:
        """Whether the checkpoint of a step is never deleted."""
        return self.keep_every > 0 and step % self.keep_every == 0


def new_owner() -> str:
    """A name for the attempts of this run of the program, unlike that of any other: host, process, random token."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def hidden_folder(root: Path, step: int, attempt: str, state: str) -> Path:
    """A name that does not count as a checkpoint."""
    return root / f".{checkpoint_name(step)}.{attempt}.{state}"


def put_in_place(temporary: Path, root: Path, step: int, attempt: str) -> Path:
    """Give a complete checkpoint its name, then point `latest` at it.

    One that has the name already makes room by being renamed. If the process dies before the other has it, `recover`
    finds the other complete.
    """
    final = root / checkpoint_name(step)
    replaced = hidden_folder(root, step, attempt, "replaced")
    if final.exists():
        final.rename(replaced)
        sync_directory(root)
    temporary.rename(final)
    sync_directory(root)
    # last: where it disagrees with the folder, the folder is right
    write_text(root / LATEST_FILE, final.name + "\n")
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def recover(root: Path) -> list[str]:
    """Put what killed processes have left in order: complete checkpoints get their name, all else is deleted.

    The caller must hold the run's lock. What a living process of this host has made is left alone all the same.

    Returns:
        Lines that say what was done with complete ones.
    """
    said = []
    for path, match in _left_by_others(root):
        # the manifest is written last, so with it all files are there
        if match["state"] == "tmp" and is_whole(path):
            step = step_of(Path(match["name"]))
            final = put_in_place(path, root, step, path.name.removeprefix(f".{match['name']}.").removesuffix(".tmp"))
            said.append(f"{final}: was complete but for its name when its process ended; put in place")
    for path, _ in _left_by_others(root):
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(f".{LATEST_FILE}.*.tmp"):
        path.unlink(missing_ok=True)
    return said


def _left_by_others(root: Path) -> list[tuple[Path, re.Match[str]]]:
    """Hidden folders whose process is not known to live."""
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        match = HIDDEN.fullmatch(path.name)
        if match and not _lives(match["host"], int(match["pid"])):
            found.append((path, match))
    return found


def _lives(host: str, process: int) -> bool:
    """Whether another process of this host with that number is there; of other hosts nothing is known."""
    # after a restart in a container, a dead writer may have had our number
    if host != socket.gethostname() or process == os.getpid():
        return False
    try:
        # signal 0 only asks
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def delete_old(root: Path, retention: Retention, attempt: str) -> list[str]:
    """Delete complete checkpoints that the policy does not keep; the newest are always kept.

    Returns:
        Lines about what could not be deleted.
    """
    complaints = []
    for path in complete_checkpoints(root)[: -max(retention.keep_last, 1)]:
        if not retention.keeps_for_good(step_of(path)):
            try:
                delete(path, attempt)
            except OSError as error:
                # a run must not end because an old checkpoint cannot be deleted
                complaints.append(f"{path}: cannot be deleted ({error.strerror}); delete it by hand")
    return complaints


def delete(checkpoint: Path, attempt: str) -> None:
    """Take a checkpoint out of sight, then delete it."""
    hidden = hidden_folder(checkpoint.parent, step_of(checkpoint), attempt, "deleting")
    checkpoint.rename(hidden)
    sync_directory(checkpoint.parent)
    # Where readers have files open, NFS leaves entries until they close them: `recover` deletes the rest.
    shutil.rmtree(hidden, ignore_errors=True)


def delete_after(root: Path, step: int, attempt: str) -> list[Path]:
    """Delete the checkpoints of later steps, newest first: a run that was rolled back must not resume from them."""
    # newest first: a kill in between leaves no gap, and the next start begins again from the newest
    later = [path for path in reversed(named_checkpoints(root)) if step_of(path) > step]
    for path in later:
        delete(path, attempt)
    return later


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts nor is lost; returns its new folder."""
    numbers = range(2, 1000)
    candidates = (f"{checkpoint.name}{DAMAGED}", *(f"{checkpoint.name}{DAMAGED}-{number}" for number in numbers))
    aside = next(path for name in candidates if not (path := checkpoint.with_name(name)).exists())
    checkpoint.rename(aside)
    sync_directory(checkpoint.parent)
    return aside
