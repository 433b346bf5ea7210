"""A model, its objective and its optimizer on the processes of a mesh: what the Trainer asks, whatever the layout.

Sums that `backward` and `forward` return are this process's share: added over all processes they are the global sums,
so a process that computes what a peer computes too returns zeros. One process is the mesh of size one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puyu.data.packing import Batch
from puyu.dist import World, current_world
from puyu.errors import ConfigError
from puyu.model.heads import CausalLM, ScalarModel
from puyu.train import optim, parallel
from puyu.train.layouts import place, sequence
from puyu.train.layouts.comm import Lane
from puyu.train.layouts.config import LayoutConfig
from puyu.train.layouts.mesh import Mesh
from puyu.train.layouts.shares import Cut, Share
from puyu.train.muon import parts_of
from puyu.train.objectives import LossOutput, Objective, Step
from puyu.train.optim import OptimConfig
from puyu.train.pieces import Piece

Sums = dict[str, float]
"""`loss`, `weight`, then the objective's metrics."""

Totals = dict[str, Tensor]
"""The same while micro-batches are computed, in float64, still on the device: nothing waits for them."""


class Blank(NamedTuple):
    """What a model on the meta device becomes: where it will lie, and the value of each whole parameter.

    So no process ever holds more than its part of the model and one whole parameter.
    """

    device: torch.device
    value: Callable[[str, tuple[int, ...]], Tensor]


