"""Packs all shards of a folder and writes their index: again after an interruption, or one shard at a time."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from megachameleon.console import track
from megachameleon.data.packing.pack_file import content_of, pack_path, read_pack, verify_pack, write_pack
from megachameleon.data.packing.pack_index import PackIndex, ShardEntry, index_path, write_index
from megachameleon.data.packing.pack_summary import PackSummary, shard_summary, total
from megachameleon.data.packing.packing import PackingMode
from megachameleon.data.shards.manifest import ShardManifest
from megachameleon.data.shards.reader import ShardReader, shard_file, shard_prefixes


def pack_folder(
    folder: Path, sequence_length: int, mode: PackingMode, *, unit: int | None = None, workers: int = 1
) -> PackSummary:
    """Pack every shard that has no pack yet, then write the index.

    Args:
        unit: only this shard, from 0, and no index; a call without it finishes the work.

    Raises:
        ValueError: no shards, no such unit, damaged or mixed shards, a picture that does not fit, or a dead worker.
    """
    prefixes = shard_prefixes(folder)
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
    if unit is None and not folder.is_dir():
        raise ValueError(f"{folder}: a shard, but an index is of a folder; give {folder.parent}, which holds it")
    if unit is not None and not 0 <= unit < len(prefixes):
        raise ValueError(f"--unit {unit}: {folder} has {len(prefixes)} shards; choose 0 to {len(prefixes) - 1}")
    chosen = prefixes if unit is None else [prefixes[unit]]
    packed = list(track(_packed(chosen, sequence_length, mode, workers), "packing", total=len(chosen)))
    summary = total([one for _, one in packed], str(folder))
    if unit is None:
        write_index(index_path(folder, mode, sequence_length), summary, [entry for entry, _ in packed])
    return summary


def _packed(
    prefixes: list[Path], sequence_length: int, mode: PackingMode, workers: int
) -> Iterator[tuple[ShardEntry, PackSummary]]:
    work = partial(_pack_one, sequence_length=sequence_length, mode=mode)
    if workers <= 1:
        yield from map(work, prefixes)
        return
    # spawn: a fork would share locks of threads that libraries have started
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(work, prefixes)
        except BrokenProcessPool:
            raise ValueError(
                f"{prefixes[0].parent}: a worker died (out of memory?); run again, or use fewer workers"
            ) from None


def _pack_one(prefix: Path, *, sequence_length: int, mode: PackingMode) -> tuple[ShardEntry, PackSummary]:
    """Pack a shard, or take the pack that it has if that is whole and of this content."""
    manifest = ShardManifest.load(shard_file(prefix, ".json"))
    path = pack_path(prefix, mode, sequence_length)
    try:
        # read whole: a pack of before may have been damaged since
        verify_pack(path)
        header, packing, _ = read_pack(path)
        found = header.content == content_of(manifest)
    except ValueError:
        found = False
    if not found:
        header, packing = write_pack(ShardReader(prefix), sequence_length, mode)
    entry = ShardEntry(prefix.name, header.fingerprint, header.strata)
    return entry, shard_summary(manifest, packing, sequence_length, mode)


def verify_packs(folder: Path) -> list[str]:
    """Read all packs behind the indices of a folder, and compare them with their shards; says what is wrong with each.

    That a sample's ids are those of `.bin` is compared whenever one is read, so not here.
    """
    problems = []
    for path in sorted(folder.glob("pack-*.index")):
        try:
            index = PackIndex(path)
            entries = [index.entry(number)[0] for number in range(index.summary.shards)]
        except ValueError as error:
            problems.append(str(error))
            continue
        for entry in track(entries, path.name):
            try:
                _verify_entry(folder / entry.name, entry, index.summary)
            except ValueError as error:
                problems.append(str(error))
    return problems


def _verify_entry(prefix: Path, entry: ShardEntry, summary: PackSummary) -> None:
    path = pack_path(prefix, summary.mode, summary.sequence_length)
    verify_pack(path)
    header, _, _ = read_pack(path)
    manifest = ShardManifest.load(shard_file(prefix, ".json"))
    if header.fingerprint != entry.pack or header.content != content_of(manifest):
        raise ValueError(f"{path}: is not the one in the folder's index, or of its shard; run preprocess_data.py pack")
