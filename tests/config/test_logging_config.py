"""Settings of logging that cannot be."""

import pytest

from megachameleon.config import load_config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("logging.monitors=[output_norms]", "did you mean 'output_norm'?"),
        ("logging.monitors=[output_norm, output_norm]", "names one twice"),
        ("logging.monitor_every=0", "must be at least 1"),
        ("logging.wandb={name: x}", "logging.wandb.project: missing"),
        ("logging.wandb={project: ''}", "logging.wandb.project: empty"),
        ("logging.mlflow={tracking_uri: '', experiment: e}", "logging.mlflow.tracking_uri: empty"),
        ("logging.price_per_gpu_hour=-1", "must be a number, 0 or more"),
        ("logging.peak_tflops=.nan", "must be a number, 0 or more"),
    ],
)
def test_each_is_named(override, message):
    with pytest.raises(ValueError) as error:
        load_config("debug", [override])
    assert message in str(error.value) and str(error.value).startswith(override.split("=")[0])
