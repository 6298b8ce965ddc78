"""What a folder of Meta's release format is, with all its files or without some."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megachameleon.checkpoint.formats.meta.names import (
    CHECKLIST_FILE,
    CONSOLIDATE_FILE,
    PARAMS_FILE,
    SINGLE_FILE,
    file_names,
)
from megachameleon.checkpoint.formats.meta.params import MOST_JSON_BYTES, model_of_params, read_params
from megachameleon.checkpoint.formats.plain import EXTRA_FILE
from megachameleon.checkpoint.inspection.raw import RawFile, listed
from megachameleon.checkpoint.inspection.report import Report
from megachameleon.checkpoint.inspection.shape import model_facts, require_sensible, vocabulary_facts
from megachameleon.checkpoint.inspection.small_files import file_info, open_files, read_mapping
from megachameleon.checkpoint.inspection.tensors import MetaTensors, StoredTensors, TensorInfo, missing_of
from megachameleon.tokens.vocabulary import Vocabulary

CHECKLIST_LINE = re.compile(r"([0-9a-fA-F]{32})\s+\*?([^/\\\s]+)")
MOST_SHARDS = 1024


class ShardedTensors(StoredTensors):
    """The tensors of all files; the same name stands in each, so the file's number goes before it."""

    def __init__(self, files: Mapping[str, RawFile]) -> None:
        super().__init__([])
        self._names: dict[str, str] = {}
        for file in files.values():
            for name, tensor in file.tensors.items():
                full = name if len(files) == 1 else f"{file.path.stem.removeprefix('consolidated.')}:{name}"
                self._homes[full], self._names[full] = file, name
                self.infos[full] = TensorInfo(
                    shape=tensor.shape, dtype=tensor.dtype, files=(file.path.name,), problem=tensor.problem
                )

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Any:
        """See `Tensors`."""
        return self._homes[name].read(self._names[name], part)


def describe_meta(folder: Path) -> Report:
    """A folder with params.json or consolidated*.pth."""
    problems: list[str] = []
    params = _params(folder, problems)
    names = _names(folder, params, problems)
    files = open_files(folder, [name for name in names if (folder / name).is_file()], problems)
    extra = read_mapping(folder / EXTRA_FILE, problems) if (folder / EXTRA_FILE).is_file() else {}
    report = Report(
        path=folder,
        format="meta",
        what=f"Chameleon in Meta's layout, {len(names)} file{'s' if len(names) > 1 else ''}",
        stored=ShardedTensors(files),
        problems=problems,
    )
    _take_model(report, params, [files.get(name) for name in names], extra)
    checklist = _checklist(folder, problems)
    for name in [*names, *(name for name in checklist if name not in names)]:
        raw = files.get(name)
        holds = ("all of it" if len(names) == 1 else "a part of every matrix, QK-norm of its heads") if raw else ""
        known = {"md5": checklist[name]} if name in checklist else {}
        report.files.append(file_info(folder, name, raw, holds, **known))
    report.sections["settings"] = {name: value for name, value in params.items() if value is not None}
    for name in (PARAMS_FILE, CONSOLIDATE_FILE, CHECKLIST_FILE):
        if not (folder / name).is_file():
            report.notes.append(f"no {name}")
    if isinstance(extra.get("lineage"), dict):
        report.sections["lineage"] = extra["lineage"]
    return report


def _params(folder: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return read_params(folder)
    except ValueError as error:
        problems.append(str(error).replace(f"{folder}: ", "").replace(f"{folder}/", ""))
        return {}


def _names(folder: Path, params: Mapping[str, Any], problems: list[str]) -> list[str]:
    """The files that should be there; those that are not are told."""
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    present = sorted(path.name for path in folder.glob("consolidated.*.pth"))
    # The number is a stranger's, and a name is made for each.
    shards = min(params.get("model_parallel_size") or len(present), MOST_SHARDS)
    names = sorted({*(file_names(shards) if shards else []), *present})
    if missing := [name for name in names if name not in present]:
        problems.append(f"{len(missing)} of {len(names)} files are missing: {listed(missing)}")
    return names


def _take_model(
    report: Report, params: Mapping[str, Any], files: list[RawFile | None], extra: Mapping[str, Any]
) -> None:
    first = next((file for file in files if file is not None), None)
    if not params or first is None:
        return
    try:
        shapes = {name: tensor.shape for name, tensor in first.tensors.items()}
        model = model_of_params(report.path, params, shapes, len(files), extra)
        require_sensible(model, PARAMS_FILE)
        report.plain = MetaTensors(model, files)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        report.problems.append(str(error).replace(f"{report.path}: ", ""))
        return
    report.model = model
    report.sections["model"] = model_facts(model)
    if missing := missing_of(report.plain):
        report.problems.append(missing)
    known = extra.get("vocabulary")
    is_release = model.vocab_size == Vocabulary().size
    report.vocabulary = known if isinstance(known, dict) else asdict(Vocabulary()) if is_release else None
    tokenizers = extra.get("tokenizers")
    report.tokenizers = tokenizers if isinstance(tokenizers, dict) else {}
    report.sections["vocabulary"] = vocabulary_facts(report.vocabulary, report.tokenizers)


def _checklist(folder: Path, problems: list[str]) -> dict[str, str]:
    """MD5 by name of a file beside it."""
    path = folder / CHECKLIST_FILE
    if not path.is_file():
        return {}
    if path.stat().st_size > MOST_JSON_BYTES:
        problems.append(f"{CHECKLIST_FILE}: {path.stat().st_size:,} bytes are no list of a few files")
        return {}
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = {line: CHECKLIST_LINE.fullmatch(line) for line in lines if line}
    if wrong := [line for line, match in found.items() if match is None]:
        problems.append(
            f"{CHECKLIST_FILE}: no MD5 and name of a file beside it: {listed(f'{w[:60]!r}' for w in wrong)}"
        )
    return {match[2]: match[1].lower() for match in found.values() if match and match[2] not in (".", "..")}
