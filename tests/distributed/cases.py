"""What worker processes run; functions are found by name, so they live at the top of a module."""

import dataclasses

import torch

from megachameleon.parallel.context import parallel_context
from megachameleon.parallel.replicas import gather_parameters


def build_trainer(config, context, callbacks=()):
    from megachameleon.training.batches import open_data
    from megachameleon.training.trainer import Trainer

    return Trainer(config, context, open_data(config.data, config.training), callbacks)


def train_steps(config, num_steps):
    """Reports, gradients of the first step and final parameters of a fresh run, without saving.

    With the distributed optimizer each replica has summed only its own part of the gradients; they are None then.
    """
    from whole import gather

    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        spread_norms(trainer)
        reports, gradients = [], None
        for step in range(num_steps):
            consumed = step * config.training.global_batch_size
            report = train_step(
                trainer.state, trainer.data.train, trainer.config, context, step=step, consumed=consumed
            )
            reports.append({**dataclasses.asdict(report.losses), "grad_norm": report.grad_norm, "lr": report.lr})
            if step == 0 and not config.parallel.distributed_optimizer:
                gradients = gather(trainer.state.model, context, gradients=True)
        gather_parameters(trainer.state.model, config.parallel)
        return reports, gradients, gather(trainer.state.model, context, gradients=False)


def gather_unequal_replicas(config):
    """What `gather` says when a parameter of the second replica has moved."""
    from whole import gather

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        gather(trainer.state.model, context, gradients=False)
        with torch.no_grad():
            next(trainer.state.model[0].parameters()).add_(1e-6 * context.data_rank)
        try:
            gather(trainer.state.model, context, gradients=False)
        except AssertionError as error:
            return str(error)


def spread_norms(trainer):
    """Give norm weights and biases values of their own, so that a mix-up between them shows."""
    from megachameleon.checkpoint.state import unwrap
    from megachameleon.model.initialization import global_names

    with torch.no_grad():
        for name, parameter in (pair for chunk in trainer.state.model for pair in global_names(unwrap(chunk))):
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(sum(name.encode()))
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    trainer.state.optimizer.reload_model_params()


def run_training(config):
    """A whole run through the loop; returns step and final parameters."""
    from whole import gather

    from megachameleon.training.callbacks.build import build_callbacks

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context, build_callbacks(config))
        start = trainer.step
        trainer.run()
        gather_parameters(trainer.state.model, config.parallel)
        return start, trainer.step, gather(trainer.state.model, context, gradients=False)


def validation_losses(config):
    """Validation losses of a fresh model."""
    from megachameleon.training.step import validate

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        report = validate(trainer.state.model, trainer.data.validation["all"], trainer.config, context)
        return dataclasses.asdict(report)
