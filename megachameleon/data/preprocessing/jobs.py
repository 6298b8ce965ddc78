"""Running units of a plan with one pool of workers, one unit after the other."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megachameleon.console import describe_error, progress_bar
from megachameleon.data.plan import Plan, Unit, load_plan
from megachameleon.data.preprocessing.block import Batch, Block
from megachameleon.data.preprocessing.blocks import BlockSettings, make_block_work
from megachameleon.data.preprocessing.picture_codes import CodeCaches, CodeFiller, PictureCounts
from megachameleon.data.preprocessing.picture_encoder import PictureEncoder
from megachameleon.data.preprocessing.tokenizer_pair import load_tokenizers
from megachameleon.data.preprocessing.unit_run import UnitRun
from megachameleon.data.preprocessing.unit_state import UnitState, forget_failure, note_failure, unit_states
from megachameleon.data.preprocessing.worker_pool import WorkerPool
from megachameleon.data.shards.writer import ShardWriter, remove_orphans
from megachameleon.files import NoRoomError, no_room_named, require_free_space
from megachameleon.tokens.text import TextTokenizer
from megachameleon.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from megachameleon.console import ProgressTask
    from megachameleon.tokens.vq import ImageTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What may differ between two runs of one plan without changing a byte of the result."""

    workers: int = 1
    """Processes that read records, prepare pictures and tokenize; 1 does it in the main one."""
    max_bad: float = 0.01
    """Share of bad records above which a unit fails."""
    code_caches: tuple[Path, ...] = ()
    """Folders of picture codes; the first is added to, and outlives the run."""
    device: str = "auto"
    """Where pictures are encoded: cpu, cuda, or auto. Of all this, only another device may turn a near tie of codes."""
    num_threads: int | None = None
    """Threads that encode pictures on the CPU, each another one; None for PyTorch's number, at most 16."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"--max-bad {self.max_bad}: must be a share between 0 and 1, such as 0.01")
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers}: must be at least 1")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"--threads {self.num_threads}: must be at least 1; leave it out for PyTorch's number")


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run did."""

    states: list[UnitState]
    """Of the chosen units, afterwards."""
    pictures: PictureCounts


def choose_units(plan: Plan, number: int | None = None, task: tuple[int, int] | None = None) -> list[Unit]:
    """The units that a job does: all, one, or every n-th.

    Args:
        number: of the one unit, counted from 0.
        task: (k, n) for the units k, k + n, k + 2n, ...; n jobs do all of them, whatever n is.

    Raises:
        ValueError: no such unit or task.
    """
    if number is not None:
        return [plan.unit(number)]
    if task is None:
        return list(plan.units())
    k, n = task
    if not 0 <= k < n:
        raise ValueError(f"--task {k} of --num-tasks {n}: tasks are counted from 0, so the last one is {n - 1}")
    return [plan.unit(i) for i in range(k, plan.num_units, n)]


def run_units(
    folder: Path, options: RunOptions, *, number: int | None = None, task: tuple[int, int] | None = None
) -> RunResult:
    """Run those of the chosen units (`choose_units`) that are not finished; finished ones are left as they are.

    A unit that fails does not keep the others from being run.

    Raises:
        ValueError: no plan, no such unit, too little disk, no document in any unit, or units failed.
        WorkerDiedError: a process died.
    """
    plan = load_plan(folder)
    chosen = choose_units(plan, number, task)
    # once a run and not once a unit: listing a large folder for each unit would be quadratic
    remove_orphans(folder)
    # hashes of the small index files only; reading every .bin is for `verify`
    before = list(unit_states(plan, chosen, indexes=True))
    units = [state.unit for state in before if state.state != "finished"]
    counts = PictureCounts()
    if units:
        _require_room(plan, units)
        with progress_bar("preprocessing (bytes)", sum(unit.bytes for unit in chosen)) as bar:
            bar.advance(sum(state.unit.bytes for state in before if state.state == "finished"))
            with _Run(plan, options, counts) as run:
                failures = [failure for unit in units if (failure := run.make(unit, bar)) is not None]
        if failures:
            more = f" ({len(failures)} units failed; status shows them all)" if len(failures) > 1 else ""
            raise ValueError(f"{failures[0]}{more}")
    states = _settled_states(plan, chosen)
    # a job of an array sees its own units only, which may well be empty
    if len(chosen) == plan.num_units:
        _require_documents(plan, states)
    return RunResult(states, counts)


