"""metrics.jsonl and TensorBoard of a whole run that was cut in two."""

import json
from pathlib import Path

import pytest
from cases import run_training

from megachameleon.training.callbacks.metrics_file import METRICS_FILE


@pytest.fixture(scope="module")
def lines(workers, module_config):
    """A run of four steps, of which the last two were done after a resume."""
    base = ["checkpoint.every=2", "logging.monitor_every=2", "training.validate_every=2", "logging.tensorboard=true"]
    base += ["optimizer.warmup_steps=1", "optimizer.decay=constant"]
    for steps in (2, 4):
        run = module_config(*base, f"training.num_steps={steps}")
        workers.run(1, run_training, run)
        folder = run.output_dir
    text = (Path(folder) / METRICS_FILE).read_text(encoding="utf-8")
    return folder, [json.loads(line) for line in text.splitlines()]


def test_every_step_says_what_was_measured(lines):
    train = [line for line in lines[1] if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    for line in train:
        assert {"loss", "loss_text", "loss_image", "log_z", "output_norm", "output_norm/image"} <= line.keys()
        assert {"time/forward", "time/backward", "gpu_hours", "effective_time", "eta_hours"} <= line.keys()
        measured = {"block_norm/1/text", "gradient_norm/head", "update_ratio/attention", "picture_codes/entropy"}
        assert (measured <= line.keys()) == (line["step"] % 2 == 0)
    assert train[3]["gpu_hours"] > train[1]["gpu_hours"]
    assert 0 < train[3]["effective_time"] < 1


def test_tensorboard_has_them_in_groups(lines):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{lines[0]}/tensorboard")
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss_image", "speed/gpu_hours", "time/backward", "output_norm/all", "update_ratio/attention"} <= tags
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_trouble_survives_a_resume(tmp_path):
    from types import SimpleNamespace

    from megachameleon.training.callbacks.metrics_file import MetricsFile
    from megachameleon.training.callbacks.throughput import Throughput
    from megachameleon.training.health.guards import Verdict

    callback = MetricsFile(Throughput(), tmp_path)
    trainer = SimpleNamespace(context=SimpleNamespace(is_main=True), step=5)
    event = SimpleNamespace(step=9, report=SimpleNamespace(skipped="loss is nan"), samples=(64, 72))
    callback._append(trainer, {"kind": "train", "step": 9})
    callback.on_trouble(trainer, event, Verdict(action="rollback", reason="why"))
    callback.on_start(trainer)
    assert [json.loads(line) for line in callback.path.read_text().splitlines()] == [
        {
            **{"kind": "trouble", "step": 9, "action": "rollback", "reason": "why"},
            **{"skipped": "loss is nan", "samples": [64, 72]},
        }
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
def test_a_full_disk_is_named(tmp_path):
    from types import SimpleNamespace

    from megachameleon.training.callbacks.metrics_file import MetricsFile
    from megachameleon.training.callbacks.throughput import Throughput

    (tmp_path / METRICS_FILE).symlink_to("/dev/full")
    callback = MetricsFile(Throughput(), tmp_path)
    with pytest.raises(ValueError, match=r"cannot write metrics\.jsonl, the disk is full"):
        callback._append(SimpleNamespace(context=SimpleNamespace(is_main=True)), {"kind": "train", "step": 9})


def test_a_full_disk_is_told_in_a_trainers_words(tmp_path):
    from types import SimpleNamespace

    from megachameleon.training.callbacks.metrics_file import MetricsFile
    from megachameleon.training.callbacks.throughput import Throughput

    callback = MetricsFile(Throughput(), tmp_path)
    callback.path.symlink_to("/dev/full")
    with pytest.raises(
        ValueError, match=r"rank 0 cannot write metrics\.jsonl, the disk is full .*last checkpoint is whole"
    ):
        callback._append(SimpleNamespace(context=SimpleNamespace(is_main=True)), {"kind": "train", "step": 9})
