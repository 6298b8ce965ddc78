"""The configuration of a run: frozen dataclasses, presets, YAML and overrides."""

from megachameleon.config.checkpoint import CheckpointConfig
from megachameleon.config.data import DataConfig, StageConfig
from megachameleon.config.faults import FaultsConfig
from megachameleon.config.health import HealthConfig
from megachameleon.config.kernels import KernelsConfig
from megachameleon.config.loading import load_config, preset_names, save_config, to_yaml
from megachameleon.config.logging import DrawingConfig, LoggingConfig
from megachameleon.config.model import ModelConfig
from megachameleon.config.parallel import ParallelConfig
from megachameleon.config.run import RunConfig
from megachameleon.config.training import OptimizerConfig, TrainingConfig

__all__ = [
    "CheckpointConfig", "DataConfig", "DrawingConfig", "FaultsConfig", "HealthConfig", "KernelsConfig", "LoggingConfig",
    "ModelConfig", "OptimizerConfig", "ParallelConfig", "RunConfig", "StageConfig", "TrainingConfig",
    "load_config", "preset_names", "save_config", "to_yaml",
]  # fmt: skip
