"""The table of model families: how each names its tensors. A family is a row here, never a file of its own.

Inside the package every model has InternLM2's fused layout: `qkv` rows are (kv group, g queries + key + value,
head_dim) and `gate_up` is the gate above the up projection. A row says which tensors of a Hugging Face
checkpoint make up each of ours; fusing and splitting only move rows, so they hold for weights, biases,
quantized codes and their scales alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Names of one family's tensors. `qkv` has one name (fused as ours) or three (query, key, value)."""

    architecture: str
    embedding: str
    norm: str
    head: str
    attention_norm: str
    qkv: tuple[str, ...]
    out: str
    mlp_norm: str
    gate_up: tuple[str, str]
    down: str
    layer: str = "model.layers.{}."
    reward_architecture: str
    reward_head: str = "v_head"
    bias_key: str | None = None
    """The config key that says whether attention has biases; None when the family fixes it."""
    qkv_bias: bool = False
    out_bias: bool = False


_LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
}

FAMILIES: dict[str, Family] = {
    "internlm2": Family(
        architecture="InternLM2ForCausalLM",
        reward_architecture="InternLM2ForRewardModel",
        embedding="model.tok_embeddings",
        norm="model.norm",
        head="output",
        attention_norm="attention_norm",
        qkv=("attention.wqkv",),
        out="attention.wo",
        mlp_norm="ffn_norm",
        gate_up=("feed_forward.w1", "feed_forward.w3"),
        down="feed_forward.w2",
        bias_key="bias",
        out_bias=True,
    ),
    "internlm": Family(
        architecture="InternLMForCausalLM",
        reward_architecture="InternLMForRewardModel",
        bias_key="bias",
        out_bias=True,
        **_LLAMA_NAMES,  # type: ignore[arg-type]
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        reward_architecture="LlamaForRewardModel",
        bias_key="attention_bias",
        out_bias=True,
        **_LLAMA_NAMES,  # type: ignore[arg-type]
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        reward_architecture="Qwen2ForRewardModel",
        qkv_bias=True,
        **_LLAMA_NAMES,  # type: ignore[arg-type]
    ),
}


def name_pairs(row: Family, num_layers: int, *, head: str | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(our module name, the checkpoint's module names) for the whole model; `head` is the checkpoint's name of it."""
    yield "trunk.embedding", (row.embedding,)
    for index in range(num_layers):
        ours, theirs = f"trunk.layers.{index}.", row.layer.format(index)
        yield ours + "attention_norm", (theirs + row.attention_norm,)
        yield ours + "attention.qkv", tuple(theirs + name for name in row.qkv)
        yield ours + "attention.out", (theirs + row.out,)
        yield ours + "mlp_norm", (theirs + row.mlp_norm,)
        yield ours + "mlp.gate_up", tuple(theirs + name for name in row.gate_up)
        yield ours + "mlp.down", (theirs + row.down,)
    yield "trunk.norm", (row.norm,)
    if head is not None:
        yield "head", (head,)


def fuse_qkv(parts: list[Tensor], *, num_kv_heads: int) -> Tensor:
    """[q rows, k rows, v rows] -> rows in our order (kv group, g queries + key + value, head_dim)."""
    if len(parts) == 1:
        return parts[0]
    grouped = [part.reshape(num_kv_heads, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def split_qkv(fused: Tensor, *, num_kv_heads: int, queries_per_kv: int, num_parts: int) -> list[Tensor]:
    """The inverse of `fuse_qkv`."""
    if num_parts == 1:
        return [fused]
    grouped = fused.reshape(num_kv_heads, queries_per_kv + 2, -1, *fused.shape[1:])
    query, key, value = grouped.split([queries_per_kv, 1, 1], dim=1)
    return [part.flatten(0, 2).contiguous() for part in (query, key, value)]
