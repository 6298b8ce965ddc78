"""Core attention for megatron-core's SelfAttention: RoPE, then causal attention within documents."""

from typing import Any

from torch import Tensor, nn

from megachameleon.model.kernels.table import Kernels
from megachameleon.model.sequence_layout import AttentionInputs, in_sequence_order


class DocumentAttention(nn.Module):
    """Constructor and call signatures are those of megatron-core's `core_attention` slot.

    Under context parallelism keys and values are gathered from all ranks; their gradients are summed and scattered.
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
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: AttentionInputs | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, head_dim], the queries of the layout.
            key: [t, b, groups, head_dim]; under context parallelism, those of this rank.
            value: like `key`.
            packed_seq_params: RoPE tables and the kernel's plan.

        Returns:
            [s, b, heads * head_dim].
        """
        assert packed_seq_params is not None, "the decoder makes the attention inputs of each micro-batch"
        inputs = packed_seq_params
        # Before the gather: the tables have this rank's positions only.
        query = self.kernels.rotary(query, *inputs.query_rotary)
        key = self.kernels.rotary(key, *inputs.key_rotary)
        value = value.contiguous()  # a view would keep queries and keys from before their norms until backward
        if inputs.gather_over is not None:
            key, value = (_whole_sequence(x, inputs.gather_over) for x in (key, value))
        return self.kernels.attention(query, key, value, inputs.plan, self.scale).flatten(2)


def _whole_sequence(x: Tensor, group: Any) -> Tensor:
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    # True: backward sums over ranks, since queries of each rank add to the gradients of all keys.
    gathered = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    return in_sequence_order(gathered, group.size())
