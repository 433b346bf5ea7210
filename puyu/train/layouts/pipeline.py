"""Pipeline parallel: each process holds some layers, and micro-batches pass through the processes in turn.

The order comes from `schedules.py`, the parts of the model from `stages.py`; here hidden states and their gradients
travel between processes, point to point, as asynchronous groups in the common order of the program, which no back end
can turn into a circle of waiting processes. Every stage draws the same batches, so that the sizes are known and only
[T, D] tensors travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from puyu.data.packing import Batch
from puyu.errors import ConfigError
from puyu.model.heads import CausalLM
from puyu.train.layouts import place
from puyu.train.layouts.base import Layout, Sums, Totals, add_sums, local
from puyu.train.layouts.schedules import Action, Program, Schedule, Transfer, plan, programs
from puyu.train.layouts.shares import Share
from puyu.train.layouts.stages import LateWeights, Product, Stage, add_products, costs, cut
from puyu.train.objectives import LossOutput, Objective, Step, lm_loss, source_names, trunk_inputs
from puyu.train.optim import OptimConfig

_SENDING = 2
"""Messages that may be on their way before the sender waits; their tensors are held as long."""


@lru_cache(maxsize=16)
def _programs(kind: Schedule, stages: int, micro: int, virtual: int) -> tuple[Program, ...]:
    return programs(plan(kind, stages, micro, virtual))


class Line:
    """Messages of this process to the other stages of its pipeline, and from them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self._ready: dict[Action, Tensor] = {}
        self._coming: dict[Action, tuple[Tensor, dist.Work]] = {}
        self._sending: deque[tuple[Tensor, dist.Work]] = deque()

    def post(self, feeds: Action, tensor: Tensor) -> None:
        """Keep what an action of another process waits for, until its group is begun."""
        self._ready[feeds] = tensor.contiguous()

    def begin(self, group: Sequence[Transfer], rooms: Sequence[Tensor]) -> None:
        """Send and receive, without waiting. `rooms`: an empty tensor for each transfer that comes here."""
        free, ops = iter(rooms), []
        for transfer in group:
            sends = transfer.source == self.rank
            tensor = self._ready.pop(transfer.feeds) if sends else next(free)
            way, peer = (dist.isend, transfer.target) if sends else (dist.irecv, transfer.source)
            ops.append(dist.P2POp(way, tensor, group=self.group, group_peer=peer))
        works = dist.batch_isend_irecv(ops)
        for number, (transfer, op) in enumerate(zip(group, ops, strict=True)):
            work = works[number % len(works)]  # NCCL has one for the whole group
            if transfer.source == self.rank:
                self._sending.append((op.tensor, work))
            else:
                self._coming[transfer.feeds] = op.tensor, work
        self.settle(_SENDING)

    def take(self, action: Action) -> Tensor:
        """What an action waits for, when it has come."""
        tensor, work = self._coming.pop(action)
        work.wait()
        return tensor

    def swap(self, mine: Tensor, *, peer: int) -> Tensor:
        """Exchange tensors of one shape with another stage."""
        mine, theirs = mine.contiguous(), torch.empty_like(mine, memory_format=torch.contiguous_format)
        ways = ((dist.isend, mine), (dist.irecv, theirs))
        for work in dist.batch_isend_irecv([dist.P2POp(way, x, group=self.group, group_peer=peer) for way, x in ways]):
            work.wait()
        return theirs

    def settle(self, most: int = 0) -> None:
        """Wait until at most that many messages are on their way from here."""
        while len(self._sending) > most:
            self._sending.popleft()[1].wait()


class Run:
    """Some micro-batches on their way through this process's chunks."""

    def __init__(self, stage: Stage, line: Line, batches: Sequence[Batch], *, scale: float = 1.0) -> None:
        self.stage, self.line, self.batches, self.scale = stage, line, batches, scale
        self.inputs = [trunk_inputs(batch) for batch in batches]
        self.late: LateWeights | None = None
        names = ("loss", "weight", *(name for batch in batches for name in source_names(batch)))
        self.totals: Totals = dict.fromkeys(names, batches[0].weights_T.new_zeros((), dtype=torch.float64))
        """All stages have the same names, the last one has the numbers."""
        self._graphs: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self._products: dict[tuple[int, int], list[Product]] = {}

    def begin(self, group: Sequence[Transfer]) -> None:
        """Begin to send and to receive."""
        coming = [transfer.feeds.micro for transfer in group if transfer.target == self.line.rank]
        self.line.begin(group, [self.stage.room(self.inputs[micro]) for micro in coming])

    def forward(self, action: Action) -> None:
        """Pass a micro-batch through a chunk."""
        _, chunk, micro = action
        x_TD = self.line.take(action).requires_grad_(torch.is_grad_enabled()) if chunk else None
        output = self.stage(chunk, self.batches[micro], self.inputs[micro], x_TD)
        if isinstance(output, LossOutput):
            add_sums(self.totals, output.sums)
            output = output.loss_sum * self.scale
        else:
            self.line.post(Action("F", chunk + 1, micro), output.detach())
        if torch.is_grad_enabled():
            self._graphs[chunk, micro] = x_TD, output

    def backward(self, action: Action) -> None:
        """Gradients of what the chunk read, and of its weights, unless those come later."""
        _, chunk, micro = action
        x_TD, output = self._graphs.pop((chunk, micro))
        grad = self.line.take(action) if chunk < self.stage.last else None
        if output.requires_grad:  # all of a first chunk may be frozen
            torch.autograd.backward(output, grad)
        if x_TD is not None:
            assert x_TD.grad is not None
            self.line.post(Action("B", chunk - 1, micro), x_TD.grad)
        if self.late:
            self._products[chunk, micro] = self.late.take()

    def weights(self, action: Action) -> None:
        """Gradients of the weights that `backward` has left."""
        add_products(self._products.pop((action.chunk, action.micro)))


