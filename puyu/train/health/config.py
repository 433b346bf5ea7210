"""What a run takes for an illness, and how long it waits. None of it changes the numbers of a healthy run."""

from __future__ import annotations

from pydantic import Field

from puyu.configure import Config


class HealthConfig(Config):
    """Thresholds and patience."""

    patience: int = Field(default=3, ge=0)
    """Bad steps in a row (not finite, or a spike) before the run goes back to a saved state; 0 stops at the first."""
    rollbacks: int = Field(default=2, ge=0)
    """How often a run goes back because of one place before it stops."""
    spike: float = Field(default=20.0, ge=0)
    """A loss or gradient norm this many deviations (by the median) above its level is a spike; 0: none is. (Batches
    of few documents lie far off now and then; the threshold leaves them alone.)"""
    window: int = Field(default=128, ge=32)
    """Steps that level and deviations are taken from."""
    hang_seconds: float = Field(default=300.0, ge=0)
    """A process that makes no progress for so long hangs (three times its longest part of a step, where that is longer;
    ten times in the first step, while saving or loading a state and in callbacks, and at most); 0: never."""
    phase_seconds: float = Field(default=7200.0, ge=0)
    """The same before the first step and after the last (reading data, loading a state, evaluating, writing the model),
    where a process that works for all is not hurried: it hangs when none moves for so long; 0: never."""
    slow_factor: float = Field(default=1.5, gt=1)
    """A process that takes so many times the median is slow."""
    compare_every: int = Field(default=50, ge=0)
    """Steps between comparisons of the processes' speed; 0: never."""
    digest_every: int = Field(default=50, ge=0)
    """Steps between comparisons of the weights that several processes hold (one pass over them; also before each saved
    state, so that states are good); 0: never. Where they differ the run goes back to a saved state."""
