"""How a run is spread over processes: the sizes of its mesh, and what is sharded over the data-parallel ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from puyu.configure import Config
from puyu.train.layouts.schedules import Schedule

Extent = Literal["replica", "partial", "full"]
"""InternEvo's choice for each kind of state: whole on every process, sharded in groups of `shard_size`, or sharded over
all data-parallel processes (Chen et al. 2024, arXiv 2401.09149)."""

DEPTH: dict[Extent, int] = {"replica": 0, "partial": 1, "full": 2}
"""How many of the dimensions (shard, replicate) divide it."""


class LayoutConfig(Config):
    """Sizes of the parallel dimensions; data parallel is what remains of the processes."""

    tensor: int = Field(default=1, ge=1)
    """Processes that share each matrix (with sequence parallel between the matrices)."""
    sequence: int = Field(default=1, ge=1)
    """Processes that share the tokens of a batch."""
    attention: Literal["ulysses", "ring"] = "ulysses"
    """How attention crosses the parts of a sequence: heads are exchanged, or keys and values travel in a ring."""
    pipeline: int = Field(default=1, ge=1)
    """Processes that share the layers."""
    schedule: Schedule = "1f1b"
    """Order of forward and backward passes in the pipeline; micro-batches are those of `accumulate`."""
    virtual: int = Field(default=2, ge=1)
    """Pieces of the model on each process of an interleaved pipeline."""
    expert: int = Field(default=1, ge=1)
    """Processes, among the data-parallel ones, that share the experts."""
    params: Extent = "full"
    """Weights."""
    grads: Extent = "full"
    """Gradients."""
    states: Extent = "full"
    """Optimizer states and master weights."""
    shard_size: int = Field(default=0, ge=0)
    """Processes of a partial group."""

    @property
    def chunks(self) -> int:
        """Pieces that the layers are cut into."""
        return self.pipeline * (self.virtual if self.schedule == "interleaved" else 1)
