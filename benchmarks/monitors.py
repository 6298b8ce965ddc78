"""What each monitor costs: how many times as long a step takes in which it measures.

    python -m benchmarks.monitors --preset cpu --layers 4 --sequence-length 512 --vocab 4096 --threads 1

One model in one process; steps without monitors and with one of them, or all, take turns in an order that changes. CPU
time of the process on a CPU, where others may be at work; wall time on a GPU. Small shares drown in that noise, so on a
CPU a profiler also says what share of a step is spent inside the monitors' own functions, by file.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.shapes import PRESETS
from megachameleon.console import run_tool, tool_parser

NONE, ALL = "none", "all"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser((__doc__ or "").partition("\n")[0], (__doc__ or "").splitlines()[2])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="size (default %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default %(default)s)")
    parser.add_argument("--layers", type=int, help="default: the preset's")
    parser.add_argument("--sequence-length", type=int, help="default: the preset's")
    parser.add_argument("--vocab", type=int, help="ids; default: the preset's")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    return parser


@dataclass(frozen=True)
class MeasuredStep:
    """A training step with some monitors at work."""

    take: Callable[..., Any]
    """`train_step` with all that does not change."""
    monitors: tuple[Any, ...]
    """Those at work."""
    samples_a_step: int
    """By which the position in the data goes on."""

    def step(self, number: int) -> float:
        """See `measuring.Stepper`."""
        report = self.take(step=number, consumed=number * self.samples_a_step, monitors=self.monitors)
        return float(report.losses.loss)


def main(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    import torch

    from benchmarks.machine import describe_machine
    from benchmarks.measuring import Plan, Spread, Timing, interleave, ratios
    from benchmarks.parking import Parking
    from megachameleon.config import ParallelConfig
    from megachameleon.parallel.context import parallel_context

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with parallel_context(ParallelConfig()) as context:
        steps = measured_steps(arguments, context)
        for step in steps.values():
            step.step(0)
        plan = Plan(rounds=arguments.rounds, warmup=1, steps_per_turn=1, settle=0)
        timings = interleave(steps, plan, context.device, Parking(context.device, enabled=False))
        machine, on_gpu = describe_machine(context.device), context.device.type == "cuda"
        inside = {} if on_gpu else shares_inside(steps[ALL])

    def seconds(timing: Timing) -> float:
        return timing.wall_seconds if on_gpu else timing.cpu_seconds

    print(f"{machine['cpu']}, {machine['cores']} cores, {arguments.preset} {arguments.precision}")
    for name in steps:
        spread = Spread.of(list(ratios(timings, name, NONE, seconds)))
        print(f"{name:18s} {100 * (spread.median - 1):+6.2f} %   ({spread.least:.3f} to {spread.most:.3f})")
    for file, share in inside.items():
        print(f"inside {file:22s} {100 * share:6.3f} % of a step in which all measure")


def shares_inside(step: MeasuredStep) -> dict[str, float]:
    """By file of the monitors: its share of the CPU time of three steps, with all that it calls outside of monitors."""
    import cProfile
    import pstats
    import time
    from collections import Counter

    from megachameleon.training.monitors import base

    folder = base.__file__.rpartition("/")[0]
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    for number in range(1, 4):
        step.step(number)
    profile.disable()
    statistics: Any = pstats.Stats(profile)
    found: Counter[str] = Counter()
    for (file, _, _), (*_, callers) in statistics.stats.items():
        if file.startswith(folder) and not file.endswith("step_times.py"):  # which yields while others work
            found[file.rpartition("/")[2]] += sum(
                times[3] for caller, times in callers.items() if not caller[0].startswith(folder)
            )
    return {file: seconds / statistics.total_tt for file, seconds in found.most_common()}


def measured_steps(arguments: argparse.Namespace, context: Any) -> dict[str, MeasuredStep]:
    """By name of the monitor."""
    from functools import partial
    from types import SimpleNamespace

    from benchmarks.batches import RandomSamples
    from benchmarks.contestants.base import Settings
    from benchmarks.contestants.ours import Ours
    from megachameleon.parallel.device import optimizer_scope
    from megachameleon.tokens.vocabulary import Vocabulary
    from megachameleon.training.monitors.build import build_monitors
    from megachameleon.training.step import train_step

    shape = PRESETS[arguments.preset]
    length, layers = arguments.sequence_length or shape.sequence_length, arguments.layers or shape.layers
    shape = replace(shape, sequence_length=length, layers=layers, vocab=arguments.vocab or shape.vocab)
    settings = Settings(
        shape=shape,
        precision=arguments.precision,
        context=context,
        samples=RandomSamples(shape, 4, 0),
        documents=4,
        peer_z_loss=False,
        overrides=("logging.monitor_every=1",),
    )
    ours = Ours(settings)
    # the decoder is made with its weights undrawn, so they are whatever memory held
    for parameter in ours.decoder.parameters():
        parameter.data.normal_(std=0.02)
    with optimizer_scope():
        ours.state.optimizer.reload_model_params()
    codes = Vocabulary.compact(num_text_ids=shape.vocab - 28, num_image_codes=16, image_grid=(2, 4))
    data = SimpleNamespace(vocabulary=codes)
    parts: Any = SimpleNamespace(config=ours.config, context=context, state=ours.state, data=data)
    watch, *monitors = build_monitors(parts)
    take = partial(train_step, ours.state, settings.samples, ours.config, context)
    sets = {NONE: (), **dict(zip(ours.config.logging.monitors, ((watch, m) for m in monitors), strict=True))}
    sets[ALL] = (watch, *monitors)
    return {name: MeasuredStep(take, some, shape.micro_batch_size) for name, some in sets.items()}


if __name__ == "__main__":
    run_tool(main, parser())
