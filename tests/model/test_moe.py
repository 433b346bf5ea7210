"""The sorted mixture of experts against a naive loop over tokens, with gradients; what a quantizer may touch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puyu.errors import ConfigError
from puyu.model.config import ExpertShape
from puyu.model.linear import Linear, QuantFormat
from puyu.model.moe import ExpertMLP
from puyu.model.quant_modules import make_quantized
from tests.model.reference import our_logits, small_config, small_model, tokens


def layer(*, count: int = 5, per_token: int = 2, shared: int = 0, normalize: bool = True) -> ExpertMLP:
    family = "qwen2_moe"
    shape = ExpertShape(count=count, per_token=per_token, size=12, shared_size=shared, normalize=normalize)
    module = ExpertMLP(small_config(family=family, hidden_size=16, experts=shape)).double()
    generator = torch.Generator().manual_seed(count)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return module


def naive(module: ExpertMLP, x_TD: Tensor) -> Tensor:
    """One token after the other, by the definition."""
    rows = []
    for x_D in x_TD:
        scores = torch.softmax(module.router.weight @ x_D, dim=0)
        best = sorted(range(len(scores)), key=lambda e: -scores[e].item())[: module.per_token]
        total = sum(scores[e] for e in best) if module.normalize else 1.0
        y_D = sum(scores[e] / total * expert(module.experts[e], x_D) for e in best)
        if module.shared is not None and module.shared_gate is not None:
            y_D = y_D + torch.sigmoid(module.shared_gate.weight @ x_D) * expert(module.shared, x_D)
        rows.append(y_D)
    return torch.stack(rows)


def expert(mlp: torch.nn.Module, x_D: Tensor) -> Tensor:
    gate, up = (mlp.gate_up.weight @ x_D).chunk(2)
    return mlp.down.weight @ (gate * torch.sigmoid(gate) * up)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 30),
    count=st.integers(1, 7),
    per_token=st.integers(1, 7),
    shared=st.sampled_from([0, 8]),
    normalize=st.booleans(),
)
def test_equals_the_naive_loop(tokens: int, count: int, per_token: int, shared: int, normalize: bool) -> None:
    module = layer(count=count, per_token=min(per_token, count), shared=shared, normalize=normalize)
    x_TD = torch.randn(tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
    torch.testing.assert_close(module(x_TD), naive(module, x_TD), rtol=1e-9, atol=1e-9)


def test_gradients_equal_the_naive_loop() -> None:
    module = layer(shared=8)
    x_TD = torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    inputs = [x_TD, *module.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(module(x_TD).square().sum(), inputs, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(naive(module, x_TD).square().sum(), inputs, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_a_token_has_the_same_output_alone_and_in_a_batch() -> None:
    module = layer()
    x_TD = torch.randn(12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([module(x_D[None]) for x_D in x_TD])
    torch.testing.assert_close(module(x_TD), alone, rtol=1e-12, atol=1e-12)


def test_an_expert_computes_its_own_tokens_and_no_others() -> None:
    module, seen = layer(count=6, per_token=1), []
    for child in module.experts:
        child.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    x_TD = torch.randn(4, 16, dtype=torch.float64)
    with torch.no_grad():
        module(x_TD)
    assert sum(seen) == 4 and len(seen) == len(module.route(x_TD)[1].unique()) < 6


def test_in_training_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    module = layer(count=6, per_token=1)
    x_TD = torch.randn(2, 16, dtype=torch.float64)
    module(x_TD).sum().backward()
    chosen = module.route(x_TD)[1].unique().tolist()
    for index, expert in enumerate(module.experts):
        assert [bool(p.grad.any()) for p in expert.parameters()] == [index in chosen] * 2


def test_quantizing_leaves_router_and_gate_in_full_precision() -> None:
    shape = ExpertShape(count=4, per_token=2, size=32, shared_size=48)
    model = small_model(family="qwen2_moe", qkv_bias=True, experts=shape)
    before = our_logits(model, tokens(5))
    assert before.isfinite().all()
    names = {name for name, child in model.trunk.named_modules() if isinstance(child, Linear)}
    assert "layers.0.mlp.experts.3.gate_up" in names and "layers.1.mlp.shared.down" in names
    assert not any("router" in name or "shared_gate" in name for name in names)
    make_quantized(model, QuantFormat(8))
    assert not any(isinstance(child, Linear) for child in model.trunk.modules())
    assert model.trunk.layers[0].mlp.router.weight.dtype == torch.float32


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 of 2 experts"):
        ExpertShape(count=2, per_token=3, size=8)
    with pytest.raises(ConfigError, match="a llama model has no experts"):
        small_config(family="llama", experts=ExpertShape(count=2, per_token=1, size=8))
    with pytest.raises(ConfigError, match="2 windows for 2 layers of a internlm2 model"):
        small_config(windows=(4, 0))
