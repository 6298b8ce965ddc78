"""Clusters: what their makers state, with where they state it; and profiles that a user writes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from megachameleon.config.binding import bind, nearest

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Equal nodes of equal GPUs; rates are of one GPU."""

    name: str
    """For people."""
    generation: Literal["ampere", "hopper", "blackwell"]
    """Whose measured efficiencies apply."""
    bf16_tflops: float
    """Dense matrix products, 1e12 FLOP/s."""
    fp8_tflops: float
    """The same in 8 bits; 0 where there is none."""
    memory_gib: float
    """What a process finds free on an idle GPU."""
    memory_tb_s: float
    """Bandwidth of memory, 1e12 B/s."""
    nvlink_gb_s: float
    """To the other GPUs of a node, one direction, 1e9 B/s."""
    gpus_per_node: int = 8
    """Those that NVLink joins."""
    network_gb_s: float
    """To other nodes, one direction, 1e9 B/s."""
    price_per_gpu_hour: float = 0.0
    """In any currency; 0 where nothing is to be said of cost."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field to the document that states it."""

    def validate(self) -> None:
        """Raise ValueError for the first field that cannot be."""
        for name in ("bf16_tflops", "memory_gib", "memory_tb_s", "nvlink_gb_s", "gpus_per_node", "network_gb_s"):
            if not 0 < getattr(self, name) < 1e9:
                raise ValueError(f"{name}: {getattr(self, name)} must be a positive number")
        for name in ("fp8_tflops", "price_per_gpu_hour"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ValueError(f"{name}: {getattr(self, name)} must be a number, 0 or more")

    def flops_per_second(self, precision: str) -> float:
        """Peak of dense matrix products.

        Raises:
            ValueError: the GPU has no such products.
        """
        if precision == "fp8" and not self.fp8_tflops:
            raise ValueError(f"kernels.fp8: {self.name} has no 8-bit matrix products; set kernels.fp8=none")
        if precision == "fp32":  # TF32 on tensor cores, half of bf16 on all of these
            return self.bf16_tflops * 0.5e12
        return (self.fp8_tflops if precision == "fp8" else self.bf16_tflops) * 1e12


_DGX_A100 = "NVIDIA DGX A100 user guide: eight 200 Gb/s ConnectX-6 for compute"
_DGX_H100 = "NVIDIA DGX H100/H200 user guide: eight 400 Gb/s ConnectX-7 for compute"

CLUSTERS = {
    "a100": Cluster(
        name="A100 80GB SXM",
        generation="ampere",
        bf16_tflops=312,
        fp8_tflops=0,
        memory_gib=79.1,
        memory_tb_s=2.039,
        nvlink_gb_s=300,
        network_gb_s=25,
        sources={
            "bf16_tflops, memory_tb_s, nvlink_gb_s": "NVIDIA A100 datasheet: 312 TFLOPS, 2,039 GB/s, 600 GB/s",
            "network_gb_s": _DGX_A100,
            "memory_gib": "torch.cuda.get_device_properties: 79.1 GiB of 80 GB",
        },
    ),
    "h100": Cluster(
        name="H100 80GB SXM",
        generation="hopper",
        bf16_tflops=989,
        fp8_tflops=1979,
        memory_gib=79.1,
        memory_tb_s=3.35,
        nvlink_gb_s=450,
        network_gb_s=50,
        sources={
            "bf16_tflops, fp8_tflops, memory_tb_s, nvlink_gb_s": "NVIDIA H100 datasheet: 1,979 and 3,958 TFLOPS with "
            "sparsity, which is half of it without; 3.35 TB/s; 900 GB/s",
            "network_gb_s": _DGX_H100,
            "memory_gib": "torch.cuda.get_device_properties: 79.1 GiB of 80 GB",
        },
    ),
    "h200": Cluster(
        name="H200 141GB SXM",
        generation="hopper",
        bf16_tflops=989,
        fp8_tflops=1979,
        memory_gib=139.8,
        memory_tb_s=4.8,
        nvlink_gb_s=450,
        network_gb_s=50,
        sources={
            "bf16_tflops, fp8_tflops, memory_tb_s, nvlink_gb_s": "NVIDIA H200 datasheet: as H100, and 4.8 TB/s",
            "network_gb_s": _DGX_H100,
            "memory_gib": "torch.cuda.get_device_properties: 139.8 GiB of 141 GB",
        },
    ),
    "b200": Cluster(
        name="B200 180GB SXM",
        generation="blackwell",
        bf16_tflops=2250,
        fp8_tflops=4500,
        memory_gib=178,
        memory_tb_s=8,
        nvlink_gb_s=900,
        network_gb_s=50,
        sources={
            "bf16_tflops, fp8_tflops, memory_tb_s, nvlink_gb_s": "NVIDIA DGX B200 datasheet: eight GPUs 72 PFLOPS FP8 "
            "with sparsity, 1,440 GB, 64 TB/s, 14.4 TB/s NVLink",
            "network_gb_s": "NVIDIA DGX B200 datasheet: eight 400 Gb/s ConnectX-7 for compute",
            "memory_gib": "180 GB less what the driver keeps, estimated",
        },
    ),
}


def find_cluster(source: str) -> Cluster:
    """A cluster by name, or from a YAML file with the fields of `Cluster`.

    Raises:
        ValueError: neither; or an unknown field, with the nearest known one; or a value that cannot be.
    """
    if source.lower() in CLUSTERS:
        return CLUSTERS[source.lower()]
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"--cluster {source}: neither a file nor a cluster; {nearest(source.lower(), CLUSTERS)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        cluster = bind(Cluster, values)
        cluster.validate()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from None
    return cluster
