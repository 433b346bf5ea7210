"""All legal layouts of a job on some processes: what each needs, how fast it is, why the others are refused.

Legal is what the mesh says (puyu/train/layouts/mesh.py), and rows that divide among readers and micro-batches. The
pick is the fastest that fits.

    found = search(job, DEVICES["h100"], processes=8); found.best[0].layout
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from puyu.dist import World
from puyu.errors import ConfigError
from puyu.model.config import ModelConfig
from puyu.train.layouts.config import LayoutConfig
from puyu.train.layouts.mesh import Mesh
from puyu.train.planning.job import Job
from puyu.train.planning.memory import Peak, extent, peak_of, trace_of
from puyu.train.planning.speed import Device, Seconds, seconds_of

RESERVED = 1.5e9
"""Bytes that a GPU's libraries and contexts take."""
USABLE = 0.95
"""Share of the rest that is left by fragmentation."""


@dataclass(frozen=True)
class Row:
    """A layout with what it needs and takes."""

    layout: LayoutConfig
    accumulate: int
    peak: Peak
    seconds: Seconds

    @property
    def words(self) -> str:
        """The settings that differ from the default, as `--set` takes them."""
        return words_of(self.layout, self.accumulate)


def words_of(layout: LayoutConfig, accumulate: int) -> str:
    """The settings that differ from the default, as `--set` takes them."""
    given = layout.model_dump(exclude_defaults=True)
    return " ".join([*(f"layout.{k}={v}" for k, v in given.items()), f"accumulate={accumulate}"])


@dataclass(frozen=True)
class Found:
    """Rows that fit, the fastest first, and how many were refused for what."""

    best: tuple[Row, ...]
    refused: Counter[str]
    smallest: tuple[float, LayoutConfig, int] | None
    """Where nothing fits: the least bytes that anything needs, its layout and micro-batches."""


def search(job: Job, device: Device, *, processes: int, memory: float = 0.0, enough: int = 40) -> Found:
    """Look at all, the fastest first, until `enough` fit; `memory`: bytes of a device (0: the device's own)."""
    room = usable(memory or device.capacity, device)
    refused, rows, floors, timed = Counter[str](), list[Row](), list[tuple[float, LayoutConfig, int]](), []
    for layout in layouts(processes, job.model, refused, group=device.group):
        for accumulate in micro_batches(job, layout, processes, refused):
            floor = floor_of(job, layout, processes=processes, accumulate=accumulate)
            if floor > room:
                refused["needs too much memory"] += 1
                floors.append((floor, layout, accumulate))
                continue
            seconds = seconds_of(job, layout, device, processes=processes, accumulate=accumulate)
            timed.append(Row(layout, accumulate, Peak(), seconds))
    timed.sort(key=lambda row: (row.seconds.total, len(row.words)))
    for number, row in enumerate(timed):
        peak = peak_of(job, row.layout, processes=processes, accumulate=row.accumulate)
        if peak.total > room:
            refused["needs too much memory"] += 1
            floors.append((peak.total, row.layout, row.accumulate))
        elif not rows or (row.seconds.total, peak.total) != (rows[-1].seconds.total, rows[-1].peak.total):
            rows.append(replace(row, peak=peak))
        if len(rows) == enough:
            refused["slower than those below, memory not looked at"] = len(timed) - number - 1
            break
    return Found(tuple(rows), refused, None if rows or not floors else min(floors, key=lambda item: item[0]))


def floor_of(job: Job, layout: LayoutConfig, *, processes: int, accumulate: int) -> float:
    """Bytes that a process needs at least: weights, states, and what the blocks of one micro-batch keep."""
    mesh = Mesh(layout, World(0, processes))
    weights = job.held(layout.tensor) * job.master / layout.pipeline
    kept = trace_of(job, mesh, accumulate).block.forward.stays / layout.tensor
    held = weights / extent(layout.params, mesh) + 2 * weights / extent(layout.states, mesh)
    return held + (job.model.num_layers // layout.pipeline) * kept


def usable(memory: float, device: Device) -> float:
    """Bytes for live tensors."""
    return memory if device.cores else USABLE * (memory - RESERVED)


def layouts(processes: int, model: ModelConfig, refused: Counter[str], *, group: int = 8) -> Iterator[LayoutConfig]:
    """The legal ones. A tensor group stays inside a machine; a partial group is a machine, or half of what there is."""
    sizes = [size for size in range(1, processes + 1) if processes % size == 0]
    experts = sizes if model.experts else [1]
    for tensor, sequence, pipeline, expert in product(sizes, sizes, sizes, experts):
        if tensor * sequence * pipeline > processes or tensor > group:
            continue
        peers = processes // (tensor * pipeline)
        for attention, schedule, extents in product(_attentions(sequence), _schedules(pipeline), _extents(peers)):
            partial = max(2, min(group // tensor, peers // 2)) if "partial" in extents else 0
            states = dict(zip(("params", "grads", "states"), extents, strict=True))
            sizes_given = {"tensor": tensor, "sequence": sequence, "pipeline": pipeline, "expert": expert}
            kinds = {"attention": attention, "schedule": schedule, "shard_size": partial}
            layout = LayoutConfig.model_validate({**sizes_given, **states, **kinds})
            if reason := why_not(layout, model, processes):
                refused[reason] += 1
            else:
                yield layout


def _attentions(sequence: int) -> tuple[str, ...]:
    return ("ulysses", "ring") if sequence > 1 else ("ulysses",)


def _schedules(pipeline: int) -> tuple[str, ...]:
    return ("gpipe", "1f1b", "interleaved", "zero-bubble") if pipeline > 1 else ("1f1b",)


def _extents(peers: int) -> Iterator[tuple[str, ...]]:
    """Of weights, gradients and states; with one peer they are all the same."""
    if peers == 1:
        yield "full", "full", "full"
        return
    for extents in product(("full", "partial", "replica"), repeat=3):
        if "partial" not in extents or peers > 2:
            yield extents


def why_not(layout: LayoutConfig, model: ModelConfig, processes: int) -> str:
    """Which rule refuses a layout; empty where none does."""
    mesh = Mesh(layout, World(0, processes))
    try:
        mesh.check()
        mesh.check_model(model)
    except ConfigError as error:
        return _rule(error.message)
    if layout.schedule == "zero-bubble" and layout.params != "replica" and mesh.peers > 1:
        return "zero-bubble with sharded weights"
    return ""


def _rule(message: str) -> str:
    """An error's sentence without its numbers."""
    return re.sub(r",? \d+\b|=\d+", "", message)


def micro_batches(job: Job, layout: LayoutConfig, processes: int, refused: Counter[str]) -> Iterator[int]:
    """Micro-batches of a step: 1, 2, 4 ... whole rows of a reader each."""
    data = Mesh(layout, World(0, processes)).data
    rows, rest = divmod(job.batch_tokens, job.row * data)
    if rest or not rows:
        refused["rows of a batch that do not divide among the readers"] += 1
        return
    counts = [rows // size for size in (1, 2, 4, 8, 16) if rows % size == 0]
    for count in counts:
        if layout.pipeline > count or (layout.schedule == "interleaved" and count % layout.pipeline):
            refused["fewer micro-batches than pipeline stages, or not a multiple of them"] += 1
        else:
            yield count
