"""The settings that every training run has, whatever it learns."""

from __future__ import annotations

from puyu.train.health.config import HealthConfig
from puyu.train.layouts.config import LayoutConfig
from puyu.train.monitor import MonitorSettings
from puyu.train.optim import OptimConfig


class RunSettings(MonitorSettings):
    """Optimizer, precision, layout, saved states, monitoring."""

    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    accumulate: int = 1
    """Micro-batches that a step is split into (less memory)."""
    seed: int = 0
    """Seed of new weights and of the data order."""
    dtype: str = "auto"
    """Compute dtype: auto, bfloat16, float32, float64. Master weights are fp32 (fp64 when this is float64)."""
    layout: LayoutConfig = LayoutConfig()
    """How the run is spread over processes."""
    checkpoint_every: int = 200
    """Steps between saved states; 0 saves only at the end and on SIGTERM."""
    keep: int = 2
    """Saved states to keep."""
    health: HealthConfig = HealthConfig()
    """What is taken for an illness of the run."""


FREE = {"device", "checkpoint_every", "keep", "layout", "health", "validation", *MonitorSettings.model_fields}
"""Fields that may change between a run and its continuation."""
