"""How long one GPU takes for one operation: a product, a pass over memory, a message."""

from dataclasses import dataclass

from megachameleon.planning.communication import seconds_on_the_wire
from megachameleon.planning.efficiencies import Efficiencies
from megachameleon.planning.hardware import Cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A GPU of a cluster, with what it reaches of its peaks."""

    cluster: Cluster
    """What its maker states."""
    efficiencies: Efficiencies
    """What of it is reached."""
    precision: str = "bf16"
    """Of matrix products, but for those said to be in bf16."""

    def product(self, m: int, n: int, k: int, *, precision: str | None = None, added_bytes: int = 0) -> float:
        """Seconds of [m, k] times [k, n].

        Arithmetic and memory traffic overlap but for a share: the first tiles of operands come before arithmetic, and
        the last tiles of results go after it. So small and thin products reach less of the peak.

        Args:
            added_bytes: traffic per element of the result beside reading both operands and writing the result in bf16,
                such as adding to a sum.
        """
        precision = precision or self.precision
        reached = self.cluster.flops_per_second(precision) * self._gemm(precision)
        operand = {"fp8": 1, "bf16": 2, "fp32": 4}[precision]
        traffic = operand * (m * k + k * n) + (2 + added_bytes) * m * n
        # The roofline (Williams et al. 2009) as a sum, not the larger of the two: it makes small models slow.
        return self._launch + 2.0 * m * n * k / reached + self.efficiencies.gemm_traffic * traffic / self._memory

    def reach(self, num_bytes: float) -> float:
        """Seconds of a pass that reads and writes so many bytes."""
        return self._launch + num_bytes / self._memory

    def attention(self, flops: float, *, backward: bool) -> float:
        """Seconds of a fused attention kernel, for the visible half of scores.

        Rates of head dimension 128 at 4,096 causal positions: 518 TFLOP/s forward on an H100 (cuDNN, in figure 5 of
        Shah et al., arXiv 2407.08608) and about 190 on an A100 (Dao, arXiv 2307.08691, figure 5); backward is taken to
        reach 0.8 of either.
        """
        reached = {"ampere": 190 / 312, "hopper": 518 / 989, "blackwell": 518 / 989}[self.cluster.generation]
        rate = reached * (0.8 if backward else 1.0) * self.cluster.flops_per_second("bf16")
        return self._launch + flops / rate

    def collective(self, kind: str, num_bytes: float, ranks: int, stride: int = 1) -> float:
        """Seconds of a collective of `num_bytes` in all over `ranks` ranks, each `stride` from the next.

        Ranks in the same node share its network: each pair of neighbouring nodes has as many links as members of the
        group in a node, each member's own. Within a node NVLink bounds it.
        """
        if ranks == 1:
            return 0.0
        within = max(1, self.cluster.gpus_per_node // stride)
        bandwidth = self._nvlink if ranks <= within else min(self._nvlink, self._network * within)
        return self.efficiencies.message_seconds + seconds_on_the_wire(kind, num_bytes, ranks, bandwidth)

    def transfer(self, num_bytes: float, stride: int) -> float:
        """Seconds of sending `num_bytes` to the rank `stride` further on."""
        bandwidth = self._nvlink if stride < self.cluster.gpus_per_node else self._network
        return self.efficiencies.message_seconds + num_bytes / bandwidth

    @property
    def _launch(self) -> float:
        return self.efficiencies.launch_seconds

    @property
    def _memory(self) -> float:
        return self.efficiencies.memory * self.cluster.memory_tb_s * 1e12

    @property
    def _nvlink(self) -> float:
        return self.efficiencies.nvlink * self.cluster.nvlink_gb_s * 1e9

    @property
    def _network(self) -> float:
        return self.efficiencies.network * self.cluster.network_gb_s * 1e9

    def _gemm(self, precision: str) -> float:
        if self.cluster.generation == "ampere":
            return self.efficiencies.gemm_ampere
        return self.efficiencies.gemm_hopper_fp8 if precision == "fp8" else self.efficiencies.gemm_hopper
