"""Checkpoints of a few numbers, without a model: all that saving does with files. As a program, it dies in saves."""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch

from megachameleon.checkpoint.folder import (
    CheckpointManifest,
    checkpoint_name,
    named_checkpoints,
    read_manifest,
    verify_hashes,
)
from megachameleon.checkpoint.retention import Retention, delete_after, new_owner, recover, set_aside
from megachameleon.checkpoint.saving import Save, write_checkpoint, write_share
from megachameleon.checkpoint.snapshot import live_snapshot
from megachameleon.checkpoint.tensors import StoredTensor, index_from_json, read_tensors
from megachameleon.files import read_json

RANKS = 2


def stored(key, data):
    """A tensor that this rank alone has."""
    return StoredTensor(key=key, global_shape=tuple(data.shape), offset=(0,) * data.dim(), data=data)


def tensors_of(rank, value):
    """A rank's half of a global tensor full of `value`."""
    half = torch.full((2, 3), float(value))
    return [StoredTensor(key="w", global_shape=(2 * RANKS, 3), offset=(2 * rank, 0), data=half)]


def small_save(root, step, rank, attempt, *, value=None, tensors=None, keep_last=2, keep_every=0, world_size=RANKS):
    manifest = CheckpointManifest(
        step=step, consumed_samples=step, data_fingerprint="x", versions={}, vocabulary={}, tokenizers={}, files={}
    )
    return Save(
        root=Path(root),
        attempt=attempt,
        rank=rank,
        world_size=world_size,
        snapshot=live_snapshot(tensors_of(rank, step if value is None else value) if tensors is None else tensors),
        manifest=manifest,
        texts={"progress.json": f'{{"step": {step}}}'},
        retention=Retention(keep_last=keep_last, keep_every=keep_every),
    )


def save_all(root, step, attempt, **settings):
    """All ranks' shares, the main process last."""
    for rank in range(RANKS - 1, 0, -1):
        write_share(small_save(root, step, rank, attempt, **settings))
    return write_checkpoint(small_save(root, step, 0, attempt, **settings))


def stored_value(checkpoint):
    """The number that fills a checkpoint, whose hashes must be right."""
    manifest = read_manifest(checkpoint)
    verify_hashes(checkpoint, manifest.files, manifest)
    index = index_from_json(read_json(checkpoint / "index.json"), "index.json")
    whole = torch.empty(2 * RANKS, 3)
    read_tensors(checkpoint, index, [StoredTensor(key="w", global_shape=(4, 3), offset=(0, 0), data=whole)])
    assert (whole == whole[0, 0]).all()
    return whole[0, 0].item()


def found_again(root):
    """Step and number of the newest checkpoint after a restart."""
    recover(root)
    newest = named_checkpoints(root)[-1]
    return newest.name, stored_value(newest)


SCENARIOS = {
    "save": lambda root, attempt: save_all(root, 3, attempt, keep_last=1),
    "again": lambda root, attempt: save_all(root, 2, attempt, value=22, keep_last=1),
    "roll back": lambda root, attempt: delete_after(root, 1, attempt),
    "set aside": lambda root, attempt: set_aside(root / checkpoint_name(2)),
}


def die_at(number, root):
    """Kill this process with signal 9 before the `number`-th operation on a file below `root`."""
    left = [number]

    def count(path):
        if str(path).startswith(str(root)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"):
            count(arguments[0])

    sync = os.fsync

    def counted_sync(descriptor):
        count(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    os.fsync = counted_sync
    sys.addaudithook(hook)


def main(scenario):
    """Print what is found after a kill at each operation: `number newest value`."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where fsync takes no time
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        before = Path(folder) / "before"
        for step in (1, 2):
            save_all(before, step, f"{new_owner()}-{step}")
        killed, number = True, 0
        while killed:
            number += 1
            root = Path(folder) / f"run{number}"
            shutil.copytree(before, root)
            child = os.fork()
            if child == 0:
                die_at(number, root)
                SCENARIOS[scenario](root, f"{new_owner()}-1")
                os._exit(0)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status)
            assert killed or os.WEXITSTATUS(status) == 0
            print(number, *found_again(root), flush=True)
            save_all(root, 4, f"{new_owner()}-9", keep_last=1)  # the next run of the program
            assert found_again(root) == ("step_00000004", 4.0)
            names = {path.name for path in root.iterdir() if ".damaged" not in path.name}
            assert names == {"latest", "step_00000004"}, names
            assert (root / "latest").read_text() == "step_00000004\n"
            shutil.rmtree(root)


if __name__ == "__main__":
    main(sys.argv[1])
