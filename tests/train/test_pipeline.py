"""Pipelines on 2 and 4 processes against one process: losses, norms, weights, states, evaluation."""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from puyu.data.packing import pack_documents
from puyu.dist import current_world
from puyu.errors import ConfigError
from puyu.train.layouts import LayoutConfig
from puyu.train.layouts.stages import LateWeights, add_products, cut
from puyu.train.objectives import lm_loss, ranking_loss
from puyu.train.optim import OptimConfig
from puyu.train.pieces import gather_whole
from puyu.train.trainer import Trainer, TrainerConfig
from tests.train import toys

SHAPE = {"num_layers": 8, "hidden_size": 8, "intermediate_size": 16}
OPTIM = OptimConfig(lr=0.01, warmup=2, clip=0.5)
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
CASES = {name: (name, name in ("interleaved", "zero-bubble")) for name in SCHEDULES}


def trained(out: Path, *, tied: bool, **layout) -> dict:
    """Three steps of four micro-batches of unequal documents, and an evaluation."""
    model = toys.model(tie_embeddings=tied, **SHAPE)
    config = TrainerConfig(steps=3, optim=OPTIM, accumulate=4, layout=LayoutConfig(**layout), checkpoint_every=2)
    trainer = Trainer(model, lm_loss, toys.source(tokens_per_batch=40), config, out=out)
    rows = []
    trainer.on_step = lambda done, metrics: rows.append([metrics["loss"], metrics["grad_norm"], metrics["tokens"]])
    trainer.fit()
    batches = [
        pack_documents(toys.documents(3, seed=seed)) for seed in range(trainer.reader.rank, 2, trainer.reader.size)
    ]
    sums = trainer.evaluate(batches)
    held = sum(parameter.numel() for parameter in model.parameters())
    return {"rows": rows, "sums": sums, "weights": trainer.full_weights(), "held": held}


def work(rank: int, size: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=f"tcp://127.0.0.1:{port}")
    for name, (schedule, tied) in CASES.items():
        found = trained(Path(out) / name, tied=tied, pipeline=size, schedule=schedule, params="replica")
        torch.save(found, Path(out) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def runs(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"pipeline{request.param}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(request.param, port, str(out)), nprocs=request.param)
    return request.param, out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return {tied: trained(out / str(tied), tied=tied) for tied in (False, True)}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(runs, alone, name):
    size, out = runs
    one, found = alone[CASES[name][1]], [torch.load(out / f"{name}-{rank}.pt") for rank in range(size)]
    for result in found:
        assert result["sums"] == pytest.approx(one["sums"], abs=1e-10)
        for row, wanted in zip(result["rows"], one["rows"], strict=True):
            assert row == pytest.approx(wanted, abs=1e-10)
    weights = found[0]["weights"]
    assert weights.keys() == one["weights"].keys() and not found[1]["weights"]
    for key, value in one["weights"].items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-10)
