"""What the passes, collectives and updates of a job take on this machine's CPU, all processes at once.

Processes are started that run parts of the real model (one block; head and loss; embedding) in the sizes that the
layouts of a plan have, and the collectives that layouts use, from kilobytes to megabytes. Nothing of a layout runs.

    rates = calibrate(job, {(1, 256), (2, 512)}, processes=2)
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
import torch.distributed as dist
from torch import Tensor

from puyu.device import num_cores
from puyu.dist import World
from puyu.model.attention import PackedPlan
from puyu.model.heads import CausalLM
from puyu.train import objectives, optim
from puyu.train.layouts import comm
from puyu.train.memory import keep_freed_pages
from puyu.train.planning.job import Job
from puyu.train.planning.speed import Device, Passes, Rates

ROUNDS, TURNS = 4, 2
"""All is measured in so many rounds, in each so many times. The shortest time counts: on a shared machine the others
tell of its neighbors, and what is measured in one go meets them at another time than the rest."""
BLOCKS = 3
"""So many run one after the other, so that one's weights leave the cache before it comes again."""
SIZES = tuple(1 << power for power in (12, 16, 18, 20, 22, 24, 25))
"""Bytes of a collective."""


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()


def cpu(job: Job, shapes: Iterable[tuple[int, int]], *, processes: int, capacity: float) -> Device:
    """This machine as a device, one of `processes`; `shapes`: (tensor, tokens) of the micro-batches to plan with."""
    rates = calibrate(job, shapes, processes=processes)
    return Device("cpu", *(0.0,) * 8, capacity=capacity, group=1 << 20, rates=rates)


def calibrate(job: Job, shapes: Iterable[tuple[int, int]], *, processes: int) -> Rates:
    """Measure with as many processes as there will be, but no more than four for each core."""
    count, sizes = min(processes, 4 * num_cores()), sorted(set(shapes))
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(count) as pool:
        tasks = [(job, sizes, World(rank, count), f"{folder}/store") for rank in range(count)]
        rates: Rates = pool.starmap(work, tasks, chunksize=1)[0]
    slower = processes / count  # so many stand behind one of those that measured
    talk = {what: [(n, slower * seconds) for n, seconds in points] for what, points in rates.talk.items()}
    times = {shape: _times(found, slower) for shape, found in rates.passes.items()}
    return replace(rates, passes=times, talk=talk, update=slower * rates.update, copy=rates.copy / slower)


def _times(found: Passes, slower: float) -> Passes:
    pairs = ((slower * first, slower * later) for first, later in found[1:])
    return Passes(slower * found.forward, *pairs)


def work(job: Job, shapes: Iterable[tuple[int, int]], world: World, store: str) -> Rates:
    """What one process of `world` measures."""
    if world.size > 1:
        torch.set_num_threads(1)
        room = dist.FileStore(store, world.size)
        dist.init_process_group("gloo", store=room, rank=world.rank, world_size=world.size)
    keep_freed_pages(torch.device("cpu"))
    torch.set_default_dtype(torch.float64 if job.dtype == torch.float64 else torch.float32)
    return _least([_round(job, list(shapes), world) for _ in range(ROUNDS)])


def _least(rounds: list[Rates]) -> Rates:
    """The best of all rounds, number by number."""
    first = rounds[0]
    times = {shape: [found.passes[shape] for found in rounds] for shape in first.passes}
    calls = {what: zip(*(found.talk[what] for found in rounds), strict=True) for what in first.talk}
    return replace(
        first,
        passes={shape: _least_passes(found) for shape, found in times.items()},
        talk={what: [min(points) for points in found] for what, found in calls.items()},
        update=min(found.update for found in rounds),
        copy=max(found.copy for found in rounds),
        alone=statistics.median(found.alone for found in rounds),
    )


def _least_passes(found: list[Passes]) -> Passes:
    backward, embedding, head = (
        tuple(map(min, zip(*pairs, strict=True))) for pairs in list(zip(*found, strict=True))[1:]
    )
    return Passes(min(x.forward for x in found), backward, embedding, head)


