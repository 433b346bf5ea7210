"""The settings that every training run has, whatever it learns."""

from __future__ import annotations

from typing import Literal

from puyu.train.health.config import HealthConfig
from puyu.train.layouts.config import LayoutConfig
from puyu.train.memory import MemoryConfig
from puyu.train.monitor import MonitorSettings
from puyu.train.optim import OptimConfig
from puyu.train.saver import SavingSettings


class RunSettings(MonitorSettings, SavingSettings):
    """Optimizer, precision, layout, saved states, monitoring."""

    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    accumulate: int = 1
    """Micro-batches that a step is split into (less memory)."""
    seed: int = 0
    """Seed of new weights and of the data order."""
    dtype: str = "auto"
    """Compute dtype: auto, bfloat16, float16 (with loss scaling), float32, float64. Master weights and sums of
    gradients are fp32 (fp64 when this is float64)."""
    precision: Literal["dtype", "float8", "float8-emulated"] = "dtype"
    """Products of the blocks: in `dtype`, in float8 where the GPU has it, or as float8 rounds on any device."""
    memory: MemoryConfig = MemoryConfig()
    """What is recomputed, moved to the host, compiled."""
    layout: LayoutConfig = LayoutConfig()
    """How the run is spread over processes."""
    health: HealthConfig = HealthConfig()
    """What is taken for an illness of the run."""


FREE = {
    "device",
    "layout",
    "memory",
    "health",
    "validation",
    *SavingSettings.model_fields,
    *MonitorSettings.model_fields,
}
"""Fields that may change between a run and its continuation."""
