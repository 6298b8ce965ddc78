"""The few things asked of SLURM from inside a job."""

import math
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

INHERITED = re.compile(r"^(SLURM|SLURMD|SLURM_STEP|SBATCH)_")
KEPT = ("SLURM_CONF",)  # by it SLURM's commands find their controller


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The job that this process is in."""

    id: str
    """SLURM's number."""
    life: int
    """How often it was requeued before."""
    hosts: list[str]
    """Its nodes, the first is where ranks meet."""

    @property
    def name(self) -> str:
        """The id of this life: 1234.0."""
        return f"{self.id}.{self.life}"


def this_job() -> Job:
    """The job of this batch script.

    Raises:
        ValueError: there is none.
    """
    try:
        job, nodes = os.environ["SLURM_JOB_ID"], os.environ["SLURM_JOB_NODELIST"]
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: not set; this belongs in a batch script, see examples/slurm") from None
    hosts = ask("scontrol", "show", "hostnames", nodes).split()
    if not hosts:
        raise ValueError(f"SLURM_JOB_NODELIST: scontrol shows no host in {nodes!r}")
    return Job(id=job, life=int(os.environ.get("SLURM_RESTART_COUNT", "0")), hosts=hosts)


def master_port(job: Job) -> int:
    """A port below the ephemeral range that neighbouring jobs and other lives of this one do not use."""
    # Neighbouring jobs are 7 ports apart, which leaves room for as many lives of each.
    return 20_000 + (int(job.id) * 7 + job.life) % 10_000


def ask(*words: str, environment: Mapping[str, str] | None = None) -> str:
    """The output of a SLURM command.

    Raises:
        RuntimeError: it failed; with its own words.
    """
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout.strip()


def step_words(job: Job, *, srun_flags: str, inside: str, python: str) -> list[str]:
    """The beginning of a command that starts one launcher on each node of the job.

    Args:
        srun_flags: more words for srun, such as pyxis' --container-image.
        inside: words before Python, such as `apptainer exec --nv IMAGE`.
        python: of the launcher and the ranks.
    """
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")  # srun does not inherit it from sbatch
    return [
        # One launcher of ours a node: torchrun dies of USR1, or ends with 1 whatever its ranks return.
        "srun", f"--nodes={len(job.hosts)}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--export=ALL",
        *([f"--cpus-per-task={cpus}"] if cpus else []), *srun_flags.split(), *inside.split(), python,
        "-m", "megachameleon.launching.node", "--master", f"{job.hosts[0]}:{master_port(job)}",
    ]  # fmt: skip


def ended_early(job: Job) -> bool:
    """Whether SLURM is ending this job before its time: cancelled by a person, or pre-empted by another job.

    `scontrol requeue` would bring a cancelled job back; a pre-empted one is requeued by SLURM.
    """
    shown = ask("scontrol", "show", "job", job.id)
    found = dict(re.findall(r"(JobState|RunTime|TimeLimit)=(\S+)", shown))
    # TIMEOUT is the end of its time, after which the keeper is the one who goes on.
    if found.get("JobState") in ("RUNNING", "TIMEOUT"):
        return False
    return seconds_of(found.get("RunTime", "")) < seconds_of(found.get("TimeLimit", ""))


def seconds_of(duration: str) -> float:
    """SLURM's [D-]HH:MM:SS in seconds; infinite for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", duration)
    if not found:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def requeue(job: Job) -> bool:
    """Have SLURM start this job again under its id; False where the site or `--no-requeue` forbids it.

    Raises:
        RuntimeError: it cannot just now, for it is requeueing a pre-empted job itself, or its controller is away.
    """
    try:
        ask("scontrol", "requeue", job.id)
    except RuntimeError as error:
        # No other refusal: while SLURM requeues a pre-empted job itself, a follow-up would be a second one.
        if "disabled" in str(error):
            return False
        raise
    return True


def submit_follow_up(job: Job, script: str, arguments: Sequence[str], exclude: Sequence[str] = ()) -> str:
    """Submit the same work as a new job that waits for this one's end, and have waiting jobs wait for it instead.

    By `afterany`, not by `singleton`: that would wait for every other job of the same name, too.

    Args:
        script, arguments: of the batch job.
        exclude: nodes that the new job must not get.

    Returns:
        the new job's id.
    """
    shape = [
        f"--{option}={value}"
        for option, value in {
            "job-name": os.environ.get("SLURM_JOB_NAME"),
            "nodes": os.environ.get("SLURM_JOB_NUM_NODES"),
            "partition": os.environ.get("SLURM_JOB_PARTITION"),
            "account": os.environ.get("SLURM_JOB_ACCOUNT"),
            "qos": os.environ.get("SLURM_JOB_QOS"),
            "gpus-per-node": os.environ.get("SLURM_GPUS_PER_NODE"),
            "cpus-per-task": os.environ.get("SLURM_CPUS_PER_TASK"),
            "time": ask("squeue", "--noheader", "--jobs", job.id, "--format=%l"),
            "output": os.environ.get("JOB_OUTPUT"),
            "exclude": ",".join(exclude),
            "dependency": f"afterany:{job.id}",
        }.items()
        if value
    ]
    # variables of this life, such as its restart count, would be taken for the new job's own
    clean = {key: value for key, value in os.environ.items() if key in KEPT or not INHERITED.match(key)}
    # With several clusters --parsable says `id;cluster`.
    new = ask("sbatch", "--parsable", *shape, script, *arguments, environment=clean).split(";")[0]
    # Else the next stage of a chain waits for the success of a job that has ended with 75.
    redirect_dependents(job.id, new)
    return new


def redirect_dependents(old: str, new: str) -> None:
    """Replace `old` by `new` in what this user's pending jobs wait for."""
    waiting = ask("squeue", "--noheader", "--me", "--states=PENDING", "--format=%i|%E")
    for line in waiting.splitlines():
        job, _, dependency = line.partition("|")
        changed = replaced_dependency(dependency, old, new)
        # The new job itself waits for the old one, and shall.
        if changed is not None and job != new:
            ask("scontrol", "update", f"JobId={job}", f"Dependency={changed}")


def replaced_dependency(dependency: str, old: str, new: str) -> str | None:
    """`afterok:12(unfulfilled)` with 12 replaced, in the form that scontrol takes; None where 12 is not in it."""
    plain = re.sub(r"\([a-z]+\)", "", dependency)
    changed = re.sub(rf"(?<=:){re.escape(old)}(?!\d)", new, plain)
    return changed if changed != plain else None
