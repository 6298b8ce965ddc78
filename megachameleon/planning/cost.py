"""The time of one optimizer step, by part."""

from dataclasses import dataclass, fields

from megachameleon.planning.communication import activation_bytes, stage_parameters
from megachameleon.planning.efficiencies import FITTED, Efficiencies
from megachameleon.planning.flops import Convention, flops_of
from megachameleon.planning.hardware import Cluster
from megachameleon.planning.layer_time import PassTime, layer_time
from megachameleon.planning.machine import Machine
from megachameleon.planning.shapes import Layout, TransformerShape
from megachameleon.planning.software import OURS, Software


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step on the pipeline stage that takes longest; parts add up to the whole."""

    matrices: float
    """Products with the matrices of layers."""
    attention: float
    passes: float
    """Norms, activations, residuals, dropout: bound by memory."""
    head: float
    """Products, loss and messages of the output matrix."""
    tensor: float
    """Tensor-parallel messages, as far as they hide under nothing; the same for the other messages."""
    context: float
    bubble: float
    """Waiting while the pipeline fills and drains."""
    transfers: float
    """Between pipeline stages."""
    data: float
    """Gradients summed over replicas, weights gathered."""
    optimizer: float
    other: float
    """What is done once a step and hides under nothing."""

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def bubble_fraction(stages: int, chunks: int, micro_batches: int) -> float:
    """Idle time of a pipeline over its working time: (p - 1) / (v m) (Narayanan et al. 2021, section 2.2.2)."""
    return (stages - 1) / (chunks * micro_batches)


def cost_of(
    shape: TransformerShape,
    layout: Layout,
    cluster: Cluster,
    efficiencies: Efficiencies = FITTED,
    software: Software = OURS,
) -> StepTime:
    """Predict the time of a step."""
    machine = Machine(cluster=cluster, efficiencies=efficiencies, precision=layout.precision)
    forward, backward = layer_time(shape, layout, machine, software)
    stages, micro_batches = layout.pipeline_parallel, layout.num_micro_batches
    head = _head(shape, layout, machine, software)
    layers = _layers_of_slowest_stage(shape, layout, forward.total + backward.total, head)
    times = layers * micro_batches
    bubble = bubble_fraction(stages, layout.virtual_pipeline_parallel, micro_batches)
    return StepTime(
        matrices=times * (forward.matrices + backward.matrices),
        attention=times * (forward.attention + backward.attention),
        passes=times * (forward.passes + backward.passes),
        head=micro_batches * head,
        tensor=times * (forward.tensor + backward.tensor),
        context=times * (forward.context + backward.context),
        bubble=bubble * times * (forward.total + backward.total),
        transfers=micro_batches * _transfers(shape, layout, machine, software, layers * forward.total),
        data=_data(shape, layout, machine, layers, forward, backward),
        optimizer=_optimizer(shape, layout, machine),
        other=efficiencies.step_seconds,
    )


def model_flops_per_second(
    shape: TransformerShape, layout: Layout, seconds: float, convention: Convention = "causal"
) -> float:
    """FLOP/s of each GPU in a step of so many seconds."""
    tokens = layout.global_batch_size * shape.sequence_length
    return flops_of(shape).total(convention) * tokens / seconds / layout.world_size


def _layers_of_slowest_stage(shape: TransformerShape, layout: Layout, layer: float, head: float) -> float:
    """The last stage has the head; where layers do not divide, the last and first have one less than the others."""
    stages = layout.pipeline_parallel
    most = -(-shape.num_layers // stages)
    last = most - (1 if shape.num_layers % stages else 0)
    # The caller adds the head to any stage; from one that has none its time is taken off.
    return last if last * layer + head >= most * layer else most - head / layer


def _head(shape: TransformerShape, layout: Layout, machine: Machine, software: Software) -> float:
    """Three products with the output matrix, passes over logits, and the gather and scatter of hidden states."""
    tokens, vocab = layout.tokens_of_micro_batch(shape.sequence_length), shape.vocab_size // layout.tensor_parallel
    going = machine.product(tokens, vocab, shape.hidden_size, precision="bf16")
    back = machine.product(tokens, shape.hidden_size, vocab, precision="bf16")
    # The sum is read and written in its own precision, instead of a result written once in bf16.
    weight = machine.product(
        vocab, shape.hidden_size, tokens, precision="bf16", added_bytes=2 * layout.gradient_bytes - 2
    )
    size = activation_bytes(shape, layout)
    messages = sum(machine.collective(kind, size, layout.tensor_parallel) for kind in ("all_gather", "reduce_scatter"))
    return going + back + weight + machine.reach(software.logit_bytes * tokens * vocab) + messages


def _transfers(shape: TransformerShape, layout: Layout, machine: Machine, software: Software, forward: float) -> float:
    """Hidden states to the next stage and gradients from it, for each chunk of a micro-batch.

    Where they overlap, what is left is by how much they take longer than forward of a chunk, the shorter direction.
    """
    stages, chunks = layout.pipeline_parallel, layout.virtual_pipeline_parallel
    if stages == 1:
        return 0.0
    whole = activation_bytes(shape, layout)
    split = layout.tensor_parallel if layout.sequence_parallel or software.splits_transfers else 1
    one = machine.transfer(whole / split, layout.world_size // stages)
    if software.splits_transfers and not layout.sequence_parallel:
        one += machine.collective("all_gather", whole, layout.tensor_parallel)
    hidden = forward / chunks if chunks > 1 and software.overlaps_transfers else 0.0
    return 2 * chunks * max(0.0, one - hidden)


def _data(
    shape: TransformerShape, layout: Layout, machine: Machine, layers: float, forward: PassTime, backward: PassTime
) -> float:
    """Gradients summed over replicas, and weights gathered.

    What overlaps hides under computation of the last micro-batches, and of the first. In the interleaved schedule the
    stage passes all its micro-batches of a round through one chunk before the next, so what belongs to a chunk is
    summed while the whole round goes through the others.
    """
    replicas, stride = layout.replicas, layout.tensor_parallel
    if replicas == 1:
        return 0.0
    parameters = stage_parameters(shape, layout, layout.pipeline_parallel - 1)
    gradients, weights = parameters * layout.gradient_bytes, parameters * layout.weight_bytes
    stages, chunks = layout.pipeline_parallel, layout.virtual_pipeline_parallel
    # That a whole round hides it explains the dip of the 70B in Megatron-Core's own table.
    rounds = layers * (1 + (stages * (chunks - 1))) / chunks
    under_backward = rounds * backward.total if layout.overlap_grad_reduce else 0.0
    if layout.fully_sharded:
        return layout.num_micro_batches * _sharded(layout, machine, layers, forward, backward, gradients, weights)
    if not layout.distributed_optimizer:
        return max(0.0, machine.collective("all_reduce", gradients, replicas, stride) - under_backward)
    under_forward = rounds * forward.total if layout.overlap_param_gather else 0.0
    reduce = machine.collective("reduce_scatter", gradients, replicas, stride)
    gather = machine.collective("all_gather", weights, replicas, stride)
    return max(0.0, reduce - under_backward) + max(0.0, gather - under_forward)


def _sharded(
    layout: Layout,
    machine: Machine,
    layers: float,
    forward: PassTime,
    backward: PassTime,
    gradients: float,
    weights: float,
) -> float:
    """Fully sharded: weights gathered twice and gradients scattered for each micro-batch, under its computation."""
    gather = machine.collective("all_gather", weights, layout.replicas, layout.tensor_parallel)
    reduce = machine.collective("reduce_scatter", gradients, layout.replicas, layout.tensor_parallel)
    return max(0.0, gather - layers * forward.total) + max(0.0, gather + reduce - layers * backward.total)


def _optimizer(shape: TransformerShape, layout: Layout, machine: Machine) -> float:
    """Adam reads gradient, master and two moments and writes the last three and the weight, counted as 32 bytes
    a parameter in bf16 training, after a pass over all gradients for their norm; and gradients are cleared."""
    parameters = stage_parameters(shape, layout, 0)
    owned = parameters / layout.optimizer_shards
    return machine.reach((26 + layout.weight_bytes + 4) * owned) + machine.reach(2 * layout.gradient_bytes * owned)
