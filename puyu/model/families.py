"""The table of model families: how each names its tensors and settings. A family is a row here, never a file.

Inside the package every model has InternLM2's fused layout: `qkv` rows are (kv group, g queries + key + value,
head_dim) and `gate_up` is the gate above the up projection. A row says which tensors of a Hugging Face
checkpoint make up each of ours; fusing and splitting only move rows, so they hold for weights, biases,
quantized codes and their scales alike. docs/supported-models.md adds a family step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from puyu.model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Names of a mixture of experts: tensors inside a layer (`{}` is the expert's number), and config keys."""

    router: str
    gate_up: tuple[str, str]
    down: str
    shared_gate_up: tuple[str, str] | None = None
    shared_down: str = ""
    shared_gate: str = ""
    count_key: str = "num_experts"
    size_key: str = "moe_intermediate_size"
    normalize: str | bool = "norm_topk_prob"
    """Whether the chosen experts' probabilities are scaled to a sum of one: a config key, or fixed."""


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
    qkv_bias: str | bool = False
    """Whether there is a bias: a config key that says so, or what the family fixes. So for the next two."""
    out_bias: str | bool = False
    mlp_bias: str | bool = False
    qk_norm: tuple[str, str] | None = None
    """Norms over each head's query and key, before the rotation."""
    mixture: Mixture | None = None
    slides: Callable[[int, int], bool] | None = None
    """(layer, max_window_layers) -> whether it has the window; None: the family knows no windows."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What an absent key of config.json means, where it is not what `ModelConfig` takes it for."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of config keys -> the names that are read and written here."""


