"""Initial weights depend on the seed and a parameter's name alone."""

from __future__ import annotations

import math

import torch
from torch import nn

from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.init import init_weights, initial_value
from tests.model.reference import small_config, small_model


def test_order_and_depth_of_the_model_do_not_matter() -> None:
    whole, shallow = small_model(seed=7), small_model(seed=7, num_layers=1)
    state = whole.state_dict()
    for name, value in shallow.state_dict().items():
        assert torch.equal(value, state[name]), name
    one_by_one = CausalLM(small_config())
    torch.manual_seed(123)  # a global seed must not leak in
    with torch.no_grad():
        for name, parameter in reversed(list(one_by_one.named_parameters())):
            parameter.copy_(initial_value(name, tuple(parameter.shape), seed=7, std=0.2))
    assert all(torch.equal(value, state[name]) for name, value in one_by_one.state_dict().items())


def test_seeds_and_names_draw_different_values() -> None:
    first, second = small_model(seed=1), small_model(seed=2)
    assert not torch.equal(first.trunk.embedding.weight, second.trunk.embedding.weight)
    layers = first.trunk.layers
    assert not torch.equal(layers[0].mlp.down.weight * math.sqrt(2), layers[1].mlp.down.weight * 2)


def test_scale_of_each_kind() -> None:
    model = CausalLM(small_config(hidden_size=256, num_heads=4, intermediate_size=512, qkv_bias=True))
    init_weights(model, seed=0, std=0.02)
    for index, block in enumerate(model.trunk.layers):
        assert isinstance(block, nn.Module)
        shrunk = 0.02 / math.sqrt(2 * (index + 1))
        for weight, std in (
            (block.attention.qkv.weight, 0.02),
            (block.mlp.gate_up.weight, 0.02),
            (block.attention.out.weight, shrunk),
            (block.mlp.down.weight, shrunk),
        ):
            assert abs(weight.std().item() / std - 1) < 0.03
        assert torch.equal(block.mlp_norm.weight, torch.ones(256))
        assert not block.attention.qkv.bias.any()


def test_a_scalar_head_starts_at_zero() -> None:
    model = ScalarModel(small_config())
    init_weights(model, seed=0)
    assert not model.head.weight.any()
