"""No sample is lost or read twice over changes of the batch size, of the micro-batch and of the layout."""

from pathlib import Path

import pytest
from cases import build_trainer

from megachameleon.checkpoint.folder import complete_checkpoints, read_manifest
from megachameleon.parallel.context import parallel_context

INTERLEAVED = ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=2"]
SP = ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"]
DISTRIBUTED = ["parallel.distributed_optimizer=true"]
STRETCHES = [
    # processes, last step, samples in a step, in a micro-batch, settings
    (2, 2, 8, 2, []),
    (2, 3, 4, 1, INTERLEAVED),
    (1, 5, 3, 3, []),
    (2, 6, 6, 1, DISTRIBUTED),
]
MORE_STRETCHES = [
    (2, 8, 10, 5, ["parallel.context_parallel=2"]),
    (4, 9, 16, 2, [*SP, *DISTRIBUTED]),
    (8, 11, 8, 2, [*SP, *INTERLEAVED]),
    (2, 12, 5, 1, SP),
]


def read_positions(config):
    """First and last step of a run to its end, this rank's data rank, and the positions that it read."""
    read = []
    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        batch = trainer.data.train.batch
        trainer.data.train.batch = lambda positions: (read.extend(positions), batch(positions))[1]
        start = trainer.step
        trainer.run()
        return start, trainer.step, context.data_rank, read


@pytest.mark.parametrize(
    "stretches", [STRETCHES, pytest.param([*STRETCHES[1:2], *MORE_STRETCHES], marks=pytest.mark.slow)], ids=len
)
def test_positions_go_on_over_other_batch_sizes_and_layouts(workers, config, stretches):
    done = consumed = 0
    for processes, until, samples, micro_batch, layout in stretches:
        settings = config(
            "model.num_layers=4",
            "training.validate_every=0",
            "optimizer.warmup_steps=0",
            f"training.num_steps={until}",
            f"training.global_batch_size={samples}",
            f"training.micro_batch_size={micro_batch}",
            *layout,
        )
        by_data_rank = {}
        for start, end, data_rank, read in workers.run(processes, read_positions, settings):
            assert (start, end) == (done, until)
            assert by_data_rank.setdefault(data_rank, read) == read, "ranks that share samples read others"
        first, consumed = consumed, consumed + (until - done) * samples
        assert sorted(position for read in by_data_rank.values() for position in read) == list(range(first, consumed))
        manifest = read_manifest(complete_checkpoints(Path(settings.output_dir) / "checkpoints")[-1])
        assert (manifest.step, manifest.consumed_samples) == (until, consumed)
        done = until
