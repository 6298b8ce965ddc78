"""Every layout measures what one process measures, and measuring moves no bit of the training."""

import pytest
import torch
from cases import train_steps
from monitor_cases import LAYOUTS, measured_steps, own_model, trained_with_monitors

FOUR_PROCESSES = "CP2-TP2-SP"


@pytest.fixture(scope="module")
def expected(workers, module_config):
    return workers.run(1, measured_steps, module_config(*own_model()))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_measures_the_same(workers, module_config, expected, layout):
    world_size, overrides = LAYOUTS[layout]
    for reports in workers.run(world_size, measured_steps, module_config(*own_model(*overrides))):
        for mine, its in zip(reports, expected, strict=True):
            assert mine == pytest.approx(its, rel=1e-5)


def test_all_kinds_are_there(expected):
    kinds = {name.partition("/")[0] for name in expected[0]}
    assert kinds == {
        *("output_norm", "block_norm", "attention_logit_bound", "attention_logit_sampled"),
        *("gradient_norm", "update_ratio", "picture_codes"),
    }


@pytest.mark.parametrize("layout", ["PP2-VPP2-recompute", "CP2"])
def test_training_is_the_same_to_the_bit(workers, module_config, layout):
    world_size, overrides = LAYOUTS[layout]
    config = module_config(*own_model(*overrides, "model.dropout=0.1"))
    plain = workers.run(world_size, train_steps, config, 3)
    measured = workers.run(world_size, trained_with_monitors, config, 3)
    for (_, _, expected), got in zip(plain, measured, strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in expected)