class Layout:
    """A model, its objective and its optimizer, placed. Every process calls the same methods in the same order."""

    def __init__(self, config: LayoutConfig, model: nn.Module, objective: Objective, *, device: torch.device) -> None:
        self.config, self.model, self.device = config, model, device
        self.mesh = Mesh.build(config, current_world(), device_type=device.type)
        self.cuts: dict[str, Cut] = {}
        self.shares: list[Share] = []
        self.lane = Lane()
        self._settling: set[str] | None = None
        self.optimizer: torch.optim.Optimizer
        self.step = self.place(objective)

    @property
    def reader(self) -> World:
        """This process among those that read different batches."""
        return self.mesh.reader

    @property
    def counts(self) -> bool:
        """Whether this process counts the tokens that it reads (one of those that read the same does)."""
        return self.mesh.is_first

    @property
    def tells(self) -> bool:
        """Whether the sums of this process are its own, not a copy of a tensor peer's."""
        return self.mesh.tensor_rank == 0

    def place(self, objective: Objective) -> Step:
        """Spread the model, in place; returns what this process computes of a micro-batch."""
        if isinstance(self.model, CausalLM | ScalarModel):
            self.mesh.check_model(self.model.config)
            self.cuts |= place.cut(self.model, self.mesh, objective)
        elif self.mesh.world.size > 1:
            raise ConfigError(f"{type(self.model).__name__} trains in one process", remedy="start it without torchrun")
        step = self.make_step(objective)
        place.shard(step, self.mesh)
        return step

    def allocate(self) -> None:
        """Memory for a model on the meta device, of what this process holds; before the optimizer is made."""
        self.step.to_empty(device=self.device)

    @torch.no_grad()
    def fill(self, blank: Blank) -> None:
        """Give what this process holds its values."""
        name, whole = "", torch.empty(0)
        for piece in self.pieces():
            if piece.name != name:  # slices of one parameter come in a row
                name, whole = piece.name, blank.value(piece.name, piece.shape)
            piece.tensor.copy_(whole[piece.window])

    def make_step(self, objective: Objective) -> Step:
        """Model and objective as one module."""
        return Step(self.model, objective)

    def make_optimizer(self, config: OptimConfig) -> None:
        """Make the optimizer, once, before the first step."""
        place.check_optimizer(self.mesh, config)
        for name, parameter in self.model.named_parameters():
            cut = self.cuts.get(name) or Cut.none(parameter)
            spread = place.spread_of(name, parameter, self.mesh, sliced=name in self.cuts)
            share = Share(name, parameter, cut, spread, whole_matrices=config.kind == "muon")
            if not share.waits and self.mesh.peers * self.mesh.config.tensor > 1 and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, share=share: self._reduce(share))
            self.shares.append(share)
        named = [(s.name, s.update) for s in self.shares if s.update.numel() and s.update.requires_grad]
        if idle := first_of("" if named else f"rank {current_world().rank}"):  # raised everywhere, nobody waits
            raise ConfigError(
                f"{idle} has nothing to train: all that it holds is frozen, or others have all its rows",
                remedy="use fewer stages or processes, or train more of the model",
            )
        parts = parts_of(self.model) if config.muon_split else None
        self.optimizer = optim.make_optimizer(named, config, parts=parts)

    def backward(self, batches: Sequence[Batch], *, scale: float = 1.0) -> Sums:
        """Make the gradients of `scale` times the summed loss over these micro-batches, once an update; nothing is
        divided."""
        totals: Totals = {}
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            self._settling = set() if last else None
            place.synchronize(self.step, self.mesh, last=last)
            output: LossOutput = self.step(self.part(batch))
            torch.autograd.backward(output.loss_sum * scale)
            add_sums(totals, output.sums)
        self.settle()
        return self.told(totals)

    def part(self, batch: Batch) -> Batch:
        """What this process computes of a batch that its sequence and tensor peers read too."""
        if not isinstance(self.model, CausalLM | ScalarModel):
            return batch
        return sequence.part(batch, self.mesh, words=self.model.config.vocab_size)

    def check_micro(self, count: int) -> None:
        """ConfigError where an update cannot be made of that many micro-batches."""

    def _reduce(self, share: Share) -> None:
        """When a gradient of a micro-batch is there: add it up over the processes, while the others are computed."""
        if self._settling is None:
            self.lane.begin(share.reduce_early())
        else:
            self._settling.add(share.name)
            self.lane.begin(share.settle())

    def settle(self) -> None:
        """After the last micro-batch: gradients become sums over all processes."""
        self.lane.finish()  # rows of earlier micro-batches may be on their way
        for share in self.shares:
            if share.name not in (self._settling or ()):
                self.lane.begin(share.settle())
        self.lane.finish()
        self._settling = None

    @torch.no_grad()
    def forward(self, batches: Iterable[Batch]) -> Sums:
        """Sums over some batches, without gradients. Every process must bring the same number of batches."""
        totals: Totals = {}
        for batch in batches:
            add_sums(totals, self.step(self.part(batch.to(self.device))).sums)
        place.forget_whole(self.step)
        return self.told(totals)

    def told(self, totals: Totals) -> Sums:
        """The numbers, for which the device is waited for once; zeros where a tensor peer tells the same."""
        numbers = torch.stack(list(totals.values())).tolist() if totals and self.tells else [0.0] * len(totals)
        return {"loss": 0.0, "weight": 0.0, **dict(zip(totals, numbers, strict=True))}

    def norm(self) -> float:
        """Euclidean norm of the summed gradients, over all processes; each number of each tensor counts once."""
        return float(parallel.agree([squares(self.shares)], self.device)[0] ** 0.5)

    def part_norms(self) -> dict[str, float]:
        """Such norms of the parts of the model (see `optim.part_of`); those without a gradient are left out."""
        found = [squares([s for s in self.shares if optim.part_of(s.name) == part]) for part in optim.PARTS]
        total = parallel.agree(found, self.device)
        return {part: value**0.5 for part, value in zip(optim.PARTS, total, strict=True) if value}

    def bad_gradient(self) -> str:
        """The first parameter whose gradient is not finite, on any process; empty where all are finite."""
        grads = ((share.name, share.update.grad) for share in self.shares)
        bad = (name for name, grad in grads if grad is not None and not bool(local(grad).isfinite().all()))
        return first_of(next(bad, ""))

    def update(self, factor: float, *, rate: float) -> None:
        """Multiply the gradients by `factor`, take the optimizer's step at `rate`, forget the gradients."""
        torch._foreach_mul_([local(s.update.grad) for s in self.shares if s.update.grad is not None], factor)
        optim.set_rate(self.optimizer, rate)
        self.optimizer.step()
        for share in self.shares:
            self.lane.begin(share.publish())
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients, without an update."""
        self.lane.finish()
        for share in self.shares:
            share.drop_gradient()

    def pieces(self) -> Iterator[Piece]:
        """What this process holds of the weights."""
        for share in self.shares:
            yield from share.pieces()

    def trained(self) -> Iterator[Piece]:
        """The same of the weights that train."""
        for share in self.shares:
            if share.parameter.requires_grad:
                yield from share.pieces()

    def moments(self) -> Iterator[Piece]:
        """What it holds of the optimizer's states, named KIND/PARAMETER; states not yet made are made, at zero."""
        optim.allocate(self.optimizer)
        for share in self.shares:
            for kind, value in self.optimizer.state.get(share.update, {}).items():
                yield from share.state_pieces(kind, value)


def add_sums(totals: Totals, found: Mapping[str, Tensor]) -> None:
    """Add sums to those of their names."""
    for name, value in found.items():
        totals[name] = value.detach().double() + totals.get(name, 0.0)


def squares(shares: Sequence[Share]) -> float:
    """Sum of the squares of these gradients, as far as this process counts them."""
    grads = [local(s.update.grad) for s in shares if s.owns_state and s.update.grad is not None]
    norms = torch._foreach_norm(kept) if (kept := [grad for grad in grads if grad.numel()]) else ()
    return float(torch.stack(norms).double().square().sum()) if norms else 0.0


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies here; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def first_of(name: str) -> str:
    """The first text that is not empty, in the order of ranks. Every process must call it."""
    world = current_world()
    if world.size == 1:
        return name
    names = [""] * world.size
    dist.all_gather_object(names, name)
    return next((found for found in names if found), "")
