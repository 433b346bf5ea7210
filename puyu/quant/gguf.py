"""Checkpoint -> one GGUF file for llama.cpp and what is built on it.

    puyu export --model runs/nano/ppo --gguf nano.gguf --type q8_0

InternLM, InternLM2, Llama and Mistral models are written as llama.cpp's `llama`, Qwen2 as `qwen2`. The `llama`
architecture turns neighboring pairs where Hugging Face turns halves, so rows of queries and keys are put in that order.
Vectors stay fp32; matrices are of the type asked for, embedding and head of q4_0 files q8_0 (an embedding loses most by
4 bits). Quantized checkpoints are dequantized first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puyu.errors import ConfigError
from puyu.model.checkpoint import is_scalar_checkpoint, load_model, read_config
from puyu.model.config import ModelConfig
from puyu.model.families import split_qkv
from puyu.model.heads import CausalLM
from puyu.model.linear import Linear, QuantLinear
from puyu.quant.gguf_blocks import BLOCK, GGUFType
from puyu.quant.gguf_file import GGUFTensor, write_gguf
from puyu.quant.gguf_tokens import tokenizer_metadata

_ARCHITECTURES = {"internlm": "llama", "internlm2": "llama", "llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
_FILE_TYPES: dict[GGUFType, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    path: Path
    size: int
    tensors: int


def export_gguf(folder: Path, path: Path, *, kind: GGUFType = "q8_0", pre: str | None = None) -> Exported:
    """Write a checkpoint directory as one GGUF file. `pre`: llama.cpp's name for how the tokenizer cuts text, where
    it cannot be told from tokenizer.json."""
    config = read_config(folder)
    architecture = check_exportable(folder, config)
    tokens = tokenizer_metadata(folder, vocab_size=config.vocab_size, pre=pre)
    model = load_model(folder)
    metadata = {**model_metadata(config, architecture, name=folder.name, kind=kind), **tokens}
    tensors = list(model_tensors(model, architecture, kind=kind))
    write_gguf(path, metadata, tensors)
    return Exported(path, path.stat().st_size, len(tensors))


def check_exportable(folder: Path, config: ModelConfig) -> str:
    """The architecture's name in llama.cpp; an error names what it has no place for."""
    if is_scalar_checkpoint(folder):
        raise ConfigError(f"{folder} is a reward model", remedy="only language models are exported")
    if config.family not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ConfigError(f"{folder}: model_type {config.family!r} is not exported to GGUF", remedy=f"known: {known}")
    stretched = (config.rope_scaling or {}).get("rope_type", (config.rope_scaling or {}).get("type", "default"))
    unknown = {
        f"rope_scaling {stretched!r}": stretched not in ("default", "dynamic"),
        "a mixture of experts": config.experts is not None,
        "sliding windows": any(config.windows),
    }
    for what in (name for name, is_there in unknown.items() if is_there):
        raise ConfigError(f"{folder}: {what} cannot be exported to GGUF", remedy="use llama.cpp's own converter")
    return _ARCHITECTURES[config.family]


def model_metadata(config: ModelConfig, architecture: str, *, name: str, kind: GGUFType) -> dict[str, Any]:
    """The keys that describe the network."""
    shape: dict[str, Any] = {
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    general = {"architecture": architecture, "name": name, "file_type": _FILE_TYPES[kind], "quantization_version": 2}
    found = {f"general.{key}": value for key, value in general.items()}
    return found | {f"{architecture}.{key}": value for key, value in shape.items()}


def model_tensors(model: CausalLM, architecture: str, *, kind: GGUFType) -> Iterator[GGUFTensor]:
    """All tensors under llama.cpp's names."""
    wide: GGUFType = "q8_0" if kind == "q4_0" else kind
    trunk = model.trunk
    yield _tensor("token_embd.weight", trunk.embedding.weight, wide)
    yield _tensor("output_norm.weight", trunk.norm.weight, "f32")
    if model.head is not None:
        yield _tensor("output.weight", _weight(model.head), wide)
    for index in range(model.config.num_layers):
        for name, tensor in _layer(model, index, turned=architecture == "llama"):
            yield _tensor(f"blk.{index}.{name}", tensor, kind)


def _layer(model: CausalLM, index: int, *, turned: bool) -> Iterator[tuple[str, Tensor]]:
    block: Any = model.trunk.layers[index]
    attention, mlp = block.attention, block.mlp
    yield "attn_norm.weight", block.attention_norm.weight
    yield "ffn_norm.weight", block.mlp_norm.weight
    yield from _projections(attention.qkv, model.config, turned=turned)
    yield "attn_output.weight", _weight(attention.out)
    if attention.out.bias is not None:
        yield "attn_output.bias", attention.out.bias
    for suffix, fused, down in (
        ("weight", _weight(mlp.gate_up), _weight(mlp.down)),
        ("bias", mlp.gate_up.bias, mlp.down.bias),
    ):
        if fused is not None:
            gate, up = fused.chunk(2)
            yield f"ffn_gate.{suffix}", gate
            yield f"ffn_up.{suffix}", up
            yield f"ffn_down.{suffix}", down


def _projections(qkv: Linear | QuantLinear, config: ModelConfig, *, turned: bool) -> Iterator[tuple[str, Tensor]]:
    sizes = {"num_kv_heads": config.num_kv_heads, "queries_per_kv": config.queries_per_kv, "num_parts": 3}
    fused = {"weight": _weight(qkv), "bias": qkv.bias}
    for suffix, tensor in fused.items():
        if tensor is not None:
            query, key, value = split_qkv(tensor, **sizes)
            rotated = (neighboring(part, config.head_dim) if turned else part for part in (query, key))
            for name, part in zip("qkv", (*rotated, value), strict=True):
                yield f"attn_{name}.{suffix}", part


def neighboring(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (head, half, i) -> (head, i, half): numbers that turn together stand together."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _weight(layer: Linear | QuantLinear) -> Tensor:
    return layer.weight(torch.float32) if isinstance(layer, QuantLinear) else layer.weight


def _tensor(name: str, tensor: Tensor, kind: GGUFType) -> GGUFTensor:
    if tensor.dim() == 1:
        kind = "f32"
    elif kind in ("q8_0", "q4_0") and tensor.shape[-1] % BLOCK:
        kind = "f16"  # as llama.cpp does where rows are no whole blocks
    return GGUFTensor(name, tuple(tensor.shape), kind, lambda: _numbers(tensor))


def _numbers(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().float().cpu().numpy()
    return found
