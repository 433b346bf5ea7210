"""FSDP2: each process holds a share of weights, gradients and optimizer states, and gathers a block when it needs it.

Source: Zhao et al. 2023 (FSDP); torch's `fully_shard`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from puyu.dist import World, current_world
from puyu.train.layouts.base import Layout
from puyu.train.pieces import Piece, plain_piece, sharded_piece


class ShardedLayout(Layout):
    """Data parallel with everything sharded over all processes."""

    @property
    def reader(self) -> World:
        return current_world()

    def place(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # An explicit mesh: with a visible GPU and a gloo group, the default would pick the GPU.
        mesh = init_device_mesh(self.device.type, (current_world().size,))
        trunk = self.model.trunk
        assert isinstance(trunk, nn.Module) and isinstance(trunk.layers, nn.ModuleList)
        for block in trunk.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.step, mesh=mesh)

    def propagate(self, loss: Tensor) -> None:
        # FSDP averages gradients over ranks; times the world size, that is the sum.
        torch.autograd.backward(loss * current_world().size)

    def piece(self, name: str, tensor: Tensor) -> Piece:
        if isinstance(tensor, DTensor):
            return sharded_piece(name, tensor)
        return plain_piece(name, tensor, owner=current_world().is_main)
