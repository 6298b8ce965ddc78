"""Norms of hidden states, against the model called by hand."""

import pytest
import torch
from cases import build_trainer, spread_norms
from monitor_cases import LAYOUTS, measured_steps, own_model

from megachameleon.parallel.context import parallel_context

NORMS = "logging.monitors=[output_norm, block_norms]"


def norms_by_hand(config):
    """Reports of the first step, and the norms of every block's output for the same samples."""
    from megachameleon.data.samples import to_tensors
    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        spread_norms(trainer)
        batch = to_tensors(trainer.data.train.batch(range(config.training.global_batch_size)))
        decoder, outputs = trainer.state.model[0].module, {}
        for layer in decoder.decoder.layers:
            layer.register_forward_hook(lambda layer, _, out: outputs.update({layer.layer_number - 1: out[0].detach()}))
        decoder(batch["tokens"], batch["position_ids"], batch["document_ids"])
        counted, image = batch["loss_mask"] > 0, batch["image_mask"].bool()
        values = {}
        for layer, output in outputs.items():
            squares = output.transpose(0, 1).double().square().sum(-1)
            for name, mask in (("", counted), ("/text", counted & ~image), ("/image", counted & image)):
                values[f"block_norm/{layer}{name}"] = float(squares[mask].mean().sqrt())
                values[f"output_norm{name}"] = values[f"block_norm/{layer}{name}"]
        report = train_step(
            trainer.state, trainer.data.train, trainer.config, context, step=0, consumed=0, monitors=trainer.monitors
        )
        return report.monitors, values


def test_they_are_those_of_tokens_with_loss(workers, module_config):
    measured, by_hand = workers.run(1, norms_by_hand, module_config(*own_model(NORMS)))[0]
    assert measured == pytest.approx(by_hand, rel=1e-6)
    assert measured["output_norm/text"] != pytest.approx(measured["output_norm/image"], rel=1e-3)


def test_all_but_the_output_norm_rest_between(workers, module_config):
    config = module_config(*own_model(NORMS, "logging.monitor_every=2"))
    first, second = workers.run(1, measured_steps, config)[0]
    assert set(first) == {"output_norm", "output_norm/text", "output_norm/image"}
    assert {"block_norm/0", "block_norm/3/image", "output_norm"} <= set(second)


def test_validation_is_not_measured(workers, module_config):
    """A validation between two steps moves nothing."""
    plain, validated = (
        workers.run(1, measured_steps, module_config(*own_model(NORMS)), validate)[0] for validate in (False, True)
    )
    assert plain == validated


def counted_tokens(config):
    """Tokens behind each block by the monitor, over all ranks, and those of the losses."""
    import torch.distributed as dist

    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        monitor = trainer.monitors[-1]
        losses = train_step(
            trainer.state, trainer.data.train, trainer.config, context, step=0, consumed=0, monitors=trainer.monitors
        ).losses
        sums = monitor.sums()
        dist.all_reduce(sums)
        return sums.view(-1, 4)[:, 2:].tolist(), [losses.num_tokens - losses.num_image_tokens, losses.num_image_tokens]


@pytest.mark.parametrize("layout", ["TP2", "PP2-VPP2-recompute", "TP2-SP-recompute"])
def test_every_token_counts_once(workers, module_config, layout):
    """Also where recomputation runs a block twice, which a mean would not show."""
    world_size, overrides = LAYOUTS[layout]
    counts, tokens = workers.run(world_size, counted_tokens, module_config(*own_model(NORMS, *overrides)))[0]
    assert counts == [tokens] * 4


def test_unsound_numbers_stay_unsound():
    from megachameleon.training.monitors.norms import HiddenNorms

    monitor = HiddenNorms.__new__(HiddenNorms)
    monitor.names = ["n"]
    assert torch.tensor(monitor.report([float("nan"), 4.0, 1.0, 1.0], [])["n"]).isnan()
    assert monitor.report([float("inf"), 4.0, 1.0, 1.0], [])["n/text"] == float("inf")
    assert monitor.report([8.0, 0.0, 2.0, 0.0], []) == {"n": 2.0, "n/text": 2.0}
