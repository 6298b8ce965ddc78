"""What a GPU holds at the peak of a step, by part, in closed form. docs/planning.md has the sources.

Symbols as in the literature: T tokens of a micro-batch on a context-parallel rank, h hidden size, k key-value size, f
feed-forward size, t tensor ranks, p ranks that the rest is split over (t with sequence parallelism, else 1), e bytes
of an element. The formulas of a layer are those of Korthikanti et al. (arXiv 2205.05198, section 4) where a trainer is
like theirs; tests hold them against what our dry run counts.
"""

from dataclasses import dataclass, fields, replace

from megachameleon.planning.communication import HEAD_TOKENS, stage_parameters
from megachameleon.planning.shapes import Layout, TransformerShape

OPTIMIZER_BYTES = 8
"""Two fp32 moments of a parameter."""
MASTER_BYTES = 4
"""An fp32 copy of a parameter in bf16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryParts:
    """Bytes on one rank at the peak of a step."""

    weights: float
    """As forward and backward use them."""
    gradients: float
    """The buffer in which they are summed."""
    optimizer: float
    """Moments, and fp32 masters of weights in bf16."""
    activations: float
    """What is kept for backward, of all micro-batches in flight."""
    head: float
    """Logits and gradients that the head works on."""
    buffers: float
    """Passing gradients of activations, and what is gathered from tensor ranks."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(float(getattr(self, field.name)) for field in fields(self))


def memory_of(shape: TransformerShape, layout: Layout, stage: int = 0) -> MemoryParts:
    """The peak on each rank of a pipeline stage. Padding of buffers, norms and biases (about 1e-4) are left out.

    Most is allocated when as many micro-batches are in flight as there can be, and either the head works or backward
    passes the activation function of the last feed-forward layer.
    """
    parameters = stage_parameters(shape, layout, stage)
    held = parameters / layout.replicas if layout.fully_sharded else parameters
    # In fp32 the weights are their own masters.
    masters = 0 if layout.precision == "fp32" else MASTER_BYTES
    kept = _kept(shape, layout, stage)
    at_head, passing = _at_head(shape, layout, kept), _in_backward(shape, layout, stage, kept)
    has_head = stage == layout.pipeline_parallel - 1
    activations, head, buffers = max(at_head, passing, key=sum) if has_head else passing
    return MemoryParts(
        weights=held * layout.weight_bytes,
        gradients=held * layout.gradient_bytes,
        optimizer=parameters * (OPTIMIZER_BYTES + masters) / layout.optimizer_shards,
        activations=activations,
        head=head,
        buffers=buffers + _gathered(shape, layout),
    )


def chunks_in_flight(layout: Layout, stage: int) -> int:
    """Forward passes through a chunk of layers that wait for their backward pass at the same time.

    1F1B holds as many micro-batches as there are stages from here to the last (Narayanan et al., arXiv 2104.04473,
    section 2.2); the interleaved schedule warms up by twice that, less two, and a round for each further chunk.
    """
    stages, chunks = layout.pipeline_parallel, layout.virtual_pipeline_parallel
    behind = stages - stage - 1
    warm_up = behind if chunks == 1 else 2 * behind + (chunks - 1) * stages
    return min(warm_up + 1, layout.num_micro_batches * chunks)


def layer_bytes(shape: TransformerShape, layout: Layout) -> float:
    """Bytes that one layer keeps for backward of one token."""
    h, e, p = shape.hidden_size, layout.weight_bytes, layout.activation_split
    if layout.recompute == "full":
        return e * h / p
    dropped = layout.recompute_modules if layout.recompute == "selective" else ()
    norm_outputs = 0 if "layernorm" in dropped and shape.norm_order == "pre" else 2
    outside = e * (2 + norm_outputs) * h + 2 * h * shape.dropout  # a mask of a byte after each branch
    return outside / p + (_attention(shape, layout) + _feed_forward(shape, layout)) / layout.tensor_parallel


