"""The certificate of layouts: the same small model, data and seed under every layout, against one process.

One process computes the reference; each world of 2 to 4 processes is started once and runs all of its layouts.
In float64 (gradients clipped) all losses and weights must agree to 1e-10, and norms of the gradients, whole and by
parts, relatively: neither clipping nor Adam lets a loss tell a wrong factor. In float32 (not clipped) losses must agree
to 1e-6 relative at the first step and 1e-5 over all. Where sums have the same order, losses and weights are equal bit
for bit: a layout with itself, run again; data parallel over two processes with one process that takes the two shares
one after the other, however weights, gradients and states are sharded (the sum of two numbers has one order).

    rows = certify(steps=50)
    python -m puyu certify layouts --small
"""

from __future__ import annotations

import math
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from puyu.data.packing import Batch, Doc, pack_documents
from puyu.dist import World
from puyu.errors import TrainingError
from puyu.files import read_json, write_json
from puyu.model.config import ExpertShape, ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.train import optim, parallel
from puyu.train.layouts import Layout, LayoutConfig, make_layout
from puyu.train.layouts.mesh import Mesh
from puyu.train.objectives import lm_loss
from puyu.train.optim import OptimConfig
from puyu.train.pieces import gather_whole

LIMITS = {"float64": 1e-10, "float32 first": 1e-6, "float32": 1e-5}
"""Largest difference of a loss: absolute in nats for float64, relative for float32."""

DENSE = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=8, num_kv_heads=4, intermediate_size=64, max_positions=64
)
EXPERTS = DENSE.with_(family="mixtral", experts=ExpertShape(count=4, per_token=2, size=24))
DEEP = DENSE.with_(num_layers=4, hidden_size=16, num_heads=4, num_kv_heads=2, intermediate_size=32)
THIN, SPARSE = (shape.with_(num_layers=1) for shape in (DENSE, EXPERTS))
SHAPES = {"dense": DENSE, "experts": EXPERTS, "deep": DEEP, "thin": THIN, "sparse": SPARSE}
"""Two processes train two layers, or two of each stage; four share two cores, and train one."""
PATIENCE = 120
"""Seconds that a process waits for its peers before it gives up."""


@dataclass(frozen=True)
class Case:
    """One layout. Its float32 run is equal bit for bit to that of `like`: one process that takes the micro-batches of
    all processes one after the other, or itself, run again."""

    name: str
    world: int
    layout: dict[str, Any] = field(default_factory=dict)
    shape: ModelConfig = DENSE
    accumulate: int = 1
    like: Literal["", "one", "itself"] = ""
    small: bool = False
    """Whether it is part of the small certificate."""


