"""Our one decoder against transformers' Llama and Qwen2, and InternLM2's layout by converting the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from puyu.model.checkpoint import load_model
from puyu.model.families import fuse_qkv, split_qkv
from puyu.model.layers import RMSNorm
from tests.model.reference import our_logits, reference, reference_logits, saved, tokens


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_equal_transformers(family: str, kv_heads: int, tmp_path: Path) -> None:
    theirs = reference(family, kv_heads=kv_heads)
    ours = load_model(saved(theirs, tmp_path))
    torch.testing.assert_close(our_logits(ours, tokens(50)), reference_logits(theirs, tokens(50)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"tie_word_embeddings": True}, {"head_dim": 24}])
def test_quirks_equal_transformers(changes: dict[str, object], tmp_path: Path) -> None:
    theirs = reference("llama", **changes)
    ours = load_model(saved(theirs, tmp_path))
    torch.testing.assert_close(our_logits(ours, tokens(50)), reference_logits(theirs, tokens(50)), rtol=1e-4, atol=1e-4)


def test_float64_stays_float64(tmp_path: Path) -> None:
    theirs = reference("llama")
    wide = our_logits(load_model(saved(theirs, tmp_path), dtype=torch.float64), tokens(40))
    assert wide.dtype == torch.float64
    # transformers computes rotary tables and norms in fp32 whatever the dtype, so its fp32 model is the oracle
    torch.testing.assert_close(wide, reference_logits(theirs, tokens(40)).double(), rtol=1e-4, atol=1e-4)


def as_internlm2(source: Path, target: Path, *, kv_heads: int, heads: int, head_dim: int) -> None:
    """Rewrite a Llama directory as InternLM2, by the definition of its layout: one output row at a time.

    wqkv's rows are (kv group, g + 2, head_dim): the group's g query heads, its key head, its value head.
    """
    old = load_file(source / "model.safetensors")
    group = heads // kv_heads
    new = {
        "model.tok_embeddings.weight": old["model.embed_tokens.weight"],
        "model.norm.weight": old["model.norm.weight"],
        "output.weight": old["lm_head.weight"],
    }
    config = json.loads((source / "config.json").read_text())
    for index in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{index}.", f"model.layers.{index}."
        rows = []
        for kv in range(kv_heads):
            for j in range(group):
                head = kv * group + j
                rows += list(old[theirs + "self_attn.q_proj.weight"][head * head_dim : (head + 1) * head_dim])
            rows += list(old[theirs + "self_attn.k_proj.weight"][kv * head_dim : (kv + 1) * head_dim])
            rows += list(old[theirs + "self_attn.v_proj.weight"][kv * head_dim : (kv + 1) * head_dim])
        new[ours + "attention.wqkv.weight"] = torch.stack(rows)
        new[ours + "attention.wo.weight"] = old[theirs + "self_attn.o_proj.weight"]
        new[ours + "attention_norm.weight"] = old[theirs + "input_layernorm.weight"]
        new[ours + "ffn_norm.weight"] = old[theirs + "post_attention_layernorm.weight"]
        new[ours + "feed_forward.w1.weight"] = old[theirs + "mlp.gate_proj.weight"]
        new[ours + "feed_forward.w3.weight"] = old[theirs + "mlp.up_proj.weight"]
        new[ours + "feed_forward.w2.weight"] = old[theirs + "mlp.down_proj.weight"]
    target.mkdir()
    save_file(new, target / "model.safetensors", metadata={"format": "pt"})
    config |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"]}
    (target / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_internlm2_layout_gives_the_logits_of_the_same_weights(kv_heads: int, tmp_path: Path) -> None:
    theirs = reference("llama", kv_heads=kv_heads)
    saved(theirs, tmp_path / "llama")
    as_internlm2(tmp_path / "llama", tmp_path / "internlm2", kv_heads=kv_heads, heads=4, head_dim=16)
    ours = load_model(tmp_path / "internlm2")
    assert ours.config.family == "internlm2"
    torch.testing.assert_close(our_logits(ours, tokens(50)), reference_logits(theirs, tokens(50)), rtol=1e-4, atol=1e-4)


@given(kv_heads=st.integers(1, 4), group=st.integers(1, 4), head_dim=st.integers(1, 5), columns=st.integers(0, 3))
def test_split_undoes_fuse(kv_heads: int, group: int, head_dim: int, columns: int) -> None:
    """For weights (two dimensions) and biases (one)."""
    tail = () if columns == 0 else (columns,)
    heads = (kv_heads * group, kv_heads, kv_heads)
    counts = [n * head_dim for n in heads]
    parts = [torch.arange(c * max(columns, 1)).reshape(c, *tail) + 1000 * i for i, c in enumerate(counts)]
    fused = fuse_qkv(parts, num_kv_heads=kv_heads)
    again = split_qkv(fused, num_kv_heads=kv_heads, queries_per_kv=group, num_parts=3)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert torch.equal(fuse_qkv(again, num_kv_heads=kv_heads), fused)
    assert fuse_qkv([fused], num_kv_heads=kv_heads) is fused


def test_rmsnorm_rounds_where_the_published_code_rounds() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RMSNorm(64, eps=1e-5), LlamaRMSNorm(64, eps=1e-5)
    weight = torch.randn(64, generator=generator).bfloat16()
    ours.weight.data, theirs.weight.data = weight.float(), weight
    x = torch.randn(500, 64, generator=generator).bfloat16()
    assert torch.equal(ours(x), theirs(x))
