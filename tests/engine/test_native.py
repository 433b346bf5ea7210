"""The native decode step against the torch modules."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from puyu.engine import native
from puyu.engine.native import NativeStep
from puyu.errors import DependencyError
from puyu.model.config import ExpertShape
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.model.linear import QuantFormat
from puyu.model.paged import KVCache, PagedPlan, PagedSequence
from puyu.model.quant_modules import make_quantized
from tests.engine.conftest import tiny_model

SHAPES = [
    {},
    {"num_kv_heads": 1, "vocab_size": 99, "intermediate_size": 46},  # sizes that no vector width divides
    {"num_kv_heads": 4, "head_dim": 6, "tie_embeddings": True},
    {"qkv_bias": True, "out_bias": True, "num_layers": 3},
]


def cache_of(model: CausalLM, dtype: torch.dtype) -> KVCache:
    cache = KVCache(model.config, num_blocks=64, block_size=4, device="cpu", dtype=dtype)
    cache.rows.fill_(float("nan"))
    return cache


def filled(shape: dict[str, int]) -> CausalLM:
    model = tiny_model(7, **shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


@torch.inference_mode()
@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (3, 2), (8, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_modules(shape: dict[str, int], batch: int, threads: int) -> None:
    model, rng = filled(shape), random.Random(batch)
    ours, theirs = cache_of(model, torch.float32), cache_of(model, torch.float32)
    step = NativeStep.make(model, ours)
    assert step is not None
    free = rng.sample(range(64), 64)
    tables = [tuple(free.pop() for _ in range(6)) for _ in range(batch)]
    torch.set_num_threads(threads)
    for at in range(23):
        active = [row for row in range(batch) if at >= 2 * row]  # sequences of different lengths
        tokens = [rng.randrange(90) for _ in active]
        places = [at - 2 * row for row in active]
        spans = [
            PagedSequence(i, 1, place, tables[row]) for i, (row, place) in enumerate(zip(active, places, strict=True))
        ]
        expected = model(torch.tensor(tokens), torch.tensor(places), PagedPlan.build(theirs, spans))
        logits = step.run(tokens, places, [tables[row] for row in active])
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    torch.set_num_threads(1)
    torch.testing.assert_close(ours.rows, theirs.rows, rtol=0, atol=1e-5, equal_nan=True)


@torch.inference_mode()
def test_bf16_is_as_close_to_fp32_as_the_modules_are() -> None:
    exact = filled({})
    model = filled({}).bfloat16()
    errors = []
    tokens = list(range(1, 21))
    caches = [cache_of(model, torch.bfloat16) for _ in range(2)]
    exact_cache = cache_of(exact, torch.float32)
    step = NativeStep.make(model, caches[0])
    assert step is not None
    for at, token in enumerate(tokens):
        where = [PagedSequence(0, 1, at, tuple(range(8)))]
        inputs = torch.tensor([token]), torch.tensor([at])
        right = exact(*inputs, PagedPlan.build(exact_cache, where))
        modules = model(*inputs, PagedPlan.build(caches[1], where)).float()
        ours = step.run([token], [at], [range(8)])
        errors.append([float((x - right).abs().mean()) for x in (ours, modules)])
    ours_error, modules_error = torch.tensor(errors).mean(0).tolist()
    assert ours_error < 1.1 * modules_error


@torch.inference_mode()
def test_changed_weights_and_rope_base_count_at_once() -> None:
    model = filled({})
    cache, other = cache_of(model, torch.float32), cache_of(model, torch.float32)
    step = NativeStep.make(model, cache)
    assert step is not None
    step.run([5], [0], [(0, 1)])
    init_weights(model, seed=9, std=0.2)
    model.trunk.layers[1].mlp.down.weight.data = model.trunk.layers[1].mlp.down.weight.data.clone()
    model.set_rope_theta(77.0)
    for at in range(3):
        where = [PagedSequence(0, 1, at, (0, 1))]
        expected = model(torch.tensor([5 + at]), torch.tensor([at]), PagedPlan.build(other, where))
        torch.testing.assert_close(step.run([5 + at], [at], [(0, 1)]), expected, rtol=0, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
)
def test_stretched_positions_are_in_its_tables(scaling: dict[str, object]) -> None:
    model = tiny_model(3, rope_scaling=scaling, max_positions=20)
    cache, other = cache_of(model, torch.float32), cache_of(model, torch.float32)
    step = NativeStep.make(model, cache)
    assert step is not None
    for at in range(24):
        if at == 20:
            model.set_context(64)  # the tables follow; the twin's cache keeps the old keys too
        expected = model(torch.tensor([at]), torch.tensor([at]), PagedPlan.build(other, [PagedSequence(0, 1, at, T)]))
        torch.testing.assert_close(step.run([at], [at], [T]), expected, rtol=0, atol=2e-5)


T = tuple(range(6))
UNKNOWN = {
    "norms of heads": {"family": "qwen3"},
    "a window": {"family": "mistral", "windows": (8, 0)},
    "experts": {"family": "mixtral", "experts": ExpertShape(count=2, per_token=1, size=48)},
    "experts in one layer": {
        "family": "qwen3_moe",
        "experts": ExpertShape(count=2, per_token=1, size=48, dense_layers=(0,)),
    },
    "biases in the MLP": {"family": "llama", "mlp_bias": True},
}


@pytest.mark.parametrize("changes", UNKNOWN.values(), ids=list(UNKNOWN))
def test_layers_that_it_does_not_know_are_left_to_torch(changes: dict[str, object]) -> None:
    model = tiny_model(3, **changes)
    assert NativeStep.make(model, cache_of(model, torch.float32)) is None


def test_what_it_does_not_know_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = filled({})
    assert NativeStep.make(model.double(), cache_of(model, torch.float64)) is None
    model = filled({})
    assert NativeStep.make(model, cache_of(model, torch.bfloat16)) is None, "mixed precision rounds otherwise"
    model.trunk.layers[0].mlp.extra = torch.nn.Identity()
    assert NativeStep.make(model, cache_of(model, torch.float32)) is None
    model = filled({})
    make_quantized(model, QuantFormat(8))
    assert NativeStep.make(model, cache_of(model, torch.float32)) is None
    monkeypatch.setenv("PUYU_NATIVE_DIR", str(tmp_path))
    native.load.cache_clear()
    assert native.load() is None
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DependencyError, match=r"no C\+\+ compiler"):
        native.build()
    monkeypatch.undo()
    native.load.cache_clear()