REPLICA = {"params": "replica", "grads": "replica", "states": "replica"}
_ZERO1 = REPLICA | {"states": "full"}
_ZERO2 = _ZERO1 | {"grads": "full"}
_LINE = {"pipeline": 2}
_HALF = {"params": "partial", "grads": "partial", "states": "partial", "shard_size": 2}
CASES = (
    Case("data 2, replicas", 2, REPLICA, like="one", small=True),
    Case("data 2, states sharded", 2, _ZERO1, like="one"),
    Case("data 2, gradients and states sharded", 2, _ZERO2, like="one", small=True),
    Case("data 2, all sharded", 2, {}, like="one", small=True),
    Case("data 2, all sharded, gradients once a step", 2, {"grads": "replica"}, accumulate=2),
    Case("tensor 2", 2, {"tensor": 2}, like="itself", small=True),
    Case("sequence 2, Ulysses", 2, {"sequence": 2}, small=True),
    Case("sequence 2, ring", 2, {"sequence": 2, "attention": "ring"}, like="itself", small=True),
    Case("experts 2", 2, {"expert": 2}, EXPERTS, like="itself", small=True),
    Case("pipeline 2, GPipe", 2, _LINE | {"schedule": "gpipe"}, DEEP, 4, "one"),
    Case("pipeline 2, 1F1B", 2, _LINE, DEEP, 4, "one", small=True),
    Case("pipeline 2, interleaved", 2, _LINE | {"schedule": "interleaved"}, DEEP, 4, "one", small=True),
    Case("pipeline 2, zero-bubble", 2, _LINE | {"schedule": "zero-bubble"} | REPLICA, DEEP, 4, "one", small=True),
    Case("data 3, replicas", 3, REPLICA),
    Case("data 3, all sharded, two micro-batches", 3, {}, accumulate=2),
    Case("data 4, all sharded", 4, {}, THIN, small=True),
    Case("data 4, sharded in twos", 4, _HALF, THIN, like="itself", small=True),
    Case("data 4, sharded in twos, states in fours", 4, _HALF | {"states": "full"}, THIN),
    Case("data 4, states sharded in twos", 4, REPLICA | {"states": "partial", "shard_size": 2}, THIN),
    Case("data 4, gradients in twos, states in fours", 4, _ZERO1 | {"grads": "partial", "shard_size": 2}, THIN, 2),
    Case("tensor 4", 4, {"tensor": 4}, THIN),
    Case("tensor 2, data 2, all sharded", 4, {"tensor": 2}, THIN, small=True),
    Case("tensor 2, data 2, states sharded", 4, {"tensor": 2} | _ZERO1, THIN, 2),
    Case("sequence 4, ring", 4, {"sequence": 4, "attention": "ring"}, THIN),
    Case("sequence 2, data 2, Ulysses", 4, {"sequence": 2}, THIN),
    Case("tensor 2, sequence 2, Ulysses", 4, {"tensor": 2, "sequence": 2}, THIN, small=True),
    Case("tensor 2, sequence 2, ring", 4, {"tensor": 2, "sequence": 2, "attention": "ring"} | _ZERO2, THIN),
    Case("experts 4", 4, {"expert": 4}, SPARSE),
    Case("experts 2, data 2, all sharded", 4, {"expert": 2}, SPARSE, small=True),
    Case("experts 2, tensor 2", 4, {"expert": 2, "tensor": 2}, SPARSE),
    Case("pipeline 4, 1F1B", 4, {"pipeline": 4}, DEEP, 2, "one"),
    Case("pipeline 2, data 2, all sharded", 4, _LINE, DENSE, 2),
    Case("pipeline 2, tensor 2", 4, _LINE | {"tensor": 2}, DENSE, 2, small=True),
    Case("pipeline 2, sequence 2, ring", 4, _LINE | {"sequence": 2, "attention": "ring"} | _ZERO1, DENSE, 2),
)


@dataclass(frozen=True)
class Row:
    """What was found of a case: largest differences against one process; `bits`: losses and weights that are not equal
    bit for bit to those of `like`, -1 where nothing is promised."""

    case: Case
    float64: float
    first: float
    float32: float
    weights: float
    norms: float
    bits: int

    @property
    def holds(self) -> bool:
        close = max(self.float64, self.weights, self.norms) <= LIMITS["float64"]
        return close and self.first <= LIMITS["float32 first"] and self.float32 <= LIMITS["float32"] and self.bits <= 0


# what is trained ----------------------------------------------------------------------------------------------------


@cache
def documents(step: int, *, tokens: int = 96) -> list[Doc]:
    """The documents of one global step: unequal lengths, a quarter of the tokens not learned."""
    rng, room = random.Random(step), tokens
    found: list[Doc] = []
    while room > 1:
        count = min(rng.randint(2, 20), room)
        learned = [rng.random() < 0.75 for _ in range(count - 1)] + [True]
        found.append(([rng.randrange(64) for _ in range(count)], learned))
        room -= count
    return found


def batches(case: Case, layout: Layout, step: int) -> list[Batch]:
    """This process's micro-batches. Those of one process are the shares that two processes would take."""
    docs, size = documents(step), layout.reader.size
    if case.world == 1:
        return [pack_documents(docs[i :: case.accumulate]) for i in range(case.accumulate)]
    own = docs[layout.reader.rank :: size]
    return [pack_documents(own[i :: case.accumulate]) for i in range(case.accumulate)]


def make_model(case: Case, dtype: torch.dtype) -> CausalLM:
    """The model of a case, at its first weights."""
    model = CausalLM(case.shape)
    init_weights(model, seed=0, std=0.1)
    return model.to(dtype).train()


def start(case: Case, dtype: torch.dtype) -> Layout:
    """The layout of a case, with its optimizer."""
    torch.manual_seed(0)
    layout = make_layout(LayoutConfig(**case.layout), make_model(case, dtype), lm_loss, device=torch.device("cpu"))
    layout.make_optimizer(optimizer(dtype))
    return layout


def optimizer(dtype: torch.dtype) -> OptimConfig:
    """AdamW, clipped where equality bit for bit is not asked for: a norm of shards is another sum."""
    return OptimConfig(lr=3e-3, warmup=5, clip=0.5 if dtype == torch.float64 else 0.0)


