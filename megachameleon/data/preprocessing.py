"""Raw sources into shards: plan the units once, run each whole or not at all, any number of times.

Nothing depends on the order of units, on the number of processes, or on what the code cache already knows.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megachameleon.console import track
from megachameleon.data.documents import Document, DocumentOptions, documents_of, encode_document
from megachameleon.data.manifest import FileRecord, ShardManifest
from megachameleon.data.picture_codes import CodeCache, PictureCoder
from megachameleon.data.plan import Plan, PlannedInput, Unit, make_units
from megachameleon.data.records import BadRecord, Record
from megachameleon.data.shard_writer import ShardWriter, writers_of
from megachameleon.data.shards import ShardReader, shard_file
from megachameleon.data.sources import DamagedArchiveError, find_sources, read_source, survey_source
from megachameleon.files import require_free_space, sha256_of, write_text
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from megachameleon.tokens.vq import ImageTokenizer

RECORDS_PER_BATCH = 64
ALWAYS_TOLERATED = 10
"""Bad records of a unit that never fail it, however few good ones it has, as long as there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What may differ between two runs of one plan without changing a byte of the result."""

    max_bad: float = 0.01
    """Share of bad records above which a unit fails."""
    code_cache: Path | None = None
    """Folder of picture codes that outlive the run."""
    device: str = "auto"
    """Where pictures are encoded: cpu, cuda, or auto."""
    num_threads: int | None = None
    """Threads of each process; None leaves it to PyTorch."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"--max-bad {self.max_bad}: must be a share between 0 and 1, such as 0.01")


def plan_preprocessing(
    inputs: Iterable[Path],
    output: Path,
    tokenizer: Path,
    image_tokenizer: Path | None,
    options: DocumentOptions,
    *,
    num_units: int | None = None,
    allow_damaged_archives: bool = False,
    replace: bool = False,
) -> Plan:
    """Find and hash the inputs, check that everything fits together, and freeze the units in `output/plan.json`.

    Args:
        num_units: shards to make; None for one an input.
        replace: put this plan in the place of another one; `run` then makes again what the new one changes.

    Raises:
        ValueError: no inputs, a damaged archive, tokenizers that do not fit, or another plan in `output`.
    """
    if num_units is not None and num_units < 1:
        raise ValueError(f"--units {num_units}: must be at least 1; leave it out for one shard an input")
    files = find_sources(inputs)
    text_tokenizer, picture_tokenizer = load_tokenizers(tokenizer, image_tokenizer, "cpu")
    planned = [_planned_input(Path(file), allow_damaged_archives) for file in track(files, "hashing inputs")]
    if not any(item.text_bytes or item.num_pictures for item in planned):
        raise ValueError(f"{planned[0].path}: no records in it or any other input; check the inputs")
    if picture_tokenizer is None and (with_pictures := [item for item in planned if item.num_pictures]):
        raise ValueError(f"{with_pictures[0].path}: holds pictures; give the picture tokenizer with --image-tokenizer")
    plan = Plan(
        tokenizer=str(tokenizer.resolve()),
        tokenizer_fingerprint=text_tokenizer.fingerprint,
        image_tokenizer=str(image_tokenizer.resolve()) if image_tokenizer else None,
        image_tokenizer_fingerprint=picture_tokenizer.fingerprint if picture_tokenizer else None,
        options=options,
        allow_damaged_archives=allow_damaged_archives,
        units=make_units(planned, num_units),
    )
    plan.save(output, replace=replace)
    return plan


def load_tokenizers(
    tokenizer: Path, image_tokenizer: Path | None, device: str
) -> tuple[TextTokenizer, "ImageTokenizer | None"]:
    """Load both tokenizers and check that they share a vocabulary.

    Args:
        device: cpu, cuda, or auto.

    Raises:
        ValueError: a file is missing or damaged, or grid or number of codes differ.
    """
    text_tokenizer = TextTokenizer.load(tokenizer)
    if image_tokenizer is None:
        return text_tokenizer, None
    import torch

    from megachameleon.tokens.vq import ImageTokenizer

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; choose cpu or auto")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    picture_tokenizer = ImageTokenizer.load(image_tokenizer, torch.device(where))
    _require_fit(text_tokenizer.vocabulary, picture_tokenizer, tokenizer, image_tokenizer)
    return text_tokenizer, picture_tokenizer


