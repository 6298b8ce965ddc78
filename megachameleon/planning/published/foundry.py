"""MosaicML's LLM Foundry: another trainer, in eager PyTorch with fully sharded data parallelism.

Its rows tell how far the planner's constants, which are Megatron's, carry. No constant is fitted to them.
"""

from collections.abc import Iterator
from typing import Literal

from megachameleon.planning.published.point import Point
from megachameleon.planning.shapes import Layout, TransformerShape
from megachameleon.planning.software import FOUNDRY

MODELS = {
    "760M": (24, 1536, 12),
    "1B": (24, 2048, 16),
    "3B": (32, 2560, 20),
    "7B": (32, 4096, 32),
    "13B": (40, 5120, 40),
    "30B": (48, 7168, 56),
    "70B": (80, 8192, 64),
}
"""Layers, hidden, heads (scripts/train/yamls/pretrain)."""


def foundry_points() -> Iterator[Point]:
    """Rows of 2,048 and 4,096 tokens in bf16."""
    for row in (
        ("a100", "760M", 2048, 8, 24, 2, "none", 32434),
        ("a100", "1B", 2048, 8, 14, 4, "none", 20513),
        ("a100", "3B", 2048, 8, 10, 2, "none", 10811),
        ("a100", "7B", 2048, 8, 6, 2, "none", 4641),
        ("a100", "13B", 2048, 8, 2, 3, "none", 2262),
        ("a100", "30B", 2048, 8, 3, 21, "full", 916),
        ("a100", "70B", 2048, 64, 8, 4, "full", 410),
        ("a100", "760M", 4096, 8, 12, 2, "none", 27351),
        ("a100", "1B", 4096, 8, 7, 4, "none", 17807),
        ("a100", "3B", 4096, 8, 5, 6, "none", 9457),
        ("a100", "7B", 4096, 8, 16, 2, "full", 3684),
        ("a100", "13B", 4096, 8, 10, 3, "full", 2060),
        ("a100", "30B", 4096, 8, 1, 21, "full", 814),
        ("h100", "760M", 2048, 8, 24, 2, "none", 63147),
        ("h100", "760M", 2048, 32, 24, 1, "none", 67971),
        ("h100", "1B", 2048, 8, 14, 1, "none", 45455),
        ("h100", "1B", 2048, 64, 20, 1, "none", 44402),
        ("h100", "3B", 2048, 16, 10, 3, "none", 24142),
        ("h100", "3B", 2048, 64, 6, 3, "none", 22525),
        ("h100", "7B", 2048, 8, 6, 1, "none", 10643),
        ("h100", "13B", 2048, 64, 2, 1, "none", 4800),
        ("h100", "30B", 2048, 32, 14, 3, "full", 2308),
        ("h100", "70B", 2048, 64, 8, 4, "full", 1039),
        ("h100", "760M", 4096, 8, 12, 2, "none", 55459),
        ("h100", "1B", 4096, 8, 7, 4, "none", 38535),
        ("h100", "3B", 4096, 8, 5, 6, "none", 20964),
        ("h100", "7B", 4096, 8, 16, 2, "full", 8611),
        ("h100", "13B", 4096, 8, 10, 3, "full", 4717),
        ("h100", "30B", 4096, 8, 1, 21, "full", 1802),
    ):
        yield _point(*row)


def _point(
    cluster: str,
    name: str,
    length: int,
    world: int,
    micro: int,
    accumulated: int,
    recompute: Literal["none", "full"],
    measured: int,
) -> Point:
    layers, hidden, heads = MODELS[name]
    return Point(
        family=f"LLM Foundry, {cluster.upper()}",
        name=f"{name}, {length} tokens, {world} GPUs",
        source="mosaicml/llm-foundry, scripts/train/benchmarking/README.md",
        cluster=cluster,
        shape=TransformerShape(
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=heads,
            ffn_hidden_size=4 * hidden,
            gated=False,
            vocab_size=50_368,
            sequence_length=length,
            tied_embeddings=True,
        ),
        layout=Layout(
            world_size=world,
            global_batch_size=world * micro * accumulated,
            micro_batch_size=micro,
            fully_sharded=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            recompute=recompute,
            head="whole",
        ),
        software=FOUNDRY,
        measured=measured,
        unit="tokens",
        convention="full",
    )
