"""Making a plan: inputs are found, read once by several processes, and shared among units."""

from array import array
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megachameleon.console import progress_bar
from megachameleon.data.documents import DocumentOptions, document_digest, documents_of
from megachameleon.data.plan import ORDINAL_BITS, Plan, PlannedInput, duplicates_hash, make_units, save_plan
from megachameleon.data.preprocessing.tokenizer_pair import load_tokenizers
from megachameleon.data.preprocessing.worker_pool import WorkerPool
from megachameleon.data.records import BadRecord
from megachameleon.data.sources.damage import DamagedArchiveError
from megachameleon.data.sources.finding import find_sources
from megachameleon.data.sources.locations import absolute_source, file_size, is_url
from megachameleon.data.sources.reading import read_source
from megachameleon.data.sources.surveying import hash_source, survey_source

MANY_INPUTS, SMALL_UNIT = 1000, 1 << 28
"""Above so many inputs, a shard has neighbouring ones of at least so many bytes, unless something else is asked for."""
UNKNOWN_REFERENCES = "unknown"
"""What a damaged archive refers to is not surveyed, so it cannot be checked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """How inputs are read and shared among units."""

    num_units: int | None = None
    """Shards to make; None for one an input, or for groups of many small inputs."""
    unit_bytes: int | None = None
    """Or: inputs of at least so many bytes a shard."""
    allow_damaged_archives: bool = False
    """Keep what comes before the damage."""
    drop_duplicates: bool = False
    """Leave out documents that an earlier one equals, over all units."""

    def __post_init__(self) -> None:
        if self.num_units is not None and self.unit_bytes is not None:
            raise ValueError("--units and --unit-bytes: give one of them")
        if self.num_units is not None and self.num_units < 1:
            raise ValueError(f"--units {self.num_units}: must be at least 1; leave it out for one shard an input")
        if self.unit_bytes is not None and self.unit_bytes < 1:
            raise ValueError(f"--unit-bytes {self.unit_bytes}: must be at least 1")


@dataclass(frozen=True, slots=True)
class _Surveyed:
    input: PlannedInput
    documents: np.ndarray
    """int64 as in `ORDINAL_BITS`; empty unless duplicates are dropped."""
    digests: np.ndarray
    """uint64 [documents, 2]."""


def plan_preprocessing(
    inputs: Iterable[Path | str],
    output: Path,
    tokenizer: Path,
    image_tokenizer: Path | None,
    options: DocumentOptions,
    how: PlanOptions | None = None,
    *,
    workers: int = 1,
    replace_plan: bool = False,
) -> Plan:
    """Find and hash the inputs, check that everything fits together, and freeze the units in `output/plan.json`.

    Args:
        inputs: files, folders or URLs.
        workers: processes that read; the plan does not depend on it.
        replace_plan: put this plan in the place of another one; `run` then makes again what the new one changes.

    Raises:
        ValueError: no inputs, a damaged archive, tokenizers that do not fit, or another plan in `output`.
    """
    how = how or PlanOptions()
    inputs = list(inputs)
    paths = [absolute_source(path) for path in find_sources(inputs)]
    _require_apart(output, [absolute_source(str(path)) for path in inputs], paths)
    text_tokenizer, picture_tokenizer = load_tokenizers(tokenizer, image_tokenizer, "cpu")
    root, names = _split_root(paths)
    # after the tokenizers are loaded: reading all inputs may take hours, and a wrong folder shows at once
    surveyed = _survey(paths, names, options, how, workers)
    planned = [item.input for item in surveyed]
    if not any(item.num_records or item.text_bytes or item.num_pictures for item in planned):
        raise ValueError(f"{paths[0]}: no records in it or any other input; check the inputs")
    if picture_tokenizer is None and (with_pictures := [i for i, item in enumerate(planned) if item.num_pictures]):
        raise ValueError(
            f"{paths[with_pictures[0]]}: holds pictures; give the picture tokenizer with --image-tokenizer"
        )
    duplicates = _duplicates(surveyed)
    planned = [replace(item, num_duplicates=len(rows)) for item, rows in zip(planned, duplicates, strict=True)]
    rows = np.concatenate([*duplicates, np.empty(0, np.int64)])
    units = []
    first = 0
    # hundreds of thousands of tiny shards would make every later listing slow
    many = how.num_units is None and len(planned) > MANY_INPUTS
    for unit in make_units(planned, count=how.num_units, unit_bytes=how.unit_bytes or (SMALL_UNIT if many else None)):
        own = rows[first : first + sum(item.num_duplicates for item in unit.inputs)]
        digest = duplicates_hash(own) if how.drop_duplicates else ""
        units.append(replace(unit, first_duplicate=first, duplicates_hash=digest))
        first += len(own)
    shared = {
        "root": root,
        # resolved, for jobs may start in another working folder
        "tokenizer": str(tokenizer.resolve()),
        "tokenizer_fingerprint": text_tokenizer.fingerprint,
        "image_tokenizer": str(image_tokenizer.resolve()) if image_tokenizer else None,
        "image_tokenizer_fingerprint": picture_tokenizer.fingerprint if picture_tokenizer else None,
        "options": options,
        "allow_damaged_archives": how.allow_damaged_archives,
        "drop_duplicates": how.drop_duplicates,
    }
    return save_plan(output, shared, units, rows, replace=replace_plan)


def _require_apart(output: Path, inputs: list[str], found: list[str]) -> None:
    folder = output.resolve()
    around = [path for path in inputs if not is_url(path) and folder.is_relative_to(path)]
    beside = [path for path in found if not is_url(path) and Path(path).parent == folder and path not in inputs]
    if around or beside:
        raise ValueError(
            f"--output {output}: lies in the same folder as the input {(around + beside)[0]}, so that the next plan "
            "would read the files of this one as inputs; choose a folder apart from the inputs"
        )


def _survey(
    paths: list[str], names: list[str], options: DocumentOptions, how: PlanOptions, workers: int
) -> list[_Surveyed]:
    # asking a server for the sizes of many objects takes as long as reading some of them
    total = None if any(map(is_url, paths)) else sum(file_size(path) or 0 for path in paths)
    surveyed: list[_Surveyed] = []
    with (
        progress_bar("hashing inputs (bytes)", total) as bar,
        WorkerPool(_make_survey, (options, how), min(workers, len(paths))) as pool,
        closing(pool.ordered(zip(paths, names, strict=True))) as results,
    ):
        for result in results:
            surveyed.append(result)
            bar.advance(result.input.bytes)
    return surveyed


def _make_survey(options: DocumentOptions, how: PlanOptions) -> Callable[[tuple[str, str]], _Surveyed]:
    def survey(place: tuple[str, str]) -> _Surveyed:
        path, name = place
        planned = _planned_input(path, name, how.allow_damaged_archives)
        documents, digests = np.empty(0, np.int64), np.empty((0, 2), np.uint64)
        if how.drop_duplicates:
            documents, digests = _digests(path, options, how.allow_damaged_archives)
        return _Surveyed(planned, documents, digests)

    return survey


def _planned_input(path: str, name: str, allow_damaged: bool) -> PlannedInput:
    try:
        survey = survey_source(path)
    except DamagedArchiveError:
        if not allow_damaged:
            raise
        file = hash_source(path)
        return PlannedInput(
            name=name, bytes=file.bytes, sha256=file.sha256, text_bytes=file.bytes, num_pictures=0,
            references=UNKNOWN_REFERENCES,
        )  # fmt: skip
    return PlannedInput(
        name=name,
        bytes=survey.bytes,
        sha256=survey.sha256,
        text_bytes=survey.text_bytes,
        num_pictures=survey.num_pictures,
        num_records=survey.num_records,
        references=survey.references or "",
    )


def _digests(path: str, options: DocumentOptions, allow_damaged: bool) -> tuple[np.ndarray, np.ndarray]:
    rows, digests = array("q"), bytearray()  # lists of Python's objects would take five times the memory
    try:
        for number, record in enumerate(read_source(path)):
            if isinstance(record, BadRecord):
                continue
            # what does not fit the 16 bits of ORDINAL_BITS is kept, duplicate or not
            for ordinal, document in enumerate(documents_of(record, options)[: 1 << ORDINAL_BITS]):
                rows.append(number << ORDINAL_BITS | ordinal)
                digests += document_digest(document)
    except DamagedArchiveError:
        if not allow_damaged:
            raise
    return np.array(rows, np.int64), np.frombuffer(digests, np.uint64).reshape(-1, 2)


def _duplicates(surveyed: list[_Surveyed]) -> list[np.ndarray]:
    """The documents of each input that an earlier one equals, sorted; 48 bytes of memory a document."""
    lengths = [len(item.documents) for item in surveyed]
    digests = np.concatenate([*(item.digests for item in surveyed), np.empty((0, 2), np.uint64)])
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so that the first in the plan comes first
    again = np.zeros(len(order), bool)
    if len(order):
        sorted_digests = digests[order]
        again[order[1:]] = (sorted_digests[1:] == sorted_digests[:-1]).all(axis=1)
    marks = np.split(again, np.cumsum(lengths)[:-1]) if lengths else []
    return [item.documents[mark] for item, mark in zip(surveyed, marks, strict=True)]


def _split_root(paths: list[str]) -> tuple[str, list[str]]:
    """The folder that holds all inputs, and their names below it; "" and whole names where there is none."""
    parts = [path.rstrip("/").split("/")[:-1] for path in paths]
    shortest = min(parts, key=len)
    depth = next((i for i in range(len(shortest)) if len({part[i] for part in parts}) > 1), len(shortest))
    if depth < (3 if any(is_url(path) for path in paths) else 2):  # "s3:", "", bucket; or "", folder
        return "", paths
    root = "/".join(shortest[:depth])
    return root, [path[len(root) + 1 :] for path in paths]
