"""From a configuration to a finished run: the library behind tools/train.py.

Nothing heavy is imported before signals are listened to.
"""

from contextlib import nullcontext
from pathlib import Path

from megachameleon.config import RunConfig
from megachameleon.files import require_usable_folder
from megachameleon.ranks import own_place
from megachameleon.training.stopping import STOPPED, Listener, StoppedError, listen


def train(config: RunConfig) -> int:
    """Train, or go on training, in the processes that a launcher started, or alone.

    Returns:
        The exit status: 0 finished, 75 asked to stop with everything saved.

    Raises:
        ValueError: anything that is wrong with configuration, data or checkpoints, before training starts.
    """
    place = own_place()
    config.validate_world(place.world_size)
    require_usable_folder(Path(config.output_dir))
    with listen() as listener:
        try:
            _train(config, listener)
        except StoppedError as reason:
            if place.rank == 0:
                print(f"stopped: {reason}", flush=True)
            return STOPPED
    return 0


def _train(config: RunConfig, listener: Listener) -> None:
    from megachameleon.parallel.context import parallel_context
    from megachameleon.training.batches import open_data
    from megachameleon.training.callbacks.build import build_callbacks
    from megachameleon.training.lock import run_lock
    from megachameleon.training.trainer import Trainer

    data = open_data(config.data, config.training)  # before processes meet: bad input must not wait for a time-out
    listener.raises = False  # from now on all stop together
    with parallel_context(config.parallel, timeout_seconds=round(config.faults.start_timeout)) as context:
        callbacks = build_callbacks(config)
        with run_lock(Path(config.output_dir)) if context.is_main else nullcontext():
            trainer = Trainer(config, context, data, callbacks, listener)
            if trainer.step < config.training.num_steps:
                trainer.run()
            elif context.is_main:
                print(f"{config.output_dir}: already finished at step {trainer.step}")
