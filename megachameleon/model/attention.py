"""Core attention for megatron-core's SelfAttention."""

from typing import Any

from torch import Tensor, nn

from megachameleon.model.kernels.table import Attention


class DocumentAttention(nn.Module):
    """Causal attention within documents. The `attention_mask` that megatron-core passes along holds document ids.

    Constructor and call signatures are those of megatron-core's `core_attention` slot.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        kernel: Attention,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, head_dim]; the last s of t positions.
            key: [t, b, groups, head_dim].
            value: [t, b, groups, head_dim].
            attention_mask: document ids [b, t], or None for one document.

        Returns:
            [s, b, heads * head_dim].
        """
        return self.kernel(query, key, value, attention_mask, self.scale).flatten(2).contiguous()
