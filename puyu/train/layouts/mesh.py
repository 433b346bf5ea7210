"""Where a process stands among the others: one mesh for all parallel dimensions, and which combinations are legal.

Ranks count, from the outermost dimension to the innermost: pipeline, data, sequence, tensor; so the processes that talk
most are neighbors. Weights see data and sequence as one dimension, `peers` (all that hold the same layers and slices),
and cut it again: into replicas of shards, or into holders of the same experts.

    mesh = Mesh.build(LayoutConfig(tensor=2), World(3, 8), device_type="cpu")
    mesh.reader, mesh.tensor_rank, mesh.group("tensor")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from puyu.dist import World
from puyu.errors import ConfigError
from puyu.model.config import ModelConfig
from puyu.train.layouts.comm import row_range, size_of
from puyu.train.layouts.config import DEPTH, LayoutConfig
from puyu.train.layouts.shares import Dim

View = tuple[tuple[str, int], ...]
"""Names and sizes of dimensions whose product is the world."""


@dataclass(frozen=True)
class Mesh:
    """Sizes, coordinates and process groups. Every process of the world must build it (groups are made together)."""

    config: LayoutConfig
    world: World
    views: tuple[DeviceMesh, ...] = field(default=(), repr=False)
    _groups: dict[str, dist.ProcessGroup | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def build(config: LayoutConfig, world: World, *, device_type: str) -> Mesh:
        """The mesh of this world; ConfigError where sizes or extents do not fit."""
        mesh = Mesh(config, world)
        mesh.check()
        if world.size == 1:
            return mesh
        if "cpu" not in dist.get_backend_config():
            raise ConfigError(
                "the process group moves nothing between CPUs, which saving and sampling need",
                remedy='join it with the backend "cpu:gloo,cuda:nccl"',
            )
        # An explicit device type: with a visible GPU and a gloo group, the default would pick the GPU.
        views = tuple(_device_mesh(view, device_type, dist.group.WORLD) for view in mesh.shapes())
        return Mesh(config, world, views)

    # sizes ----------------------------------------------------------------------------------------------------------

    @property
    def peers(self) -> int:
        """Processes that hold the same layers and slices: data x sequence."""
        return self.world.size // (self.config.pipeline * self.config.tensor)

    @property
    def data(self) -> int:
        """Processes that read different batches."""
        return self.peers // self.config.sequence

    @property
    def shard(self) -> int:
        """Processes of an innermost sharding group."""
        return self.config.shard_size if self.partial else self.peers

    @property
    def replicate(self) -> int:
        """Sharding groups among the peers."""
        return self.peers // self.shard

    @property
    def holders(self) -> int:
        """Processes that hold the same experts."""
        return self.peers // self.config.expert

    @property
    def partial(self) -> bool:
        """Whether anything is sharded in groups of `shard_size`."""
        config = self.config
        return "partial" in (config.params, config.grads, config.states)

    def shapes(self) -> tuple[View, ...]:
        """The views of the world that this configuration needs."""
        config = self.config
        outer, inner = ("pipeline", config.pipeline), ("tensor", config.tensor)
        views: list[View] = [(outer, ("replicate", self.replicate), ("shard", self.shard), inner)]
        if config.sequence > 1:
            views.append((outer, ("data", self.data), ("sequence", config.sequence), inner))
        if config.expert > 1:
            views.append((outer, ("holders", self.holders), ("expert", config.expert), inner))
        return tuple(views)

    # coordinates ----------------------------------------------------------------------------------------------------

    @property
    def tensor_rank(self) -> int:
        return self.world.rank % self.config.tensor

    @property
    def peer(self) -> int:
        """Position among the peers; sequence is its inner part."""
        return self.world.rank // self.config.tensor % self.peers

    @property
    def sequence_rank(self) -> int:
        return self.peer % self.config.sequence

    @property
    def expert_rank(self) -> int:
        return self.peer % self.config.expert

    @property
    def pipeline_rank(self) -> int:
        return self.world.rank // (self.config.tensor * self.peers)

    @property
    def reader(self) -> World:
        """This process among those that read different batches; all others read the same as one of them."""
        return World(self.peer // self.config.sequence, self.data)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for those that read, and compute, the same (the first stage, slice, part)."""
        return self.pipeline_rank == self.sequence_rank == self.tensor_rank == 0

    # groups ---------------------------------------------------------------------------------------------------------

    def dim(self, name: str) -> Dim:
        """This process along a dimension."""
        rank = {"shard": self.peer % self.shard, "replicate": self.peer // self.shard, "tensor": self.tensor_rank}
        rank |= {"holders": self.peer // self.config.expert, "expert": self.expert_rank, "sequence": self.sequence_rank}
        group = self.group(name)
        return Dim(rank[name], size_of(group), group)

    def submesh(self, *names: str) -> DeviceMesh:
        """These dimensions of one view, for torch's own wrappers."""
        for view in self.views:
            if set(names) <= set(view.mesh_dim_names or ()):
                return view[names]
        raise AssertionError(f"no view of this mesh has {names}")

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The process group along a dimension that holds this process; None where it would be alone."""
        if name not in self._groups:
            sizes = {key: size for view in self.shapes() for key, size in view}
            self._groups[name] = self.submesh(name).get_group() if sizes.get(name, 1) > 1 else None
        return self._groups[name]

    # legality -------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """ConfigError, naming field and remedy, where sizes do not fit the world or extents make no sense."""
        config, size = self.config, self.world.size
        inner = config.pipeline * config.tensor * config.sequence
        _divides("tensor x sequence x pipeline", inner, "the number of processes", size)
        _divides("expert", config.expert, "data x sequence processes", self.peers)
        if self.partial:
            if config.shard_size < 2:
                raise ConfigError("layout: partial needs shard_size >= 2", remedy="for example layout.shard_size=8")
            _divides("shard_size", config.shard_size, "data x sequence processes", self.peers)
        elif config.shard_size:
            raise ConfigError(
                f"layout.shard_size={config.shard_size} has no use: nothing is partial",
                remedy="set layout.states (and params, grads) to partial, or leave shard_size out",
            )
        if config.expert > 1 and self.partial:
            raise ConfigError(
                "layout.expert with partial sharding is not supported", remedy="use replica or full with experts"
            )
        _check_extents(config)
        _check_used(config)

    def check_model(self, shape: ModelConfig) -> None:
        """ConfigError where a model of this shape cannot be cut so."""
        config = self.config
        if config.tensor > 1:
            _divides("tensor", config.tensor, "num_kv_heads", shape.num_kv_heads)
            if shape.experts is None or shape.experts.dense_layers:  # experts stay whole
                _divides("tensor", config.tensor, "intermediate_size", shape.intermediate_size)
            if row_range(shape.vocab_size, config.tensor - 1, config.tensor)[1] < 1:
                raise ConfigError(
                    f"layout.tensor={config.tensor} is too many for {shape.vocab_size} words",
                    remedy="use a smaller layout.tensor",
                )
        if config.sequence > 1 and config.attention == "ulysses":
            _divides("tensor x sequence", config.tensor * config.sequence, "num_heads", shape.num_heads)
            heads, parts = shape.num_kv_heads // config.tensor, config.sequence
            if heads % parts and parts % heads:
                raise ConfigError(
                    f"layout.sequence={parts}: does not divide the {heads} key heads of a process, nor they it",
                    remedy="choose another size, or layout.attention=ring",
                )
        if config.chunks > shape.num_layers:
            raise ConfigError(
                f"layout.pipeline={config.pipeline} makes {config.chunks} chunks of {shape.num_layers} layers",
                remedy="use fewer stages, or a smaller layout.virtual",
            )
        if config.expert > 1:
            if shape.experts is None:
                raise ConfigError("layout.expert: this model has no experts", remedy="set layout.expert=1")
            _divides("expert", config.expert, "experts", shape.experts.count)


def _divides(field_name: str, size: int, what: str, count: int) -> None:
    if count < 1 or count % size:
        raise ConfigError(
            f"layout.{field_name}={size} does not divide {what}, {count}", remedy="choose sizes that divide it"
        )


def _check_used(config: LayoutConfig) -> None:
    """What has no use is not what was meant."""
    for name, idle, why in (
        ("schedule", config.pipeline == 1, "layout.pipeline is 1"),
        ("virtual", config.schedule != "interleaved", "layout.schedule is not interleaved"),
        ("attention", config.sequence == 1, "layout.sequence is 1"),
    ):
        value = getattr(config, name)
        if idle and value != LayoutConfig.model_fields[name].default:
            raise ConfigError(f"layout.{name}={value} has no use: {why}", remedy=f"leave layout.{name} out")


def _check_extents(config: LayoutConfig) -> None:
    """What is sharded less may not follow from what is sharded more."""
    params, grads, states = (DEPTH[extent] for extent in (config.params, config.grads, config.states))
    for name, depth in (("params", params), ("grads", grads)):
        if depth > states:
            raise ConfigError(
                f"layout: {name} {getattr(config, name)} with states {config.states}: an update needs no more than the "
                "share of its states",
                remedy=f"set layout.states={getattr(config, name)}, or layout.{name}={config.states}",
            )
    if params and grads not in (0, params):
        raise ConfigError(
            f"layout: grads {config.grads} with params {config.params}: gradients come in the shares of the weights",
            remedy=f"set layout.grads={config.params}, or replica to add them up only once a step",
        )


@lru_cache(maxsize=32)
def _device_mesh(view: View, device_type: str, world: object) -> DeviceMesh:
    """Groups are made once for each world that is joined (`world` is its group: part of the key)."""
    names: Sequence[str] = [name for name, _ in view]
    ranks = torch.arange(dist.get_world_size()).reshape([size for _, size in view])
    return DeviceMesh(device_type, ranks, mesh_dim_names=tuple(names))
