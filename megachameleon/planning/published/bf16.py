"""Megatron-LM's and Llama 3's runs in bf16 and fp16, as published.

Facts that a source does not state follow rules, and are never chosen by point:

* Interleaving: none, unless the source says that stages were interleaved or that their transfers were overlapped, which
  in Megatron only the interleaved schedule does; then chunks of one layer, the only size that divides every row's
  stages (23 layers of the 119B, 7 of the 462B).
* Micro-batch: 1 in a pipeline; without one, all four samples of a replica, which fit.
* Recomputation: none.
"""

from collections.abc import Iterator
from dataclasses import replace

from megachameleon.planning.published.point import Point
from megachameleon.planning.shapes import Layout, TransformerShape
from megachameleon.planning.software import LLAMA, MEGATRON_2021, MEGATRON_2022, MEGATRON_CORE


def bf16_points() -> Iterator[Point]:
    """H100 and A100, in the order of the sources."""
    yield from _megatron_core()
    yield from _korthikanti()
    yield from _narayanan_models()
    yield from _narayanan_scaling()
    yield from _llama()


def _gpt(layers: int, hidden: int, heads: int, vocab: int, length: int, *, attention_dropout: bool) -> TransformerShape:
    """GPT-3's architecture."""
    return TransformerShape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        ffn_hidden_size=4 * hidden,
        gated=False,
        vocab_size=vocab,
        sequence_length=length,
        dropout=True,
        attention_dropout=attention_dropout,
        bias=True,
        tied_embeddings=True,
        learned_positions=True,
    )


def _megatron_core() -> Iterator[Point]:
    rows = [
        ("1.7B", 24, 2048, 16, 1, 1, 192, 408.8),
        ("7.1B", 30, 4096, 32, 2, 1, 192, 465.9),
        ("16B", 32, 6144, 48, 4, 1, 192, 489.1),
        ("32B", 48, 7168, 56, 8, 1, 192, 459.6),
        ("70B", 84, 8192, 64, 8, 2, 384, 419.7),
        ("119B", 92, 10240, 80, 8, 4, 768, 420.5),
        ("177B", 96, 12288, 96, 8, 6, 1152, 432.8),
        ("314B", 96, 16384, 128, 8, 8, 1536, 474.4),
        ("462B", 112, 18432, 144, 8, 16, 3072, 459.9),
    ]
    # Every row has 48 replicas, which gives the number of GPUs.
    for name, layers, hidden, heads, tensor, stages, batch, measured in rows:
        yield Point(
            family="Megatron-Core 0.8, H100",
            name=name,
            source="Megatron-LM's README for Megatron-Core 0.8, images/model_table.png",
            cluster="h100",
            shape=_gpt(layers, hidden, heads, 131_072, 4096, attention_dropout=False),
            layout=Layout(
                world_size=48 * tensor * stages,
                global_batch_size=batch,
                micro_batch_size=4 if stages == 1 else 1,
                tensor_parallel=tensor,
                pipeline_parallel=stages,
                virtual_pipeline_parallel=layers // stages if stages > 1 else 1,
                sequence_parallel=tensor > 1,
                distributed_optimizer=True,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
                overlap_tensor_parallel=tensor > 1,
                head="whole",
            ),
            software=MEGATRON_CORE,
            measured=measured,
            unit="teraflops",
            convention="full",
            assumed="micro-batch, chunks of one layer, no recomputation, all of attention counted",
        )


def _korthikanti() -> Iterator[Point]:
    rows = [
        ("22B", 48, 6144, 64, 1, 1, 8, 4, 4, 1.42, 1.10),
        ("175B", 96, 12288, 96, 8, 3, 64, 64, 1, 18.13, 13.75),
        ("530B", 105, 20480, 128, 35, 3, 280, 280, 1, 49.05, 37.83),
        ("1T", 128, 25600, 160, 64, 1, 512, 512, 1, 94.42, 71.49),
    ]
    for name, layers, hidden, heads, stages, chunks, world, batch, micro, full, selective in rows:
        for recompute, seconds in (("full", full), ("selective", selective)):
            yield Point(
                family="Korthikanti 2022, A100",
                name=f"{name}, {recompute} recomputation",
                source="arXiv 2205.05198, tables 3 and 5",
                cluster="a100",
                shape=_gpt(layers, hidden, heads, 51_200, 2048, attention_dropout=True),
                layout=_korthikanti_layout(world, batch, micro, stages, chunks, recompute),
                software=MEGATRON_2022,
                measured=seconds,
                unit="seconds",
                convention="full",
            )
    yield Point(
        family="Korthikanti 2022, A100",
        name="530B, selective recomputation, 8 replicas",
        source="arXiv 2205.05198, abstract: 54.2 % of 312 TFLOP/s",
        cluster="a100",
        shape=_gpt(105, 20480, 128, 51_200, 2048, attention_dropout=True),
        layout=_korthikanti_layout(2240, 2240, 1, 35, 3, "selective"),
        software=MEGATRON_2022,
        measured=0.542 * 312,
        unit="teraflops",
        convention="full",
    )


