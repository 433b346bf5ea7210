"""What a person may watch of a run, none of which changes it: evaluation in the loop, samples, W&B, traces.

profile: {step: 100, steps: 3}          OUT/profile/steps-100-102-rank0.json.gz, for chrome://tracing or Perfetto
memory_snapshot: 100                    OUT/profile/memory-100-rank0.pickle, for pytorch.org/memory_viz
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field

from puyu.configure import Config
from puyu.errors import ConfigError
from puyu.files import disk_errors


class ProfileConfig(Config):
    """Which steps to trace."""

    step: int = Field(ge=1)
    """The first step, as metrics.jsonl counts them."""
    steps: int = Field(default=3, ge=1)
    """How many."""


class MonitorSettings(Config):
    """Evaluation in the loop, and what is written for people."""

    evaluate_every: int = Field(default=0, ge=0)
    """Steps between evaluations on what is held out (and samples); there is one at the end in any case."""
    samples: list[str] = Field(default_factory=list)
    """Beginnings that the model continues at every evaluation (samples.jsonl)."""
    sample_tokens: int = Field(default=64, ge=1)
    """Longest continuation, in tokens."""
    group_norms_every: int = Field(default=10, ge=0)
    """Steps between gradient norms by part of the model; 0: never."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """Peak of one device, for MFU; 0: from the table of devices, or measured."""
    tensorboard: bool = False
    """Write TensorBoard files beside metrics.jsonl."""
    wandb: str = ""
    """Project of Weights & Biases; offline unless WANDB_MODE says otherwise."""
    profile: ProfileConfig | None = None
    """Trace some steps."""
    memory_snapshot: int = Field(default=0, ge=0)
    """Step at whose end the GPU allocator's history is written; 0: never."""


class Tracer:
    """Traces the steps that the settings name; otherwise does nothing."""

    def __init__(self, settings: MonitorSettings, out: Path, *, device: torch.device, rank: int) -> None:
        self.profile, self.snapshot = settings.profile, settings.memory_snapshot
        self.folder, self.device, self.rank = out / "profile", device, rank
        self._profiler: torch.profiler.profile | None = None
        self._first = 0
        if self.snapshot and device.type != "cuda":
            remedy = "leave it out; on a CPU, memory_gib in metrics.jsonl and profile: {step, steps} show memory"
            raise ConfigError(f"memory_snapshot needs a GPU, this run is on {device.type}", remedy=remedy)

    def begin(self, step: int) -> None:
        """Step `step` (from 1) begins."""
        if self.profile and self._profiler is None and 0 <= step - self.profile.step < self.profile.steps:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._first = step
            self._profiler = torch.profiler.profile(activities=kinds, profile_memory=True)
            self._profiler.start()
        if step == self.snapshot:
            torch.cuda.memory._record_memory_history()

    def end(self, step: int, *, last: bool = False) -> None:
        """Step `step` has ended; one that is `last` (the run ends, or goes back) ends an unfinished trace, too.

        Each is made once: steps that are made again are not traced again."""
        if self._profiler and self.profile and (last or step - self.profile.step + 1 >= self.profile.steps):
            self._profiler.stop()
            path = self._path(f"steps-{self._first}-{step}", "json.gz")
            with disk_errors(path):
                self._profiler.export_chrome_trace(str(path))
            self.profile = self._profiler = None
        if step == self.snapshot:
            self.snapshot = 0
            path = self._path(f"memory-{step}", "pickle")
            with disk_errors(path):
                torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)

    def _path(self, name: str, ending: str) -> Path:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}-rank{self.rank}.{ending}"
