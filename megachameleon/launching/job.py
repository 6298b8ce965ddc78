"""The keeper of a training job, which its batch script becomes: run the step, judge its end, go on or raise the alarm.

It outlives what stops the step (SLURM warns the whole job), brings the first failure of all nodes to the front, writes
`attempts.jsonl` and `DONE` into the run's folder, and has the job requeued while that leads to new checkpoints.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megachameleon.files import read_json, write_json
from megachameleon.launching.attempts import (
    CUT_OFF,
    RUNNING,
    Attempt,
    Decision,
    decide,
    newest_step,
    read_attempts,
    write_attempts,
)
from megachameleon.launching.failures import BAD_INPUT, FAILED, FINISHED, STOPPED
from megachameleon.launching.inspection import build_parser, exclude, inspect, read_excluded
from megachameleon.launching.records import Outcome, outcome
from megachameleon.launching.slurm import Job, ended_early, master_port, requeue, step_words, submit_follow_up, this_job

DONE_FILE = "DONE"
LOG_FOLDER = "logs"
BAD_NODES = "refused"
"""How the line of an attempt begins that did not train, for its nodes were bad."""
ALERT_SECONDS = 60
"""Longest time for the command that alerts a person."""
REQUEUE_SECONDS = 600
"""How long to ask for a requeue while SLURM's controller is away."""
SUBMISSION = "MEGACHAMELEON_SUBMISSION"
"""Names the job that a person submitted, in the environment of its follow-up jobs."""


def run_folder(training: Sequence[str]) -> Path:
    """The output_dir of `CONFIG.yaml [key=value ...]`, read as text: a host's Python may lack a YAML parser.

    Raises:
        ValueError: it is not said.
    """
    config, *overrides = training
    named = [word.removeprefix("output_dir=") for word in overrides if word.startswith("output_dir=")]
    if not named and Path(config).is_file():
        lines = Path(config).read_text(encoding="utf-8").splitlines()
        # A comment of YAML begins with a space and #.
        named = [line.partition(":")[2].split(" #")[0] for line in lines if line.startswith("output_dir:")]
    if not named:
        raise ValueError(f"{config}: no output_dir; set it there, or append output_dir=FOLDER to the command")
    return Path(named[-1].strip().strip("\"'"))


def digest(training: Sequence[str]) -> str:
    """What a DONE mark is valid for: the configuration file's bytes and the overrides."""
    config = Path(training[0])
    content = config.read_bytes() if config.is_file() else b""
    # Separated by what no word contains, so that words cannot run into each other.
    return hashlib.sha256(b"\0".join([content, *(word.encode() for word in training[1:])])).hexdigest()


def is_done(run: Path, training: Sequence[str]) -> bool:
    """Whether this very run has finished before; a configuration changed since then, to train longer say, has not."""
    return digest(training) in finished(run)


def finished(run: Path) -> dict[str, int]:
    """Digests of the configurations that this run has finished, and their last steps.

    Several, because a later stage goes on in the same folder with a longer configuration.
    """
    path = run / DONE_FILE
    return read_json(path) if path.is_file() else {}


def keep(arguments: argparse.Namespace) -> int:
    """Run one attempt of a job and return the batch script's exit status."""
    training = arguments.training
    run = arguments.run_dir or run_folder(training)
    if is_done(run, training):
        say(f"{run} has finished already; remove {run / DONE_FILE} to run it again")
        return FINISHED
    job = this_job()
    attempts = read_attempts(run)
    if attempts and attempts[-1].line == RUNNING:
        # Nobody lived to say how that attempt ended, so this one does.
        attempts[-1] = replace(attempts[-1], line=CUT_OFF, after=newest_step(run))
        write_attempts(run, attempts)
        decision = judge(attempts, arguments)
        if decision.action == "alert" and attempts[-1].submission == submission(job):
            return call_a_person(job, run, decision, FAILED, arguments)  # SLURM alone would requeue for ever
    if attempts:
        say(f"attempt {len(attempts) + 1}; {attempts[-1].job} ended: {attempts[-1].line}")
    attempts.append(attempt(job, run, attempts, arguments))
    write_attempts(run, attempts)
    say(attempts[-1].line)
    return conclude(job, run, attempts, arguments)


