"""Train the ablations, several seeds of each, and say what the early warning was worth."""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from examples.ablations.alarm_verdict import RunResult, read_result
from examples.ablations.mixed_data import write_data
from examples.ablations.one_run import RunSpec, train_one
from examples.ablations.report import write_report
from examples.ablations.settings import SETTINGS, Setting
from megachameleon.console import progress_bar, run_tool, tool_parser

PROJECT = Path(__file__).resolve().parents[2]
RISING, NORMAL, BRISK = "rising", "normal", "brisk"
WATCH_AFTER = 40
"""Steps before which the early warning does not look."""
RUNS_OF_A_WORKER = 5
"""Before it is replaced."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that belong together in the report."""

    name: str
    """In the report, and of its folder."""
    settings: Sequence[Setting]
    """The models that are trained."""
    overrides: tuple[str, ...]
    """Of all its settings."""


def groups(arguments: argparse.Namespace) -> list[Group]:
    """All that is trained: every setting at a rising rate, the whole recipes at constant ones, and the policies."""
    steps = arguments.steps
    rising = (
        f"optimizer.lr={arguments.lr}",
        f"training.num_steps={steps}",
        # a warm-up over the whole run is the rising rate
        f"optimizer.warmup_steps={steps - 1}",
        f"health.early_warning_after={WATCH_AFTER}",
    )
    constant = (f"training.num_steps={2 * steps}", f"optimizer.warmup_steps={WATCH_AFTER}")
    whole = [setting for setting in SETTINGS if setting.name in ("7b", "34b")]
    fragile = [setting for setting in SETTINGS if setting.name == arguments.policy_setting]
    policies = [
        Group(name=policy, settings=fragile, overrides=(*rising, f"health.early_warning={policy}"))
        for policy in arguments.policies
    ]
    return [
        Group(name=RISING, settings=SETTINGS, overrides=rising),
        Group(name=NORMAL, settings=whole, overrides=("optimizer.lr=3e-3", *constant)),
        Group(name=BRISK, settings=whole, overrides=("optimizer.lr=1e-2", *constant)),
        *policies,
    ]


def main(arguments: argparse.Namespace) -> None:
    """Train what is missing, then write the report."""
    output = arguments.output.absolute()
    write_data(output / "data")
    plan = {
        (group.name, setting.name, seed): RunSpec(
            folder=output / group.name / f"{setting.name}-seed{seed}",
            data=output / "data",
            overrides=(*group.overrides, *setting.overrides, f"training.seed={seed}"),
        )
        for group in groups(arguments)
        for seed in arguments.seeds
        for setting in group.settings
    }
    missing = [spec for spec in plan.values() if not spec.is_done()]
    start = time.monotonic()
    with progress_bar("runs", len(plan), done=len(plan) - len(missing)) as bar:
        for path in _train(missing, arguments.jobs):
            bar.advance()
            bar.note(path.parent.name)
    if missing:
        print(f"{len(missing)} runs in {(time.monotonic() - start) / 60:.1f} min, {arguments.jobs} at a time")
    results: dict[str, list[RunResult]] = {}
    for (group, setting, seed), spec in plan.items():
        results.setdefault(group, []).append(read_result(spec.outcome, setting, seed))
    print(write_report(results, arguments.pictures))


def _train(specs: Sequence[RunSpec], jobs: int) -> Iterator[Path]:
    """Run them in worker processes of one thread each, which train several one after the other: loading torch is slow.

    Workers are replaced now and then, because what torch keeps of a process group adds up.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    for start in range(0, len(specs), RUNS_OF_A_WORKER * jobs):
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(train_one, spec) for spec in specs[start : start + RUNS_OF_A_WORKER * jobs]]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    parser = tool_parser(
        "Train small models without what keeps them stable, and tell how early the alarm came. Run again to go on.",
        """\
  python -m examples.ablations.run                                       # all, 2 runs at a time
  python -m examples.ablations.run --seeds 2 --jobs 1 --output /tmp/try  # a look
  python -m examples.ablations.run --pictures docs/images                # and the pictures of docs/stability.md""",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"), help="default %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6], help="default %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of each run (default %(default)s)")
    parser.add_argument("--lr", default="0.4", help="where the rising learning rate ends (default %(default)s)")
    parser.add_argument("--policies", nargs="*", default=["lower_lr", "rollback"], help="default %(default)s")
    parser.add_argument("--policy-setting", default="7b-no-qk-norm", help="on what policies act (default %(default)s)")
    parser.add_argument("--pictures", type=Path, default=None, help="folder for the pictures (default: the output's)")
    run_tool(main, parser)
