"""A job checks its own nodes: the ones it would train on, not others that a separate job might get."""

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megachameleon.files import write_text
from megachameleon.launching.judging import Limits, judge, require_usable_folders, table
from megachameleon.launching.node_check import read_check
from megachameleon.launching.slurm import Job, step_words, this_job

SOME_BAD = 3
"""Exit status when there are bad nodes."""
LIMITS = ("celsius", "idle_gib", "clock_seconds", "of_median")


def inspect(job: Job, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Check the nodes of the job, print one table, and return what is wrong with bad ones.

    Args:
        arguments: of `build_parser`.

    Raises:
        ValueError: no node can use one of the folders.
    """
    results = arguments.results
    results.mkdir(parents=True, exist_ok=True)
    command = [
        *step_words(job, srun_flags=arguments.srun_flags, inside=arguments.inside, python=arguments.python),
        "--ranks-per-node", str(arguments.ranks_per_node), "--logs", str(results / "logs"),
        "--", "-m", "megachameleon.launching.preflight", "--results", str(results),
        "--storage-mb", str(arguments.storage_mb), "--message-mb", str(arguments.message_mb),
        "--timeout", str(arguments.timeout), "--folders", *map(str, arguments.folders),
    ]  # fmt: skip
    subprocess.run(command, check=False)  # what failed is in the findings, or in their absence
    # The folder may hold what an earlier check found on other nodes.
    checks = [read_check(path) for path in sorted(results.glob("*.json")) if path.stem in job.hosts]
    require_usable_folders(checks, arguments.folders)
    has_gpus = any(check.gpus for check in checks)
    gpus = arguments.gpus if arguments.gpus is not None else arguments.ranks_per_node * has_gpus
    limits = Limits(gpus=gpus, **{name: getattr(arguments, name) for name in LIMITS})
    faults = judge(checks, job.hosts, limits)
    print(table(checks, faults), flush=True)
    if not has_gpus:
        print("no node has nvidia-smi: GPUs were not checked, the rest was", flush=True)
    return faults


def exclude(path: str, faults: Mapping[str, Sequence[str]]) -> None:
    """Add bad nodes to a file of one a line, with the reason and the date; nodes that are in it stay as they are."""
    file = Path(path)
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    known = set(read_excluded(path))
    today = time.strftime("%F %T")
    # Only added to: a person may have edited the file, and --exclude lives from it.
    lines = [f"{host}  # {today}: {'; '.join(found)}\n" for host, found in faults.items() if host not in known]
    write_text(file, before + "".join(lines))


def read_excluded(path: str) -> tuple[str, ...]:
    """Node names from a file of one a line, with comments after #; none if it is not there yet."""
    if not path or not Path(path).is_file():
        return ()
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return tuple(dict.fromkeys(name for line in lines if (name := line.partition("#")[0].strip())))


def build_parser() -> argparse.ArgumentParser:
    """The command line; a training job uses it, too, with PREFLIGHT_FLAGS."""
    parser = argparse.ArgumentParser(
        description="Check the nodes of this SLURM job, name bad ones, and write them to a file for --exclude.",
        epilog="""\
examples (in a batch script):
  python -m megachameleon.launching.inspection --ranks-per-node 8 --results logs/preflight-1 --folders runs /data

exit status: 0 all good, 3 some are bad, 2 bad input, such as a folder that no node can use""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks-per-node", type=int, required=True, metavar="N")
    add("--results", type=Path, required=True, help="shared folder for findings and logs")
    add(
        "--folders", type=Path, nargs="*", default=[], help="every node must be able to write there; the first is timed"
    )
    add("--exclude-file", default="bad_nodes.txt", help="bad nodes are added to it (default bad_nodes.txt)")
    add("--python", default=sys.executable, help="of the ranks, inside the container if there is one")
    add("--srun-flags", default="", help="more words for srun")
    add("--inside", default="", help="words before the ranks' Python")
    add("--storage-mb", type=float, default=1024, metavar="MB", help="to write and read (default 1024)")
    add("--message-mb", type=float, default=256, metavar="MB", help="to all-reduce (default 256)")
    add("--timeout", type=float, default=120, metavar="S", help="of a collective (default 120)")
    add("--gpus", type=int, default=None, help="that each node must have (default: one for each rank, if any has one)")
    for name in LIMITS:
        default = getattr(Limits(), name)
        add(f"--{name.replace('_', '-')}", type=float, default=default, help=f"limit (default {default})")
    return parser


def main() -> int:
    """The check as a job of its own, see examples/slurm/preflight.sbatch."""
    arguments = build_parser().parse_args()
    faults = inspect(this_job(), arguments)
    if not faults:
        return 0
    exclude(arguments.exclude_file, faults)
    print(f"written to {arguments.exclude_file}: sbatch --exclude, or tools/launch.py --exclude-file, leaves them out")
    return SOME_BAD


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