def _round(job: Job, sizes: list[tuple[int, int]], world: World) -> Rates:
    block, other = torch.ones(1 << 22), torch.ones(1 << 22)
    found, talk = {(tensor, tokens): passes(job, tensor, tokens) for tensor, tokens in sizes}, _talk(world)
    return Rates(
        passes=found,
        alone=_alone(job, sizes[0], found[sizes[0]]),
        talk={what: [(n, _best(partial(call, torch.ones(n // 4)))) for n in SIZES] for what, call in talk.items()},
        update=_update(job),
        copy=2 * block.nbytes / _best(lambda: other.copy_(block)),
        size=world.size,
    )


def _talk(world: World) -> dict[str, Callable[[Tensor], object]]:
    """Collectives over so many numbers, as the layouts make them."""
    group, size = (dist.group.WORLD, world.size) if world.size > 1 else (None, 1)

    def send(x: Tensor) -> None:
        after, before = (world.rank + 1) % size, (world.rank - 1) % size
        ops = [dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, torch.empty_like(x), before, group)]
        for waiting in dist.batch_isend_irecv(ops):
            waiting.wait()

    def even(x: Tensor) -> Tensor:
        return x[: len(x) // size * size]

    return {
        "gather": lambda x: comm.all_gather(x[: len(x) // size], group),
        "scatter": lambda x: comm.reduce_scatter(even(x), group),
        "sum": lambda x: comm.all_reduce(x, group),
        "exchange": lambda x: comm.all_to_all(even(x), [len(x) // size] * size, [len(x) // size] * size, group),
        "send": send if size > 1 else even,
    }


def _best(function: Callable[[], object]) -> float:
    spans = []
    function()
    for _ in range(TURNS):
        _together()
        began = time.perf_counter()
        function()
        spans.append(time.perf_counter() - began)
    return min(spans)


def passes(job: Job, tensor: int, tokens: int, *, wait: Callable[[], object] = _together) -> Passes:
    """Seconds of the parts of a model; processes `wait` for each other before each."""
    model, row = _model(job, tensor), min(job.row, tokens)
    ids, plan = torch.arange(tokens) % row, PackedPlan.build(range(0, tokens, row), tokens)
    x_TD = torch.randn(tokens, job.model.hidden_size, dtype=job.dtype).requires_grad_()
    words, weight, ones = ids % model.config.vocab_size, objectives.head_weight(model), torch.ones(tokens)

    def head() -> Tensor:
        return objectives.chunked_cross_entropy(model.trunk.norm(x_TD), weight, words, ones)[0]

    count = len(model.trunk.layers)
    blocks = _pair(model, lambda: model.trunk.through(x_TD, ids, plan, range(count)), wait)
    forward, first, later = (seconds / count for seconds in blocks)
    embedding, loss = _pair(model, lambda: model.trunk.embedded(words), wait), _pair(model, head, wait)
    of_ends = ((part[0] + part[1], part[0] + part[2]) for part in (embedding, loss))
    return Passes(forward, (first, later), *of_ends)


def _alone(job: Job, shape: tuple[int, int], together: Passes) -> float:
    """A block's passes while the other processes wait, as a share of those while all are busy. Every process calls."""
    share = 1.0
    if not dist.is_initialized() or dist.get_rank() == 0:
        found = passes(job, *shape, wait=lambda: None)
        share = (found.forward + found.backward[0]) / (together.forward + together.backward[0])
    _together()
    return min(share, 1.0)


def _pair(model: CausalLM, function: Callable[[], Tensor], wait: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds of a forward pass, of the backward pass that makes gradients, of one that adds to them."""
    found: list[tuple[float, float, float]] = []
    for _ in range(TURNS):
        model.zero_grad(set_to_none=True)
        spans = []
        for _ in range(2):
            wait()
            began = time.perf_counter()
            y = function()
            middle = time.perf_counter()
            y.backward(torch.ones_like(y))
            spans.append((middle - began, time.perf_counter() - middle))
        found.append((spans[0][0], spans[0][1], spans[1][1]))
    forward, first, later = (min(values) for values in zip(*found, strict=True))
    return forward, first, later


def _model(job: Job, tensor: int) -> CausalLM:
    model = CausalLM(job.slice(tensor).with_(num_layers=min(BLOCKS, job.model.num_layers), windows=()))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    model.set_compute_dtype(job.dtype)
    return model


def _update(job: Job) -> float:
    """Seconds of the update of one weight: norm, factor, the optimizer's step."""
    named = [(name, x) for name, x in _model(job, 1).named_parameters() if ".layers." in name]
    optimizer = optim.make_optimizer(named, job.optim)
    grads = [torch.zeros_like(x) for _, x in named]
    for (_, parameter), grad in zip(named, grads, strict=True):
        parameter.grad = grad

    def step() -> None:
        torch._foreach_norm(grads)
        torch._foreach_mul_(grads, 0.5)
        optimizer.step()

    return _best(step) / sum(grad.numel() for grad in grads)