def advance(case: Case, layout: Layout, steps: range) -> list[list[float]]:
    """Some steps as the Trainer makes them; of each the loss and, where gradients are clipped, their norm and those of
    parts."""
    rows, config = [], optimizer(next(layout.model.parameters()).dtype)
    for step in steps:
        sums = layout.backward(batches(case, layout, step))
        loss, weight = parallel.agree([sums["loss"], sums["weight"]], torch.device("cpu"))
        norms = [layout.norm(), *layout.part_norms().values()] if config.clip else []
        rows.append([loss / weight, *norms])
        factor = optim.clip_factor(norms[0] / weight, clip=config.clip) if norms else 1.0
        layout.update(factor / weight, rate=config.rate(step, 50))
    return rows


# processes ----------------------------------------------------------------------------------------------------------


def spawn(world: int, work: Callable[..., None], *arguments: Any, seconds: float = 600) -> None:
    """Run `work(*arguments)` in `world` new processes, joined as one group; TrainingError where one fails.

    They come from a server that has imported this module and has computed nothing, so that one import serves all.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # the first optimizer imports dynamo
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_joined, args=(rank, world, store, work, arguments)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        until = time.monotonic() + seconds
        while any(process.is_alive() for process in processes) and time.monotonic() < until:
            if any(process.exitcode for process in processes):
                break
            time.sleep(0.05)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    if any(code != 0 for code in codes):
        raise TrainingError(f"processes ended with {codes} (None: killed by the others, or out of time)")


def _joined(rank: int, world: int, store: str, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=patience)
    work(*arguments)
    dist.destroy_process_group()


def run_cases(cases: Sequence[Case], steps: int, folder: Path) -> None:
    """Run some cases of one world here; rank 0 writes what it finds."""
    for case in cases:
        for dtype in (torch.float64, torch.float32):
            for again in range(1 + (dtype == torch.float32 and case.like == "itself")):
                layout = start(case, dtype)
                rows, weights = advance(case, layout, range(steps)), gather_whole(layout.pieces())
                if weights:
                    path = folder / f"{case.name}, {dtype}, {again}.safetensors"
                    save_file(weights, path)
                    write_json(path.with_suffix(".json"), rows)


def certify(cases: Sequence[Case] = CASES, *, steps: int = 50) -> Iterator[Row]:
    """Run the cases, world by world; one row each, in their order within a world."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as beside:
        folder = Path(name)
        alone = [_one(case, shares=shares) for case in cases for shares in {False, case.like == "one"}]
        reference = beside.submit(spawn, 1, run_cases, [*{case.name: case for case in alone}.values()], steps, folder)
        for world in sorted({case.world for case in cases}):
            mine = [case for case in cases if case.world == world]
            if world > 3:
                reference.result()  # no more than four processes work at a time
            spawn(world, run_cases, mine, steps, folder)
            reference.result()
            yield from (_row(case, folder) for case in mine)


def _one(case: Case, *, shares: bool) -> Case:
    """One process with the model of a case: all in one micro-batch, or in the shares of all processes in turn."""
    data = Mesh(LayoutConfig(**case.layout), World(0, case.world)).data
    count = case.accumulate * data if shares else 1
    model = next(name for name, shape in SHAPES.items() if shape == case.shape)
    return Case(f"one, {model}, {count}", 1, shape=case.shape, accumulate=count)


def _row(case: Case, folder: Path) -> Row:
    def found(case: Case, dtype: torch.dtype, again: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        path = folder / f"{case.name}, {dtype}, {again}.safetensors"
        numbers = torch.tensor(read_json(path.with_suffix(".json")), dtype=torch.float64)
        return numbers[:, 0], numbers[:, 1:], load_file(path)

    (a64, g64, w64), (b64, h64, v64) = (found(which, torch.float64) for which in (case, _one(case, shares=False)))
    (a32, _, w32), (b32, _, _) = (found(which, torch.float32) for which in (case, _one(case, shares=False)))
    shares, bits = (a32 - b32) / b32, -1
    if case.like:
        again = case.like == "itself"
        losses, _, weights = found(case if again else _one(case, shares=True), torch.float32, int(again))
        bits = int((a32 != losses).sum())
        bits += sum(not torch.equal(w32[name], weights[name]) for name in weights)
    apart = max(_largest(w64[name] - v64[name]) for name in v64)
    norms = _largest((g64 - h64) / h64)
    return Row(case, _largest(a64 - b64), _largest(shares[:1]), _largest(shares), apart, norms, bits)


def _largest(differences: Tensor) -> float:
    """The largest magnitude; infinite where a number is not finite, which `max` would not see."""
    return float(differences.abs().max()) if bool(differences.isfinite().all()) else math.inf
