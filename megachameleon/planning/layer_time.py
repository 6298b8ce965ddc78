"""How long one layer takes for one micro-batch, forward and backward."""

from dataclasses import dataclass

from megachameleon.planning.communication import activation_bytes
from megachameleon.planning.machine import Machine
from megachameleon.planning.shapes import Layout, TransformerShape
from megachameleon.planning.software import Software


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTime:
    """Seconds of one direction of one layer."""

    matrices: float
    """Products with weights."""
    attention: float
    """Scores and weighted sums."""
    passes: float
    """Norms, activations, residuals, dropout: bound by memory."""
    tensor: float
    """Tensor-parallel communication that hides under nothing."""
    context: float
    """Keys and values, or their gradients, among context-parallel ranks."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.matrices + self.attention + self.passes + self.tensor + self.context


def layer_time(
    shape: TransformerShape, layout: Layout, machine: Machine, software: Software
) -> tuple[PassTime, PassTime]:
    """Forward, and backward with what is recomputed in it."""
    tokens, split = layout.tokens_of_micro_batch(shape.sequence_length), layout.tensor_parallel
    products = _products(shape, tokens, split)
    going = [machine.product(tokens, n, k) for n, k in products]
    inputs = [machine.product(tokens, k, n) for n, k in products]
    # The sum is read and written in its own precision, instead of a result written once in bf16.
    weights = [machine.product(n, k, tokens, added_bytes=2 * layout.gradient_bytes - 2) for n, k in products]
    attention = [_attention(shape, layout, machine, backward=backward) for backward in (False, True)]
    passes = [machine.reach(_pass_bytes(shape, layout, tokens, backward=b)) for b in (False, True)]
    context = [_context(shape, layout, machine, backward=b) for b in (False, True)]
    forward = PassTime(
        matrices=sum(going),
        attention=attention[0],
        passes=passes[0],
        tensor=_forward_tensor(shape, layout, machine),
        context=context[0],
    )
    backward = PassTime(
        matrices=sum(inputs) + sum(weights) + _again(layout, going),
        attention=attention[1] + _attention_again(layout, forward),
        passes=passes[1] + _passes_again(shape, layout, machine, forward),
        tensor=_backward_tensor(shape, layout, machine, software, inputs, weights) + _tensor_again(layout, forward),
        context=context[1] + (forward.context if layout.recompute == "full" else 0.0),
    )
    return forward, backward


def _products(shape: TransformerShape, tokens: int, split: int) -> list[tuple[int, int]]:
    """(n, k) of the weights of a rank: queries with keys and values, attention's output, both feed-forward ones."""
    hidden, wide = shape.hidden_size, shape.ffn_hidden_size * (2 if shape.gated else 1)
    return [
        ((hidden + 2 * shape.key_value_size) // split, hidden),
        (hidden, hidden // split),
        (wide // split, hidden),
        (hidden, shape.ffn_hidden_size // split),
    ]


def _attention(shape: TransformerShape, layout: Layout, machine: Machine, *, backward: bool) -> float:
    """Fused: the visible half, and backward makes the scores again (5 products for 2). Unfused: passes over scores."""
    tokens, heads = layout.tokens_of_micro_batch(shape.sequence_length), shape.num_attention_heads
    per_product = 2.0 * tokens * shape.sequence_length * shape.hidden_size / layout.tensor_parallel
    if layout.attention == "flash":
        return machine.attention((5 if backward else 2) * per_product / 2, backward=backward)
    scores = tokens * shape.sequence_length * heads // layout.tensor_parallel
    batches = scores // shape.sequence_length**2 or 1
    each = machine.product(batches * shape.sequence_length, shape.sequence_length, shape.head_dim)
    # Bytes: scores are read and written in 2; backward reads two of them and writes one.
    softmax = 4 if not backward else 6
    dropout = 5 if shape.attention_dropout else 0  # reads and writes scores, and a mask of one byte
    return (4 if backward else 2) * each + machine.reach(scores * (softmax + dropout))


def _pass_bytes(shape: TransformerShape, layout: Layout, tokens: int, *, backward: bool) -> float:
    """Bytes that everything but products and attention reads and writes.

    Forward: two norms read and write (8 hidden), two residual additions read two and write one (12), with dropout a
    mask more; the activation reads its input and writes its output; RoPE and QK-norm read and write queries and keys.
    Backward reads what forward read and the gradient, and adds the gradients that meet at a residual.
    """
    hidden = tokens * shape.hidden_size / layout.activation_split
    wide = tokens * shape.ffn_hidden_size / layout.tensor_parallel
    heads = tokens * (shape.hidden_size + shape.key_value_size) / layout.tensor_parallel
    masks = 2.0 if shape.dropout else 0.0
    casts = _cast_bytes(shape, layout, tokens, backward=backward) if layout.precision == "fp8" else 0.0
    per_head = 4.0 + (4.0 if shape.qk_norm else 0.0)
    if not backward:
        return casts + (20 + masks) * hidden + (6 if shape.gated else 4) * wide + per_head * heads
    return casts + (12 + 4 + 12 + masks) * hidden + (10 if shape.gated else 6) * wide + 1.5 * per_head * heads


def _cast_bytes(shape: TransformerShape, layout: Layout, tokens: int, *, backward: bool) -> float:
    """To 8 bits: the input of each product is read in 16 and written in 8, as it is and transposed."""
    sizes = [n if backward else k for n, k in _products(shape, tokens, layout.tensor_parallel)]
    return 4.0 * tokens * sum(sizes)


def _context(shape: TransformerShape, layout: Layout, machine: Machine, *, backward: bool) -> float:
    """Keys and values gathered, or their gradients scattered, while nothing else runs."""
    ranks = layout.context_parallel
    tokens = layout.tokens_of_micro_batch(shape.sequence_length) * ranks
    size = tokens * shape.key_value_size // layout.tensor_parallel * layout.weight_bytes
    kind = "reduce_scatter" if backward else "all_gather"
    return 2 * machine.collective(kind, size, ranks, layout.tensor_parallel)


def _message(shape: TransformerShape, layout: Layout, machine: Machine, kind: str) -> float:
    return machine.collective(kind, activation_bytes(shape, layout), layout.tensor_parallel)


def _forward_tensor(shape: TransformerShape, layout: Layout, machine: Machine) -> float:
    """Two all-reduces, or two gathers and two scatters, which move as much; hidden in part where overlapped."""
    if layout.tensor_parallel == 1:
        return 0.0
    kinds = ["all_gather", "reduce_scatter"] if layout.sequence_parallel else ["all_reduce"]
    whole = 2 * sum(_message(shape, layout, machine, kind) for kind in kinds)
    return whole * (1 - machine.efficiencies.overlapped_tensor if layout.overlap_tensor_parallel else 1)


def _backward_tensor(
    shape: TransformerShape,
    layout: Layout,
    machine: Machine,
    software: Software,
    inputs: list[float],
    weights: list[float],
) -> float:
    """Exposed communication of backward.

    Where the software overlaps it, the second gather of a column-split layer's input runs under the product that makes
    its gradient, and the sum of that gradient over ranks runs under the product that makes the weight's
    (megatron-core's LinearWithGradAccumulationAndAsyncCommunication). The gather at a row-split layer waits.
    """
    if layout.tensor_parallel == 1:
        return 0.0
    if not layout.sequence_parallel:
        reduce = _message(shape, layout, machine, "all_reduce")
        return sum(max(0.0, reduce - (weights[i] if software.overlaps_backward else 0.0)) for i in (0, 2))
    gather, scatter = (_message(shape, layout, machine, kind) for kind in ("all_gather", "reduce_scatter"))
    waiting = 2 * gather * (1 - machine.efficiencies.overlapped_tensor if layout.overlap_tensor_parallel else 1)
    # Column-split: queries with keys and values, and the first of the feed-forward.
    for i in (0, 2):
        hidden = (inputs[i], weights[i]) if software.overlaps_backward else (0.0, 0.0)
        waiting += max(0.0, gather - hidden[0]) + max(0.0, scatter - hidden[1])
    return waiting


def _again(layout: Layout, going: list[float]) -> float:
    """Products computed again in backward."""
    if layout.recompute == "full":
        return sum(going)
    return sum(going[2:]) if "mlp" in layout.recompute_modules else 0.0  # the two of the feed-forward


def _attention_again(layout: Layout, forward: PassTime) -> float:
    again = layout.recompute == "full" or "core_attn" in layout.recompute_modules
    return forward.attention if again else 0.0


def _passes_again(shape: TransformerShape, layout: Layout, machine: Machine, forward: PassTime) -> float:
    """All of forward's; or the norms before the branches, or the activation function, read and written."""
    if layout.recompute == "full":
        return forward.passes
    tokens = layout.tokens_of_micro_batch(shape.sequence_length)
    norms = 8.0 * shape.hidden_size / layout.activation_split * ("layernorm" in layout.recompute_modules)
    activation = 2.0 * shape.ffn_matrices * shape.ffn_hidden_size / layout.tensor_parallel
    again = norms + activation * ("mlp" in layout.recompute_modules)
    return machine.reach(tokens * again) if again else 0.0


def _tensor_again(layout: Layout, forward: PassTime) -> float:
    if layout.recompute == "full":
        return forward.tensor
    # The feed-forward has half of the messages.
    return forward.tensor / 2 if "mlp" in layout.recompute_modules else 0.0
