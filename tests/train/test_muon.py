"""Muon against exact linear algebra, and MuonAdamW against torch's AdamW."""

import pytest
import torch
from torch import nn

from puyu.train import muon
from puyu.train.muon import MuonAdamW, Parts, orthogonal, parts_of
from puyu.train.optim import OptimConfig, make_optimizer, set_rate
from tests.train import toys


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 40)])
def test_newton_schulz_is_close_to_the_orthogonal_factor(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix[None])[0].float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.35
    exact = left @ right
    assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.96


def test_groups_without_momentum_take_exactly_torchs_adamw_step():
    torch.manual_seed(0)
    mine, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(mine.state_dict())
    row = {"lr": 1e-2, "weight_decay": 0.1}
    first = MuonAdamW([{"params": list(mine.parameters()), **row}], betas=(0.9, 0.95), eps=1e-8)
    second = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.95), eps=1e-8, fused=True, **row)
    for step in range(4):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((mine, first), (theirs, second)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_the_count_of_steps_lies_where_the_parameter_lies():
    weight = nn.Parameter(torch.zeros(4, device="meta"))
    optimizer = MuonAdamW([{"params": [weight]}], betas=(0.9, 0.95), eps=1e-8)
    optimizer.allocate()
    assert {state.device.type for state in optimizer.state[weight].values()} == {"meta"}


def test_few_matrices_at_a_time_are_updated_as_all_at_once(monkeypatch):
    found, sizes, whole = [], [], muon.orthogonal
    monkeypatch.setattr(muon, "orthogonal", lambda batch: sizes.append(len(batch)) or whole(batch))
    for limit in (1 << 30, 2 * 6 * 4 * 4):
        monkeypatch.setattr(muon, "BATCH_BYTES", limit)
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(6, 4, generator=generator)) for _ in range(5)]
        for weight in weights:
            weight.grad = torch.randn(6, 4, generator=generator)
        MuonAdamW([{"params": weights, "lr": 0.1, "momentum": 0.9}], betas=(0.9, 0.95), eps=1e-8).step()
        found.append(torch.stack(weights).detach())
    assert sizes == [5, 2, 2, 1]
    torch.testing.assert_close(*found, rtol=0, atol=1e-3)


def test_a_muon_step_has_the_size_of_its_rate():
    weight = nn.Parameter(torch.zeros(16, 4))
    optimizer = MuonAdamW([{"params": [weight], "lr": 0.1, "momentum": 0.95}], betas=(0.9, 0.95), eps=1e-8)
    weight.grad = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)) * 1e-4  # the gradient's size is lost
    optimizer.step()
    sizes = torch.linalg.svdvals(weight.detach())
    assert sizes.min() > 0.1 * 2 * 0.5 and sizes.max() < 0.1 * 2 * 1.35  # scale sqrt(16 / 4) = 2


def test_only_the_matrices_of_the_blocks_take_muon():
    from tests.engine.conftest import tiny_model

    optimizer = make_optimizer(
        tiny_model().named_parameters(), OptimConfig(kind="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1)
    )
    set_rate(optimizer, 5e-4)
    by_momentum = {group["momentum"]: group for group in optimizer.param_groups if group["weight_decay"] > 0}
    assert len(by_momentum[0.95]["params"]) == 2 * 4 and by_momentum[0.95]["lr"] == pytest.approx(0.01)
    assert {tuple(p.shape) for p in by_momentum[0.0]["params"]} == {(97, 32)} and by_momentum[0.0]["lr"] == 5e-4


def test_joined_matrices_are_split_by_key_head_and_by_gate_and_up():
    model = toys.model(dtype=torch.float32)  # 4 query heads, 2 key heads, head size 4, inner 32, width 16
    parts = parts_of(model)
    name = "trunk.layers.1.attention.qkv.weight"
    assert parts[name] == Parts(2, (8, 4, 4)) and parts["trunk.layers.0.mlp.gate_up.weight"] == Parts(2, (32,))
    assert len(parts) == 4
    config = OptimConfig(kind="muon", lr=1.0, muon_lr=1.0, muon_momentum=0.5, weight_decay=0.0, muon_split=True)
    named = dict(model.named_parameters())
    optimizer = make_optimizer(named.items(), config, parts=parts)
    set_rate(optimizer, 1.0)
    before = {key: value.detach().clone() for key, value in named.items()}
    draw = torch.Generator().manual_seed(0)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    optimizer.step()
    for key, pieces in ((name, [(0, 8), (8, 12), (12, 16), (16, 24), (24, 28), (28, 32)]),
                        ("trunk.layers.0.mlp.gate_up.weight", [(0, 32), (32, 64)]),
                        ("trunk.layers.0.mlp.down.weight", [(0, 16)])):  # fmt: skip
        moved, ahead = before[key] - named[key].detach(), named[key].grad * 1.5
        for start, stop in pieces:
            scale = max(1.0, (stop - start) / moved.shape[1]) ** 0.5
            wanted = orthogonal(ahead[start:stop][None])[0].float() * scale
            torch.testing.assert_close(moved[start:stop], wanted, rtol=0, atol=0.02)
