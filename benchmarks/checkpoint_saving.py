"""What a checkpoint costs a run: how long training waits for it, and how much slower steps are while it is written.

    python -m benchmarks.checkpoint_saving --preset cpu --sequence-length 256 --threads 1 --output /tmp/saves

Each of several interleaved rounds, whose order changes, takes steps without a save, saves asynchronously and takes
steps until the checkpoint is visible, and saves synchronously: training waits until it is. One process, one device; the
file is hashed, written and synchronized to the disk as in a run.
"""

import argparse
import os
import shutil
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.shapes import PRESETS
from megachameleon.console import run_tool, tool_parser, track

if TYPE_CHECKING:
    from megachameleon.checkpoint.saving import Save
    from megachameleon.checkpoint.snapshot import Snapshot
    from megachameleon.parallel.context import ParallelContext

Seconds = dict[str, list[float]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser((__doc__ or "").partition("\n")[0], (__doc__ or "").splitlines()[2].strip())
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="size (default %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="(default %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="a folder on the file system to be measured")
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps without a save in a round (default %(default)s)")
    parser.add_argument("--sequence-length", type=int, help="default: the preset's")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    import torch

    from benchmarks.machine import describe_machine
    from megachameleon.config import ParallelConfig
    from megachameleon.parallel.context import parallel_context

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with parallel_context(ParallelConfig()) as context:
        saving = Saving(arguments, context)
        seconds = saving.measure(arguments.rounds, arguments.steps)
        machine = describe_machine(context.device)
        device = context.device.type
    shutil.rmtree(saving.root)
    print(f"{machine['cpu']}, {machine['cores']} cores, {device}, {arguments.preset} {arguments.precision}")
    print(f"{saving.num_bytes / 1e9:.2f} GB a checkpoint; medians of {arguments.rounds} rounds, interleaved")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"{name:44s} {median:8.3f} s   ({low:.3f} to {high:.3f}, {len(seconds[name])} times)")
    waits = medians[BLOCKED] / medians[SYNCHRONOUS]
    print(f"training waits {waits:.3f} of what it waits for a synchronous save")
    print(f"a step takes {medians[STEP_BESIDE] / medians[STEP]:.2f} times as long while a checkpoint is written")


STEP = "a step without a save"
STEP_BESIDE = "a step while a checkpoint is written"
BLOCKED = "training waits, asynchronous"
VISIBLE = "until it is visible, asynchronous"
SYNCHRONOUS = "training waits, synchronous"


class Saving:
    """A model in training and the ways to save it."""

    def __init__(self, arguments: argparse.Namespace, context: "ParallelContext") -> None:
        from benchmarks.batches import RandomSamples
        from benchmarks.contestants.base import Settings
        from benchmarks.contestants.ours import Ours
        from megachameleon.checkpoint.snapshot import HostMemory
        from megachameleon.parallel.device import optimizer_scope

        shape = PRESETS[arguments.preset]
        shape = replace(shape, sequence_length=arguments.sequence_length or shape.sequence_length)
        samples = RandomSamples(shape, 4, 0)
        self.ours = Ours(
            Settings(
                shape=shape,
                precision=arguments.precision,
                context=context,
                samples=samples,
                documents=4,
                peer_z_loss=False,
                overrides=(),
            )
        )
        # the decoder is made with its weights undrawn, so they are whatever memory held
        for parameter in self.ours.decoder.parameters():
            parameter.data.normal_(std=0.02)
        with optimizer_scope():
            # masters were copied from the weights when there were none yet
            self.ours.state.optimizer.reload_model_params()
        self.root = arguments.output / "checkpoints_measured"
        self.context = context
        self.memory = HostMemory(context.device)
        self.num_bytes = 0
        self._step = 0

    def measure(self, rounds: int, steps: int) -> Seconds:
        """Seconds of each kind of thing; the first round is not counted."""
        seconds: Seconds = defaultdict(list)
        for number in track(range(rounds + 1), "rounds"):
            found: Seconds = defaultdict(list)
            ways = [self._plain, self._beside, self._stopped]
            # an order that changes, so that what one leaves in caches favours nobody
            for way in ways[number % 3 :] + ways[: number % 3]:
                way(found, steps)
            for name in (STEP, STEP_BESIDE, BLOCKED, VISIBLE, SYNCHRONOUS):
                # the first round allocates the buffers
                seconds[name] += found[name] if number else []
        return seconds

    def _plain(self, found: Seconds, steps: int) -> None:
        for _ in range(steps):
            found[STEP].append(self._train())

    def _beside(self, found: Seconds, _: int) -> None:
        from megachameleon.checkpoint.background import Background
        from megachameleon.checkpoint.saving import write_checkpoint
        from megachameleon.checkpoint.state import training_state

        start = time.perf_counter()
        tensors = training_state([self.ours.state.model[0]], self.ours.state.optimizer, self.context.groups)
        save = self._save(self.memory.copy(tensors))
        writer: Background[object] = Background("checkpoint")
        writer.start(lambda: (write_checkpoint(save), time.perf_counter()))
        found[BLOCKED].append(time.perf_counter() - start)
        while writer.busy:
            taken = self._train()
            if writer.busy:  # the last one ran alone for a part of its time
                found[STEP_BESIDE].append(taken)
        writer.wait()
        ((saved, end),) = writer.results()
        found[VISIBLE].append(end - start)
        self.num_bytes = saved.num_bytes

    def _stopped(self, found: Seconds, _: int) -> None:
        from megachameleon.checkpoint.saving import write_checkpoint
        from megachameleon.checkpoint.snapshot import live_snapshot
        from megachameleon.checkpoint.state import training_state

        start = time.perf_counter()
        tensors = training_state([self.ours.state.model[0]], self.ours.state.optimizer, self.context.groups)
        write_checkpoint(self._save(live_snapshot(tensors)))
        found[SYNCHRONOUS].append(time.perf_counter() - start)

    def _train(self) -> float:
        start = time.perf_counter()
        self.ours.step(self._step)  # reads the loss, so the device has finished
        self._step += 1
        return time.perf_counter() - start

    def _save(self, snapshot: "Snapshot") -> "Save":
        from megachameleon.checkpoint.folder import CheckpointManifest
        from megachameleon.checkpoint.retention import Retention, new_owner
        from megachameleon.checkpoint.saving import Save, small_files

        self._step += 1
        manifest = CheckpointManifest(
            step=self._step,
            consumed_samples=0,
            data_fingerprint="",
            versions={},
            vocabulary={},
            tokenizers={},
            files={},
        )
        return Save(
            root=self.root,
            attempt=f"{new_owner()}-1",
            rank=0,
            world_size=1,
            snapshot=snapshot,
            manifest=manifest,
            texts=small_files(self.ours.config, {}, {}),
            # the disk holds one checkpoint, however many rounds there are
            retention=Retention(keep_last=1),
        )


if __name__ == "__main__":
    run_tool(main, parser())
