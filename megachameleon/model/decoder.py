"""The decoder: megatron-core's GPTModel with Chameleon's blocks and a loss that also returns log Z."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megachameleon.config import ModelConfig, ParallelConfig
from megachameleon.model.blocks import block_spec
from megachameleon.model.initialization import initialize
from megachameleon.model.kernels.table import Kernels
from megachameleon.model.transformer_config import transformer_config


class Decoder(GPTModel):
    """Reads token ids [b, s] and document ids [b, s].

    Without labels it returns logits [b, s, vocab / tensor_parallel]; with labels [b, s] it returns fp32 [b, s, 2]:
    the negative log-likelihood of each label and the log-partition at its position.
    """

    def __init__(self, *, kernels: Kernels, embedding_dropout: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.cross_entropy = kernels.cross_entropy
        if self.pre_process:
            # megatron-core drops embeddings with hidden_dropout; Chameleon does not.
            self.embedding.embedding_dropout.p = embedding_dropout

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, vocab / tensor_parallel] to [b, s, 2]."""
        nll, log_z = self.cross_entropy(logits, labels.transpose(0, 1).contiguous(), self.pg_collection.tp)
        return torch.stack((nll, log_z), dim=-1).transpose(0, 1).contiguous()


def build_decoder(
    model: ModelConfig,
    parallel: ParallelConfig,
    kernels: Kernels,
    groups: Any,
    *,
    dtype: torch.dtype,
    seed: int | None,
) -> Decoder:
    """Build this process's part of the decoder on the current default device.

    Args:
        groups: megatron-core's ProcessGroupCollection.
        dtype: of the weights in forward and backward.
        seed: of the initial weights; None leaves matrices as they are allocated, for a checkpoint to fill.
    """
    config = transformer_config(model, parallel, dtype)
    tensor_rank, stage = groups.tp.rank(), groups.pp.rank()
    decoder = Decoder(
        kernels=kernels,
        embedding_dropout=model.embedding_dropout,
        config=config,
        transformer_layer_spec=block_spec(model, config, kernels, tensor_rank),
        vocab_size=model.vocab_size,
        max_sequence_length=model.context_length,
        pre_process=stage == 0,
        post_process=stage == parallel.pipeline_parallel - 1,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
    )
    if seed is not None:
        initialize(decoder, model, seed, tensor_rank=tensor_rank, tensor_parallel=parallel.tensor_parallel)
    return decoder
