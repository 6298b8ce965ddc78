"""From a path to what it is."""

from pathlib import Path

from megachameleon.checkpoint.folder import (
    INDEX_FILE,
    MANIFEST_FILE,
    complete_checkpoints,
    is_whole,
    named_checkpoints,
)
from megachameleon.checkpoint.formats.conversion import CHECKED, JOB_FILE, PARTIAL, RECORDS
from megachameleon.checkpoint.formats.huggingface.names import CONFIG_FILE
from megachameleon.checkpoint.formats.meta.names import PARAMS_FILE
from megachameleon.checkpoint.inspection.huggingface import describe_huggingface
from megachameleon.checkpoint.inspection.meta import describe_meta
from megachameleon.checkpoint.inspection.ours import describe_ours, hidden_attempts
from megachameleon.checkpoint.inspection.raw import RawFile
from megachameleon.checkpoint.inspection.report import Facts, Report
from megachameleon.checkpoint.inspection.small_files import (
    SUFFIXES_OF_TORCH,
    file_info,
    open_file,
    open_files,
    read_mapping,
)
from megachameleon.checkpoint.inspection.tensors import StoredTensors
from megachameleon.checkpoint.retention import HIDDEN

CHECKPOINTS, MOST_NAMED = "checkpoints", 6
WHOLE_FOLDERS = (MANIFEST_FILE, CONFIG_FILE, PARAMS_FILE, INDEX_FILE, "model.safetensors.index.json")


def inspect(path: Path) -> Report:
    """Find out what a path is and describe it; only headers and small files are read.

    Raises:
        ValueError: there is nothing, or nothing that could be a checkpoint.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        return inspect(path.parent) if path.name in WHOLE_FOLDERS else _one_file(path)
    # First, since an unfinished conversion has the files of a finished one.
    if (path / JOB_FILE).is_file() or path.name.endswith(".converting"):
        return _conversion(path)
    if (path / MANIFEST_FILE).is_file() or HIDDEN.fullmatch(path.name) or _is_ours_without_manifest(path):
        return describe_ours(path)
    for root in (path, path / "checkpoints"):
        if named_checkpoints(root) or (root.is_dir() and any(hidden_attempts(root))):
            return _newest(path, root)
    names = {entry.name for entry in path.iterdir()}
    if CONFIG_FILE in names:
        return describe_huggingface(path)
    if PARAMS_FILE in names or any(name.startswith("consolidated.") for name in names):
        return describe_meta(path)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return describe_huggingface(path)
    if torch_files := sorted(name for name in names if name.endswith(SUFFIXES_OF_TORCH)):
        return _plain_files(path, torch_files)
    raise ValueError(
        f"{path}: no checkpoint: neither one of this project (step_*/manifest.json), nor config.json, params.json or "
        "files of tensors; give the folder that holds them"
    )


def _is_ours_without_manifest(path: Path) -> bool:
    return (path / INDEX_FILE).is_file() and any(path.glob("tensors_*.safetensors"))


def _one_file(path: Path) -> Report:
    """A file of tensors by itself."""
    if path.suffix not in (".safetensors", *SUFFIXES_OF_TORCH) and not path.name.endswith(PARTIAL):
        raise ValueError(f"{path}: not a file of tensors; give a .safetensors or .pth file, or a folder")
    raw = open_file(path)
    kind = "torch" if path.suffix in SUFFIXES_OF_TORCH else "safetensors"
    report = Report(
        path=path, format="files", what=f"a {kind} file", stored=StoredTensors([raw]), problems=list(raw.problems)
    )
    report.files.append(file_info(path.parent, path.name, raw))
    if raw.metadata:
        report.sections["metadata"] = {str(name): value for name, value in raw.metadata.items()}
    return report


def _plain_files(folder: Path, names: list[str]) -> Report:
    problems: list[str] = []
    files = open_files(folder, names, problems)
    report = Report(
        path=folder,
        format="files",
        what="files of torch without a configuration",
        stored=StoredTensors(files.values()),
        problems=problems,
    )
    report.files = [file_info(folder, name, files.get(name)) for name in names]
    return report


def _newest(path: Path, root: Path) -> Report:
    """The newest complete checkpoint of a run, and what else there is."""
    complete = complete_checkpoints(root)
    candidates = complete or named_checkpoints(root) or [hidden for hidden, _ in hidden_attempts(root)]
    report = describe_ours(candidates[-1])
    others: Facts = {}
    for checkpoint in named_checkpoints(root):
        state = "whole" if is_whole(checkpoint) else "damaged" if checkpoint in complete else "without a manifest"
        others[checkpoint.name] = state
    others |= {hidden.name: state for hidden, state in hidden_attempts(root)}
    report.sections = {CHECKPOINTS: _shortened(others), **report.sections}
    newest = named_checkpoints(root)[-1:]
    if newest and newest[0] != report.path:
        report.problems.append(f"{newest[0].name} is newer and not complete; this is {report.path.name}")
    if len(complete) > 1:
        report.notes.append(f"{path} has {len(complete)} complete checkpoints; this is {report.path.name}")
    return report


def _shortened(states: Facts) -> Facts:
    """Those that are not whole, and the newest of the others."""
    whole = [name for name, state in states.items() if state == "whole"]
    dropped = whole[:-MOST_NAMED]
    more = {f"{len(dropped)} older": "whole"} if dropped else {}
    return more | {name: state for name, state in states.items() if name not in dropped}


def _conversion(folder: Path) -> Report:
    """What a conversion that was interrupted has left, or one that is being done."""
    problems: list[str] = []
    job = read_mapping(folder / JOB_FILE, problems)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    records = folder / RECORDS, folder / CHECKED
    data = [path for path in paths if path.name != JOB_FILE and path.parent not in records]
    done = {path.name.removesuffix(".json").replace("+", "/") for path in paths if path.parent == folder / RECORDS}
    opened: list[RawFile] = []
    report = Report(path=folder, format="conversion", what="", stored=StoredTensors([]), problems=problems)
    for path in data:
        name = str(path.relative_to(folder))
        finished = name in done
        raw = None
        if path.name.removesuffix(PARTIAL).endswith((".safetensors", *SUFFIXES_OF_TORCH)):
            raw = _as_far_as_written(path)
            opened += [raw] if raw else []
        report.files.append(file_info(folder, name, raw, "finished" if finished else "begun"))
    report.stored = StoredTensors(opened)
    destination = folder.name.removeprefix(".").removesuffix(".converting")
    report.what = f"an unfinished conversion to {destination}: {len(done)} files are finished"
    report.sections["conversion"] = {
        "destination": str(folder.with_name(destination)),
        "source": job.get("source"),
        "finished_files": len(done),
    }
    report.notes.append("run the same command again: it goes on with the files that are missing")
    return report


def _as_far_as_written(path: Path) -> RawFile | None:
    try:
        return open_file(path)
    except (OSError, ValueError):
        return None  # begun only