def unit_problem(plan: Plan, folder: Path, unit: Unit) -> str | None:
    """Why a unit still has to be run; None when its shard is there, opens, and was made by this plan."""
    if not shard_file(folder / unit.name, ".json").exists():
        return "being made by another run" if writers_of(folder / unit.name) else "not run"
    try:
        manifest = ShardReader(folder / unit.name).manifest
    except ValueError as error:
        return str(error)
    if manifest.inputs != _file_records(unit) or manifest.options != _shard_options(plan):
        return "made by another plan"
    if (manifest.tokenizer, manifest.image_tokenizer) != (plan.tokenizer_fingerprint, plan.image_tokenizer_fingerprint):
        return "made with other tokenizers"
    return None


def require_room(plan: Plan, folder: Path, units: Sequence[Unit]) -> None:
    """Refuse to start what the disk cannot hold, by a low estimate.

    Raises:
        ValueError: too little room.
    """
    vocabulary = Vocabulary.load(Path(plan.tokenizer))
    inputs = [item for unit in units for item in unit.inputs]
    ids = sum(item.text_bytes // 3 + item.num_pictures * vocabulary.image_length for item in inputs)
    require_free_space(folder, ids * np.dtype(vocabulary.token_dtype).itemsize, "writing the shards")


def run_unit(
    plan: Plan, folder: Path, unit: Unit, options: RunOptions, report: Callable[[int], None] = lambda num_bytes: None
) -> ShardManifest:
    """Make one unit's shard, and `NAME.quarantine.jsonl` if records had to be set aside.

    Args:
        report: is told input bytes as they are done.

    Raises:
        ValueError: an input or tokenizer changed since the plan, or too many records are bad; then only
            `NAME.quarantine.jsonl` is left.
    """
    if options.num_threads is not None:
        import torch

        torch.set_num_threads(options.num_threads)
    image_folder = Path(plan.image_tokenizer) if plan.image_tokenizer else None
    text_tokenizer, image_tokenizer = load_tokenizers(Path(plan.tokenizer), image_folder, options.device)
    _require_unchanged(plan, unit, text_tokenizer, image_tokenizer)
    cache = None
    if image_tokenizer is not None and options.code_cache is not None:
        codes_per_image = text_tokenizer.vocabulary.codes_per_image
        cache = CodeCache(options.code_cache, image_tokenizer.fingerprint, codes_per_image)
    try:
        coder = PictureCoder(image_tokenizer, cache) if image_tokenizer is not None else None
        with ShardWriter(
            folder / unit.name,
            text_tokenizer.vocabulary,
            tokenizer=plan.tokenizer_fingerprint,
            image_tokenizer=plan.image_tokenizer_fingerprint,
        ) as writer:
            return _UnitRun(plan, unit, text_tokenizer, coder, writer).run(options.max_bad, report)
    finally:
        if cache is not None:
            cache.close()


class _UnitRun:
    """One pass over the records of a unit."""

    def __init__(
        self, plan: Plan, unit: Unit, tokenizer: TextTokenizer, coder: PictureCoder | None, writer: ShardWriter
    ) -> None:
        self._plan, self._unit, self._tokenizer, self._coder, self._writer = plan, unit, tokenizer, coder, writer
        self._bad: list[BadRecord] = []
        self._num_records = 0
        self._num_filtered = 0

    def run(self, max_bad: float, report: Callable[[int], None]) -> ShardManifest:
        for item in self._unit.inputs:
            records = self._read(Path(item.path), _delta(report, item.bytes))
            name = _name_in(self._plan, item)
            while batch := list(islice(records, RECORDS_PER_BATCH)):
                self._write(item, name, batch)
                if self._num_records > 10_000:
                    self._require_tolerable(max_bad)
        self._require_tolerable(max_bad)
        self._save_quarantine()
        return self._writer.commit(
            inputs=_file_records(self._unit),
            quarantined=dict(sorted(Counter(bad.file for bad in self._bad).items())),
            filtered=self._num_filtered,
            options=_shard_options(self._plan),
        )

    def _read(self, path: Path, report: Callable[[int], None]) -> Iterator[Record | BadRecord]:
        try:
            yield from read_source(path, report)
        except DamagedArchiveError as error:
            if not self._plan.allow_damaged_archives:
                raise
            yield BadRecord(path.name, "end", error.reason)

    def _write(self, item: PlannedInput, name: str, batch: list[Record | BadRecord]) -> None:
        self._num_records += len(batch)
        documents = [
            [] if isinstance(record, BadRecord) else documents_of(record, self._plan.options) for record in batch
        ]
        codes, reasons = self._codes_of(item, [document for group in documents for document in group])
        for record, group in zip(batch, documents, strict=True):
            if isinstance(record, BadRecord):
                self._bad.append(replace(record, file=name))
                continue
            pictures = [picture for document in group for picture in document.pictures]
            if broken := [picture for picture in pictures if picture.content_hash in reasons]:
                reason = f"{broken[0].origin}: {reasons[broken[0].content_hash]}"
                self._bad.append(BadRecord(name, record.origin, reason))
                continue
            self._num_filtered += not group
            for document in group:
                self._writer.add(encode_document(document, self._tokenizer, codes))

    def _codes_of(self, item: PlannedInput, documents: list[Document]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        pictures = [picture for document in documents for picture in document.pictures]
        if not pictures:
            return {}, {}
        if self._coder is None:
            raise ValueError(
                f"{item.path}: holds pictures; plan again with --image-tokenizer DIR and --replace, then run again"
            )
        return self._coder.codes_of(pictures)

    def _require_tolerable(self, max_bad: float) -> None:
        bad, records = len(self._bad), self._num_records
        if bad and (bad == records or bad > max(ALWAYS_TOLERATED, max_bad * records)):
            examples = "; ".join(f"{bad.file}, {bad.place}: {bad.reason}" for bad in self._bad[:3])
            too_many = "" if bad == records else f", more than --max-bad {max_bad:g} allows"
            remedy = "" if bad == records else ", or raise --max-bad"
            raise ValueError(
                f"unit {self._unit.name}: {bad} of {records} records are bad{too_many} "
                f"({examples}{'; ...' if bad > 3 else ''}); all reasons are in {self._save_quarantine()}; "
                f"mend the input and plan again{remedy}"
            )

    def _save_quarantine(self) -> Path:
        path = shard_file(self._writer.prefix, ".quarantine.jsonl")
        if self._bad:
            write_text(path, "".join(json.dumps(asdict(bad), ensure_ascii=False) + "\n" for bad in self._bad))
        else:
            path.unlink(missing_ok=True)
        return path


def _planned_input(path: Path, allow_damaged: bool) -> PlannedInput:
    try:
        survey = survey_source(path)
        text_bytes, num_pictures = survey.text_bytes, survey.num_pictures
    except DamagedArchiveError:
        if not allow_damaged:
            raise
        text_bytes, num_pictures = path.stat().st_size, 0
    return PlannedInput(
        path=str(path.resolve()),
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        text_bytes=text_bytes,
        num_pictures=num_pictures,
    )


def _require_fit(vocabulary: Vocabulary, pictures: "ImageTokenizer", tokenizer: Path, image_tokenizer: Path) -> None:
    mine = (vocabulary.num_image_codes, vocabulary.image_grid)
    theirs = (pictures.num_codes, tuple(pictures.grid))
    if mine != theirs:
        raise ValueError(
            f"{image_tokenizer}: {theirs[0]} codes in a grid of {theirs[1]}, but the vocabulary in {tokenizer} has "
            f"{mine[0]} in {mine[1]}; train the text tokenizer with --num-codes {theirs[0]} "
            f"--grid {theirs[1][0]}x{theirs[1][1]}"
        )


def _require_unchanged(
    plan: Plan, unit: Unit, text_tokenizer: TextTokenizer, image_tokenizer: "ImageTokenizer | None"
) -> None:
    fingerprint = image_tokenizer.fingerprint if image_tokenizer is not None else None
    if (text_tokenizer.fingerprint, fingerprint) != (plan.tokenizer_fingerprint, plan.image_tokenizer_fingerprint):
        raise ValueError(
            f"{plan.tokenizer}, {plan.image_tokenizer}: a tokenizer changed since the plan was made; "
            "plan again into another folder"
        )
    for item in unit.inputs:
        path = Path(item.path)
        if not path.exists():
            raise ValueError(f"{path}: gone since the plan was made; bring it back or plan again into another folder")
        if path.stat().st_size != item.bytes or sha256_of(path) != item.sha256:
            raise ValueError(f"{path}: changed since the plan was made; plan again into another folder")


def _file_records(unit: Unit) -> tuple[FileRecord, ...]:
    return tuple(FileRecord(name=Path(item.path).name, bytes=item.bytes, sha256=item.sha256) for item in unit.inputs)


def _name_in(plan: Plan, item: PlannedInput) -> str:
    """An input's path relative to the folder that holds all inputs of the plan."""
    folders = [Path(other.path).parent for unit in plan.units for other in unit.inputs]
    return str(Path(item.path).relative_to(os.path.commonpath(folders)))


def _shard_options(plan: Plan) -> dict:
    options = asdict(plan.options)
    options["languages"] = list(plan.options.languages)
    return {**options, "allow_damaged_archives": plan.allow_damaged_archives}


def _delta(report: Callable[[int], None], total: int) -> Callable[[int], None]:
    """Turns positions in a file into steps for a progress bar, at most `total` in sum."""
    done = 0

    def at(position: int) -> None:
        nonlocal done
        position = min(position, total)
        report(max(0, position - done))
        done = max(done, position)

    return at
