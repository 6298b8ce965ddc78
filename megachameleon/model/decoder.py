"""The decoder: megatron-core's GPTModel with Chameleon's blocks and a head that goes straight to the loss."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megachameleon.config import ModelConfig, ParallelConfig
from megachameleon.model.blocks import block_spec
from megachameleon.model.embedding import TokenEmbedding
from megachameleon.model.head import LossHead, Targets
from megachameleon.model.initialization import initialize
from megachameleon.model.kernels.table import Kernels
from megachameleon.model.sequence_layout import (
    AttentionInputs,
    SequenceLayout,
    context_chunks,
    natural_positions,
    rotary_tables,
)
from megachameleon.model.transformer_config import transformer_config


class Decoder(GPTModel):
    """Reads token ids [b, s], where s is this rank's part of the sequence under context parallelism.

    Without targets it returns logits [b, s, vocab / tensor_parallel]; with targets, the fp64 sums of `head.loss_sums`.
    """

    def __init__(self, *, kernels: Kernels, model: ModelConfig, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.kernels, self.rope_theta = kernels, model.rope_theta
        if self.pre_process:
            # megatron-core drops embeddings with hidden_dropout; its paper states none.
            self.embedding.embedding_dropout.p = model.embedding_dropout
            if kernels.resolved.embedding == "torch":
                plain = self.embedding.word_embeddings
                self.embedding.word_embeddings = TokenEmbedding.instead_of(plain, self.config)
        if self.post_process:
            self.output_layer: LossHead = LossHead.instead_of(self.output_layer, kernels.head_loss)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        *,
        targets: Targets | None = None,
        inference_context: Any = None,
        runtime_gather_output: bool | None = None,
    ) -> Tensor:
        """See the class.

        Args:
            position_ids: int [b, s], for RoPE; None counts through the sequence, as does a context for inference.
            document_ids: int [b, t] over whole sequences; attention stays within equal ids. None: one document a row.
            inference_context: megatron-core's static context with the keys of earlier positions.
        """
        return super().forward(
            input_ids,
            position_ids,
            None,  # the mask: as a tensor it would be saved where layers are recomputed
            labels=targets,
            inference_context=inference_context,
            packed_seq_params=self._attention_inputs(input_ids, position_ids, document_ids, inference_context),
            runtime_gather_output=runtime_gather_output,
        )

    def _attention_inputs(
        self, input_ids: Tensor, position_ids: Tensor | None, document_ids: Tensor | None, inference_context: Any
    ) -> AttentionInputs:
        batch, length = input_ids.shape
        device, head_dim, dtype = input_ids.device, self.config.kv_channels, self.config.params_dtype
        gather_over = None
        if inference_context is not None:
            past = inference_context.sequence_len_offset
            num_keys, position_ids = past + length, None
            chunks: tuple[tuple[int, int], ...] = ((past, length),)
        else:
            group = self.pg_collection.cp
            num_keys, gather_over = length * group.size(), group if group.size() > 1 else None
            chunks = context_chunks(num_keys, group.rank(), group.size())
        layout = SequenceLayout(
            batch=batch,
            num_keys=num_keys,
            query_chunks=chunks,
            document_ids=document_ids,
            device=device,
            for_generation=inference_context is not None,
        )
        positions = natural_positions(chunks, device) if position_ids is None else position_ids
        query_rotary = key_rotary = rotary_tables(positions, head_dim, self.rope_theta, dtype)
        if inference_context is not None:
            # The cache holds keys that were not turned yet, so all of them are, at each step.
            keys = natural_positions([(0, num_keys)], device)
            key_rotary = rotary_tables(keys, head_dim, self.rope_theta, dtype)
        return AttentionInputs(
            query_rotary=query_rotary,
            key_rotary=key_rotary,
            # Here and not in a layer: all layers of the micro-batch follow this one plan.
            plan=self.kernels.attention.plan(layout),
            gather_over=gather_over,
        )

    def _postprocess(self, *, hidden_states: Tensor, labels: Targets | None, **arguments: Any) -> Tensor:
        """What follows the blocks; megatron-core hands the targets on as labels."""
        if self.post_process and labels is not None:
            return self.output_layer(hidden_states, targets=labels)
        return super()._postprocess(hidden_states=hidden_states, labels=None, **arguments)


def build_decoder(
    model: ModelConfig,
    parallel: ParallelConfig,
    kernels: Kernels,
    groups: Any,
    *,
    dtype: torch.dtype,
    seed: int | None,
    vp_stage: int | None = None,
) -> Decoder:
    """Build this process's part of the decoder, or one chunk of it, on the current default device.

    Args:
        groups: megatron-core's ProcessGroupCollection.
        dtype: of the weights in forward and backward.
        seed: of the initial weights; None leaves matrices as they are allocated, for a checkpoint to fill.
        vp_stage: number of the chunk under the interleaved pipeline schedule; None without it.
    """
    config = transformer_config(model, parallel, dtype, kernels.resolved)
    tensor_rank, stage = groups.tp.rank(), groups.pp.rank()
    last_stage, last_chunk = parallel.pipeline_parallel - 1, parallel.virtual_pipeline_parallel - 1
    decoder = Decoder(
        kernels=kernels,
        model=model,
        config=config,
        transformer_layer_spec=block_spec(model, config, kernels, tensor_rank, vp_stage),
        vocab_size=model.vocab_size,
        max_sequence_length=model.context_length,
        # Chunks go round the stages: embedding in the first of the first stage, head in the last of the last.
        pre_process=stage == 0 and vp_stage in (None, 0),
        post_process=stage == last_stage and vp_stage in (None, last_chunk),
        position_embedding_type="none",  # RoPE is part of our core attention
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    if seed is not None:
        initialize(decoder, model, seed, tensor_rank=tensor_rank, tensor_parallel=parallel.tensor_parallel)
    return decoder


def build_chunks(
    model: ModelConfig,
    parallel: ParallelConfig,
    kernels: Kernels,
    groups: Any,
    *,
    dtype: torch.dtype,
    seed: int | None,
) -> list[Decoder]:
    """All chunks of this process: one, or several under the interleaved pipeline schedule. See `build_decoder`."""
    count = parallel.virtual_pipeline_parallel
    stages = range(count) if count > 1 else [None]
    return [build_decoder(model, parallel, kernels, groups, dtype=dtype, seed=seed, vp_stage=stage) for stage in stages]
