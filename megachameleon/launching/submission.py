"""A training job for SLURM: the batch script of examples/slurm with a run's own header, and its submission.

There is one script, examples/slurm/train.sbatch; what is submitted is that script with other `#SBATCH` lines and
exported variables, so that what --print shows can be read, kept and submitted by hand.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megachameleon.config import RunConfig
from megachameleon.launching.slurm import ask

SCRIPTS = Path("examples/slurm")
SCRIPT_NAME = "train.sbatch"
SCRIPT_FILE = "{name}.sbatch"
"""In the run's folder: what was submitted, and is again where requeueing is disabled."""
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
"""What sbatch takes for --time: minutes, minutes:seconds, hours:minutes:seconds, and days- before hours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a job asks for, apart from what it trains. Empty strings leave the choice to the script or the site."""

    nodes: int = 1
    gpus_per_node: int = 8
    """0 on clusters without GPUs; then `ranks_per_node` must be said."""
    ranks_per_node: int = 0
    """0: one for each GPU."""
    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""
    """Limit, in one of the forms of `TIME`."""
    name: str = ""
    """Of the job."""
    container: str = ""
    """Path of an image that every node sees; empty: no container."""
    container_runtime: str = ""
    """What runs the image; empty: the script's default."""
    mounts: str = ""
    """Folders that the container sees, in one list without spaces."""
    site: str = ""
    """A file in place of examples/slurm/site.env."""
    exclude: tuple[str, ...] = ()
    """Nodes not to be taken."""
    exclude_file: str = ""
    """Where the check before training adds nodes that it refuses."""
    preflight: bool = False
    save_seconds: int = 300
    """How long before the time limit SLURM asks for a save: the longest step, plus a save, plus 30 s."""
    options: tuple[str, ...] = field(default=())
    """More of sbatch's options, such as --constraint=h100."""

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * (self.ranks_per_node or self.gpus_per_node)

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        for name in ("nodes", "save_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(self, name)} must be at least 1")
        if self.gpus_per_node < 0 or self.ranks_per_node < 0 or self.world_size < 1:
            raise ValueError(
                f"--gpus-per-node: {self.gpus_per_node} leaves no process; on nodes without GPUs, say --ranks-per-node"
            )
        # They end up among the words for srun, which are split at spaces.
        for name in ("container", "mounts"):
            if any(letter.isspace() for letter in getattr(self, name)):
                raise ValueError(f"--{name}: {getattr(self, name)!r} has a space in it; choose a path without")
        if self.time and not TIME.fullmatch(self.time):
            raise ValueError(
                f"--time: {self.time!r} is no limit that SLURM knows; write it like 24:00:00 or 2-12:00:00"
            )
        if self.site and not Path(self.site).is_file():
            raise ValueError(f"--site: {self.site}: no such file; copy examples/slurm/site.env and edit it")
        if self.container and "/" not in self.container:
            raise ValueError(
                f"--container: {self.container} must be a path with a /, to an image imported beforehand; "
                "a name would be pulled on every node at every start"
            )


def require_fitting(config: RunConfig, request: Request, name: str) -> None:
    """Refuse a layout that does not divide over the job's processes, before it waits in the queue.

    Raises:
        ValueError: names the field, its value and what would work, and the size of the job.
    """
    try:
        config.validate_world(request.world_size)
    except ValueError as error:
        ranks = request.ranks_per_node or request.gpus_per_node
        nodes = "1 node" if request.nodes == 1 else f"{request.nodes} nodes"
        raise ValueError(f"{name} on {nodes} x {ranks} = {request.world_size} ranks: {error}") from None


def header(request: Request) -> dict[str, str]:
    """sbatch's options by name, those of the script that the request replaces or adds."""
    chosen = {
        "job-name": request.name,
        "nodes": str(request.nodes),
        "gpus-per-node": str(request.gpus_per_node) if request.gpus_per_node else "",
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "time": request.time,
        "exclude": ",".join(request.exclude),
        # Without `B:`, which would tell the batch shell alone: the ranks are to hear it.
        "signal": f"USR1@{request.save_seconds}",
    }
    for option in request.options:
        name, _, value = option.removeprefix("--").partition("=")
        chosen[name] = value
    return {name: value for name, value in chosen.items() if value or f"--{name}" in request.options}


def variables(request: Request, run: Path, project: Path, script: Path) -> dict[str, str]:
    """What the script reads from its environment."""
    chosen = {
        "PROJECT": str(project),
        "RUN_DIR": str(run),
        "SCRIPT": str(script),
        "RANKS_PER_NODE": str(request.ranks_per_node or request.gpus_per_node),
        "SITE_ENV": request.site,
        "CONTAINER": request.container,
        "CONTAINER_RUNTIME": request.container_runtime,
        "MOUNTS": request.mounts,
        "PREFLIGHT": "1" if request.preflight else "",
        "EXCLUDE_FILE": request.exclude_file,
    }
    return {name: value for name, value in chosen.items() if value}


def render(template: str, request: Request, exports: dict[str, str], training: Sequence[str]) -> str:
    """The batch script for one run.

    Args:
        template: text of examples/slurm/train.sbatch.
        exports: see `variables`.
        training: CONFIG.yaml and overrides, as for tools/train.py.
    """
    options = header(request)
    lines, rest = [], dict(options)
    for line in template.splitlines():
        name = line.removeprefix("#SBATCH --").partition("=")[0] if line.startswith("#SBATCH --") else ""
        if name == "gpus-per-node" and not request.gpus_per_node:
            continue
        lines.append(_directive(name, rest.pop(name)) if name in rest else line)
    # sbatch reads no #SBATCH line behind the first command.
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    lines[last + 1 : last + 1] = [_directive(name, value) for name, value in rest.items()]
    start = lines.index("set -euo pipefail") + 1
    lines[start:start] = [
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        f"set -- {shlex.join(training)}",
    ]
    return "\n".join(lines) + "\n"


def _directive(name: str, value: str) -> str:
    return f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"


def require_sbatch() -> None:
    """Refuse a machine without SLURM.

    Raises:
        ValueError: sbatch is not on the PATH.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "sbatch: SLURM's command was not found on this machine; submit from a login node of the cluster, or see "
            "the script with --print"
        )


def submit(script: Path, *options: str, arguments: Sequence[str] = ()) -> str:
    """Submit a script and return the job's id.

    Raises:
        RuntimeError: sbatch refused, with its own words.
    """
    return ask("sbatch", "--parsable", *options, str(script), *arguments).split(";")[0]


def test_only(text: str) -> str:
    """What SLURM says of a script without queueing it: when and where it would start.

    Raises:
        ValueError: it would never, with SLURM's reason.
    """
    done = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True, check=False)
    # sbatch says it on stderr, also where all is well.
    said = " ".join(done.stderr.split()).removeprefix("sbatch: ")
    if done.returncode:
        raise ValueError(f"sbatch --test-only: {said}; see `sinfo`, or ask for less")
    return said
