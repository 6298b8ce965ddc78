"""What happens between steps sees the updated weights, whole, whatever the layout."""

import pytest
import torch
from cases import build_trainer
from test_layouts import BASE, LAYOUTS, fast_or_slow, overrides_of

from megachameleon.parallel.context import parallel_context
from megachameleon.training.callbacks.base import Callback


class Reader(Callback):
    """Reads logits with the stepper that draws, at each validation."""

    def __init__(self):
        self.logits, self.losses = [], []

    def on_validation(self, trainer, step, reports):
        from megachameleon.generation.model_steppers import CachedStepper

        tokens = torch.arange(40, 60).reshape(2, 10)
        stepper = CachedStepper(trainer.state.model, 64)
        first = stepper.prefill(tokens, torch.zeros(2, 10, dtype=torch.int32), 1)
        self.logits.append(torch.stack((first, stepper.decode(tokens[:, 0]))))
        self.losses.append(reports["all"].loss)


def read_between_steps(config):
    """Logits and validation losses after two and four steps, and the training loss that follows them."""
    reader = Reader()
    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context, [reader])
        trainer.run()
    return reader.logits, reader.losses


@pytest.mark.parametrize(
    ("layout",),
    fast_or_slow(
        [("DP2-overlap",), ("CP2",), ("PP2-VPP2-DP2-overlap",), ("TP2-SP-PP2-VPP2-DP2-overlap-selective",)],
        {("DP2-overlap",), ("PP2-VPP2-DP2-overlap",)},
    ),
)
def test_drawing_and_validation_see_the_updated_weights(workers, config, layout):
    base = [*BASE, "training.num_steps=4", "training.validate_every=2", "checkpoint.every=100"]
    alone = config(*base, output="alone")
    [(expected, losses)] = workers.run(1, read_between_steps, alone)
    settings = config(*base, *overrides_of(layout), output=layout)
    assert len(expected) == 2 and not torch.allclose(expected[0], expected[1], atol=1e-2)
    for logits, its_losses in workers.run(LAYOUTS[layout][0], read_between_steps, settings):
        torch.testing.assert_close(torch.stack(logits), torch.stack(expected), atol=1e-5, rtol=1e-5)
        assert its_losses == pytest.approx(losses, rel=1e-5)