class _Run:
    """What all units of a run share: tokenizers, workers, the cache."""

    def __init__(self, plan: Plan, options: RunOptions, counts: PictureCounts) -> None:
        self._plan, self._options, self._counts = plan, options, counts
        image_folder = Path(plan.image_tokenizer) if plan.image_tokenizer else None
        self._text, self._image = load_tokenizers(Path(plan.tokenizer), image_folder, options.device)
        _require_same(plan, self._text, self._image)
        self._encoder = PictureEncoder(self._image, options.num_threads) if self._image is not None else None
        self._cache: CodeCaches | None = None
        if self._image is not None and options.code_caches:
            self._cache = CodeCaches(options.code_caches[:1], self._image.fingerprint, self._image.codes_per_image)
        settings = BlockSettings(
            tokenizer=Path(plan.tokenizer),
            options=plan.options,
            image_tokenizer=plan.image_tokenizer_fingerprint,
            image_size=self._image.image_size if self._image is not None else 0,
            caches=options.code_caches,
        )
        self._pool: WorkerPool[Batch, Block] = WorkerPool(make_block_work, (settings,), options.workers)

    def __enter__(self) -> "_Run":
        self._pool.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__(*error)  # type: ignore[arg-type]
        if self._encoder is not None:
            self._encoder.close()
        if self._cache is not None:
            self._cache.close()

    def make(self, unit: Unit, bar: "ProgressTask") -> ValueError | None:
        """Make one unit's shard; returns why it failed where the others may still be made."""
        plan = self._plan
        bar.note(unit.name)
        filler = CodeFiller(self._encoder, self._text.vocabulary, self._cache, self._counts)
        fingerprints = {"tokenizer": plan.tokenizer_fingerprint, "image_tokenizer": plan.image_tokenizer_fingerprint}
        prefix = plan.folder / unit.name
        try:
            with (
                no_room_named(prefix),
                ShardWriter(prefix, self._text.vocabulary, **fingerprints) as writer,  # type: ignore[arg-type]
            ):
                UnitRun(plan, unit, self._pool, filler, writer).run(self._options.max_bad, bar.advance)
                forget_failure(plan.folder, unit)
        # not its unit's matter: all others would fail likewise
        except NoRoomError:
            raise
        except (ValueError, OSError) as error:  # an input that cannot be read is its unit's matter
            reason = describe_error(error) + ("" if isinstance(error, ValueError) else "; mend that and run again")
            note_failure(plan.folder, unit, reason)
            return ValueError(reason)
        return None


def _require_same(plan: Plan, text: TextTokenizer, image: "ImageTokenizer | None") -> None:
    fingerprint = image.fingerprint if image is not None else None
    if (text.fingerprint, fingerprint) != (plan.tokenizer_fingerprint, plan.image_tokenizer_fingerprint):
        changed = plan.image_tokenizer if text.fingerprint == plan.tokenizer_fingerprint else plan.tokenizer
        raise ValueError(
            f"{changed}: this tokenizer changed since the plan was made; put it back, or plan again into another folder"
        )


def _require_room(plan: Plan, units: Sequence[Unit]) -> None:
    """Refuse to start what the disk cannot hold, by a low estimate."""
    vocabulary = Vocabulary.load(Path(plan.tokenizer))
    inputs = [item for unit in units for item in unit.inputs]
    # few texts have more than five bytes an id, so what is refused here would hardly fit
    ids = sum(item.text_bytes // 5 + item.num_pictures * vocabulary.image_length for item in inputs)
    require_free_space(plan.folder, ids * np.dtype(vocabulary.token_dtype).itemsize, "writing the shards")


def _settled_states(plan: Plan, chosen: Sequence[Unit], patience: float = 5.0) -> list[UnitState]:
    """Of the chosen ones; another run that has made one too may just be putting its shard in place of ours."""
    end = time.monotonic() + patience
    while True:
        states = list(unit_states(plan, chosen))
        if all(state.problem is None for state in states) or time.monotonic() > end:
            return states
        time.sleep(0.2)


def _require_documents(plan: Plan, states: Sequence[UnitState]) -> None:
    manifests = [state.manifest for state in states if state.manifest is not None]
    if len(manifests) < len(states) or any(manifest.num_documents for manifest in manifests):
        return
    if any(manifest.filtered for manifest in manifests):
        raise ValueError(f"{plan.folder}: no caption is in the languages of --languages; plan again with others")
    names = ", ".join(plan.input_path(item) for item in states[0].unit.inputs[:3])
    raise ValueError(f"{plan.folder}: no records in {names} or any other input; check the inputs")
