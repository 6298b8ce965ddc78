"""From raw text and pictures to a model that writes and draws, and a page about it. `make demo` calls this."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil

from examples.demo.pipeline import Pipeline, StageError
from examples.demo.profiles import FULL, QUICK
from examples.demo.run_folder import RunFolder
from examples.demo.stages import GLOBAL_BATCH_SIZE, Machine, build_stages
from megachameleon.console import run_tool, tool_parser
from megachameleon.files import require_free_space

PROJECT = Path(__file__).resolve().parents[2]
DISK_BYTES = 2_000_000_000
"""Room that the demo asks for before it begins."""
MEMORY_BYTES = 3_000_000_000
"""What it takes at most."""


def main(arguments: argparse.Namespace) -> None:
    """Check the machine, run the stages, and say where the page is."""
    run = RunFolder(arguments.run.absolute())
    require_free_space(run.root, DISK_BYTES, "the demo")
    warn_of_little_memory()
    # stages run as files in tools/, whose folder Python would search instead of the project's
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    stages = build_stages(run, QUICK if arguments.quick else FULL, find_machine(arguments.processes))
    names = [stage.name for stage in stages]
    for name in arguments.again:
        if name not in names:
            raise ValueError(f"--again: {name!r} is no stage; the stages are {', '.join(names)}")
    pipeline = Pipeline(stages, run.stages_json, PROJECT)
    # before the run: a stage that is done anew takes all that need it along
    pipeline.forget(arguments.again)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        pipeline.run()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except StageError as failure:
        print(f"error: {failure}; once mended, the same command goes on from here", file=sys.stderr)
        sys.exit(failure.status)
    print(run.report)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Treat a request to end, or a terminal that closes, like Ctrl-C."""
    raise KeyboardInterrupt


def find_machine(processes: int | None) -> Machine:
    """Count cores and GPUs; by default one process for each GPU, or two on a machine without.

    Raises:
        ValueError: fewer than one process, more than there are GPUs, or a number that does not divide the batch.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"--processes: {processes} must be at least 1")
    if processes is not None and GLOBAL_BATCH_SIZE % processes:
        raise ValueError(f"--processes: {processes} does not divide the batch of {GLOBAL_BATCH_SIZE}; use 1, 2 or 4")
    gpus = count_gpus()
    if processes is not None and 0 < gpus < processes:
        raise ValueError(
            f"--processes: {processes} is more than the {gpus} GPU(s) here, and each process needs its own; "
            "give no more than that, or set CUDA_VISIBLE_DEVICES= (empty) to use the CPU"
        )
    most = max(n for n in range(1, GLOBAL_BATCH_SIZE + 1) if GLOBAL_BATCH_SIZE % n == 0 and n <= max(gpus, 1))
    return Machine(cores=len(os.sched_getaffinity(0)), processes=processes or (most if gpus else 2), gpus=gpus)


def count_gpus() -> int:
    """GPUs that PyTorch can use; PyTorch is only asked where there is a driver, for that takes seconds."""
    if shutil.which("nvidia-smi") is None:
        return 0
    question = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=False)
    return int(answer.stdout) if answer.returncode == 0 else 0


def warn_of_little_memory() -> None:
    """Say so when memory may not last."""
    available = psutil.virtual_memory().available
    if available < MEMORY_BYTES:
        print(
            f"warning: {available / 1e9:.1f} GB of memory are available and the demo takes up to "
            f"{MEMORY_BYTES / 1e9:.0f} GB; close other programs if it is killed",
            file=sys.stderr,
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "Run the whole demo: data, tokenizers, shards, training, drawings, evaluation, report. Stages that are done "
        "are skipped; an interrupted one goes on.",
        """\
  python -m examples.demo.run_demo
  python -m examples.demo.run_demo --processes 4
  python -m examples.demo.run_demo --again generation""",
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of all results (default runs/demo)")
    parser.add_argument("--processes", type=int, help="of training: 1, 2 or 4 (default: one for each GPU, or 2)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: every stage works, the drawings do not")
    parser.add_argument("--again", action="append", default=[], metavar="STAGE", help="do a stage anew; repeatable")
    return parser


if __name__ == "__main__":
    run_tool(main, build_parser())