def conclude(job: Job, run: Path, attempts: list[Attempt], arguments: argparse.Namespace) -> int:
    """Finish, go on or raise the alarm; returns the batch script's exit status."""
    last = attempts[-1]
    decision = judge(attempts, arguments)
    if decision.action == "finish":
        write_json(run / DONE_FILE, {**finished(run), digest(arguments.training): last.after})
        return FINISHED
    if decision.action == "rest":
        say(f"not started again: {decision.reason}")
        return last.status
    if decision.action == "alert":
        # 75 would tell whoever watches the job that it goes on.
        return call_a_person(job, run, decision, FAILED if last.status == STOPPED else last.status, arguments)
    say(f"again: {decision.reason}")
    go_on(job, arguments, leaves_nodes=last.line.startswith(BAD_NODES))
    return last.status


def judge(attempts: list[Attempt], arguments: argparse.Namespace) -> Decision:
    """What becomes of the job, by the limits of the command line."""
    return decide(attempts, max_attempts=arguments.max_attempts, max_idle=arguments.max_idle)


def call_a_person(job: Job, run: Path, decision: Decision, status: int, arguments: argparse.Namespace) -> int:
    """Say that the job does not go on by itself; returns the exit status."""
    say(f"not started again: {decision.reason}")
    alert(arguments.alert_command, f"{run}: job {job.id} needs a person: {decision.reason}")
    return status


def submission(job: Job) -> str:
    """The job that a person submitted: this one, or the one that it follows."""
    # In the environment, for sbatch hands it on to a follow-up job.
    return os.environ.setdefault(SUBMISSION, job.id)


def attempt(job: Job, run: Path, earlier: list[Attempt], arguments: argparse.Namespace) -> Attempt:
    """Run the step of this life, and tell how it ended."""
    before, start = newest_step(run), time.monotonic()
    logs = run / LOG_FOLDER / job.name
    logs.mkdir(parents=True, exist_ok=True)
    say(f"job {job.name} on {', '.join(job.hosts)}, meeting at port {master_port(job)}: logs of ranks in {logs}")
    now = Attempt(
        submission=submission(job), job=job.name, status=FAILED, line=RUNNING, before=before,
        after=before, hosts=job.hosts, seconds=0.0,
    )  # fmt: skip
    # Before anything that can be cut off: the next life finds in it that this one began.
    write_attempts(run, [*earlier, now])
    if arguments.preflight:
        try:
            bad = inspect(job, inspection_of(run, logs / "preflight", arguments))
        except ValueError as error:  # told as any end of an attempt, not left as one that is running
            return replace(now, status=BAD_INPUT, line=str(error))
        if bad:
            exclude(arguments.exclude_file, bad)
            return replace(now, line=f"{BAD_NODES} {', '.join(bad)}")
    code = run_step(step_command(job, run, logs, arguments))
    end = outcome(logs, job.hosts)
    if end.status == FINISHED and code:
        end = Outcome(status=code, line=f"srun ended with {code}, although every rank finished")
    seconds = round(time.monotonic() - start, 1)
    return replace(now, status=end.status, line=end.line, after=newest_step(run), seconds=seconds)


def inspection_of(run: Path, results: Path, arguments: argparse.Namespace) -> argparse.Namespace:
    """How the nodes of a training job are checked: like by preflight.sbatch, with PREFLIGHT_FLAGS."""
    # With "=": a value that begins with dashes would be taken for an option.
    words = [
        "--ranks-per-node", str(arguments.ranks_per_node), "--results", str(results), "--python", arguments.python,
        f"--srun-flags={arguments.srun_flags}", f"--inside={arguments.inside}", "--folders", str(run),
    ]  # fmt: skip
    return build_parser().parse_args([*words, *os.environ.get("PREFLIGHT_FLAGS", "").split()])


def step_command(job: Job, run: Path, logs: Path, arguments: argparse.Namespace) -> list[str]:
    """srun with one launcher a node."""
    return [
        *step_words(job, srun_flags=arguments.srun_flags, inside=arguments.inside, python=arguments.python),
        "--ranks-per-node", str(arguments.ranks_per_node), "--zero-when-stopped", "--logs", str(logs),
        "--heartbeat", str(run / "heartbeat.json"), "--start-within", str(arguments.start_within),
        "--stale-after", str(arguments.stale_after), "tools/train.py", *arguments.training,
    ]  # fmt: skip


