"""One process; and what the Trainer asks of every layout.

Sums that `backward` and `forward` return are this process's share: added over all processes they are the global sums,
so a process that computes what a peer computes too returns zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puyu.data.packing import Batch
from puyu.dist import World, current_world
from puyu.train import optim, parallel
from puyu.train.layouts.config import LayoutConfig
from puyu.train.objectives import LossOutput, Objective, Step
from puyu.train.optim import OptimConfig
from puyu.train.pieces import Piece, plain_piece

Sums = dict[str, float]
"""`loss`, `weight`, then the objective's metrics."""


class Layout:
    """A model, its objective and its optimizer, placed. Every process calls the same methods in the same order."""

    def __init__(self, config: LayoutConfig, model: nn.Module, objective: Objective, *, device: torch.device) -> None:
        self.config, self.model, self.device = config, model, device
        self.step = Step(model, objective)
        self.optimizer: torch.optim.Optimizer
        self.place()

    @property
    def reader(self) -> World:
        """This process among those that read different batches."""
        return World()

    @property
    def counts(self) -> bool:
        """Whether this process counts the tokens that it reads (one of those that read the same does)."""
        return True

    def place(self) -> None:
        """Spread the model, in place."""

    def make_optimizer(self, config: OptimConfig) -> None:
        """Make the optimizer, once, before the first step."""
        self.optimizer = optim.make_optimizer(self.model, config)

    def backward(self, batches: Sequence[Batch], *, scale: float = 1.0) -> Sums:
        """Add the gradients of `scale` times the summed loss over these micro-batches; nothing is divided."""
        sums: Sums = {"loss": 0.0, "weight": 0.0}
        for batch in batches:
            output: LossOutput = self.step(batch)
            self.propagate(output.loss_sum * scale)
            add_sums(sums, output)
        return sums

    def propagate(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, whose sum over processes is that of the loss."""
        torch.autograd.backward(loss)

    @torch.no_grad()
    def forward(self, batches: Iterable[Batch]) -> Sums:
        """Sums over some batches, without gradients. Every process must bring the same number of batches."""
        sums: Sums = {"loss": 0.0, "weight": 0.0}
        for batch in batches:
            add_sums(sums, self.step(batch.to(self.device)))
        return sums

    def norm(self) -> float:
        """Euclidean norm of the summed gradients, over all processes."""
        return optim.global_norm(optim.gradients(self.model))

    def part_norms(self) -> dict[str, float]:
        """Such norms of the parts of the model (see `optim.part_of`); those without a gradient are left out."""
        found: dict[str, tuple[Tensor, ...]] = dict.fromkeys(optim.PARTS, ())
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and (piece := self.piece(name, parameter.grad)).owner:
                part = optim.part_of(name)
                found[part] = (*found[part], piece.tensor)
        found = {part: torch._foreach_norm(grads) if grads else () for part, grads in found.items()}
        squares = [float(torch.stack(norms).double().square().sum()) if norms else 0.0 for norms in found.values()]
        total = parallel.agree(squares, self.device)
        return {part: value**0.5 for part, value in zip(found, total, strict=True) if value}

    def bad_gradient(self) -> str:
        """The first parameter whose gradient is not finite, on any process; empty where all are finite."""
        found = ""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not bool(local(parameter.grad).isfinite().all()):
                found = name
                break
        return first_of(found)

    def update(self, factor: float, *, rate: float) -> None:
        """Multiply the gradients by `factor`, take the optimizer's step at `rate`, forget the gradients."""
        torch._foreach_mul_(optim.gradients(self.model), factor)
        optim.set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients, without an update."""
        self.optimizer.zero_grad(set_to_none=True)

    def pieces(self) -> Iterator[Piece]:
        """What this process holds of the weights."""
        for name, parameter in self.model.named_parameters():
            yield self.piece(name, parameter)

    def moments(self) -> Iterator[Piece]:
        """What it holds of the optimizer's states, named KIND/PARAMETER; states not yet made are made, at zero."""
        optim.allocate(self.optimizer)
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                yield self.piece(f"{kind}/{name}", value)

    def piece(self, name: str, tensor: Tensor) -> Piece:
        """What this process holds of one tensor."""
        return plain_piece(name, tensor)


def add_sums(sums: Sums, output: LossOutput) -> None:
    """Add what an objective returned."""
    found = {"loss": output.loss_sum, "weight": output.weight_sum, **output.metrics}
    for name, value in found.items():
        sums[name] = sums.get(name, 0.0) + float(value.detach())


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
