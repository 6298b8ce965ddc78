"""Running the units of a plan, here or in several processes, and saying where they stand."""

import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from megachameleon.console import ProgressTask, progress_bar
from megachameleon.data.manifest import ShardManifest
from megachameleon.data.plan import Plan, Unit
from megachameleon.data.preprocessing import RunOptions, require_room, run_unit, unit_problem
from megachameleon.data.shard_writer import ShardWriter
from megachameleon.data.shards import ShardReader


@dataclass(frozen=True, slots=True)
class UnitState:
    """Where a unit stands."""

    unit: Unit
    problem: str | None
    """Why it still has to be run; None when it is finished."""
    manifest: ShardManifest | None
    """Its manifest when it is finished."""


def unit_states(folder: Path) -> list[UnitState]:
    """Where each unit of a planned folder stands.

    Raises:
        ValueError: there is no plan, or a damaged one.
    """
    plan = Plan.load(folder)
    states = []
    for unit in plan.units:
        problem = unit_problem(plan, folder, unit)
        manifest = None if problem else ShardReader(folder / unit.name).manifest
        states.append(UnitState(unit, problem, manifest))
    return states


def run_units(folder: Path, options: RunOptions, *, number: int | None = None, workers: int = 1) -> list[UnitState]:
    """Run all units that are not finished, or one; finished ones are left as they are.

    Args:
        number: of the one unit to run, counted from 0.
        workers: processes; the result does not depend on it.

    Returns:
        All units' states afterwards.

    Raises:
        ValueError: no plan, no such unit, too little disk, no document in any unit, or a unit failed; the others'
            shards stay.
        RuntimeError: a process died.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
    plan = Plan.load(folder)
    if number is not None and not 0 <= number < len(plan.units):
        raise ValueError(f"--unit {number}: the plan in {folder} has units 0..{len(plan.units) - 1}")
    chosen = plan.units if number is None else (plan.units[number],)
    units = [unit for unit in chosen if unit_problem(plan, folder, unit) is not None]
    require_room(plan, folder, units)
    total = sum(unit.bytes for unit in chosen)
    done = total - sum(unit.bytes for unit in units)
    with progress_bar("preprocessing (bytes)", total, done=done) as bar:
        if workers == 1 or len(units) <= 1:
            for unit in units:
                bar.note(unit.name)
                run_unit(plan, folder, unit, options, bar.advance)
        else:
            _run_in_processes(plan, folder, units, options, workers, bar)
    states = _settled_states(folder, chosen)
    _require_documents(folder, states)
    return states


def verify_units(folder: Path) -> None:
    """Read every shard again and compare it with its manifest, its plan and itself.

    Raises:
        ValueError: a unit is missing or was changed; names the first and what mends it.
    """
    states = unit_states(folder)
    with progress_bar("verifying", len(states)) as bar:
        for state in states:
            if state.problem:
                raise ValueError(f"{folder / state.unit.name}: {state.problem}; run preprocess_data.py run again")
            ShardReader(folder / state.unit.name).verify()
            bar.advance()


def merge_shards(shards: Sequence[ShardReader], prefix: Path) -> ShardManifest:
    """Write the documents of several shards, in order, as one; for megatron-core without this package.

    Raises:
        ValueError: `prefix` is one of the shards, or their vocabularies or tokenizers differ.
    """
    first = shards[0]
    if any(shard.prefix.resolve() == prefix.resolve() for shard in shards):
        raise ValueError(f"{prefix}: is one of the shards to merge; choose another name")
    for shard in shards[1:]:
        first.vocabulary.require_same(shard.vocabulary, str(first.prefix), str(shard.prefix))
        if shard.manifest.tokenizer != first.manifest.tokenizer:
            raise ValueError(
                f"{shard.prefix}: made with another tokenizer than {first.prefix}; preprocess both with one"
            )
    image_tokenizers = {shard.manifest.image_tokenizer for shard in shards if shard.manifest.image_tokenizer}
    if len(image_tokenizers) > 1:
        raise ValueError(
            f"{prefix}: shards of several image tokenizers {sorted(image_tokenizers)}; preprocess all with one"
        )
    with ShardWriter(
        prefix,
        first.vocabulary,
        tokenizer=first.manifest.tokenizer,
        image_tokenizer=next(iter(image_tokenizers), None),
    ) as writer:
        for shard in shards:
            for index in range(len(shard)):
                writer.add(shard.document(index))
        quarantined: Counter[str] = Counter()  # a file's name may be that of others in other folders
        for shard in shards:
            quarantined.update(shard.manifest.quarantined)
        return writer.commit(
            inputs=[record for shard in shards for record in shard.manifest.inputs],
            quarantined=quarantined,
            filtered=sum(shard.manifest.filtered for shard in shards),
            options=first.manifest.options,
        )


def _settled_states(folder: Path, chosen: Sequence[Unit], patience: float = 5.0) -> list[UnitState]:
    """All states; another run that has made one of `chosen` too may just be putting its shard in place of ours."""
    end = time.monotonic() + patience
    while True:
        states = unit_states(folder)
        if all(s.problem is None for s in states if s.unit in chosen) or time.monotonic() > end:
            return states
        time.sleep(0.2)


def _require_documents(folder: Path, states: Sequence[UnitState]) -> None:
    manifests = [state.manifest for state in states if state.manifest is not None]
    if len(manifests) < len(states) or any(manifest.num_documents for manifest in manifests):
        return
    if any(manifest.filtered for manifest in manifests):
        raise ValueError(f"{folder}: no caption is in the languages of --languages; plan again with others")
    names = ", ".join(item.path for item in states[0].unit.inputs[:3])
    raise ValueError(f"{folder}: no records in {names} or any other input; check the inputs")


def _end_with_parent() -> None:
    """Let a worker end when its parent is killed; the executor's own workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run_in_processes(
    plan: Plan, folder: Path, units: Sequence[Unit], options: RunOptions, workers: int, bar: ProgressTask
) -> None:
    # spawn, because forking a process that has started threads of PyTorch may hang
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        jobs = {pool.submit(run_unit, plan, folder, unit, options): unit for unit in units}
        try:
            for job in as_completed(jobs):
                job.result()
                bar.advance(jobs[job].bytes)
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died (killed, or out of memory?); finished units stay, run again, "
                "with fewer --workers if memory was short"
            ) from None
        except (KeyboardInterrupt, SystemExit):
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