def _attention(shape: TransformerShape, layout: Layout) -> float:
    """Queries, keys and values before and after their norm, the output, and what the softmax leaves, of one token."""
    h, k, e, heads = shape.hidden_size, shape.key_value_size, layout.weight_bytes, shape.num_attention_heads
    before_norm = (h + k) * shape.qk_norm
    statistics = 8 * (heads + shape.num_query_groups) * shape.qk_norm  # mean and deviation in fp32
    kept = statistics + e * (before_norm + 2 * h + 2 * k * layout.context_parallel)
    if layout.attention == "flash":
        return kept + 4 * heads
    if layout.recompute == "selective" and "core_attn" in layout.recompute_modules:
        return kept
    return kept + heads * shape.sequence_length * (e + (1 + e) * shape.attention_dropout)


def _feed_forward(shape: TransformerShape, layout: Layout) -> float:
    """Input and output of the activation function, of one token."""
    if layout.recompute == "selective" and "mlp" in layout.recompute_modules:
        return 0
    return layout.weight_bytes * shape.ffn_matrices * shape.ffn_hidden_size


def _states(shape: TransformerShape, layout: Layout) -> float:
    """Hidden states of a micro-batch on one rank, outside of tensor-parallel regions."""
    tokens = layout.tokens_of_micro_batch(shape.sequence_length)
    return tokens * layout.weight_bytes * shape.hidden_size / layout.activation_split


def _gathered(shape: TransformerShape, layout: Layout) -> float:
    """The buffer into which linear layers gather a sequence that tensor ranks share."""
    return _states(shape, layout) * layout.activation_split * layout.sequence_parallel


def _kept(shape: TransformerShape, layout: Layout, stage: int) -> float:
    tokens = layout.tokens_of_micro_batch(shape.sequence_length)
    layers = layout.layers_of_stage(shape.num_layers) / layout.virtual_pipeline_parallel
    rotary = layout.weight_bytes * shape.head_dim
    output = _states(shape, layout)  # sent on, or normed for the head
    return chunks_in_flight(layout, stage) * (tokens * (layers * layer_bytes(shape, layout) + rotary) + output)


def _at_head(shape: TransformerShape, layout: Layout, kept: float) -> tuple[float, float, float]:
    """Activations, head and buffers while the head works on logits: of a chunk of tokens, or of all."""
    e, h = layout.weight_bytes, shape.hidden_size
    tokens = layout.tokens_of_micro_batch(shape.sequence_length)
    rows = shape.vocab_size / layout.tensor_parallel
    normed = _states(shape, layout)
    if layout.head == "whole":  # logits, their fp32 exponentials, and the gradient
        return kept + normed, tokens * rows * (2 * e + 4), 0.0
    chunk = min(tokens, HEAD_TOKENS)
    of_chunk = 2 * e * chunk * rows + (4 + e % 4) * chunk * h  # logits and their gradient; that of hidden states
    whole = e * tokens * h * (1 + layout.sequence_parallel)  # gradient of all hidden states; these, gathered
    return kept + normed, of_chunk + whole, 0.0


def _in_backward(shape: TransformerShape, layout: Layout, stage: int, kept: float) -> tuple[float, float, float]:
    """Activations, head and buffers while backward is in the last feed-forward layer, its last product done."""
    tokens = layout.tokens_of_micro_batch(shape.sequence_length)
    inner = tokens * layout.weight_bytes * shape.ffn_hidden_size / layout.tensor_parallel
    again = tokens * (layer_bytes(shape, replace(layout, recompute="none")) - layer_bytes(shape, layout))
    gradients = inner * (4 if shape.gated else 2)  # of the output, of the input, and the activation function of a half
    sent = _states(shape, layout) * ((stage > 0) + (layout.virtual_pipeline_parallel > 1))
    return kept + again - inner, 0.0, gradients + sent
