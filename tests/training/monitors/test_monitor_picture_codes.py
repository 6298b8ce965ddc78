"""The histogram of picture codes, against the samples themselves."""

import math
from collections import Counter

import pytest
from cases import build_trainer
from monitor_cases import own_model

from megachameleon.parallel.context import parallel_context
from megachameleon.training.monitors.picture_codes import describe_codes


def codes_by_hand(config):
    from megachameleon.training.step import train_step

    with parallel_context(config.parallel) as context:
        trainer = build_trainer(config, context)
        batch = trainer.data.train.batch(range(config.training.global_batch_size))
        counted = (batch.loss_mask > 0) & (batch.image_mask > 0)
        report = train_step(
            trainer.state, trainer.data.train, trainer.config, context, step=0, consumed=0, monitors=trainer.monitors
        )
        return report.monitors, Counter(batch.labels[counted].tolist()), trainer.data.vocabulary.num_image_codes


def test_codes_of_the_data(workers, module_config):
    config = module_config(*own_model("logging.monitors=[picture_codes]"))
    measured, counts, size = workers.run(1, codes_by_hand, config)[0]
    total = sum(counts.values())
    assert measured == pytest.approx(
        {
            "picture_codes/used": len(counts) / size,
            "picture_codes/entropy": -sum(n / total * math.log2(n / total) for n in counts.values()),
            "picture_codes/most_frequent": max(counts.values()) / total,
        }
    )


def test_even_use_has_all_bits():
    assert describe_codes([3.0] * 8, "c") == pytest.approx({"c/used": 1, "c/entropy": 3, "c/most_frequent": 1 / 8})
    assert describe_codes([0, 5.0, 0, 0], "c") == {"c/used": 0.25, "c/entropy": 0, "c/most_frequent": 1}
    assert describe_codes([0.0, 0.0], "c") == {}
