"""A real SLURM cluster on one machine, for tests: controller, nodes and munge from Debian's packages, no service.

    python tests/slurm/cluster.py start [--tracker linuxproc]      install if needed, start, wait until nodes are idle
    eval "$(python tests/slurm/cluster.py env)"                    sbatch, squeue, scancel ... of this cluster
    python tests/slurm/cluster.py stop

Each node has its own network, hostname and /etc/hosts (Linux namespaces on a private bridge), so that jobs rendezvous
as between machines; that needs root. Packages are downloaded with apt's own tools and unpacked under the prefix
(MEGACHAMELEON_SLURM, by default /tmp/megachameleon-slurm); no maintainer script runs and nothing is written elsewhere.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "libmunge2")
CLIENTS = ("sbatch", "srun", "scancel", "squeue", "sinfo", "scontrol")
DAEMONS = ("slurmctld", "slurmd", "slurmstepd", "munged")
PRESENT = {"libc6", "libc-bin", "base-files", "perl", "systemd", "dbus", "init-system-helpers", "ucf", "adduser"}
FREEZER = Path("/sys/fs/cgroup/freezer")
MARK = "MEGACHAMELEON_SLURM_NODE"
"""In the environment of every process of the cluster and its jobs; says which node it belongs to."""
PORT = 17_917
NETWORK = "10.214.0."

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=login({network}1)
SlurmctldPort={port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
AuthInfo=socket={prefix}/munge/socket
SlurmUser=root
SlurmdUser=root
PluginDir={plugins}
StateSaveLocation={prefix}/state
SlurmdSpoolDir={prefix}/spool/%n
SlurmctldPidFile={prefix}/run/slurmctld.pid
SlurmdPidFile={prefix}/run/%n.pid
SlurmctldLogFile={prefix}/log/slurmctld.log
SlurmdLogFile={prefix}/log/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/{tracker}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2,bf_interval=2
PriorityType=priority/basic
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
TCPTimeout=2
MessageTimeout=10
KillWait=15
MinJobAge=900
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preemption}
AccountingStorageType=accounting_storage/none
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES PriorityTier=10 DefaultTime=10 MaxTime=2-0 State=UP
PartitionName=preemptible Nodes=ALL PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE DefaultTime=10 MaxTime=2-0 State=UP
"""


class ClusterError(RuntimeError):
    """The cluster cannot be had here."""


