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
from heapq import heappop, heappush
from itertools import product
from typing import Any

from puyu.dist import World
from puyu.errors import ConfigError
from puyu.train.layouts.config import LayoutConfig
from puyu.train.layouts.mesh import Mesh
from puyu.train.layouts.place import check_optimizer
from puyu.train.planning.job import Job
from puyu.train.planning.memory import Peak, extent, peak_of, trace_of
from puyu.train.planning.speed import Device, Seconds, seconds_of
from puyu.train.planning.trace import Checkpoint

RESERVED = 1.5e9
"""Bytes that a GPU's libraries and contexts take."""
USABLE = 0.95
"""Share of the rest that is left by fragmentation."""
LEVELS: tuple[Checkpoint, ...] = ("none", "selective", "full")
NO_TIME = Seconds(*(0.0,) * 7)


@dataclass(frozen=True)
class Row:
    """A layout with what it needs and takes."""

    layout: LayoutConfig
    accumulate: int
    checkpoint: Checkpoint
    peak: Peak
    seconds: Seconds

    @property
    def words(self) -> str:
        """The settings that differ from the default, as `--set` takes them."""
        given = [f"layout.{k}={v}" for k, v in self.layout.model_dump(exclude_defaults=True).items()]
        again = [f"memory.checkpoint={self.checkpoint}"] if self.checkpoint != "none" else []
        return " ".join([*given, *again, f"accumulate={self.accumulate}"])


@dataclass(frozen=True)
class Found:
    """Rows that fit, the fastest first, and how many were refused for what."""

    best: tuple[Row, ...]
    refused: Counter[str]
    smallest: Row | None
    """Where nothing fits: what needs the least memory, of which its peak is a lower bound."""


def search(job: Job, device: Device, *, processes: int, memory: float = 0.0, enough: int = 40) -> Found:
    """Look at all, the fastest first, until `enough` fit; `memory`: bytes of a device (0: the device's own).

    Activations are computed again, some or all, only where they do not fit.
    """
    room, refused, rows, least = usable(memory or device.capacity, device), Counter[str](), list[Row](), list[Row]()
    heap: list[tuple[float, int, int, Row]] = []

    def consider(layout: LayoutConfig, accumulate: int, levels: tuple[Checkpoint, ...]) -> None:
        """With the first of the levels that may fit: the others are slower."""
        for level in levels:
            if level != "none" and layout.schedule == "zero-bubble":
                refused["rule: zero-bubble with recomputed activations"] += 1
                return
            how: dict[str, Any] = {"processes": processes, "accumulate": accumulate, "checkpoint": level}
            row = Row(layout, accumulate, level, Peak(round(floor_of(job, layout, room=room, **how))), NO_TIME)
            if row.peak.total <= room:
                row = replace(row, seconds=seconds_of(job, layout, device, **how))
                heappush(heap, (row.seconds.total, len(row.words), len(heap) + len(least), row))
                return
            least.append(row)

    for layout in layouts(processes, job, refused, group=device.group):
        for accumulate in micro_batches(job, layout, processes, refused):
            consider(layout, accumulate, LEVELS)
    while heap and len(rows) < enough:
        *_, row = heappop(heap)
        peak = peak_of(job, row.layout, processes=processes, accumulate=row.accumulate, checkpoint=row.checkpoint)
        row = replace(row, peak=peak)
        if peak.total > room:
            least.append(row)
            consider(row.layout, row.accumulate, LEVELS[LEVELS.index(row.checkpoint) + 1 :])
        elif not rows or (row.seconds.total, peak.total) != (rows[-1].seconds.total, rows[-1].peak.total):
            rows.append(row)
    refused["slower: behind those that fit, memory not looked at"] = len(heap)
    refused["memory: more than there is"] = len(least)
    return Found(tuple(rows), +refused, None if rows or not least else min(least, key=lambda row: row.peak.total))


def floor_of(
    job: Job, layout: LayoutConfig, *, processes: int, accumulate: int, checkpoint: Checkpoint, room: float
) -> float:
    """Bytes that a process needs at least: weights, states, and what the blocks of one micro-batch keep (which is not
    looked at where there is no `room`)."""
    mesh = Mesh(layout, World(0, processes))
    outside = job.experts * job.model.num_layers * (1 - 1 / layout.expert)
    weights = (job.held(layout.tensor) - outside) * job.master / layout.pipeline
    states = weights * job.states.block / (job.block(1) * job.master) / extent(layout.states, mesh)
    held = weights / extent(layout.params, mesh) + states
    if held > room:
        return held
    kept = trace_of(job, mesh, accumulate, checkpoint).block.forward.stays / layout.tensor / job.memory.every
    return held + (job.model.num_layers // layout.pipeline) * kept


def usable(memory: float, device: Device) -> float:
    """Bytes for live tensors."""
    return memory if device.rates else USABLE * (memory - RESERVED)


def shapes(job: Job, processes: int) -> set[tuple[int, int]]:
    """(tensor, tokens) of the micro-batches of all legal layouts, for a CPU to be measured with."""
    found, refused = set(), Counter[str]()
    for layout in layouts(processes, job, refused, group=1 << 20):
        tokens = job.batch_tokens // (Mesh(layout, World(0, processes)).data * layout.sequence)
        found |= {(layout.tensor, tokens // count) for count in micro_batches(job, layout, processes, refused)}
    return found


def layouts(processes: int, job: Job, refused: Counter[str], *, group: int = 8) -> Iterator[LayoutConfig]:
    """The legal ones. A tensor group stays inside a machine; a partial group is a machine, or half of what there is."""
    sizes = [size for size in range(1, processes + 1) if processes % size == 0]
    experts = sizes if job.model.experts else [1]
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
            if reason := why_not(layout, job, processes):
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


def why_not(layout: LayoutConfig, job: Job, processes: int) -> str:
    """Which rule refuses a layout; empty where none does."""
    mesh = Mesh(layout, World(0, processes))
    try:
        mesh.check()
        mesh.check_model(job.model)
        check_optimizer(mesh, job.optim)
    except ConfigError as error:
        return _rule(error.message)
    if layout.schedule == "zero-bubble" and layout.params != "replica" and mesh.peers > 1:
        return "rule: zero-bubble with sharded weights"
    if job.float8 and (layout.tensor > 1 or layout.schedule == "zero-bubble"):
        return "rule: float8 with tensor parallel or zero-bubble"
    return ""


def _rule(message: str) -> str:
    """An error's sentence without its numbers, behind the kind of the reason."""
    if found := re.search(r"(params|grads) \w+ with (states|params)", message):
        return f"rule: {found[1]} sharded otherwise than {found[2]} allow"
    kind = "sizes" if re.search("divide|makes|too many", message) else "rule"
    return f"{kind}: " + re.sub(r",? \d+\b|=\d+", "", message)


def micro_batches(job: Job, layout: LayoutConfig, processes: int, refused: Counter[str]) -> Iterator[int]:
    """Micro-batches of a step: 1, 2, 4 ... whole rows of a reader each."""
    data = Mesh(layout, World(0, processes)).data
    rows, rest = divmod(job.batch_tokens, job.row * data)
    if rest or not rows:
        refused["sizes: rows of a batch, not a multiple of the readers"] += 1
        return
    counts = [rows // size for size in (1, 2, 4, 8, 16) if rows % size == 0]
    for count in counts:
        if layout.pipeline > count or (layout.schedule == "interleaved" and count % layout.pipeline):
            refused["sizes: micro-batches, fewer than pipeline stages or not a multiple"] += 1
        else:
            yield count
