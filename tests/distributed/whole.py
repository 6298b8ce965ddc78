"""The whole model put together from the parts that ranks hold, for comparison between layouts."""

import torch
import torch.distributed as dist

from megachameleon.checkpoint.state import unwrap
from megachameleon.model.initialization import global_names
from megachameleon.parallel.optimizer_state import held_states


def gather(model, context, *, gradients):
    """Whole parameters or gradients by global name, on every rank. Replicas over tensor, context and data ranks must
    agree."""
    mine = {}
    for name, parameter in (pair for chunk in model for pair in global_names(unwrap(chunk))):
        tensor = parameter.main_grad if gradients else parameter
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        assert name not in mine, f"{name} stands in two chunks"
        mine[name] = (tensor.detach().float().clone(), dim)
    ranks = [None] * context.world_size
    replica = context.groups.dp_cp.rank()
    dist.all_gather_object(ranks, (context.tensor_rank, context.pipeline_rank, replica, mine))
    require_equal_replicas(ranks)
    whole = {}
    for stage in range(context.config.pipeline_parallel):
        rows = sorted((row for row in ranks if row[1] == stage and row[2] == 0), key=lambda row: row[0])
        for name, (_, dim) in rows[0][3].items():
            whole[name] = join([row[3][name][0] for row in rows], name, dim)
    return whole


def gather_state(chunks, optimizer, context):
    """Whole weights, moments and masters by kind and global name, on every rank, put together from what the optimizers
    of all ranks say that they hold: it knows nothing of checkpoints."""
    names = {id(parameter): name for chunk in chunks for name, parameter in global_names(unwrap(chunk))}
    mine = []
    for held in held_states(optimizer):
        parameter = held.parameter
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        weight = parameter.detach().view(-1)[held.start : held.stop]
        for kind, values in {"weight": weight, **held.tensors}.items():
            mine.append((f"{kind} {names[id(parameter)]}", parameter.shape, dim, held.start, values.clone()))
    ranks = [None] * context.world_size
    dist.all_gather_object(ranks, (context.tensor_rank, mine))
    local, dims = {}, {}
    for tensor_rank, rows in ranks:
        for key, shape, dim, start, values in rows:
            whole = local.setdefault((key, tensor_rank), torch.full((shape.numel(),), torch.nan, dtype=values.dtype))
            whole[start : start + len(values)] = values
            dims[key] = shape, dim
    assert not any(tensor.isnan().any() for tensor in local.values()), "nobody holds some of the values"
    size = context.config.tensor_parallel
    return {
        key: join([local[key, rank].view(shape) for rank in range(size)], key, dim)
        for key, (shape, dim) in sorted(dims.items())
    }


def require_equal_replicas(ranks):
    """Replicas over data and context do the same updates with the same sums: not a bit may differ."""
    first = {(tensor, stage): mine for tensor, stage, replica, mine in ranks if replica == 0}
    for tensor, stage, replica, mine in ranks:
        for name, (part, _) in mine.items():
            assert torch.equal(part, first[tensor, stage][name][0]), f"{name} differs on replica {replica}"


def join(parts, name, dim):
    if dim is None or len(parts) == 1:
        for part in parts[1:]:
            torch.testing.assert_close(part, parts[0], rtol=1e-5, atol=1e-7, msg=f"{name} differs between replicas")
        return parts[0]
    if "linear_fc1" in name:
        halves = [part.chunk(2, dim) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves], dim)
    return torch.cat(parts, dim)


def relative_errors(got, expected):
    """Relative L2 error of each tensor."""
    assert got.keys() == expected.keys()
    return {
        name: float((got[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)) for name in expected
    }


def overall_error(got, expected):
    """Relative L2 error over all tensors taken as one vector."""
    difference = sum(float((got[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5