def run_step(command: list[str]) -> int:
    """Run srun to its end; requests to stop are for the ranks, which get them from SLURM themselves."""
    step = subprocess.Popen(command)
    # with --signal=B:USR1@T only this process is told; srun passes it on, and the launcher ignores a repetition
    signal.signal(signal.SIGUSR1, lambda number, frame: step.send_signal(signal.SIGUSR1))
    # It must outlive the step: somebody has to judge how that ended.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    return step.wait()


def go_on(job: Job, arguments: argparse.Namespace, *, leaves_nodes: bool) -> None:
    """Requeue the job, or submit a follow-up where that is not allowed, or where it must not get the same nodes."""
    if ended_early(job):
        say("SLURM is ending the job: pre-empted, it comes back; cancelled, it does not until it is submitted again")
        return
    if not leaves_nodes and requeued(job):
        time.sleep(ALERT_SECONDS)  # SLURM ends this process meanwhile
        return
    avoided = read_excluded(arguments.exclude_file)
    new = submit_follow_up(job, arguments.script, arguments.training, avoided)
    why = f"without {', '.join(avoided)}" if leaves_nodes else "for requeueing is disabled here"
    say(f"job {new} follows, {why}; what waited for {job.id} waits for it")


def requeued(job: Job) -> bool:
    """Ask until SLURM has requeued the job, or says that this is disabled.

    A pre-empted job is requeued by SLURM itself, which refuses to do it twice and ends this process soon.
    """
    limit = time.monotonic() + REQUEUE_SECONDS
    while True:
        try:
            return requeue(job)
        except RuntimeError as error:
            say(str(error))
            if time.monotonic() > limit:
                raise
            time.sleep(10)


def alert(command: str, message: str) -> None:
    """Tell a person, by a command that gets the message as its last argument."""
    if not command:
        return
    try:
        subprocess.run([*command.split(), message], check=True, timeout=ALERT_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        say(f"the alert could not be sent: {error}")


def say(text: str) -> None:
    """A line in the job's log, marked as the keeper's."""
    print(f"{time.strftime('%F %T')} job: {text}", flush=True)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; batch scripts write it, see examples/slurm/train.sbatch."""
    parser = argparse.ArgumentParser(
        description="Keep a training job on SLURM: run, judge, requeue. Called by examples/slurm/train.sbatch.",
        epilog="""\
examples:
  exec python -m megachameleon.launching.job --script examples/slurm/train.sbatch --ranks-per-node 8 run.yaml
  exec python -m megachameleon.launching.job --script examples/slurm/train.sbatch --ranks-per-node 8 \\
      --srun-flags "--container-image=/images/mc.sqsh --container-mounts=/data:/data" run.yaml optimizer.lr=3e-4""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--script", required=True, help="the batch script, for a follow-up job where requeueing is disabled")
    add("--ranks-per-node", type=int, required=True, metavar="N")
    add("--run-dir", type=Path, default=None, help="the run's output_dir (default: read from the configuration)")
    add("--python", default=sys.executable, help="of the ranks, inside the container if there is one")
    add("--srun-flags", default="", help="more words for srun, such as pyxis' --container-image")
    add("--inside", default="", help="words before the ranks' Python, such as `apptainer exec --nv IMAGE`")
    add("--start-within", type=float, default=3600.0, metavar="S", help="seconds until the first heartbeat")
    add("--stale-after", type=float, default=1800.0, metavar="S", help="seconds without heartbeat that mean: hung")
    add("--max-attempts", type=int, default=200, metavar="N", help="attempts of the run in all (default 200)")
    add("--max-idle", type=int, default=3, metavar="N", help="attempts in a row without a new checkpoint (default 3)")
    add("--preflight", action="store_true", help="check the nodes first, and leave bad ones by a follow-up job")
    add("--exclude-file", default="bad_nodes.txt", help="where bad nodes are written (default bad_nodes.txt)")
    add("--alert-command", default="", help="gets a line as its last argument when a person is needed")
    add("training", nargs=argparse.REMAINDER, help="CONFIG.yaml [key.sub=value ...], as for tools/train.py")
    arguments = parser.parse_args(words)
    if not arguments.training:
        parser.error("give a configuration, such as run.yaml")
    return arguments


if __name__ == "__main__":
    try:
        sys.exit(keep(parse()))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
