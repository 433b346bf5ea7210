"""A plan in words: the table, the pick with what each of its numbers is made of, and why others are refused.

for line in table(job, found, DEVICES["h100"]): print(line)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from puyu.dist import World
from puyu.train.layouts.mesh import Mesh
from puyu.train.meter import work_of
from puyu.train.planning.job import Job
from puyu.train.planning.memory import extent, trace_of
from puyu.train.planning.search import RESERVED, USABLE, Found, Row, usable
from puyu.train.planning.speed import HIDDEN, MOVED, Device

GB = 1e9
_KINDS = {
    "activations": " kept for the backward pass",
    "working": " of the operation at the peak: for head and loss a gradient of the head, logits of a chunk",
    "gathered": " whole weights of the process",
    "buffers": " of the gathering",
    "reducing": " the last gradients, until the next are summed",
}


def summary(job: Job, row: Row, device: Device, processes: int) -> dict[str, Any]:
    """The numbers of a row, JSON-ready. Memory in bytes, of one process."""
    rate = job.batch_tokens / row.seconds.total
    flops = work_of(job.model, outputs=job.model.vocab_size).flops(job.row)
    return {
        "layout": row.layout.model_dump(exclude_defaults=True),
        "accumulate": row.accumulate,
        "memory": {"peak": row.peak.total, "where": row.peak.where, "kinds": row.peak.kinds},
        "seconds": {"step": row.seconds.total, **asdict(row.seconds)},
        "tokens_per_s": rate,
        "mfu": rate * flops / (device.peak * processes) if device.peak else None,
        "limit": row.seconds.limit,
        "settings": row.words,
    }


def table(job: Job, found: Found, device: Device, *, processes: int, memory: float, top: int) -> Iterator[str]:
    """What fits, the fastest first, then the reasons of the others."""
    room = usable(memory, device)
    size = f"{job.kinds.total() / GB:.3f} B parameters"
    yield f"{size}, rows of {job.row:,} tokens, {job.batch_tokens:,} tokens a step"
    yield f"{processes} x {device.name}, {memory / GB:.0f} GB each, {room / GB:.1f} GB of it for tensors"
    yield ""
    if found.best:
        yield f"{'memory':>9}  {'step':>9}  {'tokens/s':>10}  {'MFU':>5}  {'limited by':<18}  settings"
    for row in found.best[:top]:
        numbers = summary(job, row, device, processes)
        mfu = f"{numbers['mfu']:.1%}" if numbers["mfu"] else "-"
        yield (
            f"{row.peak.total / GB:6.1f} GB  {row.seconds.total:7.2f} s  {numbers['tokens_per_s']:10,.0f}  {mfu:>5}  "
            f"{row.seconds.limit:<18}  {row.words}"
        )
    if found.best:
        yield f"\npick: {found.best[0].words}"
    else:
        yield "nothing fits"
    if found.smallest:
        yield f"the least is {found.smallest.peak.total / GB:.1f} GB or more, with {found.smallest.words}"
    yield from refusals(found.refused)


def refusals(refused: Counter[str]) -> Iterator[str]:
    """A line for each kind of reason: memory, sizes, rule, slower."""
    kinds: dict[str, Counter[str]] = {}
    for reason, count in refused.items():
        kind, _, words = reason.partition(": ")
        kinds.setdefault(kind, Counter())[words] += count
    for kind, reasons in sorted(kinds.items()):
        total = sum(reasons.values())
        yield f"refused {total:6} ({kind}): " + ", ".join(f"{words} ({n})" for words, n in reasons.most_common())


def explain(job: Job, row: Row, device: Device, processes: int) -> Iterator[str]:
    """Each number of a row with its formula."""
    mesh, layout = Mesh(row.layout, World(0, processes)), row.layout
    trace = trace_of(job, mesh, row.accumulate, row.checkpoint)
    tokens = job.batch_tokens // (mesh.data * row.accumulate * layout.sequence)
    kept, states = trace.block.forward.stays, job.states
    yield f"\nmicro-batch   {tokens:,} tokens = batch / (data {mesh.data} x accumulate x sequence)"
    yield f"parameters    {job.kinds.total():,}: " + ", ".join(f"{name} {count:,}" for name, count in job.kinds.items())
    each = states.block / job.block(1)
    for name, kind, size in (
        ("weights", layout.params, job.master),
        ("gradients", layout.grads, job.master),
        ("states", layout.states, each),
    ):
        split = f"tensor x pipeline x {extent(kind, mesh)} processes, {kind}"
        yield f"{name:<13} {size:.4g} B x parameters / ({split})"
    again = f", checkpoint {row.checkpoint}; counted"
    yield f"a block keeps {kept:,} B = {kept / tokens / job.model.hidden_size:.1f} B x tokens x hidden{again}"
    yield f"blocks        {job.model.num_layers // layout.pipeline} a process, of each micro-batch in flight"
    yield f"head and loss {trace.head.forward.peak:,} B at most, {trace.head.forward.stays:,} B kept (counted)"
    yield f"peak          {row.peak.total / GB:.2f} GB at {row.peak.where}"
    yield from (f"  {name:<13} {count / GB:.3f} GB{_KINDS.get(name, '')}" for name, count in row.peak.kinds.items())
    yield f"a step        {row.seconds.total:.3f} s"
    yield from (f"  {name:<13} {value:.3f} s" for name, value in asdict(row.seconds).items())
    yield f"  room for it: {USABLE:.0%} of what {RESERVED / GB} GB of libraries leave"
    yield from _rates(device)


def _rates(device: Device) -> Iterator[str]:
    if device.rates:
        talk = ", ".join(f"{what} {points[-1][0] / points[-1][1]:.3g}" for what, points in device.rates.talk.items())
        yield f"  passes as measured here; collectives at {talk} B/s; copies at {device.rates.copy:.3g} B/s"
        return
    yield f"  products at {device.products:.3g} FLOP/s, attention at {device.attention:.3g}"
    yield f"  {device.fusion:.0%} of the other bytes at {device.memory:.3g} B/s"
    yield f"  links {device.near:.3g} B/s in a machine, {device.far:.3g} B/s a device to others"
    yield f"  weights travel behind {HIDDEN:.0%} of the products; an update moves {MOVED} words a weight"
