"""What is computed and how it is divided: the two values that every formula of the planner reads.

They are wider than our own configuration, so that published runs of other trainers can be written down in them.
"""

from dataclasses import dataclass
from typing import Literal

from megachameleon.config import ModelConfig, RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerShape:
    """Sizes of a decoder-only transformer and of the sequences it reads."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    """Heads of queries."""
    num_query_groups: int
    """Key/value heads."""
    ffn_hidden_size: int
    """Width of the inner layer; of each half of SwiGLU's."""
    gated: bool
    """SwiGLU, with three matrices, instead of GELU, with two."""
    vocab_size: int
    sequence_length: int
    """Tokens of a sample."""
    norm_order: Literal["pre", "swin"] = "pre"
    """Norms before the branches, or behind them."""
    qk_norm: bool = False
    """Norms of queries and keys."""
    dropout: bool = False
    """Whether masks of hidden dropout are drawn and kept."""
    attention_dropout: bool = False
    """The same for attention's weights; only unfused attention keeps that mask."""
    bias: bool = False
    """Biases of linear layers."""
    tied_embeddings: bool = False
    """One table for embedding and head."""
    learned_positions: bool = False
    """A table of positions instead of RoPE."""

    @classmethod
    def from_model(cls, model: ModelConfig, sequence_length: int) -> "TransformerShape":
        """The shape of one of our decoders."""
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            ffn_hidden_size=model.ffn_hidden_size,
            gated=True,
            vocab_size=model.vocab_size,
            sequence_length=sequence_length,
            norm_order=model.norm_order,
            qk_norm=model.qk_norm != "none",
            dropout=model.dropout > 0,
        )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_size(self) -> int:
        """Width of all keys of a token, which is that of its values."""
        return self.num_query_groups * self.head_dim

    @property
    def ffn_matrices(self) -> int:
        """Matrices of a feed-forward layer."""
        return 3 if self.gated else 2

    @property
    def layer_matrix_parameters(self) -> int:
        """Parameters in the matrices of one layer."""
        attention = 2 * self.hidden_size * (self.hidden_size + self.key_value_size)
        return attention + self.ffn_matrices * self.hidden_size * self.ffn_hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the output projection."""
        return self.vocab_size * self.hidden_size

    @property
    def matrix_parameters(self) -> int:
        """Parameters that each token is multiplied by: the embedding is only looked up."""
        return self.num_layers * self.layer_matrix_parameters + self.head_parameters

    @property
    def num_parameters(self) -> int:
        """All matrices; norms and biases, a fraction of 1e-4, are left out."""
        tables = (0 if self.tied_embeddings else self.vocab_size) + (
            self.sequence_length if self.learned_positions else 0
        )
        return self.matrix_parameters + tables * self.hidden_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a step is divided over devices, and what is kept, recomputed and hidden."""

    world_size: int
    """GPUs."""
    global_batch_size: int
    """Samples of a step."""
    micro_batch_size: int = 1
    """Samples of a forward pass of one rank."""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline_parallel: int = 1
    """Chunks of layers on each stage."""
    context_parallel: int = 1
    sequence_parallel: bool = False
    """Tensor ranks share activations outside their regions, along the sequence."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Nothing, `recompute_modules`, or whole layers."""
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp"], ...] = ()
    """What `selective` computes again."""
    distributed_optimizer: bool = False
    """Optimizer states split over data- and context-parallel ranks (ZeRO 1)."""
    fully_sharded: bool = False
    """Weights and gradients split too, weights gathered for each layer (ZeRO 3, FSDP); ours has no such mode."""
    overlap_grad_reduce: bool = False
    """Gradients are summed under backward."""
    overlap_param_gather: bool = False
    """Weights are gathered under forward."""
    overlap_tensor_parallel: bool = False
    """Tensor-parallel communication runs under matrix products (userbuffers, async TP)."""
    attention: Literal["flash", "unfused"] = "flash"
    """Whether scores are ever in memory: `unfused`."""
    head: Literal["chunked", "whole"] = "chunked"
    """Whether logits of all tokens of a micro-batch exist at once."""
    precision: Literal["bf16", "fp8", "fp32"] = "bf16"
    """Of matrix products in blocks. The head's are bf16 under `fp8`."""
    gradient_bytes: Literal[2, 4] = 4
    """Of an element of the gradient buffer and of what data-parallel ranks send."""

    @classmethod
    def from_run(cls, config: RunConfig, world_size: int) -> "Layout":
        """The layout of one of our runs; precision `auto` is bf16, which every GPU of the planner has.

        Raises:
            ValueError: layout or batch do not divide over the world.
        """
        config.validate_world(world_size)
        parallel, training, kernels = config.parallel, config.training, config.kernels
        fp8 = kernels.fp8 != "none"
        return cls(
            world_size=world_size,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            tensor_parallel=parallel.tensor_parallel,
            pipeline_parallel=parallel.pipeline_parallel,
            virtual_pipeline_parallel=parallel.virtual_pipeline_parallel,
            context_parallel=parallel.context_parallel,
            sequence_parallel=parallel.sequence_parallel,
            recompute=parallel.recompute,
            recompute_modules=parallel.recompute_modules if parallel.recompute == "selective" else (),
            distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            overlap_tensor_parallel=kernels.userbuffers,
            attention="unfused" if kernels.attention == "reference" else "flash",
            head="whole" if kernels.loss == "reference" else "chunked",
            precision="fp32" if training.precision == "fp32" else ("fp8" if fp8 else "bf16"),
        )

    @property
    def model_parallel(self) -> int:
        """Devices that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def data_parallel(self) -> int:
        """Groups of devices that read different samples."""
        return self.world_size // self.model_parallel

    @property
    def replicas(self) -> int:
        """Devices that hold the same weights and sum their gradients."""
        return self.data_parallel * self.context_parallel

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.global_batch_size // (self.data_parallel * self.micro_batch_size)

    @property
    def activation_split(self) -> int:
        """Parts that activations outside tensor-parallel regions are divided into."""
        return self.tensor_parallel if self.sequence_parallel else 1

    @property
    def optimizer_shards(self) -> int:
        """Devices that share one copy of the optimizer's states."""
        # megatron-core splits states over context ranks too: they hold the same weights.
        return self.replicas if self.distributed_optimizer or self.fully_sharded else 1

    @property
    def weight_bytes(self) -> int:
        """Of an element of the weights in forward and backward."""
        return 4 if self.precision == "fp32" else 2

    def tokens_of_micro_batch(self, sequence_length: int) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.micro_batch_size * sequence_length // self.context_parallel

    def layers_of_stage(self, num_layers: int) -> int:
        """Layers on each pipeline stage."""
        return num_layers // self.pipeline_parallel

    def describe(self) -> str:
        """The layout in the field's shorthand, like `TP8 PP2 VPP4 DP64 mbs1`."""
        parts = [f"TP{self.tensor_parallel}", f"PP{self.pipeline_parallel}"]
        parts += [f"VPP{self.virtual_pipeline_parallel}"] if self.virtual_pipeline_parallel > 1 else []
        parts += [f"CP{self.context_parallel}"] if self.context_parallel > 1 else []
        parts += [f"DP{self.data_parallel}", f"mbs{self.micro_batch_size}"]
        if self.recompute != "none":
            parts.append(f"recompute {'+'.join(self.recompute_modules) or self.recompute}")
        return " ".join(parts)
