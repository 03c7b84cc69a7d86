"""What a run is told: frozen sections, read from recipes, TOML files and section.key=value."""

from fieldmark.config.load import load_toml, override
from fieldmark.config.schema import (
    AugmentConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PackageConfig,
    ProbeConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

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
]
