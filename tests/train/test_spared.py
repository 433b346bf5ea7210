"""Recomputed activations, one-byte moments and split Muon on two processes, all sharded, against one process."""

import pytest
import torch

from puyu.files import read_json, write_json
from puyu.train.layouts import LayoutConfig, make_layout
from puyu.train.layouts.certify import DENSE, REPLICA, Case, advance, make_model, spawn
from puyu.train.memory import MemoryConfig, spare
from puyu.train.objectives import lm_loss
from puyu.train.optim import OptimConfig
from puyu.train.pieces import gather_whole

SETTINGS = {
    "full": ({"checkpoint": "full"}, {}),
    "selective": ({"checkpoint": "selective", "offload": True}, {}),
    "adamw8": ({}, {"kind": "adamw8"}),
    "split": ({}, {"kind": "muon", "muon_split": True, "muon_lr": 3e-3}),
}
BOUNDS = {"full": 1e-10, "selective": 1e-10, "adamw8": 2e-3, "split": 2e-3}  # roundings to 8 bits and to bf16 may flip


def run(folder, world, layouts):
    """Losses of four steps, and the shapes of all states."""
    for name, (memory, optimizer) in SETTINGS.items():
        for number, layout in enumerate(layouts):
            case = Case(name, world, layout)
            model = make_model(case, torch.float64)
            spare(model, MemoryConfig(**memory))
            made = make_layout(LayoutConfig(**layout), model, lm_loss, device=torch.device("cpu"))
            made.make_optimizer(OptimConfig(lr=3e-3, warmup=0, **optimizer))
            losses = [row[0] for row in advance(case, made, range(4))]
            states = gather_whole(made.moments())
            if states:
                shapes = {key: list(value.shape) for key, value in states.items()}
                write_json(folder / f"{name}-{world}-{number}.json", [losses, shapes])


def test_they_do_on_two_processes_what_they_do_on_one(tmp_path):
    run(tmp_path, 1, [{}])
    spawn(2, run, tmp_path, 2, [{}, REPLICA])
    for name, bound in BOUNDS.items():
        wanted, shapes = read_json(tmp_path / f"{name}-1-0.json")
        for number in range(2):
            losses, found = read_json(tmp_path / f"{name}-2-{number}.json")
            assert losses == pytest.approx(wanted, abs=bound), name
            assert found == shapes
    assert shapes.keys() and read_json(tmp_path / "adamw8-1-0.json")[1]["exp_avg_scale/head.weight"] == [64, 1]
    assert DENSE.vocab_size == 64
