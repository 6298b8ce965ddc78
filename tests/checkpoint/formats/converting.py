"""Checkpoints of ours with drawn weights, written without the converter; conversions in one call."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from plain_weights import build_filled
from safetensors.torch import load_file

from megachameleon.checkpoint.folder import CheckpointManifest, resolve_checkpoint
from megachameleon.checkpoint.formats.conversion import convert
from megachameleon.checkpoint.formats.registry import Options, make_sink, open_source
from megachameleon.checkpoint.lineage import Lineage
from megachameleon.checkpoint.loading import load_checkpoint
from megachameleon.checkpoint.retention import Retention
from megachameleon.checkpoint.saving import Save, small_files, write_checkpoint
from megachameleon.checkpoint.snapshot import live_snapshot
from megachameleon.checkpoint.state import common_state, training_state
from megachameleon.config import load_config
from megachameleon.parallel.context import parallel_context
from megachameleon.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(num_text_ids=100, num_image_codes=16, image_grid=(2, 4))
TOKENIZERS = {"text": "t", "image": "i"}
SIZE = ["model.vocab_size=128", "model.hidden_size=128", "model.ffn_hidden_size=160", "model.num_layers=2"]
CASES = {
    "pre-norm, 1 group": [*SIZE, "model.num_attention_heads=8", "model.num_query_groups=8"],
    "swin, 4 groups": [
        *(*SIZE, "model.norm_order=swin"),
        *("model.num_attention_heads=16", "model.num_query_groups=8", "model.qk_norm_groups=4"),
    ],
}


def save_chunks(config, chunks, context, root):
    """A checkpoint of weights, each rank its own file, as training writes it."""
    manifest = CheckpointManifest(
        step=7,
        consumed_samples=56,
        data_fingerprint="x",
        versions={},
        vocabulary=asdict(VOCABULARY),
        tokenizers=dict(TOKENIZERS),
        files={},
        lineage=Lineage(datasets={}, parent=None, starts=()).to_dict(),
    )
    save = Save(
        root=Path(root),
        attempt="host-1-ab-1",
        rank=context.rank,
        world_size=context.world_size,
        snapshot=live_snapshot(training_state(chunks, None, context.groups)),
        manifest=manifest,
        texts=small_files(config, {"step": 7, "consumed_samples": 56, "skipped": ()}, common_state(None)),
        retention=Retention(keep_last=1),
    )
    write_checkpoint(save)


def save_filled(overrides, weights, root, precision="fp32"):
    """Our checkpoint with these weights, from one process."""
    config = load_config("debug", [*overrides, f"training.precision={precision}"])
    with parallel_context(config.parallel) as context:
        decoder = build_filled(config, context, weights)
        if precision == "bf16":
            decoder.bfloat16()
        save_chunks(config, [decoder], context, root)
    return root


def save_again(source, root, layout):
    """What real ranks of a layout save after they have loaded a checkpoint; in as many processes as they are."""
    from megachameleon.checkpoint.loading import saved_config
    from megachameleon.model.decoder import build_chunks
    from megachameleon.model.kernels.table import choose_kernels

    config = saved_config(resolve_checkpoint(Path(source)))
    config = replace(config, parallel=replace(config.parallel, **layout))
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    with parallel_context(config.parallel) as context:
        kernels = choose_kernels(config.kernels)
        chunks = build_chunks(config.model, config.parallel, kernels, context.groups, dtype=dtype, seed=1)
        chunks = [chunk.to(dtype) for chunk in chunks]
        load_checkpoint(resolve_checkpoint(Path(source)), chunks, None, context)
        context.barrier()
        save_chunks(config, chunks, context, root)
        context.barrier()


def convert_checkpoint(kinds, source, destination, *, workers=1, **options):
    """`kinds`: such as ("megatron", "hf"). Returns the destination."""
    chosen = Options(**options)
    opened = open_source(kinds[0], Path(source), chosen)
    sink = make_sink(kinds[1], opened.description, chosen, opened)
    convert(opened, sink, Path(destination), workers=workers)
    return destination


def tensors_of(folder):
    """All tensors of a folder of safetensors files."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
