"""From a configuration to a finished run: the library behind tools/train.py.

Nothing heavy is imported before signals are listened to.
"""

import os
from contextlib import nullcontext
from pathlib import Path

from megachameleon.config import RunConfig
from megachameleon.files import require_usable_folder
from megachameleon.ranks import own_place
from megachameleon.training.pulse import Pulse
from megachameleon.training.stopping import STOPPED, Listener, StoppedError, listen

NCCL_FOLDER = "nccl"
LOCK_PATIENCE_SECONDS = 60.0
"""After a requeue, beyond the time in which processes of the former life on a node that was cut off end themselves."""


def train(config: RunConfig) -> int:
    """Train, or go on training, in the processes that a launcher started, or alone.

    Returns:
        The exit status: 0 finished, 75 asked to stop with everything saved.

    Raises:
        ValueError: anything that is wrong with configuration, data or checkpoints, before training starts.
        FailureError: it failed, here or in another process, for the reason that it says.
    """
    place = own_place()
    config.validate_world(place.world_size)
    require_usable_folder(Path(config.output_dir))
    faults = config.faults
    pulse = Pulse(rank=place.rank, hang_timeout=faults.hang_timeout, start_timeout=faults.start_timeout)
    with listen() as listener:
        try:
            _train(config, listener, pulse)
        except StoppedError as reason:
            pulse.close("stopped", reason=str(reason))
            if place.rank == 0:
                print(f"stopped: {reason}", flush=True)
            return STOPPED
        except BaseException as error:
            pulse.close("failed", reason=" ".join(str(error).split())[:500])
            raise
    pulse.close("finished")
    return 0


def _train(config: RunConfig, listener: Listener, pulse: Pulse) -> None:
    # Imported here: torch takes seconds, and signals are listened to by now.
    from megachameleon.parallel.context import parallel_context
    from megachameleon.training.batches import open_data
    from megachameleon.training.postmortem import PostMortem

    folder = Path(config.output_dir)
    post_mortem = PostMortem(folder, pulse)
    # Time-outs of gloo and NCCL are set once, and must allow for loading: this watch can be quicker.
    pulse.watch(post_mortem.end_hung)
    data = open_data(config.data, config.training)  # before processes meet: bad input must not wait for a time-out
    listener.raises = False  # from now on all stop together
    patience = round(config.faults.start_timeout)
    with parallel_context(config.parallel, timeout_seconds=patience, traces=folder / NCCL_FOLDER) as context:
        from megachameleon.training.callbacks.build import build_callbacks
        from megachameleon.training.lock import run_lock
        from megachameleon.training.trainer import Trainer

        try:
            callbacks = build_callbacks(config)
            # Only one process of a run can hold it; the others wait for that one when they join.
            with run_lock(folder, _lock_patience(config)) if context.is_main else nullcontext():
                post_mortem.join(context)
                pulse.publish(folder)
                trainer = Trainer(config, context, data, callbacks, listener, pulse, post_mortem.peers)
                if trainer.step < config.training.num_steps:
                    trainer.run()
                elif context.is_main:
                    print(f"{config.output_dir}: already finished at step {trainer.step}")
        except Exception as error:
            told = post_mortem.explain(error)
            if told is error:
                raise
            raise told from error


def _lock_patience(config: RunConfig) -> float:
    """How long the former life of a requeued job may still hold the folder, in seconds."""
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return config.faults.hang_timeout + LOCK_PATIENCE_SECONDS if requeued else 0.0