def why_not() -> str | None:
    """What this machine lacks, or None."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces and device nodes"
    for command in ("apt-get", "dpkg", "unshare", "nsenter"):
        if shutil.which(command) is None:
            return f"needs {command} (Debian or Ubuntu)"
    probe = "hostname x && mount --bind /etc/hosts /etc/hosts"
    done = subprocess.run(["unshare", "--net", "--uts", "--mount", "sh", "-c", probe], capture_output=True, check=False)
    return None if done.returncode == 0 else "namespaces cannot be made here (a container without privileges?)"


def trackers() -> list[str]:
    """The process trackers that work here: cgroup needs a writable v1 freezer."""
    probe = FREEZER / f"megachameleon-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return ["linuxproc"]
    return ["cgroup", "linuxproc"]


class Cluster:
    """`num_nodes` emulated nodes with a few pretended cores and GPUs each."""

    def __init__(self, prefix: Path, *, num_nodes: int = 4, cpus: int = 4, gpus: int = 2, tracker: str = "") -> None:
        self.prefix = prefix.absolute()
        if len(str(self.prefix)) > 60:
            raise ClusterError(f"{prefix}: longer than 60 characters, too long for a socket's name")
        self.num_nodes, self.cpus, self.gpus = num_nodes, cpus, gpus
        self.tracker = tracker or trackers()[0]
        self.root, self.bin, self.etc = (self.prefix / name for name in ("root", "bin", "etc"))
        self.run_folder, self.logs = self.prefix / "run", self.prefix / "log"

    # ---- installing --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Download and unpack the packages, once for a prefix."""
        mark = self.root / ".installed"
        if mark.exists():
            return
        apt = self.prefix / "apt"
        for folder in ("state/lists/partial", "cache/archives/partial", "debs"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        options = [
            f"-oDir::State={apt}/state", f"-oDir::State::Lists={apt}/state/lists", f"-oDir::Cache={apt}/cache",
            "-oDir::State::status=/var/lib/dpkg/status", "-oAPT::Sandbox::User=", "-oDebug::NoLocking=1",
            "-oAcquire::Retries=3", "-q",
        ]  # fmt: skip
        command(["apt-get", *options, "update"])
        wanted = [*PACKAGES, *([] if shutil.which("ip") else ["iproute2"])]
        plan = command(["apt-get", *options, "install", "--simulate", "--no-install-recommends", *wanted])
        new = {line.split()[1] for line in plan.splitlines() if line.startswith("Inst ") and "[" not in line.split()[2]}
        command(["apt-get", *options, "download", *sorted((new | set(wanted)) - PRESENT)], folder=apt / "debs")
        for package in sorted((apt / "debs").glob("*.deb")):
            command(["dpkg", "-x", str(package), str(self.root)])
        mark.touch()

    def _program(self, name: str) -> Path:
        places = [self.root / folder / name for folder in ("usr/sbin", "usr/bin", "sbin", "bin")]
        return next(place for place in places if place.exists())

    @property
    def _plugins(self) -> Path:
        return next((self.root / "usr/lib").rglob("auth_munge.so")).parent

    def version(self) -> tuple[int, ...]:
        """SLURM's, such as (22, 5, 8)."""
        text = command([str(self.bin / "slurmctld"), "-V"]).split()[-1]
        return tuple(int(part) for part in text.split("."))

    def _wrap_programs(self) -> None:
        """Short scripts that give each program its libraries; clients enter the login node's namespaces."""
        for daemon in (self.root / "usr/sbin").glob("*-wlm"):  # Debian chooses between emulators by alternatives
            link = daemon.with_name(daemon.name.removesuffix("-wlm"))
            if not link.exists():
                link.symlink_to(daemon.name)
        self.bin.mkdir(parents=True, exist_ok=True)
        libraries = f"{self._plugins.parent}:{self._plugins}"
        loader = next(word for word in command(["ldd", "/bin/sh"]).split() if "/ld-linux" in word)
        enter = f'[ -n "$SLURMD_NODENAME${MARK}" ] || {MARK}=client exec nsenter -t $(cat {self.run_folder}/login.pid)'
        for name in (*CLIENTS, *DAEMONS):
            lines = ["#!/bin/sh", f"export SLURM_CONF={self.etc}/slurm.conf"]
            if name in DAEMONS:  # newer ones start themselves again, and need their own name for that
                lines += [f"export LD_LIBRARY_PATH={libraries}", f'exec {self._program(name)} "$@"']
            else:  # the loader is called by name, so that no LD_LIBRARY_PATH leaks into jobs
                lines += [
                    f'{enter} -n -u -m --wd="$PWD" -- "$0" "$@"',
                    f'exec {loader} --library-path {libraries} --argv0 {name} {self._program(name)} "$@"',
                ]
            (self.bin / name).write_text("\n".join(lines) + "\n")
            (self.bin / name).chmod(0o755)
        if not shutil.which("ip"):
            run = f'exec {loader} --library-path {libraries} {self._program("ip")} "$@"'
            (self.bin / "ip").write_text(f"#!/bin/sh\n{run}\n")
            (self.bin / "ip").chmod(0o755)

    # ---- configuring -------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        for folder in (self.etc, self.run_folder, self.logs, self.prefix / "state", self.prefix / "dev"):
            folder.mkdir(parents=True, exist_ok=True)
        munge = self.prefix / "munge"
        munge.mkdir(mode=0o755, exist_ok=True)
        key = munge / "key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(1024))
        names = self.nodes()
        hosts = [f"{NETWORK}1 login", *(f"{NETWORK}{10 + number} {name}" for number, name in enumerate(names, 1))]
        (self.etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        described = [
            f"NodeName={name} NodeHostname={name} NodeAddr={NETWORK}{10 + number} Port={PORT + 1} CPUs={self.cpus} "
            f"RealMemory=16000 Gres=gpu:{self.gpus} State=UNKNOWN"
            for number, name in enumerate(names, 1)
        ]
        newer = self.version() >= (23, 2)
        signals = "PreemptParameters=send_user_signal" if newer else "SlurmctldParameters=preempt_send_user_signal"
        (self.etc / "slurm.conf").write_text(
            CONFIGURATION.format(
                prefix=self.prefix, port=PORT, slurmd_port=PORT + 1, plugins=self._plugins, tracker=self.tracker,
                network=NETWORK, preemption=signals, nodes="\n".join(described),
            )
        )  # fmt: skip
        mount = FREEZER.parent if self.tracker == "cgroup" else self.prefix / "no-cgroups"
        cgroups = f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={mount}\nCgroupAutomount=no\n"
        if newer and self.tracker != "cgroup":
            cgroups = "CgroupPlugin=disabled\n"
        (self.etc / "cgroup.conf").write_text(cgroups)
        self._pretend_gpus(names)

    def _pretend_gpus(self, names: list[str]) -> None:
        """Copies of /dev/null: SLURM counts devices and sets CUDA_VISIBLE_DEVICES, it does not look into them."""
        for number in range(self.gpus):
            device = self.prefix / "dev" / f"nvidia{number}"
            if not device.exists():
                command(["mknod", str(device), "c", "1", "3"])
        files = f"{self.prefix}/dev/nvidia[0-{self.gpus - 1}]"
        (self.etc / "gres.conf").write_text(f"NodeName=node[1-{len(names)}] Name=gpu File={files}\n")

    # ---- running -----------------------------------------------------------------------------------------------------

    def nodes(self) -> list[str]:
        """Their names."""
        return [f"node{number}" for number in range(1, self.num_nodes + 1)]

    def environment(self) -> dict[str, str]:
        """What a process needs to use the cluster's commands."""
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SLURM_CONF": f"{self.etc}/slurm.conf",
        }

    def start(self) -> None:
        """Start everything, and wait until all nodes are idle."""
        self.install()
        self._wrap_programs()
        self.stop()  # what an interrupted run of the tests has left behind
        self._configure()
        self._start_login()
        socket, key = self.prefix / "munge/socket", self.prefix / "munge/key"
        munge = [f"--{name}={self.prefix}/munge/{name}" for name in ("pid-file", "log-file", "seed-file")]
        self._daemon("login", [str(self.bin / "munged"), f"--socket={socket}", f"--key-file={key}", "--force", *munge])
        self._daemon("login", [*self._inside_login(), str(self.bin / "slurmctld"), "-c"])
        wait_for(lambda: "UP" in self._quietly("scontrol", "ping"), 30, "the controller answers")
        for node in self.nodes():
            self.start_node(node)
        self.wait_idle()

    def wait_idle(self) -> None:
        """Until every node can be given work."""
        wait_for(lambda: self._quietly("sinfo", "-hN", "-tidle", "-o%N").split() != [], 60, "a node is idle")
        wait_for(
            lambda: len(set(self._quietly("sinfo", "-hN", "-tidle,mix,alloc,comp", "-o%N").split())) == self.num_nodes,
            60, f"{self.num_nodes} nodes are up",
        )  # fmt: skip

    def _quietly(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment(), capture_output=True, text=True, check=False)
        return done.stdout

    def _daemon(self, node: str, words: list[str]) -> None:
        environment = {**self.environment(), MARK: f"{self.prefix}:{node}"}
        with (self.logs / f"{node}.out").open("ab") as log:
            done = subprocess.run(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                check=False,
            )
        if done.returncode:
            raise ClusterError(f"{' '.join(words)} ended with {done.returncode}; see {self.logs}")

    def _inside_login(self) -> list[str]:
        return ["nsenter", "-t", (self.run_folder / "login.pid").read_text().strip(), "-n", "-u", "-m"]

    def _start_login(self) -> None:
        pid = self.run_folder / "login.pid"
        pid.unlink(missing_ok=True)
        setup = (
            f"hostname login; mount --bind {self.etc}/hosts /etc/hosts; ip link set lo up; "
            "ip link add br0 type bridge; "
            f"ip addr add {NETWORK}1/24 dev br0; ip link set br0 up; echo $$ >{pid}; exec sleep infinity"
        )
        with (self.logs / "login.out").open("ab") as log:
            subprocess.Popen(
                ["unshare", "--net", "--uts", "--mount", "--propagation", "private", "sh", "-ec", setup],
                env={**self.environment(), MARK: f"{self.prefix}:login"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"), 10, "the login node's network is there")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd in namespaces of its own, joined to the bridge."""
        number = int(node.removeprefix("node"))
        login = (self.run_folder / "login.pid").read_text().strip()
        subprocess.run(
            [*self._inside_login(), str(self._ip()), "link", "del", f"v{number}"], capture_output=True, check=False
        )
        (self.prefix / "spool" / node).mkdir(parents=True, exist_ok=True)
        setup = (
            f"hostname {node}; mount --bind {self.etc}/hosts /etc/hosts; ip link set lo up; "
            f"ip link add name eth0 type veth peer name v{number} netns {login}; "
            f"ip addr add {NETWORK}{10 + number}/24 dev eth0; ip link set eth0 up; "
            f"nsenter -t {login} -n ip link set v{number} master br0 up; "
            f"exec {self.bin}/slurmd -c -N {node} -d {self.bin}/slurmstepd"
        )
        namespaces = ["unshare", "--net", "--uts", "--mount", "--propagation", "private", "sh", "-ec", setup]
        self._daemon(node, namespaces)

    def _ip(self) -> Path:
        own = self.bin / "ip"
        return own if own.exists() else Path(shutil.which("ip") or "ip")

    # ---- ending ------------------------------------------------------------------------------------------------------

    def kill_node(self, node: str) -> None:
        """As if its power went: nothing runs any more, and not even a reset leaves it."""
        number = int(node.removeprefix("node"))
        command([*self._inside_login(), str(self._ip()), "link", "set", f"v{number}", "down"])
        for pid in self._processes(node):
            kill(pid)

    def stop(self) -> None:
        """End every daemon and every job's process."""
        if not self._processes():
            return  # without a controller, scancel would look for it for more than a minute
        self._quietly("scancel", "--full", "--me")
        time.sleep(0.3)
        for _ in range(10):
            found = self._processes()
            for pid in found:
                kill(pid)
            if not found:
                break
            time.sleep(0.2)
        for folder in sorted(FREEZER.glob("slurm_node*/**/"), reverse=True):
            try:
                folder.rmdir()
            except OSError:
                continue

    def _processes(self, node: str = "") -> list[int]:
        """Those of `node`, or all: by the mark, by the job's own variables, and slurmstepd by its file and log."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            if path.name == str(os.getpid()):
                continue
            try:
                variables = set((path / "environ").read_bytes().decode(errors="replace").split("\0"))
                program = str((path / "exe").readlink())
                open_files = {str(file.readlink()) for file in (path / "fd").iterdir() if "slurmstepd" in program}
            except OSError:
                continue
            ours = f"SLURM_CONF={self.etc}/slurm.conf" in variables
            if node:
                hit = f"{MARK}={self.prefix}:{node}" in variables or (ours and f"SLURMD_NODENAME={node}" in variables)
                hit = hit or f"{self.logs}/{node}.log" in open_files
            else:
                hit = any(variable.startswith(f"{MARK}={self.prefix}:") for variable in variables)
                hit = hit or (ours and any(variable.startswith("SLURMD_NODENAME=") for variable in variables))
                hit = hit or program.startswith(f"{self.root}/")
            if hit:
                found.append(int(path.name))
        return found


def kill(pid: int) -> None:
    """SIGKILL, if it still is there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def command(words: list[str], *, folder: Path | None = None) -> str:
    """Its output; a `ClusterError` with its last words if it failed."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"{' '.join(words[:4])} ...: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def wait_for(condition, seconds: float, what: str) -> None:
    """Look until it holds."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise ClusterError(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.1)


def main() -> None:
    """Start, stop, or print the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "stop", "env", "kill-node", "start-node"])
    parser.add_argument("node", nargs="?")
    parser.add_argument("--tracker", choices=["cgroup", "linuxproc"], default="")
    arguments = parser.parse_args()
    prefix = Path(os.environ.get("MEGACHAMELEON_SLURM", "/tmp/megachameleon-slurm"))
    reason = why_not()
    if reason:
        sys.exit(f"error: {reason}")
    cluster = Cluster(prefix, tracker=arguments.tracker)
    if arguments.action == "env":
        print(f"export PATH={cluster.bin}:$PATH SLURM_CONF={cluster.etc}/slurm.conf")
    elif arguments.node:
        {"kill-node": cluster.kill_node, "start-node": cluster.start_node}[arguments.action](arguments.node)
    else:
        getattr(cluster, arguments.action)()


if __name__ == "__main__":
    main()
