"""Which guards a configuration asks for."""

from itertools import accumulate
from pathlib import Path

from megachameleon.checkpoint.folder import CONFIG_FILE
from megachameleon.config import RunConfig
from megachameleon.training.health.early_warning import EarlyWarning
from megachameleon.training.health.guards import Guard
from megachameleon.training.health.spikes import SpikeGuard


def build_guards(config: RunConfig) -> list[Guard]:
    """In the order in which they are asked. The first is always there: it also counts steps that are not finite.

    Raises:
        ValueError: an early warning is to act, and nothing measures what it needs.
    """
    policy = config.health.early_warning
    if policy not in ("off", "log") and "output_norm" not in config.logging.monitors:
        raise ValueError(
            f"health.early_warning: {policy} acts on output norms; add output_norm to logging.monitors, or set "
            "health.early_warning=log"
        )
    lengths = [stage.samples for stage in config.data.stages if stage.samples is not None]
    look_up = f"python tools/preprocess_data.py inspect --blend {Path(config.output_dir) / CONFIG_FILE} --position"
    return [
        SpikeGuard(
            config.health,
            batch_size=config.training.global_batch_size,
            stage_ends=list(accumulate(lengths)),
            look_up=look_up,
        ),
        EarlyWarning(config.health, warmup_steps=config.optimizer.warmup_steps),
    ]
