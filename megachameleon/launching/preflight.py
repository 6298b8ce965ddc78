"""The check of a job's nodes before it trains: `srun` starts one launcher a node, and the launcher these ranks.

Each node looks at itself first and leaves what it found; then all-reduces are timed, among the ranks of each node and
between neighbouring nodes in a ring, so that a slow node is told from its partners.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megachameleon.console import run_tool, tool_parser
from megachameleon.launching.node_check import NodeCheck, look_at_itself

WARM_UP, ROUNDS = 2, 5  # NCCL connects ranks in their first collectives


def all_reduce_bandwidth(group: Any, size: int, num_bytes: int, device: Any) -> float:
    """Bus bandwidth in GB/s: bytes that each rank sends, 2 (n - 1) / n of the buffer, by the time of the slowest.

    The convention of NVIDIA's nccl-tests (doc/PERFORMANCE.md). The median of several rounds.
    """
    import torch
    import torch.distributed as dist

    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    seconds = []
    for number in range(WARM_UP + ROUNDS):
        dist.barrier(group)
        start = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        # On CUDA the call returns when the work is queued.
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    slowest = torch.tensor([sorted(seconds)[ROUNDS // 2]], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    return 2 * (size - 1) / size * buffer.numel() * 4 / slowest.item() / 1e9


def ring_rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Neighbours in a ring, in rounds in which no node has two partners."""
    if num_nodes < 2:
        return []
    edges = [(node, (node + 1) % num_nodes) for node in range(num_nodes if num_nodes > 2 else 1)]
    even, odd = edges[: num_nodes // 2 * 2 : 2], edges[1::2]
    # In a ring of odd length the last edge meets the first one of `even`, so it has a round of its own.
    last = edges[-1:] if num_nodes % 2 and num_nodes > 2 else []
    return [one for one in (even, [edge for edge in odd if edge not in last], last) if one]


def check_connections(check: NodeCheck, folder: Path, num_bytes: int, timeout: float) -> None:
    """Join all ranks and fill in bandwidths and clock offsets; problems are noted, not raised."""
    import torch
    import torch.distributed as dist

    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    num_nodes, node = int(os.environ["WORLD_SIZE"]) // ranks_per_node, rank // ranks_per_node
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    dist.barrier()  # leaves all ranks within milliseconds, so their clocks can be compared
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, (check.host, time.time()))
    hosts = [names[number * ranks_per_node][0] for number in range(num_nodes)]
    check.clock_offset = names[node * ranks_per_node][1] - names[0][1]
    # a new group is made by all ranks together, also by those that are not in it
    inside = [dist.new_group([*range(n * ranks_per_node, (n + 1) * ranks_per_node)]) for n in range(num_nodes)]
    if ranks_per_node > 1:
        check.inside_gb_per_second = all_reduce_bandwidth(inside[node], ranks_per_node, num_bytes, device)
        if local == 0:
            check.write(folder)
    for pairs in ring_rounds(num_nodes):
        groups = [dist.new_group([one * ranks_per_node, two * ranks_per_node]) for one, two in pairs]
        for pair, group in zip(pairs, groups, strict=True):
            if local == 0 and node in pair:
                speed = all_reduce_bandwidth(group, 2, num_bytes, device)
                check.pair_gb_per_second[hosts[pair[1 - pair.index(node)]]] = speed
                check.write(folder)
        dist.barrier()
    dist.destroy_process_group()


def main(arguments: argparse.Namespace) -> None:
    """One rank's part."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    # The name by which SLURM knows the node: findings and --exclude go by it.
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    check = NodeCheck(host=host)
    if is_first:
        look_at_itself(check, arguments.folders, round(arguments.storage_mb * 1e6))
        check.write(arguments.results)
    try:
        check_connections(check, arguments.results, round(arguments.message_mb * 1e6), arguments.timeout)
    except Exception as error:
        check.problems.append(f"all-reduce: {' '.join(str(error).split())[:200]}")
        raise
    finally:
        if is_first:
            check.write(arguments.results)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = tool_parser(
        "One rank of the check of nodes. Started by the launcher of a node, see examples/slurm/preflight.sbatch.",
        """\
  srun --ntasks-per-node=1 python -m megachameleon.launching.node --ranks-per-node 8 --master node1:20123 \\
      -- -m megachameleon.launching.preflight --results runs/preflight/1 --folders runs /data
  python -m megachameleon.launching.node --ranks-per-node 2 --logs /tmp/logs \\
      -m megachameleon.launching.preflight --results /tmp/results --folders /tmp         # this machine alone""",
    )
    parser.add_argument("--results", type=Path, required=True, help="shared folder for a file from each node")
    parser.add_argument("--folders", type=Path, nargs="*", default=[], help="must be writable; the first is timed")
    parser.add_argument("--storage-mb", type=float, default=1024, metavar="MB", help="to write and read (default 1024)")
    parser.add_argument("--message-mb", type=float, default=256, metavar="MB", help="to all-reduce (default 256)")
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="of a collective (default 120)")
    return parser


def run(words: Sequence[str]) -> None:
    """Parse and check."""
    sys.argv[1:] = words
    run_tool(main, build_parser())


if __name__ == "__main__":
    run(sys.argv[1:])
