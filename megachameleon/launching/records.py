"""What each node's launcher leaves behind for the job: one small file a node, in the folder of the attempt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megachameleon.files import read_json, write_json
from megachameleon.launching.failures import FAILED, FINISHED, STOPPED, Failure, first_failure


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRecord:
    """How the ranks of one node ended."""

    node: int
    """Number in the job, from 0."""
    host: str
    statuses: dict[int, int]
    """Exit status by rank."""
    failures: list[Failure]
    stopped_by: str = ""
    """Why rank 0 stopped, in its own words, if it is on this node."""

    @property
    def status(self) -> int:
        """0: all finished; 75: all saved and may go on; else the first failure's own."""
        if self.failures:
            first = first_failure(self.failures)
            assert first is not None
            return first.status
        return STOPPED if STOPPED in self.statuses.values() else FINISHED

    def write(self, folder: Path) -> None:
        """Leave the record in the attempt's folder."""
        value = {
            "node": self.node,
            "host": self.host,
            "status": self.status,
            "statuses": {str(rank): status for rank, status in self.statuses.items()},
            "stopped_by": self.stopped_by,
            "failures": [failure.to_json() for failure in self.failures],
        }
        write_json(record_path(folder, self.node), value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How an attempt ended, over all nodes."""

    status: int
    """0, 75, or the first failure's."""
    line: str
    """One line for people."""


def record_path(folder: Path, node: int) -> Path:
    """Where node number `node` leaves its record."""
    return folder / f"node-{node:04d}.json"


def read_record(path: Path) -> NodeRecord:
    """Read what `NodeRecord.write` wrote.

    Raises:
        ValueError: it is not there or not such a record.
    """
    value: dict[str, Any] = read_json(path)
    try:
        return NodeRecord(
            node=value["node"],
            host=value["host"],
            statuses={int(rank): status for rank, status in value["statuses"].items()},
            stopped_by=value["stopped_by"],
            failures=[Failure(**failure) for failure in value["failures"]],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a record of a node ({error}); remove it") from None


def outcome(folder: Path, hosts: list[str]) -> Outcome:
    """Bring the first failure of all nodes to the front.

    Args:
        folder: of the attempt.
        hosts: the allocation's nodes, in SLURM's order.
    """
    paths = [record_path(folder, node) for node in range(len(hosts))]
    records = [read_record(path) for path in paths if path.is_file()]
    first = first_failure(failure for record in records for failure in record.failures)
    # In the order of SLURM_NODEID, by which records are named.
    silent = [host for host, path in zip(hosts, paths, strict=True) if not path.is_file()]
    # A failure after a stop may only follow from what happened to a node that can no longer tell.
    if first is not None and not (silent and first.after_stop):
        return Outcome(status=first.status, line=f"failed first by {first}")
    if silent:
        said = f"lost {', '.join(silent)}, which left no word: dead, cut off, or its launcher killed"
        return Outcome(status=FAILED, line=said)
    if any(record.status == STOPPED for record in records):
        reason = next((record.stopped_by for record in records if record.stopped_by), "a request")
        return Outcome(status=STOPPED, line=f"was stopped by {reason}")
    return Outcome(status=FINISHED, line="has finished")
