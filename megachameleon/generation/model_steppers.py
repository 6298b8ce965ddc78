"""Steppers on the decoder: with a key-value cache, or reading everything again.

They work for any layout: logits are gathered over the tensor-parallel ranks, hidden states go from stage to stage (and
round again to the next chunk of an interleaved pipeline), and the last stage broadcasts its logits. Context-parallel
ranks do the same work side by side.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext

from megachameleon.checkpoint.state import unwrap


class CachedStepper:
    """Reads each id once and keeps keys and values in megatron-core's static context."""

    def __init__(self, chunks: Sequence[torch.nn.Module], context_length: int) -> None:
        """`chunks` are this rank's part of the model, wrapped or not; `context_length` the most ids of a sequence."""
        self._chunks, self.context_length = [unwrap(chunk) for chunk in chunks], context_length
        self._document_ids = torch.empty(0, 0, dtype=torch.int32)
        self._cache: StaticInferenceContext | None = None

    def prefill(self, tokens: torch.Tensor, document_ids: torch.Tensor, room: int) -> torch.Tensor:
        """See `Stepper`."""
        streams, columns = tokens.shape
        self._cache = StaticInferenceContext(max_batch_size=streams, max_sequence_length=columns + room)
        self._document_ids = document_ids
        return self._read(tokens)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Stepper`."""
        assert self._cache is not None, "prefill comes before decode"
        added = torch.zeros(len(tokens), 1, dtype=torch.int32)
        # of all columns, since attention asks which of the cached ones are padding
        self._document_ids = torch.cat((self._document_ids, added), dim=1)
        self._cache.enable_decode_mode()
        return self._read(tokens[:, None])

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        cache = self._cache
        assert cache is not None
        logits = _last_logits(self._chunks, tokens, self._document_ids, cache)
        # after the pass: all layers of it write at the same place
        cache.sequence_len_offset += tokens.size(1)
        return logits


class UncachedStepper:
    """Reads the whole context at every step: slow, plain, the reference of the cached one."""

    def __init__(self, chunks: Sequence[torch.nn.Module], context_length: int) -> None:
        self._chunks, self.context_length = [unwrap(chunk) for chunk in chunks], context_length
        self._tokens = torch.empty(0, 0, dtype=torch.int64)
        self._document_ids = torch.empty(0, 0, dtype=torch.int32)

    def prefill(self, tokens: torch.Tensor, document_ids: torch.Tensor, room: int) -> torch.Tensor:
        """See `Stepper`."""
        self._tokens, self._document_ids = tokens, document_ids
        return _last_logits(self._chunks, tokens, document_ids, None)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Stepper`."""
        added = torch.zeros(len(tokens), 1, dtype=torch.int32)
        return self.prefill(
            torch.cat((self._tokens, tokens[:, None]), dim=1), torch.cat((self._document_ids, added), dim=1), 0
        )


def _last_logits(
    chunks: list[Any], tokens: torch.Tensor, document_ids: torch.Tensor, cache: StaticInferenceContext | None
) -> torch.Tensor:
    """One forward pass through all pipeline stages; logits after the last column on every rank, float32."""
    device = next(chunks[0].parameters()).device
    tokens, document_ids = tokens.to(device), document_ids.to(device)
    offset = document_ids.size(1) - tokens.size(1)
    position_ids = torch.arange(offset, document_ids.size(1), device=device).expand_as(tokens)
    with ExitStack() as modes, torch.no_grad():
        for chunk in chunks:
            modes.enter_context(_for_inference(chunk))
        return _through_stages(chunks, tokens, position_ids, document_ids, cache)


def _through_stages(
    chunks: list[Any],
    tokens: torch.Tensor,
    position_ids: torch.Tensor,
    document_ids: torch.Tensor,
    cache: StaticInferenceContext | None,
) -> torch.Tensor:
    """Take hidden states from the stage before, hand them to the next; the last stage broadcasts its logits."""
    group, config = chunks[0].pg_collection.pp, chunks[0].config
    ranks, stage = dist.get_process_group_ranks(group), group.rank()
    # on every rank: the last stage's are broadcast into it
    logits = torch.empty(len(tokens), chunks[0].vocab_size, device=tokens.device)
    for chunk in chunks:
        if not chunk.pre_process:
            shape = (tokens.size(1), tokens.size(0), config.hidden_size)
            # [columns, rows, hidden], megatron-core's order of axes
            hidden = torch.empty(shape, dtype=config.params_dtype, device=tokens.device)
            dist.recv(hidden, src=ranks[stage - 1], group=group)
            chunk.set_input_tensor(hidden)
        # gathered: every tensor-parallel rank must choose the same id
        output = chunk(tokens, position_ids, document_ids, inference_context=cache, runtime_gather_output=True)
        # a leftover would be taken for the input of the next forward pass
        chunk.set_input_tensor(None)
        if chunk.post_process:
            logits = output[:, -1].float().contiguous()
        else:
            # modulo, because an interleaved pipeline goes round
            dist.send(output.contiguous(), dst=ranks[(stage + 1) % len(ranks)], group=group)
    if len(ranks) > 1:
        dist.broadcast(logits, src=ranks[-1], group=group)
    return logits


@contextmanager
def _for_inference(model: Any) -> Iterator[None]:
    """Evaluation mode, and no sequence parallelism: a single new id cannot be split over ranks. Both are put back."""
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    owners = [model.config, *model.modules()]
    # megatron-core's modules copy the flag when they are made, so the configuration alone is not enough
    changed = [(owner, name) for owner in owners for name in names if getattr(owner, name, None) is True]
    was_training = model.training
    model.eval()
    for owner, name in changed:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in changed:
            setattr(owner, name, True)
        model.train(was_training)
