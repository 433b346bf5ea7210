"""The same step over several processes: FSDP2 shards parameters, gradients and optimizer state; world 1 is plain.

Every process builds the same full model (initial weights depend on names only), then keeps its shard. Whole tensors
are gathered for checkpoints, so a checkpoint fits any world. Source: Zhao et al. 2023 (FSDP); torch's `fully_shard`.

    torchrun --nproc-per-node 2 -m puyu pretrain ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from puyu.dist import World, world
from puyu.train.objectives import Step


def current_world() -> World:
    """This process among its peers."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Be part of the group of processes; a group that a caller has joined is used, and left to the caller."""
    if dist.is_available() and dist.is_initialized():
        yield current_world()
        return
    with world(device) as found:
        yield found


def shard(step: Step, device: torch.device) -> None:
    """Shard the step's model over all processes, block by block; nothing in one process."""
    if current_world().size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # An explicit mesh: with a visible GPU and a gloo group, the default would pick the GPU.
    mesh = init_device_mesh(device.type, (current_world().size,))
    trunk = step.model.trunk
    assert isinstance(trunk, nn.Module) and isinstance(trunk.layers, nn.ModuleList)
    for block in trunk.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(step, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU; a collective when it is sharded, so every rank must call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def like(full: Tensor, other: Tensor) -> Tensor:
    """`full` placed as `other` is: its device, dtype and shards."""
    full = full.to(device=other.device, dtype=other.dtype)
    if isinstance(other, DTensor):
        return distribute_tensor(full, other.device_mesh, other.placements, src_data_rank=None)
    return full


def whole_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and full parameters, one at a time; every rank must walk it."""
    for name, parameter in model.named_parameters():
        yield name, whole(parameter)


def agree(values: list[float], device: torch.device) -> list[float]:
    """Sums over all ranks, in float64."""
    if current_world().size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()
