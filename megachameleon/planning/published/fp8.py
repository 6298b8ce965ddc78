"""NVIDIA's own benchmarks of NeMo and Megatron-Bridge in FP8; layouts are published with them.

Not stated, and taken alike for all: tensor-parallel communication overlapped by userbuffers, gradients summed in bf16,
no recomputation, cross entropy of Transformer Engine.
"""

from collections.abc import Iterator

from megachameleon.planning.published.point import Point
from megachameleon.planning.shapes import Layout, TransformerShape
from megachameleon.planning.software import NEMO

NEMO_2407 = "NVIDIA NeMo, docs/source/performance/performance_summary.md, container 24.07"
BRIDGE = "NVIDIA Megatron-Bridge, docs/performance-summary-archive.md"


def fp8_points() -> Iterator[Point]:
    """H100: model, GPUs, batch, micro-batch, TP, PP, CP, VPP, tokens a second of a GPU."""
    for row in (
        ("GPT3-5B", 64, 2048, 4, 1, 1, 1, 1, 22521),
        ("GPT3-20B", 64, 256, 2, 2, 1, 1, 1, 5851),
        ("GPT3-175B", 128, 256, 1, 4, 8, 1, 6, 726),
        ("GPT3-175B", 512, 2048, 2, 4, 8, 1, 6, 782),
        ("Llama2-7B", 8, 128, 1, 1, 1, 1, 1, 16847),
        ("Llama2-13B", 16, 128, 1, 1, 4, 1, 10, 8646),
        ("Llama2-70B", 64, 128, 1, 4, 4, 1, 20, 1707),
        ("Nemotron-8B", 64, 256, 4, 2, 1, 1, 1, 12701),
        ("Nemotron-22B", 64, 256, 2, 2, 4, 1, 10, 4256),
        ("Nemotron-340B", 128, 32, 1, 8, 8, 1, 12, 322),
        ("Llama3-8B", 8, 128, 1, 1, 1, 2, 1, 12036),
        ("Llama3-70B", 64, 128, 1, 4, 4, 2, 5, 1533),
    ):
        yield _point("NeMo 24.07 FP8, H100", NEMO_2407, "h100", *row)
    for version, row in (
        ("26.02", ("Llama3-70B", 64, 256, 1, 4, 8, 1, 5, 1621)),
        ("25.09", ("Llama3-405B", 1024, 512, 1, 8, 8, 2, 8, 302)),
        ("26.02", ("Llama3-405B", 1024, 1536, 1, 8, 8, 2, 8, 311)),
    ):
        yield _point("Megatron-Bridge FP8, H100", f"{BRIDGE}, container {version}", "h100", *row)


def blackwell_points() -> Iterator[Point]:
    """B200, in FP8 with a scale for each tensor; columns as in `fp8_points`."""
    for row in (
        ("Llama3-8B", 8, 128, 2, 1, 1, 1, 1, 30624),
        ("Llama3-405B", 128, 64, 1, 4, 8, 2, 8, 661),
    ):
        yield _point("Megatron-Bridge FP8, B200", f"{BRIDGE}, container 25.11", "b200", *row)


def _point(
    family: str,
    source: str,
    cluster: str,
    name: str,
    world: int,
    batch: int,
    micro: int,
    tensor: int,
    stages: int,
    context: int,
    chunks: int,
    measured: int,
) -> Point:
    return Point(
        family=family,
        name=f"{name}, batch {batch:,}",
        source=source,
        cluster=cluster,
        shape=_shape(name),
        layout=Layout(
            world_size=world,
            global_batch_size=batch,
            micro_batch_size=micro,
            tensor_parallel=tensor,
            pipeline_parallel=stages,
            virtual_pipeline_parallel=chunks,
            context_parallel=context,
            sequence_parallel=tensor > 1,
            overlap_tensor_parallel=tensor > 1,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            head="whole",
            precision="fp8",
            gradient_bytes=2,
        ),
        software=NEMO,
        measured=measured,
        unit="tokens",
        convention="causal",
        assumed="userbuffers, gradients in bf16, no recomputation",
    )


def _shape(name: str) -> TransformerShape:
    """Layers, hidden, heads, key/value heads, feed-forward, gated, vocabulary, and the benchmark's sequence length."""
    rows = {
        "GPT3-5B": (24, 4096, 32, 32, 16384, False, 51_200, 2048),
        "GPT3-20B": (44, 6144, 48, 48, 24576, False, 51_200, 2048),
        "GPT3-175B": (96, 12288, 96, 96, 49152, False, 51_200, 2048),
        "Llama2-7B": (32, 4096, 32, 32, 11008, True, 32_000, 4096),
        "Llama2-13B": (40, 5120, 40, 40, 13824, True, 32_000, 4096),
        "Llama2-70B": (80, 8192, 64, 8, 28672, True, 32_000, 4096),
        "Nemotron-8B": (32, 4096, 32, 32, 16384, False, 256_000, 4096),
        "Nemotron-22B": (40, 6144, 48, 48, 24576, False, 256_000, 4096),
        "Nemotron-340B": (96, 18432, 96, 8, 73728, False, 256_000, 4096),
        "Llama3-8B": (32, 4096, 32, 8, 14336, True, 128_256, 8192),
        "Llama3-70B": (80, 8192, 64, 8, 28672, True, 128_256, 8192),
        "Llama3-405B": (126, 16384, 128, 8, 53248, True, 128_256, 8192),
    }
    layers, hidden, heads, groups, wide, gated, vocab, length = rows[name]
    return TransformerShape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=wide,
        gated=gated,
        vocab_size=vocab,
        sequence_length=length,
    )
