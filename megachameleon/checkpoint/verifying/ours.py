"""Our own side of a verification: the decoder that trains, a block of weights at a time."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from megachameleon.checkpoint.folder import INDEX_FILE, resolve_checkpoint
from megachameleon.checkpoint.loading import saved_config
from megachameleon.checkpoint.state import training_state
from megachameleon.checkpoint.tensors import StoredTensor, index_from_json, read_tensors
from megachameleon.checkpoint.verifying.streaming import Advance, Trace, streamed
from megachameleon.config import KernelsConfig, ParallelConfig
from megachameleon.files import read_json
from megachameleon.model.decoder import Decoder, build_decoder
from megachameleon.model.kernels.table import choose_kernels
from megachameleon.parallel.context import parallel_context


def our_trace(
    path: Path,
    tokens: Tensor,
    rounding: torch.dtype,
    advance: Advance,
    *,
    exact: bool = False,
    without_qk_norm: bool = False,
) -> Trace:
    """What a checkpoint of ours computes, in fp32, from token ids [b, s].

    The weights take the way that they take into training: megatron-core says where the parameters that have memory
    stand in the checkpoint's global tensors.

    Args:
        exact: fp32 masters instead of weights, where there are any.
        without_qk_norm: leave them out, as if the model had none.

    Raises:
        ValueError: the checkpoint lacks tensors, or is damaged.
    """
    checkpoint = resolve_checkpoint(path)
    model, layout = saved_config(checkpoint).model, ParallelConfig()
    if without_qk_norm:
        # Without the modules the decoder asks for no such tensors, though they are there.
        model = replace(model, qk_norm="none", qk_norm_groups=1)
    index = index_from_json(read_json(checkpoint / INDEX_FILE), origin=str(checkpoint / INDEX_FILE))
    with parallel_context(layout) as context:
        kernels = choose_kernels(KernelsConfig())
        with torch.device("meta"):
            decoder = build_decoder(model, layout, kernels, context.groups, dtype=torch.float32, seed=None).eval()

        def fill(_: str, __: nn.Module) -> None:
            stored = training_state([decoder], None, context.groups)
            read_tensors(checkpoint, index, [wanted(item) for item in stored if not item.data.is_meta])

        def wanted(item: StoredTensor) -> StoredTensor:
            master = f"optimizer.master.{item.key}"
            return replace(item, key=master) if exact and master in index else item

        with streamed(_parts(decoder), fill, context.device, rounding, advance) as outputs:
            logits = decoder(tokens.to(context.device), None, None).float().cpu()
    # Our decoder has the sequence first.
    return Trace(hidden=tuple(hidden.transpose(0, 1) for hidden in outputs[:-1]), logits=logits)


def _parts(decoder: Decoder) -> dict[str, nn.Module]:
    blocks = {f"block {i}": block for i, block in enumerate(decoder.decoder.layers)}
    last = {"final norm": decoder.decoder.final_layernorm, "head": decoder.output_layer}
    return {"embedding": decoder.embedding, **blocks, **last}
