import pytest
import torch

from megachameleon.parallel.device import install, optimizer_scope, pick_device
from megachameleon.parallel.seeding import derive_seed

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stand-ins are not installed beside CUDA")


@needs_cpu
def test_cuda_names_lead_to_the_cpu():
    install(pick_device())
    install(pick_device())  # twice does no harm
    assert torch.empty(2, device="cuda").device.type == "cpu"
    assert torch.zeros(1).cuda().device.type == "cpu"
    assert not torch.zeros(1, pin_memory=True).is_pinned()
    assert torch.cuda.current_device() == torch.device("cpu")


@needs_cpu
def test_type_strings_change_only_in_the_optimizer():
    install(pick_device())
    tensor = torch.zeros(1)
    assert tensor.type() == "torch.FloatTensor"
    with optimizer_scope():
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type(torch.float64).dtype == torch.float64
    assert tensor.type() == "torch.FloatTensor"


@needs_cpu
def test_named_random_states_do_not_disturb_each_other():
    install(pick_device())
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("a", 1)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with tracker.fork("a"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(2), expected)
    with tracker.fork("a"):
        second = torch.rand(3)
    assert torch.equal(torch.cat((first, second)), torch.rand(6, generator=torch.Generator().manual_seed(1)))


def test_seeds_differ_by_every_part():
    seeds = {derive_seed(seed, "step", step, rank) for seed in range(3) for step in range(20) for rank in range(4)}
    assert len(seeds) == 3 * 20 * 4
    assert derive_seed(1, "step", 2) == derive_seed(1, "step", 2)
