"""What a run is told: frozen sections, read from recipes, TOML files and section.key=value."""

from fieldmark.config.inputs import AugmentConfig, DataConfig, ModelConfig
from fieldmark.config.learning import (
    LossConfig,
    OptimConfig,
    ProbeConfig,
    ScheduleConfig,
    TrainConfig,
)
from fieldmark.config.load import load_toml, override, without_idle
from fieldmark.config.schema import EvalConfig, PackageConfig, RunConfig

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "EvalConfig",
    "ProbeConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PackageConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "load_toml",
    "override",
    "without_idle",
]
