"""megatron-core takes a fused Adam wherever it finds one; we say which."""

import sys
from types import ModuleType

import pytest
import torch

from megachameleon.parallel.adam import use_adam
from megachameleon.parallel.device import install, pick_device


class FusedAdam(torch.optim.AdamW):
    """Stands in for apex's, by its constructor."""

    def __init__(self, params, *, lr, weight_decay, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)


@pytest.fixture
def optimizers(monkeypatch):
    install(pick_device())
    module = ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    yield optimizer, distrib_optimizer
    use_adam("torch")


def test_the_chosen_adam_is_built_and_no_other(optimizers):
    optimizer, distrib_optimizer = optimizers
    use_adam("apex")
    assert optimizer.Adam is distrib_optimizer.Adam is FusedAdam and not optimizer.USING_PYTORCH_OPTIMIZER
    assert distrib_optimizer.HAVE_APEX_OR_TE and distrib_optimizer.USING_APEX_OPTIMIZER
    use_adam("torch")
    assert optimizer.USING_PYTORCH_OPTIMIZER and optimizer.Adam is torch.optim.AdamW
    assert not (distrib_optimizer.HAVE_APEX_OR_TE or distrib_optimizer.USING_APEX_OPTIMIZER)
