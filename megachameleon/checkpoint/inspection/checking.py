"""Whether the bytes of a checkpoint are those of which it has the hashes."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from megachameleon.checkpoint.inspection.report import FileInfo, Report

STRIDE = 8 << 20


def check_files(report: Report, advance: Callable[[int], None]) -> dict[str, str]:
    """Compare every file that has a hash; `as it should be`, `changed` or `missing`, by name.

    What is wrong goes to the report's problems.

    Args:
        advance: called with the bytes that were read.
    """
    folder = report.path if report.path.is_dir() else report.path.parent
    states = {}
    for file in report.files:
        if not file.digests:
            continue
        path = folder / file.name
        states[file.name] = _state(path, file, advance) if path.is_file() else "missing"
        if states[file.name] == "changed":
            report.problems.append(f"{file.name}: its {' and '.join(file.digests).upper()} is another")
        # Whoever opened the checkpoint has told of most missing files already.
        elif states[file.name] == "missing" and file.name not in " ".join(report.problems):
            report.problems.append(f"{file.name}: is missing")
    if not states:
        report.notes.append("no hashes are stored, so nothing was compared")
    return states


def _state(path: Path, file: FileInfo, advance: Callable[[int], None]) -> str:
    digests = {name: hashlib.new(name) for name in file.digests}
    with path.open("rb") as opened:
        while piece := opened.read(STRIDE):
            for digest in digests.values():
                digest.update(piece)
            advance(len(piece))
    same = all(digests[name].hexdigest() == str(wanted).lower() for name, wanted in file.digests.items())
    return "as it should be" if same else "changed"