def _korthikanti_layout(world: int, batch: int, micro: int, stages: int, chunks: int, recompute: str) -> Layout:
    selective = recompute == "selective"
    return Layout(
        world_size=world,
        global_batch_size=batch,
        micro_batch_size=micro,
        tensor_parallel=8,
        pipeline_parallel=stages,
        virtual_pipeline_parallel=chunks,
        sequence_parallel=selective,
        recompute="selective" if selective else "full",
        recompute_modules=("core_attn",) if selective else (),
        attention="unfused",
        head="whole",
        gradient_bytes=2,
    )


def _narayanan_models() -> Iterator[Point]:
    rows = [
        ("1.7B", 24, 2304, 24, 1, 1, 1, 16, 32, 512, 137),
        ("3.6B", 30, 3072, 32, 2, 1, 1, 16, 64, 512, 138),
        ("7.5B", 36, 4096, 32, 4, 1, 1, 16, 128, 512, 142),
        ("18B", 40, 6144, 48, 8, 1, 1, 8, 256, 1024, 135),
        ("39B", 48, 8192, 64, 8, 2, 1, 4, 512, 1536, 138),
        ("76B", 60, 10240, 80, 8, 4, 3, 2, 1024, 1792, 140),
        ("145B", 80, 12288, 96, 8, 8, 2, 2, 1536, 2304, 148),
        ("310B", 96, 16384, 128, 8, 16, 2, 1, 1920, 2160, 155),
        ("530B", 105, 20480, 128, 8, 35, 3, 1, 2520, 2520, 163),
        ("1T", 128, 25600, 160, 8, 64, 1, 1, 3072, 3072, 163),
    ]
    for name, layers, hidden, heads, tensor, stages, chunks, micro, world, batch, measured in rows:
        yield Point(
            family="Narayanan 2021 table 1, A100",
            name=name,
            source="arXiv 2104.04473, table 1; Megatron-LM's examples/sc21/run_table_1.sh",
            cluster="a100",
            shape=_gpt(layers, hidden, heads, 51_200, 2048, attention_dropout=True),
            layout=_narayanan_layout(world, batch, micro, tensor, stages, chunks),
            software=MEGATRON_2021,
            measured=measured,
            unit="teraflops",
            convention="recomputed",
        )


def _narayanan_scaling() -> Iterator[Point]:
    rows = [
        ("175B", 96, 12288, 96, 12, 1536, {384: 153, 768: 149, 1536: 141}),
        ("530B", 105, 20480, 128, 35, 2240, {560: 171, 1120: 167, 2240: 159}),
    ]
    for name, layers, hidden, heads, stages, batch, measured in rows:
        for world, teraflops in measured.items():
            yield Point(
                family="Narayanan 2021 table 2, A100",
                name=f"{name}, {world} GPUs",
                source="arXiv 2104.04473, table 2",
                cluster="a100",
                shape=_gpt(layers, hidden, heads, 51_200, 2048, attention_dropout=True),
                layout=_narayanan_layout(world, batch, 1, 8, stages, 1),
                software=MEGATRON_2021,
                measured=teraflops,
                unit="teraflops",
                convention="recomputed",
                assumed="no interleaving",
            )


def _narayanan_layout(world: int, batch: int, micro: int, tensor: int, stages: int, chunks: int) -> Layout:
    return Layout(
        world_size=world,
        global_batch_size=batch,
        micro_batch_size=micro,
        tensor_parallel=tensor,
        pipeline_parallel=stages,
        virtual_pipeline_parallel=chunks,
        recompute="full",
        overlap_grad_reduce=stages == 1,  # --DDP-impl torch
        attention="unfused",
        head="whole",
        gradient_bytes=2,
    )


def _llama() -> Iterator[Point]:
    shape = TransformerShape(
        num_layers=126,
        hidden_size=16384,
        num_attention_heads=128,
        num_query_groups=8,
        ffn_hidden_size=53248,
        gated=True,
        vocab_size=128_256,
        sequence_length=8192,
    )
    for world, context, length, batch, measured in (
        (8192, 1, 8192, 2048, 430),
        (16384, 1, 8192, 2048, 400),
        (16384, 16, 131072, 128, 380),
    ):
        yield Point(
            family="Llama 3, H100",
            name=f"405B, {world} GPUs, {length} tokens",
            source="arXiv 2407.21783, tables 3 and 4",
            cluster="h100",
            shape=replace(shape, sequence_length=length),
            layout=Layout(
                world_size=world,
                global_batch_size=batch,
                tensor_parallel=8,
                pipeline_parallel=16,
                virtual_pipeline_parallel=8,
                context_parallel=context,
                sequence_parallel=True,
                distributed_optimizer=True,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
                head="whole",
            ),
            software=LLAMA,
            measured=measured,
            unit="teraflops",
            convention="causal",
            assumed="chunks of one layer, micro-batch 1, sequence parallelism, visible attention counted",
        )
