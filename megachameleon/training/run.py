"""From a configuration to a finished run: the library behind tools/train.py."""

import os
from contextlib import nullcontext
from pathlib import Path

from megachameleon.config import RunConfig
from megachameleon.files import require_usable_folder
from megachameleon.parallel.context import parallel_context


def train(config: RunConfig) -> None:
    """Train, or go on training, in the processes that torchrun started, or alone.

    Raises:
        ValueError: anything that is wrong with configuration, data or checkpoints, before training starts.
    """
    config.validate_world(int(os.environ.get("WORLD_SIZE", "1")))
    require_usable_folder(Path(config.output_dir))
    from megachameleon.training.batches import open_data

    data = open_data(config.data, config.training)  # before processes meet: bad input must not wait for a time-out
    with parallel_context(config.parallel) as context:
        from megachameleon.training.callbacks.build import build_callbacks
        from megachameleon.training.lock import run_lock
        from megachameleon.training.trainer import Trainer

        callbacks = build_callbacks(config)
        with run_lock(Path(config.output_dir)) if context.is_main else nullcontext():
            trainer = Trainer(config, context, data, callbacks)
            if trainer.step < config.training.num_steps:
                trainer.run()
            elif context.is_main:
                print(f"{config.output_dir}: already finished at step {trainer.step}")
