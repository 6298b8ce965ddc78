"""What worker processes run to see what monitors measure."""

from cases import build_trainer, spread_norms

from megachameleon.parallel.context import parallel_context

SP = ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"]
VPP = ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=2"]
DISTRIBUTED = ["parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true", "parallel.bucket_size=3000"]

LAYOUTS = {
    "TP2": (2, ["parallel.tensor_parallel=2"]),
    "TP2-SP-recompute": (2, [*SP, "parallel.recompute=full"]),
    "PP2-VPP2-recompute": (2, [*VPP, "parallel.recompute=full"]),
    "PP2": (2, ["parallel.pipeline_parallel=2"]),
    "DP2": (2, []),
    "DP2-distributed": (2, [*DISTRIBUTED, "parallel.overlap_param_gather=true"]),
    "CP2": (2, ["parallel.context_parallel=2"]),
    "CP2-TP2-SP": (4, [*SP, "parallel.context_parallel=2"]),
}


def own_model(*overrides):
    """Four blocks, eight heads, gentle updates, everything measured at each step."""
    return [
        *("model.num_layers=4", "model.hidden_size=64", "model.num_attention_heads=8", "model.num_query_groups=4"),
        *("optimizer.lr=1e-3", "logging.monitor_every=1"),
        *overrides,
    ]


def measured_steps(config, validate=False):
    """What the monitors report of two steps."""
    from megachameleon.training.step import train_step
    from megachameleon.training.step import validate as run_validation

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        spread_norms(trainer)
        reports = []
        for step in range(2):
            report = train_step(
                trainer.state,
                trainer.data.train,
                trainer.config,
                context,
                step=step,
                consumed=step * config.training.global_batch_size,
                monitors=trainer.monitors,
            )
            reports.append(report.monitors)
            if validate:
                run_validation(trainer.state.model, trainer.data.validation["all"], trainer.config, context)
        return reports


def trained_with_monitors(config, num_steps):
    """Final parameters of a fresh run in which everything is measured."""
    from whole import gather

    from megachameleon.parallel.replicas import gather_parameters
    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        spread_norms(trainer)
        for step in range(num_steps):
            consumed = step * config.training.global_batch_size
            arguments = (trainer.state, trainer.data.train, trainer.config, context)
            report = train_step(*arguments, step=step, consumed=consumed, monitors=trainer.monitors)
            assert report.monitors
        gather_parameters(trainer.state.model, config.parallel)
        return gather(trainer.state.model, context, gradients=False)