class PipelineLayout(Layout):
    """The layers, shared by the processes of a pipeline; every stage is spread as `Layout` spreads a model."""

    step: Stage

    def make_step(self, objective: Objective) -> Step:
        config, model, group = self.config, self.model, self.mesh.group("pipeline")
        if objective is not lm_loss or not isinstance(model, CausalLM):
            raise ConfigError(
                f"layout.pipeline={config.pipeline}: only a language model's own loss can be computed in stages",
                remedy="set layout.pipeline=1 for rewards and preferences",
            )
        if config.schedule == "zero-bubble" and config.params != "replica" and self.mesh.peers > 1:
            raise ConfigError(
                "layout.schedule zero-bubble with sharded weights: they are not there when their gradients come",
                remedy="set layout.params=replica, or the schedule 1f1b",
            )
        assert group is not None
        dist.all_reduce(torch.zeros((), device=self.device), group=group)  # NCCL: all must meet before pairs do
        self.line = Line(group)
        self.tied = model.head is None and self.line.rank in (0, config.pipeline - 1)
        cuts = cut(costs(model, slices=config.tensor), parts=config.chunks)
        return Stage(model, cuts, rank=self.line.rank, stages=config.pipeline, slices=config.tensor)

    def make_optimizer(self, config: OptimConfig) -> None:
        super().make_optimizer(config)
        if self.tied and self.line.rank:  # the first stage speaks for the embedding that both have
            share = self._embedding
            share.spread = replace(share.spread, speaks=False)

    def check_micro(self, count: int) -> None:
        _programs(self.config.schedule, self.config.pipeline, count, self.config.virtual)

    @property
    def _embedding(self) -> Share:
        return next(share for share in self.shares if share.name == "trunk.embedding.weight")

    def backward(self, batches: Sequence[Batch], *, scale: float = 1.0) -> Sums:
        config, count = self.config, len(batches)
        run = Run(self.step, self.line, [self.part(batch) for batch in batches], scale=scale)
        run.late = LateWeights() if config.schedule == "zero-bubble" else None
        with run.late.installed(self.step) if run.late else nullcontext():
            for item in _programs(config.schedule, config.pipeline, count, config.virtual)[self.line.rank]:
                if not isinstance(item, Action):
                    run.begin(item)
                elif item.kind == "F":
                    run.forward(item)
                elif item.kind == "B":
                    # With several chunks FSDP2 cannot tell which of them a last backward pass is for.
                    several = config.chunks > config.pipeline
                    place.synchronize(self.step, self.mesh, last=several or item.micro == count - 1)
                    run.backward(item)
                else:
                    run.weights(item)
                    for share in self.shares:
                        self.lane.begin(share.reduce_early())
        self.line.settle()
        self.settle()
        return self.told(run.totals)

    def settle(self) -> None:
        super().settle()
        if self.tied and (grad := self._embedding.update.grad) is not None:
            grad = local(grad)  # the embedding is the head, too: the gradients of both are added up, on both
            grad.add_(self.line.swap(grad, peer=self.config.pipeline - 1 - self.line.rank))

    @torch.no_grad()
    def forward(self, batches: Iterable[Batch]) -> Sums:
        totals: Totals = {}
        for batch in batches:
            add_sums(totals, self._evaluate(self.part(batch.to(self.device))))
        self.line.settle()
        place.forget_whole(self.step)
        return self.told(totals)

    def _evaluate(self, batch: Batch) -> Totals:
        """Sums over one batch; in the end its messages to other stages are still on their way."""
        run, rank, stages = Run(self.step, self.line, [batch]), self.line.rank, self.config.pipeline
        for chunk in self.step.mine:
            action = Action("F", chunk, 0)
            if chunk:
                run.begin([Transfer(action, (chunk - 1) % stages, rank)])
            run.forward(action)
            if chunk < self.step.last:
                run.begin([Transfer(Action("F", chunk + 1, 0), rank, (chunk + 1) % stages)])
        return run.totals
