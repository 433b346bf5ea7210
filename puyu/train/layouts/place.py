"""From a mesh to a placed model: slices first, then FSDP2 or plain replicas, then what each parameter's sums cross.

Slices (tensor), experts and parts of a sequence have modules of their own; here is what they share. Weights that are
sharded are FSDP2's (torch's `fully_shard`; a 2-D mesh shards in groups and replicates over them), with its division of
gradients switched off: gradients are sums everywhere. All else is in shares.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from puyu.errors import ConfigError
from puyu.model.adapted import adapted_layers
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.layers import RMSNorm
from puyu.model.linear import Linear
from puyu.model.moe import Gate
from puyu.train.layouts.config import DEPTH, LayoutConfig
from puyu.train.layouts.experts import SharedExperts, share_experts
from puyu.train.layouts.mesh import Mesh
from puyu.train.layouts.shares import Cut, Spread
from puyu.train.layouts.tensor import GatherLinear, ScatterLinear, slice_model
from puyu.train.objectives import Objective, Step, lm_loss
from puyu.train.optim import OptimConfig

_CASTING = (Linear, GatherLinear, ScatterLinear, RMSNorm, Gate)
"""Modules that use their weights in the dtype of what comes in, and whose gradients are made in it."""


def cut(model: CausalLM | ScalarModel, mesh: Mesh, objective: Objective) -> dict[str, Cut]:
    """Leave only this process's slices in the model; returns them by name of parameter."""
    config = mesh.config
    for name in ("tensor", "sequence"):
        if getattr(config, name) > 1 and (objective is not lm_loss or not isinstance(model, CausalLM)):
            raise ConfigError(
                f"layout.{name} works with the language-model loss only, not with {_name(objective)}",
                remedy=f"set layout.{name}=1: data-parallel processes take any objective",
            )
    check_adapters(model, config)
    cuts = {}
    if config.tensor > 1 and isinstance(model, CausalLM):
        cuts = slice_model(model, mesh.dim("tensor"))
    if config.expert > 1:
        share_experts(model, mesh.dim("expert"))
    return cuts


def check_adapters(model: nn.Module, config: LayoutConfig) -> None:
    """ConfigError where a layout does not know adapters."""
    layers = [name for name, _ in adapted_layers(model)]
    in_experts = any(".experts." in name for name in layers)
    for name, known in (("tensor", not layers), ("pipeline", not layers), ("expert", not in_experts)):
        if getattr(config, name) > 1 and not known:
            raise ConfigError(
                f"layout.{name}={getattr(config, name)} does not work with adapters",
                remedy=f"set layout.{name}=1: data-parallel processes share a frozen base, too (layout.params)",
            )


def _name(objective: Objective) -> str:
    function = getattr(objective, "func", objective)  # of a partial
    return getattr(function, "__qualname__", type(function).__name__).partition(".<")[0].lstrip("_")


def shard(step: Step, mesh: Mesh) -> None:
    """FSDP2, block by block, over the processes that hold the same slices; nothing where weights are replicas."""
    if mesh.config.params == "replica" or mesh.peers == 1:
        return
    names = ("replicate", "shard") if mesh.replicate > 1 else ("shard",)
    whole = mesh.submesh(*names)
    trunk = step.model.trunk
    assert isinstance(trunk, nn.Module) and isinstance(trunk.layers, nn.ModuleList)
    alone: set[nn.Parameter] = set()
    for experts in (module for module in step.modules() if isinstance(module, SharedExperts)):
        if mesh.holders > 1:
            fully_shard(experts, mesh=mesh.submesh("holders"))
        alone |= set(experts.parameters())
    held = [block for block in trunk.layers if next(block.parameters(), None) is not None]  # of this stage
    for block in held:
        fully_shard(block, mesh=whole, ignored_params=alone, mp_policy=_precision(block, trunk.compute_dtype))
    fully_shard(step, mesh=whole, ignored_params=alone)  # rows of the embedding are added up in its own dtype
    for module in _sharded(step):
        # Sums, not means. The order matters: without forced sums a factor becomes an operation that gloo lacks.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def _precision(block: nn.Module, compute: object) -> MixedPrecisionPolicy:
    """Weights travel in the dtype of the products, where every module casts them to it anyway; gradients do not."""
    own, masters = MixedPrecisionPolicy(cast_forward_inputs=False), next(block.parameters()).dtype
    holders = [module for module in block.modules() if next(module.parameters(recurse=False), None) is not None]
    plain = all(type(x) in _CASTING and "forward" not in vars(x) for x in holders)  # not those that float8 replaces
    if not isinstance(compute, torch.dtype) or compute == masters or not plain:
        return own
    return replace(own, param_dtype=compute, reduce_dtype=masters)


def synchronize(step: Step, mesh: Mesh, *, last: bool) -> None:
    """Before a micro-batch: say what FSDP2 may put off until the last one."""
    if isinstance(step, FSDPModule):
        step.set_requires_gradient_sync(last or mesh.config.grads != "replica")
        step.set_requires_all_reduce(last)
        step.set_is_last_backward(last)


def forget_whole(step: Step) -> None:
    """After passes without gradients: give back the whole weights that FSDP2 keeps, which a later write to the shards
    would not reach."""
    for module in _sharded(step):
        module.reshard()


def _sharded(step: Step) -> list[FSDPModule]:
    return [module for module in step.modules() if isinstance(module, FSDPModule)]


def spread_of(name: str, parameter: torch.Tensor, mesh: Mesh, *, sliced: bool) -> Spread:
    """Which dimensions a parameter's gradient and states cross."""
    config = mesh.config
    tensor = None if sliced else mesh.group("tensor")
    speaks = sliced or mesh.tensor_rank == 0
    if config.expert > 1 and ".mlp.experts." in name:
        holders = () if isinstance(parameter, DTensor) else (mesh.dim("holders"),)
        rows, early = (min(DEPTH[extent], len(holders)) for extent in (config.states, config.grads))
        return Spread(holders, rows=rows, early=early, tensor=tensor, speaks=speaks)
    shards, replicas = mesh.dim("shard"), mesh.dim("replicate")
    if config.params != "replica" and mesh.peers > 1:
        return Spread(copies=(replicas,), rows=int(config.states != config.params), tensor=tensor, speaks=speaks)
    rows, early = DEPTH[config.states], DEPTH[config.grads]
    return Spread((shards, replicas), rows=rows, early=early, tensor=tensor, speaks=speaks)


def check_optimizer(mesh: Mesh, config: OptimConfig) -> None:
    """ConfigError where an optimizer cannot work on what lies on a process."""
    if config.kind == "adamw8" and mesh.config.tensor > 1:
        raise ConfigError(
            "optim.kind=adamw8 has a scale for every 256 columns, layout.tensor cuts between them",
            remedy="use adamw, or layout.tensor=1",
        )
    if config.kind != "muon":
        return
    if mesh.config.tensor > 1:
        raise ConfigError(
            "optim.kind=muon needs whole matrices, layout.tensor slices them", remedy="use adamw, or layout.tensor=1"
        )
    if mesh.peers > 1 and mesh.config.params != mesh.config.states:
        raise ConfigError(
            f"optim.kind=muon needs whole matrices, layout.states={mesh.config.states} divides their rows",
            remedy="set layout.params and layout.states alike",
        )
