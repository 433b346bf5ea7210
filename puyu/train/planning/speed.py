"""Seconds of a training step: work counted on the code, divided by what a device sustains; nothing is fitted.

- a GPU: products and attention at their own rates, all other operations by the bytes they move, each call its overhead;
  a CPU: the passes of a block, of head and embedding as they were measured on this machine (calibrate.py);
- communication by volume over the slower of the links that a dimension crosses, call by call as the layouts make them,
  hidden behind products where the device can do both at once (a GPU), or not at all (processes that share a CPU);
- a pipeline's fullest stage idles (P - 1) / M of its work (gpipe, 1f1b), that over V chunks (interleaved), a third of
  that (ZB-H1).

GPU rates are the datasheets' times what large products sustain.

    seconds_of(job, LayoutConfig(), DEVICES["h100"], processes=8, accumulate=1)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from puyu.dist import World
from puyu.train.layouts.config import LayoutConfig
from puyu.train.layouts.mesh import Mesh
from puyu.train.planning.job import Job
from puyu.train.planning.live import Work
from puyu.train.planning.memory import cuts_of, extent, trace_of
from puyu.train.planning.trace import Checkpoint, Part

MOVED = 10
"""Words read or written for each weight in an update: norm, scale, and AdamW's four reads and three writes."""
HIDDEN = 0.9
"""Share of the products' time behind which weights can travel."""
AGAIN = {"none": 0.0, "selective": 0.3, "full": 1.0}
"""Share of a measured forward pass that is computed again; on a GPU it is counted."""


class Passes(NamedTuple):
    """Seconds of a block's forward pass; then of the backward pass, and of embedding, and of head and loss in both:
    each when gradients are new, and when they are added to others."""

    forward: float
    backward: tuple[float, float]
    embedding: tuple[float, float]
    head: tuple[float, float]


@dataclass(frozen=True)
class Rates:
    """What was measured: passes by (tensor, tokens), collectives (what: bytes, seconds ...) in a group of `size`, an
    update of one weight."""

    passes: Mapping[tuple[int, int], Passes]
    talk: Mapping[str, list[tuple[float, float]]]
    update: float
    copy: float
    """Bytes/s read and written."""
    size: int
    alone: float = 1.0
    """Time of a process's passes where the others wait, as a share of that where all are busy."""

    def seconds(self, what: str, count: float) -> float:
        """Of one collective, on the line between the sizes around it."""
        points = self.talk[what]
        at = min(max(bisect_left(points, (count, 0.0)), 1), len(points) - 1)
        (low, first), (high, last) = points[at - 1 : at + 1]
        return max(first + (count - low) * (last - first) / (high - low), points[0][1])


