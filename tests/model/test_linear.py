"""Linear layers over products of our choice: megatron-core's results, whatever adds up the weight's gradient.

fp32 sums in another order (1e-6); bf16 on the CPU rounds at the same places, so it must be bit-equal.
"""

import pytest
import torch
from cases import parallel_context, train_steps
from torch.utils._python_dispatch import TorchDispatchMode
from whole import relative_errors

from megachameleon.config import KernelsConfig, ParallelConfig, load_config

SEVERAL = ["model.num_query_groups=2", "training.global_batch_size=8", "training.micro_batch_size=2"]
LAYOUTS = {
    "alone": (1, []),
    "tensor 2": (2, ["parallel.tensor_parallel=2"]),
    "tensor 2, sequence": (2, ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"]),
    "overlap": (
        2,
        [
            "parallel.distributed_optimizer=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
        ],
    ),
    "pipeline 2, two chunks": (
        2,
        ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=2", "model.num_layers=4"],
    ),
    "recompute": (1, ["parallel.recompute=full"]),
}


@pytest.fixture(scope="module")
def context():
    with parallel_context(ParallelConfig()) as context:
        yield context


def trained(workers, config, world_size, *overrides):
    return workers.run(world_size, train_steps, config(*SEVERAL, *overrides), 2)[-1]


@pytest.mark.parametrize(("layout", "precision"), [("alone", "fp32"), *((layout, "bf16") for layout in LAYOUTS)])
def test_learns_what_megatron_cores_layers_learn(workers, module_config, layout, precision):
    world_size, overrides = LAYOUTS[layout]
    overrides = [*overrides, f"training.precision={precision}", "kernels.embedding=reference"]
    _, gradients, parameters = trained(workers, module_config, world_size, *overrides, "kernels.linear=torch")
    _, expected, expected_parameters = trained(
        workers, module_config, world_size, *overrides, "kernels.linear=reference"
    )
    bound = 1e-6 if precision == "fp32" else 0
    if gradients is not None:
        assert max(relative_errors(gradients, expected).values()) <= bound
    assert max(relative_errors(parameters, expected_parameters).values()) <= bound


def decoder(context, **kernels):
    from megachameleon.model.decoder import build_decoder
    from megachameleon.model.kernels.table import choose_kernels

    config = load_config("debug", [])
    chosen = choose_kernels(KernelsConfig(**kernels))
    return build_decoder(config.model, config.parallel, chosen, context.groups, dtype=torch.float32, seed=1)


def test_without_main_grad_weights_have_an_ordinary_gradient(context):
    tokens = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    gradients = []
    for linear in ("torch", "reference"):
        model = decoder(context, linear=linear)
        for parameter in model.decoder.layers[0].mlp.linear_fc2.parameters():
            parameter.requires_grad_(False)
        model(tokens, None, None).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[1].items():
        if "layers.0.mlp.linear_fc2" in name:
            assert gradients[0][name] is None
        else:
            torch.testing.assert_close(gradients[0][name], expected, rtol=1e-5, atol=1e-5)


class LargeResults(TorchDispatchMode):
    """Names of operations that made a tensor of some shape anew."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.names = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        seen = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        is_large = isinstance(result, torch.Tensor) and result.shape == self.shape
        if is_large and result.untyped_storage().data_ptr() not in seen:
            self.names.append(str(func))
        return result


def test_the_gradient_of_a_weight_is_never_a_tensor_of_its_own(context):
    from megachameleon.parallel.replicas import wrap_replicas

    (replica,) = wrap_replicas([decoder(context, linear="torch")], ParallelConfig())
    replica.zero_grad_buffer()
    weight = replica.module.decoder.layers[0].mlp.linear_fc1.weight
    loss = replica(torch.randint(0, 128, (2, 32)), None, None).square().sum()
    with LargeResults(weight.shape) as made:
        loss.backward()
    assert made.names == []
    assert weight.main_grad.norm() > 0 and weight.grad is None


def test_the_cuda_path_asks_for_an_operation_that_exists():
    """Shapes and dtypes only: torch has it on CUDA, and without values on the meta device."""
    from megachameleon.model.kernels.linear import add_torch_weight_gradient

    grad, x = (torch.empty(6, n, dtype=torch.bfloat16, device="meta") for n in (4, 8))
    main_grad = torch.empty(4, 8, device="meta")
    add_torch_weight_gradient(grad, x, main_grad)
    with pytest.raises(RuntimeError):
        add_torch_weight_gradient(grad, x, torch.empty(8, 4, device="meta"))
