"""Weights & Biases and MLflow: the real packages where they are installed, and what must never stop a run."""

import sys
import threading
import time
import types

import pytest

from megachameleon.config.logging import MlflowConfig, WandbConfig
from megachameleon.training.callbacks import mlflow as mlflow_module
from megachameleon.training.callbacks import wandb as wandb_module
from megachameleon.training.callbacks.courier import ROOM, Courier
from megachameleon.training.callbacks.throughput import Throughput


class Trainer:
    """As much of one as a service looks at."""

    def __init__(self, config):
        self.config, self.step = config, 0


def test_calls_are_made_in_order():
    made, courier = [], Courier("service")
    for number in range(5):
        courier.send(lambda number=number: made.append(number))
    courier.close()
    assert made == list(range(5))


def test_a_failing_service_is_reported_once_and_the_rest_still_sent(capsys):
    made, courier = [], Courier("service")
    for _ in range(3):
        courier.send(lambda: 1 / 0)
    courier.send(lambda: made.append(True))
    courier.close()
    warning = capsys.readouterr().err
    assert made and warning.count("warning: service: ZeroDivisionError") == 1


def test_a_hanging_service_holds_nobody(capsys):
    release, courier = threading.Event(), Courier("service", patience=0.05)
    courier.send(release.wait)
    start = time.perf_counter()
    for _ in range(ROOM + 10):
        courier.send(lambda: None)
    courier.close()
    assert time.perf_counter() - start < 20  # it would hang for ever
    assert capsys.readouterr().err.count("warning: service: does not keep up") == 1
    release.set()


@pytest.mark.parametrize(
    ("service", "make"),
    [
        ("wandb", lambda path: wandb_module.WeightsAndBiases(Throughput(), WandbConfig(project="p"), path)),
        (
            "mlflow",
            lambda path: mlflow_module.MLflow(Throughput(), MlflowConfig(tracking_uri="file:x", experiment="e"), path),
        ),
    ],
)
def test_a_missing_package_is_an_error_at_the_start(monkeypatch, tmp_path, service, make):
    for module in (wandb_module, mlflow_module):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"logging\.{service}: the package is not installed; pip install {service}"):
        make(tmp_path)


class WandbStandIn(types.ModuleType):
    """`init`, `Settings`, `Image` and a run's `log`, `define_metric`, `finish`, with the names that wandb 0.2x gives
    their arguments; notes what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, *, project, entity, name, id, resume, mode, dir, config, settings):
        self.inits.append({"project": project, "id": id, "resume": resume, "mode": mode, "config": config})
        return self

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, data):
        self.logged.append(data)

    def finish(self):
        self.finished += 1

    @staticmethod
    def Settings(*, console, silent):
        return console, silent

    @staticmethod
    def Image(picture, caption=None):
        return caption


def test_a_resumed_run_goes_on_in_the_same_wandb_run(monkeypatch, tmp_path, config):
    stand_in = WandbStandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(wandb_module, "find_spec", lambda name: True)
    trainer, ids = Trainer(config()), []
    state = {}
    for _ in range(2):
        callback = wandb_module.WeightsAndBiases(Throughput(), WandbConfig(project="p", mode="offline"), tmp_path)
        if state:
            callback.load_state_dict(state)
        callback.open(trainer)
        callback.log({"train/loss": 1.5}, 3)
        callback.log_pictures(["a cat"], [object()], 3)
        callback.close()
        state = callback.state_dict()
        ids.append(stand_in.inits[-1]["id"])
    assert ids[0] == ids[1] and stand_in.finished == 2
    assert stand_in.logged[:2] == [{"train/loss": 1.5, "step": 3}, {"drawn": ["a cat"], "step": 3}]
    assert stand_in.inits[0]["resume"] == "allow" and stand_in.inits[0]["config"]["model"]["num_layers"] == 2


def test_wandb_itself_offline(tmp_path, config, monkeypatch):
    pytest.importorskip("wandb")
    from PIL import Image

    callback = wandb_module.WeightsAndBiases(Throughput(), WandbConfig(project="p", mode="offline"), tmp_path)
    callback.open(Trainer(config()))
    callback.log({"train/loss": 1.5}, 3)
    callback.log_pictures(["a cat"], [Image.new("RGB", (8, 8))], 3)
    callback.close()
    written = next(tmp_path.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()
    assert callback.run_id.encode() in written and b"train/loss" in written


def test_mlflow_itself_goes_on_in_the_same_run(tmp_path, config, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from PIL import Image

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = MlflowConfig(tracking_uri=(tmp_path / "mlruns").as_uri(), experiment="cats")
    state = {}
    for step in (3, 4):
        callback = mlflow_module.MLflow(Throughput(), settings, tmp_path / "run")
        if state:
            callback.load_state_dict(state)
        callback.open(Trainer(config()))
        callback.log({"train/loss": 1.5 / step, "block_norm/0/image": 2.0}, step)
        callback.log_pictures(["a cat"], [Image.new("RGB", (8, 8))], step)
        callback.close()
        state = callback.state_dict()
    client = mlflow.MlflowClient(tracking_uri=settings.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("cats").experiment_id])
    assert [run.info.run_id for run in runs] == [state["run_id"]] and runs[0].info.status == "FINISHED"
    history = client.get_metric_history(state["run_id"], "train/loss")
    assert [(point.step, point.value) for point in history] == [(3, 0.5), (4, 0.375)]
    assert {item.path for item in client.list_artifacts(state["run_id"], "drawn/step_00000004")} == {
        "drawn/step_00000004/00.png",
        "drawn/step_00000004/prompts.json",
    }