@dataclass(frozen=True, slots=True)
class Device:
    """What one device sustains: FLOP/s, bytes/s, seconds, bytes. `peak` is the datasheet's, for the MFU.

    `near`, `far`: what a process sends inside its machine of `group` devices, and to others; `host`: to its host's
    memory. `call`, `message`: seconds of an operation, a collective, beside their work. `fusion`: share of the bytes
    between products that compiled blocks still move. `float8`: has such products. `rates`: of a CPU, as measured.
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
    host: float = 25e9
    group: int = 8
    fusion: float = 0.4
    float8: bool = False
    rates: Rates | None = None

    def link(self, size: int, inner: int) -> float:
        """Bytes/s of a process in a group of `size` whose members are `inner` apart: all cards of a machine carry the
        group's traffic to others."""
        if size * inner <= self.group:
            return self.near
        return min(self.near, self.far * max(self.group // inner, 1))

    def travel(self, what: str, count: float, group: tuple[int, int], *, messages: int = 1) -> float:
        """Seconds of `messages` collectives over `count` bytes in all (what a process has in the end of a gathering, or
        gives to a sum), in a group of so many, so far apart: gather, scatter, sum, exchange, send."""
        size, inner = group
        if size < 2 or not messages:
            return 0.0
        if self.rates:
            share = (size - 1) / size * self.rates.size / max(self.rates.size - 1, 1)
            return messages * self.rates.seconds(what, count / messages) * (1.0 if what == "send" else share)
        times = {"sum": 2.0, "send": size / (size - 1)}.get(what, 1.0)
        latency = messages * self.message * (1 + size / 64)
        return times * count * (size - 1) / size / self.link(size, inner) + latency


DEVICES = {
    "h100": Device(
        "h100", 989e12, 0.68 * 989e12, 0.45 * 989e12, 2.7e12, 340e9, 40e9, 4e-6, 20e-6, 80e9, 50e9, float8=True
    ),
    "h200": Device(
        "h200", 989e12, 0.68 * 989e12, 0.45 * 989e12, 3.9e12, 340e9, 40e9, 4e-6, 20e-6, 141e9, 50e9, float8=True
    ),
    "a100": Device("a100", 312e12, 0.75 * 312e12, 0.50 * 312e12, 1.6e12, 220e9, 20e9, 4e-6, 20e-6, 80e9),
}
"""Dense bf16 peaks (989 TFLOP/s for Hopper, 312 for A100); links: NVLink 4 and 3, one 400 or 200 Gbit/s card a GPU."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """A step's time by what takes it (`memory`: operations that move bytes; `communication`: what is not hidden).

    Of a CPU `products` are the passes as a whole.
    """

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


class Plan(NamedTuple):
    """What is timed: a layout of a job with its micro-batches, on a device."""

    job: Job
    mesh: Mesh
    device: Device
    accumulate: int
    checkpoint: Checkpoint
    layers: list[int]
    """Of each stage."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch of a process."""
        return self.job.batch_tokens // (self.mesh.data * self.accumulate * self.mesh.config.sequence)

    @property
    def fresh(self) -> int:
        """Micro-batches whose gradients are not added to those of others on the process."""
        config = self.mesh.config
        return self.accumulate if config.grads != "replica" and self.mesh.peers > 1 else 1


def seconds_of(
    job: Job,
    layout: LayoutConfig,
    device: Device,
    *,
    processes: int,
    accumulate: int,
    checkpoint: Checkpoint = "none",
) -> Seconds:
    """One optimizer step of the slowest process."""
    cuts, stages = cuts_of(job, layout), layout.pipeline
    layers = [sum(len(cut) for cut in cuts[rank::stages]) for rank in range(stages)]
    plan = Plan(job, Mesh(layout, World(0, processes)), device, accumulate, checkpoint, layers)
    busy = _measured(plan, device.rates) if device.rates else _counted(plan)
    within, weights = accumulate * sum(_inside(plan)), _weights(plan)
    idle = max(0.0, 2 * device.rates.alone - 1) if device.rates else 1.0  # while one waits, the other is faster
    hidden = 0.0 if device.rates else HIDDEN * (busy[0] + busy[1])
    held = job.held(layout.tensor) / layout.pipeline / extent(layout.states, plan.mesh)
    products, attention, moved, calls = busy
    return Seconds(
        products=products,
        attention=attention,
        memory=moved,
        calls=calls,
        communication=within + max(0.0, weights - hidden),
        bubble=bubble_share(layout, accumulate) * (sum(busy) + within) * idle,
        optimizer=held * (device.rates.update if device.rates else MOVED * job.master / device.memory),
    )


def _stages(layers: list[int]) -> Iterator[tuple[int, bool, bool]]:
    """The stages that may be the slowest: layers, whether with the embedding, with the head."""
    alone = len(layers) == 1
    yield layers[0], True, alone
    yield layers[-1], alone, True
    yield max(layers), alone, alone


def _measured(plan: Plan, rates: Rates) -> list[float]:
    """Seconds of all passes of the slowest stage, as products."""
    passes, fresh = rates.passes[plan.mesh.config.tensor, plan.tokens], plan.fresh
    added = plan.accumulate - fresh
    forward = (1 + AGAIN[plan.checkpoint]) * plan.accumulate * passes.forward
    block, embedding, head = (
        fresh * pair[0] + added * pair[1] for pair in (passes.backward, passes.embedding, passes.head)
    )
    times = [n * (forward + block) + first * embedding + last * head for n, first, last in _stages(plan.layers)]
    return [max(times), 0.0, 0.0, 0.0]


def _counted(plan: Plan) -> list[float]:
    """Seconds of products, attention, other operations and calls of the slowest stage."""
    device, accumulate = plan.device, plan.accumulate
    trace = trace_of(plan.job, plan.mesh, accumulate, plan.checkpoint)
    works = []
    for layers, first, last in _stages(plan.layers):
        work = Work().plus(_both(trace.block), layers)
        work = work.plus(_both(trace.embedding)) if first else work
        works.append(work.plus(_both(trace.head)) if last else work)
    rates = (device.products, device.attention, device.memory / device.fusion, 1 / device.call)
    busy = [accumulate * amount / rate for amount, rate in zip(max(works), rates, strict=True)]
    busy[3] = max(0.0, busy[3] - sum(busy[:3]))  # calls are queued while products run
    if plan.job.memory.offload:
        kept, stays = (trace_of(job, plan.mesh, accumulate).block.forward.stays for job in (plan.job.plain, plan.job))
        busy[2] += 2 * accumulate * max(plan.layers) * (kept - stays) / device.host
    return busy


def _both(part: Part) -> Work:
    return part.forward.work.plus(part.first.work)


def bubble_share(layout: LayoutConfig, micro: int) -> float:
    """Idle time of a pipeline as a share of its work, where a backward pass takes as long as two forward ones."""
    parts = {"interleaved": layout.virtual, "zero-bubble": 3}.get(layout.schedule, 1)
    return (layout.pipeline - 1) / (micro * parts)


def _inside(plan: Plan) -> Iterator[float]:
    """Seconds of what passes between processes inside a micro-batch's forward and backward pass."""
    (job, mesh, device, *_), layout, shape = plan, plan.mesh.config, plan.job.model
    layers, again = max(plan.layers), int(plan.checkpoint != "none")
    rows = plan.tokens * shape.hidden_size * job.dtype.itemsize  # bytes of hidden states
    if layout.tensor > 1:  # gather and scatter around attention, MLP, once around embedding and head; back likewise
        calls = (4 + 2 * again) * layers + 2
        yield sum(
            device.travel(what, calls * rows, (layout.tensor, 1), messages=calls) for what in ("gather", "scatter")
        )
    if layout.sequence > 1:
        group = layout.sequence, layout.tensor
        each = rows * shape.head_dim / shape.hidden_size / layout.tensor
        if layout.attention == "ulysses":  # queries, keys and values there, outputs back; gradients likewise
            wide, calls = 2 * (shape.num_heads + max(shape.num_kv_heads, layout.sequence)) * each, (2 + again) * layers
            yield device.travel("exchange", calls * wide, group, messages=2 * calls)
            yield 4 * calls * wide / (device.rates.copy if device.rates else device.memory)  # parts are laid in order
        else:  # keys and values forward and backward, their gradients once around in fp32
            pair, turns = 2 * shape.num_kv_heads * each, layout.sequence - 1
            yield device.travel(
                "send", (2 + again) * turns * layers * pair, group, messages=(2 + again) * turns * layers
            )
            wide = pair * job.master / job.dtype.itemsize * layout.sequence * layers
            yield device.travel("send", wide, group, messages=layout.sequence * layers)
    if layout.pipeline > 1:
        calls = 2 * layout.chunks // layout.pipeline
        yield device.travel("send", calls * rows / layout.tensor, (2, layout.tensor * mesh.peers), messages=calls)
    if layout.expert > 1 and shape.experts:
        calls = (4 + 2 * again) * layers
        routed = calls * rows * shape.experts.per_token
        yield device.travel("exchange", routed, (layout.expert, layout.tensor), messages=calls)


def _weights(plan: Plan) -> float:
    """Seconds in which weights and gradients travel in a step: blocks at once where weights are sharded (and copied
    into a buffer and out of it), else one parameter after the other."""
    (job, mesh, device, accumulate, *_), layout = plan, plan.mesh.config
    peers, inner = mesh.peers, layout.tensor
    if peers == 1:
        return 0.0
    whole, blocks = job.held(inner) * job.master / layout.pipeline, max(plan.layers) + 1
    copied = 2 * whole / (device.rates.copy if device.rates else device.memory)
    sums = plan.fresh
    if layout.params != "replica":  # gathered twice and summed once a micro-batch
        near = extent(layout.params, mesh), inner
        outer = peers // near[0], inner * near[0]
        passes, tables = 2 * accumulate, 2 - job.model.tie_embeddings
        rest = tables * job.model.vocab_size * job.model.hidden_size * job.master / inner / layout.pipeline
        gathered = passes * (whole - rest) * job.gathered + accumulate * rest  # head and embedding: once
        total = device.travel("gather", gathered, near, messages=passes * blocks)
        total += device.travel("scatter", sums * whole, near, messages=sums * blocks) + (passes + sums) * copied
        total += device.travel("sum", whole / near[0], outer, messages=blocks)
        if layout.states != layout.params:
            total += device.travel("gather", whole / near[0], outer, messages=6 * blocks)
        return total
    if layout.states == "replica":
        return device.travel("sum", whole, (peers, inner), messages=6 * blocks)
    near = extent(layout.states, mesh), inner
    total = device.travel("scatter", sums * whole, near, messages=6 * sums * blocks)
    total += device.travel("gather", whole, near, messages=6 * blocks) + copied
    return total + device.travel("sum", whole / near[0], (peers // near[0], inner * near[0]), messages=6 * blocks)
