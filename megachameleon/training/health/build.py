"""Which guards a configuration asks for."""

from itertools import accumulate
from pathlib import Path

from megachameleon.checkpoint.folder import CONFIG_FILE
from megachameleon.config import RunConfig
from megachameleon.training.health.guards import Guard
from megachameleon.training.health.spikes import SpikeGuard


def build_guards(config: RunConfig) -> list[Guard]:
    """In the order in which they are asked. The first is always there: it also counts steps that are not finite."""
    lengths = [stage.samples for stage in config.data.stages if stage.samples is not None]
    look_up = f"python tools/preprocess_data.py inspect --blend {Path(config.output_dir) / CONFIG_FILE} --position"
    return [
        SpikeGuard(
            config.health,
            batch_size=config.training.global_batch_size,
            stage_ends=list(accumulate(lengths)),
            look_up=look_up,
        )
    ]
