"""Stretched rotary positions against transformers, within the trained context and beyond it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from puyu.model.checkpoint import load_model, save_model
from puyu.model.packed import PackedPlan
from puyu.model.rope import RopeScaling, rotation
from tests.model.reference import our_logits, reference, reference_logits, saved, small_config, small_model, tokens

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.5},
    {**LLAMA3, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.9, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_logits_equal_transformers_beyond_the_original_context(scaling: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference("llama", rope_parameters={**scaling, "rope_theta": 50_000.0}, max_position_embeddings=64)
    ours = load_model(saved(theirs, tmp_path), context=300)
    assert ours.config.max_positions == 300
    torch.testing.assert_close(our_logits(ours, tokens(290)), reference_logits(theirs, tokens(290)), **CLOSE)
    save_model(ours, tmp_path / "longer")  # the longer context is written, the angles stay
    again = load_model(tmp_path / "longer")
    assert again.config.max_positions == 300
    torch.testing.assert_close(our_logits(again, tokens(290)), our_logits(ours, tokens(290)), rtol=0, atol=0)


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("scaling", [SCALINGS[0], SCALINGS[2], {"rope_type": "dynamic", "factor": 2.0}])
def test_old_keys_say_the_same(scaling: dict[str, Any], key: str, tmp_path: Path) -> None:
    theirs = reference("llama", rope_parameters={**scaling, "rope_theta": 50_000.0}, max_position_embeddings=64)
    saved(theirs, tmp_path)
    value = json.loads((tmp_path / "config.json").read_text())
    new = value.pop("rope_parameters")
    value["rope_theta"] = new.pop("rope_theta")
    value["rope_scaling"] = {key if name == "rope_type" else name: item for name, item in new.items()}
    (tmp_path / "config.json").write_text(json.dumps(value))
    torch.testing.assert_close(
        our_logits(load_model(tmp_path), tokens(60)), reference_logits(theirs, tokens(60)), **CLOSE
    )


@pytest.mark.parametrize("length", [65, 100, 256])
def test_dynamic_ntk_is_transformers_at_the_length_it_was_fixed_for(length: int, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    theirs = reference("llama", rope_parameters=rope, max_position_embeddings=64)
    plain, fixed = load_model(saved(theirs, tmp_path)), load_model(tmp_path, context=length)
    short, whole = tokens(64), tokens(length)
    torch.testing.assert_close(our_logits(plain, short), reference_logits(theirs, short), **CLOSE)
    torch.testing.assert_close(our_logits(fixed, whole), reference_logits(theirs, whole), **CLOSE)
    assert not torch.allclose(our_logits(plain, whole), reference_logits(theirs, whole), **CLOSE)
    # what a cache needs: a prefix has the angles that it has in the whole
    torch.testing.assert_close(our_logits(fixed, whole)[:50], our_logits(fixed, whole[:50]), **CLOSE)
    save_model(fixed, tmp_path / "fixed")
    again = load_model(tmp_path / "fixed")
    assert again.config.max_positions == length and again.config.scaling is None
    torch.testing.assert_close(our_logits(again, whole), our_logits(fixed, whole), rtol=0, atol=0)


@pytest.mark.parametrize("order", [(65, 100, 256, 1000), (1000, 256, 100, 65)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_dynamic_ntk_depends_on_the_length_alone(head_dim: int, order: tuple[int, ...]) -> None:
    """transformers' module keeps the base of the longest sequence that it has seen; its formula, and ours, do not."""
    rope = {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 1e6}
    theirs = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=64, rope_parameters=rope)
    ours = small_config(
        hidden_size=head_dim, num_heads=1, num_kv_heads=1, max_positions=64, rope_theta=1e6, rope_scaling=rope
    )
    module = LlamaRotaryEmbedding(theirs)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    stale = []
    for length in order:
        fresh, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, seq_len=length)
        theta = ours.stretched(length).rope_theta
        assert theta == ours.stretched(length).rope_theta and ours.rope_theta == 1e6
        torch.testing.assert_close(1.0 / theta**exponents, fresh, rtol=1e-5, atol=0)
        module(torch.zeros(1), torch.arange(length)[None])
        stale.append(not torch.allclose(module.inv_freq, fresh, rtol=1e-3, atol=0))
    assert stale == [length < max(order[: i + 1]) for i, length in enumerate(order)]  # the trap, which is not ours


def test_a_shorter_context_changes_nothing() -> None:
    config = small_config(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert config.stretched(256) is config and config.stretched(10) is config
    assert small_config().stretched(999).with_(max_positions=256) == small_config()


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_of_published_sizes(kind: str, head_dim: int) -> None:
    """Tables of real models: heads of 64 and 128, contexts of tens of thousands."""
    value = {**LLAMA3, "rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        hidden_size=head_dim * 2, num_attention_heads=2, max_position_embeddings=8192, rope_theta=5e5,
        rope_parameters={**value, "rope_theta": 5e5},
    )  # fmt: skip
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](config)
    positions = torch.tensor([1, 5, 100, 8191])
    turn = rotation(
        positions,
        theta=5e5,
        head_dim=head_dim,
        dtype=torch.float32,
        scaling=RopeScaling.read(value, max_positions=8192),
    )
    angles = positions[:, None].double() * torch.cat((frequencies, frequencies)).double()
    torch.testing.assert_close(turn.cos[:, 0, 0].double(), angles.cos() * amplitude, rtol=0, atol=2e-3)
    torch.testing.assert_close(turn.sin[:2, 0, 0].double(), angles.sin()[:2] * amplitude, rtol=0, atol=1e-6)


def test_a_model_without_scaling_has_the_angles_it_always_had() -> None:
    """Bit for bit: recorded runs depend on it."""
    turn = rotation(torch.arange(500), theta=10_000.0, head_dim=16, dtype=torch.float32)
    angles = torch.arange(500.0)[:, None] / 10_000.0 ** (torch.arange(0, 16, 2) / 16)
    assert torch.equal(turn.cos[:, 0, 0, :8], angles.cos()) and torch.equal(turn.sin[:, 0, 0, 8:], angles.sin())
    assert small_model().trunk.config.scaling is None
    dynamic = small_model(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert torch.equal(our_logits(dynamic, tokens(200)), our_logits(small_model(), tokens(200)))


@pytest.mark.parametrize("rope", ["yarn", "linear", "llama3", "ntk", "none"])
def test_a_longer_model_has_the_positions_of_transformers(rope: Any, tmp_path: Path) -> None:
    theirs = reference("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4}, max_position_embeddings=64)
    theirs.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", dtype=torch.float64)
    found = model.config.longer(256, rope)
    assert found.max_positions == 256 and model.config.longer(64, rope) == model.config
    assert found.longer(512, rope).max_positions == 512
    model.set_shape(found)
    save_model(model, tmp_path / "longer", dtype=torch.float32)
    again = load_model(tmp_path / "longer", dtype=torch.float64)
    assert again.config.with_(stop_ids=()) == found.with_(stop_ids=())
    import transformers

    right = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "longer", dtype=torch.float64).eval()
    tokens = torch.arange(200) % theirs.config.vocab_size
    with torch.no_grad():
        expected = right(tokens[None]).logits[0]
        ours = again(tokens, torch.arange(200), PackedPlan.build([0], 200))
    torch.testing.assert_close(ours, expected, **CLOSE)
    if rope == "ntk":
        assert found.rope_theta == pytest.approx(1e4 * 4 ** (found.head_dim / (found.head_dim - 2)))
    if rope in ("yarn", "linear", "llama3"):
        assert found.scaling is not None and found.scaling.factor == 4.0