LLAMA_NAMES: dict[str, Any] = {
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
_QK_NORM = ("self_attn.q_norm", "self_attn.k_norm")
_QWEN_EXPERTS: dict[str, Any] = {
    "router": "mlp.gate",
    "gate_up": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    "down": "mlp.experts.{}.down_proj",
}
_NO_PAD = {"pad_token_id": None, "rms_norm_eps": 1e-6}
_QWEN_DEFAULTS = {
    **_NO_PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _always(layer: int, first: int) -> bool:
    return True


def _from_first(layer: int, first: int) -> bool:
    return layer >= first


def _even_before(layer: int, last: int) -> bool:
    return layer % 2 == 0 and layer < last


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
        qkv_bias="bias",
        out_bias="bias",
    ),
    "internlm": Family(
        architecture="InternLMForCausalLM",
        reward_architecture="InternLMForRewardModel",
        qkv_bias="bias",
        out_bias="bias",
        **LLAMA_NAMES,
    ),
    "internlm3": Family(
        architecture="InternLM3ForCausalLM",
        reward_architecture="InternLM3ForRewardModel",
        qkv_bias="qkv_bias",
        out_bias="bias",
        mlp_bias="bias",
        defaults={"head_dim": 128, "max_position_embeddings": 32768},
        aliases={"attention_bias": "qkv_bias", "mlp_bias": "bias"},
        **LLAMA_NAMES,
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        reward_architecture="LlamaForRewardModel",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults=_NO_PAD,
        **LLAMA_NAMES,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        reward_architecture="Qwen2ForRewardModel",
        qkv_bias=True,
        slides=_from_first,
        defaults=_QWEN_DEFAULTS,
        **LLAMA_NAMES,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        reward_architecture="Qwen3ForRewardModel",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm=_QK_NORM,
        slides=_from_first,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        **LLAMA_NAMES,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        reward_architecture="MistralForRewardModel",
        slides=_always,
        defaults={**_NO_PAD, "sliding_window": 4096, "max_position_embeddings": 131072},
        **LLAMA_NAMES,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        reward_architecture="MixtralForRewardModel",
        slides=_always,
        mixture=Mixture(
            router="block_sparse_moe.gate",
            gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
            down="block_sparse_moe.experts.{}.w2",
            count_key="num_local_experts",
            size_key="intermediate_size",
            normalize=True,
        ),
        defaults={
            "pad_token_id": None,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        **LLAMA_NAMES,
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        reward_architecture="Qwen2MoeForRewardModel",
        qkv_bias="qkv_bias",
        slides=_even_before,
        mixture=Mixture(
            shared_gate_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
            shared_down="mlp.shared_expert.down_proj",
            shared_gate="mlp.shared_expert_gate",
            **_QWEN_EXPERTS,
        ),
        defaults={**_QWEN_DEFAULTS, "qkv_bias": True},
        **LLAMA_NAMES,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        reward_architecture="Qwen3MoeForRewardModel",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm=_QK_NORM,
        slides=_always,
        mixture=Mixture(**_QWEN_EXPERTS),
        defaults=_QWEN_DEFAULTS,
        aliases={"num_local_experts": "num_experts"},
        **LLAMA_NAMES,
    ),
}

REFUSED = {
    "deepseek": "its first mixture is not built like Qwen's; DeepSeek LLM and Coder are llama models",
    "deepseek_v2": "multi-head latent attention is not built here; DeepSeek LLM and Coder are llama models",
    "deepseek_v3": "multi-head latent attention is not built here; DeepSeek LLM and Coder are llama models",
}
"""Families that people will try, and why they are refused."""


Pairs = Iterator[tuple[str, tuple[str, ...]]]


def name_pairs(config: ModelConfig, *, head: str | None) -> Pairs:
    """(our module name, the checkpoint's module names) for the whole model; `head` is the checkpoint's name of it."""
    row = config.row
    yield "trunk.embedding", (row.embedding,)
    for index in range(config.num_layers):
        ours, theirs = f"trunk.layers.{index}.", row.layer.format(index)
        for name, parts in _layer_pairs(config, index):
            yield ours + name, tuple(theirs + part for part in parts)
    yield "trunk.norm", (row.norm,)
    if head is not None:
        yield "head", (head,)


def _layer_pairs(config: ModelConfig, index: int) -> Pairs:
    row = config.row
    yield "attention_norm", (row.attention_norm,)
    yield "attention.qkv", row.qkv
    yield "attention.out", (row.out,)
    if row.qk_norm is not None:
        yield "attention.q_norm", row.qk_norm[:1]
        yield "attention.k_norm", row.qk_norm[1:]
    yield "mlp_norm", (row.mlp_norm,)
    if config.experts is not None and index not in config.experts.dense_layers:
        assert row.mixture is not None, "ModelConfig allows experts only where the family has them"
        yield from _mixture_pairs(row.mixture, count=config.experts.count, shared=config.experts.shared_size > 0)
    else:
        yield "mlp.gate_up", row.gate_up
        yield "mlp.down", (row.down,)


def _mixture_pairs(names: Mixture, *, count: int, shared: bool) -> Pairs:
    yield "mlp.router", (names.router,)
    for number in range(count):
        yield f"mlp.experts.{number}.gate_up", tuple(name.format(number) for name in names.gate_up)
        yield f"mlp.experts.{number}.down", (names.down.format(number),)
    if shared and names.shared_gate_up is not None:
        yield "mlp.shared.gate_up", names.shared_gate_up
        yield "mlp.shared.down", (names.shared_down,)
        yield "mlp.shared_gate", (names.shared_gate,)


def fuse_qkv(parts: Sequence[Tensor], *, num_kv_heads: int) -> Tensor:
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


_PRODUCTS = (".qkv", "attention.out", ".gate_up", ".down")


@dataclass(frozen=True, slots=True)
class Join:
    """How the rows of stored matrices are those of one of our layers: `rows` of each, and the key heads by which
    queries, keys and values alternate (0: they stand below each other)."""

    rows: tuple[int, ...]
    num_kv_heads: int = 0

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """[rows, ...] of each part -> [sum of rows, ...]."""
        if self.num_kv_heads:
            return fuse_qkv(parts, num_kv_heads=self.num_kv_heads)
        return torch.cat(tuple(parts))

    def beside(self, parts: Sequence[Tensor | None]) -> Tensor:
        """[rows, R] of some parts -> [sum of rows, sum of R]: each in columns of its own, zeros elsewhere."""
        like = next(part for part in parts if part is not None)
        widths, blocks = [0 if part is None else part.shape[1] for part in parts], []
        for at, (part, rows) in enumerate(zip(parts, self.rows, strict=True)):
            part = like.new_zeros(rows, 0) if part is None else part
            blocks.append(F.pad(part, (sum(widths[:at]), sum(widths[at + 1 :]))))
        return self(blocks)

    def split(self, joined: Tensor) -> list[Tensor]:
        """The inverse: [sum of rows, ...] -> the parts."""
        if not self.num_kv_heads:
            return list(joined.split(self.rows))
        group = self.rows[0] // self.rows[1]
        return split_qkv(joined, num_kv_heads=self.num_kv_heads, queries_per_kv=group, num_parts=len(self.rows))


def joins(config: ModelConfig) -> dict[str, tuple[Join, tuple[str, ...]]]:
    """Names of our linear layers in the blocks -> how they are joined, and what the family calls the parts."""
    pairs = name_pairs(config, head=None)
    return {ours: (_join(ours, len(theirs), config), theirs) for ours, theirs in pairs if ours.endswith(_PRODUCTS)}


def inputs_of(ours: str, config: ModelConfig) -> int:
    """Input columns of one of our linear layers in the blocks."""
    if ours.endswith(".down"):
        return _width(ours, config)
    return config.num_heads * config.head_dim if ours.endswith(".out") else config.hidden_size


def _width(ours: str, config: ModelConfig) -> int:
    """Inner width of the MLP that a layer belongs to."""
    if config.experts is not None and ".experts." in ours:
        return config.experts.size
    if config.experts is not None and ".shared." in ours:
        return config.experts.shared_size
    return config.intermediate_size


def _join(ours: str, parts: int, config: ModelConfig) -> Join:
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if ours.endswith(".qkv"):
        return Join((heads, kv, kv), config.num_kv_heads) if parts == 3 else Join((heads + 2 * kv,))
    if ours.endswith(".gate_up"):
        return Join((_width(ours, config),) * parts)
    return Join((config.hidden_size,))
