"""Coordinates of the mesh against a walk over all ranks, and combinations that are refused by name."""

import itertools
import math

import pytest

from puyu.dist import World
from puyu.errors import ConfigError
from puyu.model.config import ModelConfig
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
        ({"expert": 2, "params": "replica", "grads": "replica", "states": "partial", "shard_size": 2}, 4, "expert"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_by_name(config, size, words):
    with pytest.raises(ConfigError, match=words):
        Mesh(LayoutConfig(**config), World(0, size)).check()


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
