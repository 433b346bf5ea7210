"""Reference models for these tests: transformers' own code on random weights, saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    InternLM3Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from puyu.model.attention import PackedPlan
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights

VOCAB = 97

KINDS: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "internlm3": (InternLM3Config, LlamaForCausalLM),  # transformers reads InternLM3 as a Llama with biases
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def reference(family: str, *, kv_heads: int = 2, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A small random transformers model; norms and biases are random too, so that none can be left out."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **({} if "rope_parameters" in changes else {"rope_theta": 50_000.0}),
        **changes,
    }
    kind, model_kind = KINDS[family]
    torch.manual_seed(seed)
    model = model_kind(kind(**shape)).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Norms and biases too."""
    for name, parameter in model.named_parameters():
        middle = 1.0 if "norm" in name else 0.0
        parameter.copy_(middle + torch.randn(parameter.shape) * 0.2)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens_T: Tensor) -> Tensor:
    return model(tokens_T[None]).logits[0]


@torch.no_grad()
def our_logits(model: CausalLM, tokens_T: Tensor, starts: tuple[int, ...] = (0,)) -> Tensor:
    """Logits of one packed row; positions restart with each document."""
    ends = (*starts[1:], len(tokens_T))
    positions = torch.cat([torch.arange(end - start) for start, end in zip(starts, ends, strict=True)])
    return model(tokens_T, positions, PackedPlan.build(starts, len(tokens_T)))


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def small_config(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 96,
        "max_positions": 256,
    }
    return ModelConfig(**(shape | changes))


def small_model(seed: int = 0, *, std: float = 0.2, **changes: Any) -> CausalLM:
    model = CausalLM(small_config(**changes))
    init_weights(model, seed=seed, std=std)
    return model.eval()
