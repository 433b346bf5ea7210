"""Two gloo processes answer as one does: dense with tied embeddings and biases, int8, int4."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from puyu.engine.core import Engine
from puyu.engine.parallel import shard
from puyu.errors import ConfigError
from puyu.model.linear import QuantFormat, QuantLinear
from tests.engine.conftest import tiny_model
from tests.engine.parallel_worker import BITS, CONFIG, answers, model_of

ROOT = Path(__file__).resolve().parents[2]


def two_processes() -> list[list[object]]:
    """What both ranks printed, for each number of bits."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.engine.parallel_worker"]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **common, "RANK": str(rank)}, stdout=-1, stderr=-1, text=True
        )
        for rank in range(2)
    ]
    outputs = []
    for process in ranks:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error[-2000:]
        outputs.append(json.loads(out.splitlines()[-1]))
    return outputs


def test_two_processes_give_the_tokens_of_one() -> None:
    leader, follower = two_processes()
    for bits, theirs, steps in zip(BITS, leader, follower, strict=True):
        engine = Engine(model_of(bits).requires_grad_(False), CONFIG)
        engine.runner.native = None  # which rounds activations of quantized layers; sharded models have no such step
        assert answers(engine) == theirs, bits
        assert steps == engine.stats().num_steps, "the follower ran every step"


@pytest.fixture
def group_of_one(tmp_path: Path) -> object:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield None
    dist.destroy_process_group()


def test_a_group_of_one_changes_nothing(group_of_one: object) -> None:
    model = model_of(16)
    expected = answers(Engine(model, CONFIG))
    shard(model)
    assert answers(Engine(model, CONFIG)) == expected


def test_shapes_that_do_not_divide_are_refused(group_of_one: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 3)
    with pytest.raises(ConfigError, match=r"num_kv_heads is 2, which 3 processes do not divide"):
        shard(tiny_model(0))
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    model = tiny_model(0, hidden_size=64)
    block = model.trunk.layers[0]
    block.mlp.down = QuantLinear(48, 64, form=QuantFormat(8))
    block.attention.out = QuantLinear(64, 64, form=QuantFormat(4, 64))
    with pytest.raises(ConfigError, match="groups of 64 do not divide over 2 processes"):
        shard(model)
    block.attention.out = QuantLinear(64, 64, form=QuantFormat(4, 32, permuted=True))
    with pytest.raises(ConfigError, match="order of their own"):
        shard(model)
    assert torch.is_tensor(model.trunk.embedding.weight)
