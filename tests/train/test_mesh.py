"""Coordinates of the mesh against a walk over all ranks, and combinations that are refused by name."""

import itertools
import math

import pytest

from puyu.dist import World
from puyu.errors import ConfigError
from puyu.model.config import ExpertShape, ModelConfig
from puyu.train.layouts import mesh as mesh_module
from puyu.train.layouts.config import LayoutConfig
from puyu.train.layouts.mesh import Mesh
from tests.train import toys

SHAPE = ModelConfig(vocab_size=50, **toys.SHAPE)


@pytest.mark.parametrize("pipeline, sequence, tensor", [(1, 1, 1), (2, 1, 3), (1, 2, 2), (2, 2, 1), (2, 3, 2)])
def test_coordinates_count_from_the_innermost(pipeline, sequence, tensor):
    config, data = LayoutConfig(pipeline=pipeline, sequence=sequence, tensor=tensor), 2
    size = pipeline * data * sequence * tensor
    walk = itertools.product(range(pipeline), range(data), range(sequence), range(tensor))
    for rank, place in enumerate(walk):
        mesh = Mesh(config, World(rank, size))
        assert (mesh.pipeline_rank, mesh.reader.rank, mesh.sequence_rank, mesh.tensor_rank) == place
        assert mesh.reader.size == data and mesh.is_first == (place[0] == place[2] == place[3] == 0)
        for view in mesh.shapes():
            assert math.prod(count for _, count in view) == size


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        ({"tensor": 2}, 3, "does not divide the number of processes, 3"),
        ({"expert": 3}, 4, "layout.expert=3 does not divide data x sequence processes, 4"),
        ({"params": "partial", "grads": "partial"}, 4, "shard_size >= 2"),
        ({"shard_size": 2}, 4, "nothing is partial"),
        ({"params": "full", "states": "replica"}, 4, "params full with states replica"),
        ({"params": "replica", "grads": "full", "states": "replica"}, 4, "grads full with states replica"),
        ({"params": "partial", "shard_size": 2}, 4, "grads full with params partial"),
        ({"schedule": "gpipe"}, 4, "schedule=gpipe has no use: layout.pipeline is 1"),
        ({"pipeline": 2, "virtual": 3}, 4, "virtual=3 has no use: layout.schedule"),
        ({"attention": "ring"}, 4, "attention=ring has no use: layout.sequence is 1"),
        ({"expert": 2, "params": "replica", "grads": "replica", "states": "partial", "shard_size": 2}, 4, "expert"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_by_name(config, size, words):
    with pytest.raises(ConfigError, match=words):
        Mesh(LayoutConfig(**config), World(0, size)).check()


def test_a_group_that_cannot_reach_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(mesh_module.dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(ConfigError, match=r"moves nothing between CPUs(.|\n)*cpu:gloo,cuda:nccl"):
        Mesh.build(LayoutConfig(), World(0, 2), device_type="cuda")


def test_only_dense_layers_need_slices_of_the_intermediate_size():
    mesh, sparse = Mesh(LayoutConfig(tensor=2), World(0, 2)), SHAPE.with_(intermediate_size=33)
    with pytest.raises(ConfigError, match="intermediate_size, 33"):
        mesh.check_model(sparse)
    mesh.check_model(sparse.with_(family="mixtral", experts=ExpertShape(count=4, per_token=2, size=8)))
    with pytest.raises(ConfigError, match=r"too many for 1 words(.|\n)*smaller layout.tensor"):
        mesh.check_model(SHAPE.with_(vocab_size=1))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"tensor": 4}, "num_kv_heads, 2"),
        ({"tensor": 2, "sequence": 4}, "num_heads, 4"),
        ({"sequence": 3}, "num_heads, 4"),
        ({"pipeline": 3}, "2 layers"),
        ({"expert": 2}, "no experts"),
    ],
)
def test_a_model_that_cannot_be_cut_so_is_refused_by_name(config, words):
    with pytest.raises(ConfigError, match=words):
        Mesh(LayoutConfig(**config), World(0, 24)).check_model(SHAPE)
    Mesh(LayoutConfig(sequence=3, attention="ring"), World(0, 24)).check_model(SHAPE)
