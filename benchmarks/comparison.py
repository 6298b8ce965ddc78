"""Builds contestants with the same weights, checks that they compute the same, measures, and summarises."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestants.base import Contestant, Settings, build_contestant, import_contestant
from benchmarks.machine import PROJECT, describe_machine, device_name
from benchmarks.measuring import Plan, Timing, interleave
from benchmarks.parking import Parking
from benchmarks.report import Row, as_json, make_row
from benchmarks.resident import forget_peak, peak_resident_bytes, resident_bytes
from benchmarks.same_weights import Weights, require_same_loss
from benchmarks.shapes import peak_flops
from megachameleon.console import progress_bar

SEED = 1234
"""Of weights and tokens."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was measured."""

    rows: list[Row]
    """One a contestant, in the order given."""
    timings: list[Timing]
    """Every step that counts."""
    machine: dict[str, Any]
    """As `describe_machine`, before the first step."""
    resident_bytes: int | None
    """On the CPU, with one contestant only: what its steps needed beyond the process with its packages imported."""


def compare(
    names: Sequence[str], settings: Settings, plan: Plan, *, park: bool, check: bool, memory: dict[str, int | None]
) -> Comparison:
    """Measure contestants against the first of them.

    Args:
        park: move those who wait to the host's memory.
        check: refuse contestants that should compute the same loss as the first and do not.
        memory: bytes of contestants on the CPU, measured before.

    Raises:
        ValueError: a contestant is not installed, or computes another loss.
    """
    for name in names:
        import_contestant(name)
    device = settings.context.device
    machine = describe_machine(device)
    parking = Parking(device, enabled=park)
    # after packages are imported, which every contestant needs
    before = resident_bytes()
    contestants, first_losses = {}, {}
    for name in names:
        with parking.building(name):
            contestants[name], first_losses[name] = _build(name, settings)
    # before anything is timed: other losses mean another model, whose times say nothing
    if check:
        require_same_loss({n: first_losses[n] for n in names if contestants[n].same_function}, settings.precision)
    counted = forget_peak()
    turns = len(names) * (plan.rounds + plan.warmup)
    with progress_bar("measuring", turns) as bar:
        timings = interleave(contestants, plan, device, parking, bar.advance)
    peak = peak_resident_bytes() if counted and device.type == "cpu" and len(names) == 1 else None
    rows = [
        make_row(
            name,
            contestants[name].title,
            timings,
            names[0],
            settings.shape,
            first_loss=first_losses[name],
            peak_flops=peak_flops(device_name(device)) if settings.precision == "bf16" else None,
            peak_bytes=memory.get(name),
        )
        for name in names
    ]
    resident = None if peak is None or before is None else peak - before
    return Comparison(rows=rows, timings=timings, machine=machine, resident_bytes=resident)


def measure_memory(names: Sequence[str], arguments: Sequence[str]) -> dict[str, int | None]:
    """Peak memory on the CPU of each contestant, in a process of its own.

    Args:
        arguments: of the command line; a later option overrules an earlier one.

    Raises:
        RuntimeError: such a process failed.
    """
    found: dict[str, int | None] = {}
    # or each would start processes of its own, without end
    kept = [argument for argument in arguments if argument != "--memory"]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "one.json"
            own = ["--contestants", name, "--rounds", "1", "--warmup", "1", "--output", str(output)]
            command = [sys.executable, "-m", "benchmarks.train_step", *kept, *own]
            done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"--memory: measuring {name} failed: {done.stderr.strip()[-500:]}")
            found[name] = json.loads(output.read_text(encoding="utf-8"))["resident_bytes"]
    return found


def to_json(comparison: Comparison, settings: Settings, plan: Plan, command: Sequence[str]) -> str:
    """Everything, for `--output`."""
    return json.dumps(
        {
            "command": list(command),
            "machine": comparison.machine,
            "shape": asdict(settings.shape),
            "precision": settings.precision,
            "documents": settings.documents,
            "peer_z_loss": settings.peer_z_loss,
            "overrides": list(settings.overrides),
            "plan": asdict(plan),
            "resident_bytes": comparison.resident_bytes,
            **as_json(comparison.rows, comparison.timings),
        },
        indent=1,
    )


def _build(name: str, settings: Settings) -> tuple[Contestant, float]:
    """A contestant after its first step, which also allocates the optimizer's state, and the loss of that step."""
    contestant = build_contestant(name, settings)
    contestant.load(Weights(settings.shape, SEED, settings.context.device))
    return contestant, contestant.step(0)
