"""Seconds of a training step: work counted on the code, divided by what a device sustains; nothing is fitted.

- products and attention at their own rates, all other operations by the bytes they move, each call its overhead;
- communication by volume over the slower of the links that a dimension crosses, hidden behind products where the
  device can do both at once (a GPU), or not at all (processes that share a CPU);
- a pipeline idles (P - 1) / M of its work (gpipe, 1f1b), that over V chunks (interleaved), a third of that (ZB-H1).

GPU rates are the datasheets' times what large products sustain; a CPU is probed for a second.

    seconds_of(job, LayoutConfig(), DEVICES["h100"], processes=8, accumulate=1)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from puyu.device import num_cores
from puyu.dist import World
from puyu.train.layouts.config import LayoutConfig
from puyu.train.layouts.mesh import Mesh
from puyu.train.planning.job import Job
from puyu.train.planning.live import Work
from puyu.train.planning.memory import extent, trace_of

MOVED = 10
"""Words read or written for each weight in an update: norm, scale, and AdamW's four reads and three writes."""
HIDDEN = 0.9
"""Share of the products' time behind which weights can travel."""


@dataclass(frozen=True, slots=True)
class Device:
    """What one device sustains: FLOP/s, bytes/s, seconds, bytes. `peak` is the datasheet's, for the MFU.

    `near`, `far`: what a process sends inside its machine of `group` devices, and to others. `call`, `message`: seconds
    of an operation, a collective, beside their work. `fusion`: share of the bytes between products that compiled blocks
    still move. `overlaps`: communication runs beside products. `cores`: shared by the processes, where they are.
    `reduce`, `total`: how much longer sums that are scattered, and sums for all, take than a gathering of their bytes.
    """

    name: str
    peak: float
    products: float
    attention: float
    memory: float
    near: float
    far: float
    call: float
    message: float
    capacity: float
    group: int = 8
    overlaps: bool = True
    fusion: float = 0.4
    cores: int = 0
    reduce: float = 1.0
    total: float = 2.0

    def link(self, size: int, inner: int) -> float:
        """Bytes/s of a process in a group of `size` whose members are `inner` apart: all cards of a machine carry the
        group's traffic to others."""
        if size * inner <= self.group:
            return self.near
        return min(self.near, self.far * max(self.group // inner, 1))


DEVICES = {
    "h100": Device("h100", 989e12, 0.68 * 989e12, 0.45 * 989e12, 2.7e12, 340e9, 40e9, 4e-6, 20e-6, 80e9),
    "h200": Device("h200", 989e12, 0.68 * 989e12, 0.45 * 989e12, 3.9e12, 340e9, 40e9, 4e-6, 20e-6, 141e9),
    "a100": Device("a100", 312e12, 0.75 * 312e12, 0.50 * 312e12, 1.6e12, 220e9, 20e9, 4e-6, 20e-6, 80e9),
}
"""Dense bf16 peaks (989 TFLOP/s for Hopper, 312 for A100); links: NVLink 4 and 3, one 400 or 200 Gbit/s card a GPU."""


def probe_cpu(dtype: torch.dtype, *, seconds: float = 1.0) -> Device:
    """One process of this machine, with its threads, by a second of products, copies and small operations."""
    a, small = torch.ones(512, 512, dtype=dtype), torch.ones(16)
    block, other = torch.ones(1 << 23), torch.ones(1 << 23)
    product = _best(lambda: a @ a, seconds / 3)
    copy = _best(lambda: other.copy_(block), seconds / 3)
    call = _best(lambda: small.add_(1), seconds / 3)
    rate, memory = 2 * 512**3 / product, 2 * block.nbytes / copy
    return Device(
        *("cpu", rate, rate, rate / 2, memory, memory / 30, memory / 30, 2 * call, 4e-4, 0.0),
        group=1 << 20,
        overlaps=False,
        fusion=1.0,
        reduce=2.4,
        total=1.5,
        cores=num_cores() // torch.get_num_threads() or 1,
    )


def _best(function: Callable[[], object], seconds: float) -> float:
    function()
    best, until = float("inf"), time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        function()
        best = min(best, time.perf_counter() - began)
    return best


@dataclass(frozen=True, slots=True)
class Seconds:
    """A step's time by what takes it (`memory`: operations that move bytes; `communication`: what is not hidden)."""

    products: float
    attention: float
    memory: float
    calls: float
    communication: float
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def limit(self) -> str:
        """What takes most beside products, with its share."""
        name, value = max(list(asdict(self).items())[1:], key=lambda item: item[1])
        return f"{name} {value / self.total:.0%}"


def seconds_of(job: Job, layout: LayoutConfig, device: Device, *, processes: int, accumulate: int) -> Seconds:
    """One optimizer step of the slowest process."""
    mesh = Mesh(layout, World(0, processes))
    trace, stages = trace_of(job, mesh, accumulate), layout.pipeline
    layers, both = -(-job.model.num_layers // stages), lambda part: part.forward.work.plus(part.first.work)
    ends = both(trace.head) if stages > 1 else both(trace.head).plus(both(trace.embedding))
    work = Work().plus(both(trace.block), layers).plus(ends)
    shared = max(1.0, min(processes, device.group) / device.cores) if device.cores else 1.0
    rates = (device.products, device.attention, device.memory / device.fusion, 1 / device.call)
    busy = [accumulate * amount * shared / rate for amount, rate in zip(work, rates, strict=True)]
    if device.overlaps:  # calls are queued while products run
        busy[3] = max(0.0, busy[3] - sum(busy[:3]))
    within, weights = (
        accumulate * _inside(job, mesh, device, (layers, accumulate)),
        _weights(job, mesh, device, accumulate),
    )
    hidden = HIDDEN * (busy[0] + busy[1]) if device.overlaps else 0.0
    held = job.held(layout.tensor) / stages / extent(layout.states, mesh)
    products, attention, moved, calls = busy
    return Seconds(
        products=products,
        attention=attention,
        memory=moved,
        calls=calls,
        communication=within + max(0.0, weights - hidden),
        bubble=bubble_share(layout, accumulate) * (sum(busy) + within) / shared,  # others use an idle process's core
        optimizer=MOVED * job.master * held * shared / device.memory,
    )


def bubble_share(layout: LayoutConfig, micro: int) -> float:
    """Idle time of a pipeline as a share of its work, where a backward pass takes as long as two forward ones."""
    parts = {"interleaved": layout.virtual, "zero-bubble": 3}.get(layout.schedule, 1)
    return (layout.pipeline - 1) / (micro * parts)


def _inside(job: Job, mesh: Mesh, device: Device, work: tuple[int, int]) -> float:
    """Seconds of what passes between processes inside a micro-batch's forward and backward pass. `work`: layers of a
    stage, micro-batches."""
    layout, total, shape = mesh.config, 0.0, job.model
    layers, accumulate = work
    tokens = job.batch_tokens // (mesh.data * accumulate)
    row_bytes = tokens // layout.sequence * shape.hidden_size * job.dtype.itemsize
    both = (1 + device.reduce) / 2
    if layout.tensor > 1:  # gather and scatter around attention and MLP, both ways
        total += 8 * layers * _travel(row_bytes * both, layout.tensor, 1, device)
    if layout.sequence > 1:
        wide = shape.num_heads + shape.num_kv_heads if layout.attention == "ulysses" else shape.num_kv_heads
        each = row_bytes * 2 * wide * shape.head_dim / shape.hidden_size / layout.tensor
        turns = 1 if layout.attention == "ulysses" else layout.sequence - 1
        total += 2 * turns * layers * _travel(each, layout.sequence, layout.tensor, device)
    if layout.pipeline > 1:
        total += 2 * _travel(2 * row_bytes, 2, layout.tensor * mesh.peers, device)
    if layout.expert > 1 and job.model.experts:
        routed = row_bytes * job.model.experts.per_token
        total += 4 * layers * _travel(routed, layout.expert, layout.tensor, device)
    return total


def _weights(job: Job, mesh: Mesh, device: Device, accumulate: int) -> float:
    """Seconds in which weights and gradients travel in a step: blocks at once where weights are sharded, else one
    parameter after the other."""
    layout, peers, inner = mesh.config, mesh.peers, mesh.config.tensor
    whole = job.held(inner) * job.master / layout.pipeline
    blocks = job.model.num_layers // layout.pipeline + 1
    if layout.params != "replica":  # gathered twice and summed once a micro-batch
        near = extent(layout.params, mesh)
        total = accumulate * _travel((2 + device.reduce) * whole, near, inner, device, messages=3 * blocks)
        return total + _travel(device.total * whole / near, peers // near, inner * near, device, messages=blocks)
    if layout.states == "replica":
        return _travel(device.total * whole, peers, inner, device, messages=6 * blocks)
    times = accumulate if layout.grads != "replica" else 1
    return _travel((1 + times * device.reduce) * whole, peers, inner, device, messages=6 * (1 + times) * blocks)


def _travel(count: float, size: int, inner: int, device: Device, messages: int = 1) -> float:
    """Seconds in which the processes of a group of `size` get `count` bytes from each other."""
    if size < 2:
        return 0.0
    shared = max(1.0, size / device.cores) if device.cores else 1.0
    return shared * (count * (size - 1) / size / device.link(size, inner) + messages * device.message * (1 + size / 64))
