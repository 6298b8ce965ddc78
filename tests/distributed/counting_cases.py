"""What worker processes run to count a real step of training."""

import torch

from megachameleon.model.kernels.table import choose_kernels
from megachameleon.parallel.context import parallel_context
from megachameleon.planning.counting import Watch
from megachameleon.planning.fake_step import axes_of, build_decoders, run_step, wrap_for_training


def count_real_steps(config):
    """Peak by part and messages of the second of two whole steps."""
    with parallel_context(config.parallel) as context:
        watch = Watch(axes_of(context.groups), pretend=False)
        with watch:
            kernels = choose_kernels(config.kernels)
            decoders = build_decoders(config, context, watch, kernels)
            with torch.no_grad():
                for parameter in (p for decoder in decoders for p in decoder.parameters()):
                    parameter.fill_(0.01)
            state = wrap_for_training(decoders, config, watch, kernels)
            micro_batches = config.training.num_micro_batches(context.data_parallel)
            for _ in range(2):
                traffic = run_step(state, config, context, watch, micro_batches)
        return watch.memory.peak, traffic
