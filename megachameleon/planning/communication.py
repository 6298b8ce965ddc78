"""What ranks send each other in one step, by axis: counts and bytes, from shape and layout alone.

These are our own trainer's messages (megatron-core's schedule, our linear layers, attention and head); the dry run on
fake tensors counts the real ones, and tests hold the two against each other. Messages of a few numbers, such as the
gradient norm, are left out.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from megachameleon.planning.shapes import Layout, TransformerShape

HEAD_TOKENS = 2_048
"""Tokens for which our head exchanges its statistics at once on a GPU."""


@dataclass(frozen=True, slots=True)
class Messages:
    """Messages of one kind in a step."""

    count: int
    """By each rank."""
    bytes: int
    """Sum over messages of the whole tensor: what all ranks hold together after a gather or before a scatter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommunicationParts:
    """Messages of one rank in one step; keys are all_reduce, all_gather, reduce_scatter, send and recv."""

    tensor: Mapping[str, Messages] = field(default_factory=dict)
    """Among ranks that share matrices."""
    context: Mapping[str, Messages] = field(default_factory=dict)
    """Among ranks that share sequences."""
    pipeline: Mapping[str, Messages] = field(default_factory=dict)
    """With the stages before and behind."""
    data: Mapping[str, Messages] = field(default_factory=dict)
    """Among replicas: ranks of the data and context axes together."""


def communication_of(shape: TransformerShape, layout: Layout, stage: int = 0) -> CommunicationParts:
    """Messages of each rank of a pipeline stage."""
    return CommunicationParts(
        tensor=_tensor(shape, layout, stage) if layout.tensor_parallel > 1 else {},
        context=_context(shape, layout) if layout.context_parallel > 1 else {},
        pipeline=_pipeline(shape, layout, stage) if layout.pipeline_parallel > 1 else {},
        data=_data(shape, layout, stage) if layout.replicas > 1 else {},
    )


def seconds_on_the_wire(kind: str, whole_bytes: float, ranks: int, bandwidth: float) -> float:
    """Time of a collective of `whole_bytes` by rings or trees of optimal volume.

    A rank sends (n - 1) / n of the tensor in a gather or a scatter, and twice that in an all-reduce, which is both
    (Thakur, Rabenseifner and Gropp 2005, sections 4 and 5).

    Args:
        bandwidth: bytes a second that a rank sends.
    """
    passes = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}[kind]
    return passes * (ranks - 1) / ranks * whole_bytes / bandwidth


def activation_bytes(shape: TransformerShape, layout: Layout) -> int:
    """Hidden states of a micro-batch on one context-parallel rank, whole over tensor ranks."""
    return layout.tokens_of_micro_batch(shape.sequence_length) * shape.hidden_size * layout.weight_bytes


def layer_tensor_messages(layout: Layout) -> Counter[str]:
    """Messages of `activation_bytes` each among tensor ranks, for one layer and one micro-batch.

    Without sequence parallelism each half of a layer has an all-reduce in forward and one in backward (Shoeybi et al.,
    arXiv 1909.08053, figure 4). With it (Korthikanti et al., arXiv 2205.05198, figure 5), forward gathers the input and
    scatters the output of each half; backward gathers the gradient, scatters the other gradient, and gathers the input
    again for the weight's gradient, since only a rank's part of it was kept. Recomputation repeats forward.
    """
    halves = 2
    again = {"none": 0, "full": 2, "selective": int("mlp" in layout.recompute_modules)}[layout.recompute]
    if not layout.sequence_parallel:
        return Counter(all_reduce=2 * halves + again)
    return Counter(all_gather=3 * halves + again, reduce_scatter=2 * halves + again)


def stage_parameters(shape: TransformerShape, layout: Layout, stage: int) -> int:
    """Parameters in the matrices of one rank of a stage."""
    matrices = layout.layers_of_stage(shape.num_layers) * shape.layer_matrix_parameters
    ends = (stage == 0) + (stage == layout.pipeline_parallel - 1)
    if shape.tied_embeddings and layout.pipeline_parallel == 1:
        ends = 1
    return (matrices + ends * shape.head_parameters) // layout.tensor_parallel


def _tensor(shape: TransformerShape, layout: Layout, stage: int) -> dict[str, Messages]:
    micro_batches, size = layout.num_micro_batches, activation_bytes(shape, layout)
    counts: Counter[str] = Counter()
    layer = layer_tensor_messages(layout)
    for kind in layer:
        counts[kind] = layer[kind] * layout.layers_of_stage(shape.num_layers)
    ends = (stage == 0) + (stage == layout.pipeline_parallel - 1)
    if layout.sequence_parallel:  # the embedding scatters forward and gathers backward, the head the other way round
        counts += Counter(all_gather=ends, reduce_scatter=ends)
    else:
        counts += Counter(all_reduce=ends)
    result = {kind: Messages(n * micro_batches, n * micro_batches * size) for kind, n in counts.items()}
    if stage == layout.pipeline_parallel - 1:
        tokens = layout.tokens_of_micro_batch(shape.sequence_length)
        chunks = -(-tokens // HEAD_TOKENS) * micro_batches
        statistics = 8 * tokens * layout.tensor_parallel * micro_batches  # two fp32 of each token from each rank
        before = result.get("all_gather", Messages(0, 0))
        result["all_gather"] = Messages(before.count + chunks, before.bytes + statistics)
    return result


def _context(shape: TransformerShape, layout: Layout) -> dict[str, Messages]:
    """Keys and values of the whole sequence are gathered, and their gradients scattered."""
    tokens = layout.tokens_of_micro_batch(shape.sequence_length) * layout.context_parallel
    size = tokens * shape.key_value_size // layout.tensor_parallel * layout.weight_bytes
    layers = layout.layers_of_stage(shape.num_layers) * layout.num_micro_batches
    # A layer that is computed again gathers its keys and values again.
    gathers = layers * (4 if layout.recompute == "full" else 2)
    return {
        "all_gather": Messages(gathers, gathers * size),
        "reduce_scatter": Messages(2 * layers, 2 * layers * size),
    }


def _pipeline(shape: TransformerShape, layout: Layout, stage: int) -> dict[str, Messages]:
    """Hidden states forward and their gradients back, over each border between chunks of layers."""
    size = activation_bytes(shape, layout) // layout.activation_split
    chunks, micro_batches = layout.virtual_pipeline_parallel, layout.num_micro_batches
    # Behind the last chunk of all nothing is sent, and before the first nothing is received.
    borders_behind = chunks - (stage == layout.pipeline_parallel - 1)
    borders_before = chunks - (stage == 0)
    count = (borders_before + borders_behind) * micro_batches
    return {"send": Messages(count, count * size), "recv": Messages(count, count * size)}


def _data(shape: TransformerShape, layout: Layout, stage: int) -> dict[str, Messages]:
    """Gradients once a step in the buffer's precision, and updated weights if their masters are split.

    Counts of messages are those of one piece; overlapping communication cuts it into buckets.
    """
    parameters = stage_parameters(shape, layout, stage)
    gradients = Messages(1, parameters * layout.gradient_bytes)
    if not (layout.distributed_optimizer or layout.fully_sharded):
        return {"all_reduce": gradients}
    # Fully sharded, weights are gathered for forward and again for backward, in each micro-batch.
    gathers = 2 * layout.num_micro_batches if layout.fully_sharded else 1
    weights = Messages(gathers, gathers * parameters * layout.weight_bytes)
    return {"reduce_scatter": gradients, "all_gather": weights}
