"""Killed, and on in another world and layout: losses of the uninterrupted run, no token lost or drawn twice."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from tests.train.elastic import Attempt, alone, differences, drawn, kill_and_again, prepare, run, train

ATTEMPTS = [
    Attempt(2, {"tensor": 2}, (1, "draw", 7)),
    Attempt(2, {"pipeline": 2}, (0, "step", 9)),
    Attempt(2),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("elastic")
    prepare(root)
    (root / "whole").mkdir()
    train(root, root / "whole", 0, Attempt(1))
    run(root, root / "killed", ATTEMPTS)
    return root


def test_killed_twice_and_on_in_another_layout_it_is_the_uninterrupted_run(runs):
    loss, tokens = differences(runs / "killed", runs / "whole")
    assert loss <= 1e-10 and tokens == 0
    assert len({path.name.split("-")[1] for path in (runs / "killed").glob("ledger-*")}) == 3
    assert sum(sum(docs.values()) for docs in drawn(runs / "whole")[0].values()) > 50


@pytest.mark.parametrize("change", ["lose", "repeat", "other reader"])
def test_the_ledger_finds_a_token_that_is_lost_or_repeated(runs, tmp_path, change):
    for path in (runs / "killed").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if path.name == "ledger-2-0.jsonl":
            if change == "other reader":
                rows[-1] = rows[-1] | {"reader": 1}
            elif change == "lose":
                rows[-1]["docs"][0].pop()
            else:
                rows[-1]["docs"].append(rows[-1]["docs"][0])
        (tmp_path / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert differences(tmp_path, runs / "whole")[1] > 0


def test_killed_at_random_moments_the_weights_are_bit_equal(tmp_path):
    alone(tmp_path / "whole", 60)
    assert kill_and_again(tmp_path / "killed", kills=3, steps=60, rng=random.Random(0), longest=0.05) == 3
    whole, killed = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
