"""Our configuration in megatron-core's words."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megachameleon.config import KernelsConfig, ModelConfig, ParallelConfig


def transformer_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, kernels: KernelsConfig) -> Any:
    """megatron-core's TransformerConfig for a decoder in `dtype` (bf16 or fp32).

    megatron-core's own fusions are off: what they do, the kernels do, and most fail without apex or Transformer Engine.
    """
    chunks = parallel.virtual_pipeline_parallel
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm != "none",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        # To megatron-core that of embeddings too, which the decoder sets by itself.
        hidden_dropout=model.dropout,
        # The paper mentions none, and our kernels have none.
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context_parallel,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Sums over tokens, divided once: exact where ranks have different numbers of labels.
        calculate_per_token_loss=True,
        # The other way allocates on the GPU by name, whatever the default device.
        use_cpu_initialization=True,
        # Initialisation is ours (initialization.py), but only this path marks which parameters are split.
        perform_initialization=True,
        init_method=_leave_as_allocated,
        output_layer_init_method=_leave_as_allocated,
        embedding_init_method=_leave_as_allocated,
        # Batched transfers are silently wrong in the interleaved schedule of two stages; single ones overlap there.
        # `deallocate_pipeline_outputs` stays off: it frees what gloo is still sending.
        batch_p2p_comm=chunks == 1,
        batch_p2p_sync=False,  # true waits for the device, for the sake of old versions of PyTorch
        overlap_p2p_comm=chunks > 1,
        **_recompute(parallel),
        **_float8(kernels),
        tp_comm_overlap=kernels.userbuffers,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _recompute(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}


def _float8(kernels: KernelsConfig) -> dict[str, Any]:
    """Recipes of Transformer Engine, which megatron-core's blocks turn on around each layer."""
    if kernels.fp8 == "te_delayed":  # scales from the largest of 1,024 micro-batches
        return {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    if kernels.fp8 == "te_tensorwise":
        # Hybrid: e4m3 forward, e5m2 for gradients, which need its range.
        return {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    return {}


def _leave_as_allocated(weight: torch.Tensor) -> torch.Tensor:
    return weight
