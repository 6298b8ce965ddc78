"""Where the time of a step goes."""

import time

import pytest
from cases import build_trainer
from monitor_cases import LAYOUTS, own_model

from megachameleon.parallel.context import parallel_context

PARTS = {"data", "forward", "backward", "communication", "optimizer"}


class FakeClock:
    """Stands still but for those who say that they take time."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def times_of_a_step(config, slow, clock):
    """Parts of the second step, of which one part takes 0.3 s more."""
    from megachameleon.training import step as step_module
    from megachameleon.training.monitors import step_times
    from megachameleon.training.monitors.step_times import StepTimes

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        times = next(monitor for monitor in trainer.monitors if isinstance(monitor, StepTimes))

        def sleep(*_, **__):
            clock.sleep(0.3)

        class SlowSamples:
            def batch(self, positions):
                if slow == "data":
                    sleep()
                return trainer.data.train.batch(positions)

        layer = trainer.state.model[0].module.decoder.layers[0]
        if slow == "forward":
            layer.register_forward_hook(sleep)
        if slow == "backward":
            layer.register_forward_hook(lambda _, __, out: out[0].register_hook(sleep) and None)
        if slow == "optimizer":
            update = step_module.optimizer_step
            step_module.optimizer_step = lambda *arguments: (sleep(), update(*arguments))[1]
        step_times.time = clock
        try:
            for step in range(2):
                arguments = (trainer.state, SlowSamples(), trainer.config, context)
                step_module.train_step(*arguments, step=step, consumed=8 * step, monitors=trainer.monitors)
        finally:
            step_times.time = time
            if slow == "optimizer":
                step_module.optimizer_step = update
        return times.seconds()


@pytest.mark.parametrize("slow", sorted(PARTS - {"communication"}))
def test_time_is_of_the_part_that_took_it(workers, module_config, slow):
    config = module_config(*own_model("training.micro_batch_size=8"))
    parts = workers.run(1, times_of_a_step, config, slow, FakeClock())[0]
    assert parts == pytest.approx({**dict.fromkeys(PARTS, 0.0), slow: 0.3})


@pytest.mark.parametrize("layout", ["PP2-VPP2-recompute", "PP2"])
def test_waiting_for_another_stage_is_communication(workers, module_config, layout):
    """The first stage's slow forward is waited for by the last one."""
    _, overrides = LAYOUTS[layout]
    first, last = workers.run(2, slow_first_stage, module_config(*own_model(*overrides)))
    assert first["forward"] >= 0.3 and last["communication"] >= 0.25
    assert all(parts[name] > 0 for parts in (first, last) for name in ("data", "backward", "optimizer"))


def slow_first_stage(config):
    import os

    return times_of_a_step(config, "forward" if os.environ["RANK"] == "0" else "", time)
