"""ModelConfig: the shape of the network, read from and written to a Hugging Face `config.json`.

One frozen dataclass for all families; what differs between them is a row of `families.py`.
Sources: InternLM2 report (arXiv 2403.17297) and the config.json files of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from puyu.errors import CheckpointError, ConfigError
from puyu.model.families import FAMILIES, Family


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder. Sizes are counts of elements; `max_positions` is in tokens."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    head_dim: int = 0
    """0 means hidden_size / num_heads."""
    family: str = "internlm2"
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    max_positions: int = 2048
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    initializer_range: float = 0.02
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = 2
    quantization: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the source config.json that this package does not read; written back unchanged."""

    def __post_init__(self) -> None:
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // max(self.num_heads, 1))
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} must be even for rotary positions")
        _check_rope_scaling(self.rope_scaling)

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head (g)."""
        return self.num_heads // self.num_kv_heads

    @property
    def row(self) -> Family:
        """This family's row of the table."""
        return FAMILIES[self.family]

    def with_(self, **changes: Any) -> ModelConfig:
        """A copy with fields changed."""
        return replace(self, **changes)

    @staticmethod
    def from_hf(value: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face config; CheckpointError names a missing key or an unsupported family."""
        kind = value.get("model_type")
        if kind not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise CheckpointError(f"{where}: model_type {kind!r} is not supported", remedy=f"supported: {known}")
        row = FAMILIES[kind]
        known_keys = {hf: ours for ours, hf in _KEYS.items()}
        try:
            fields = {ours: value[hf] for ours, hf in _KEYS.items() if hf in value or ours in _REQUIRED}
        except KeyError as error:
            raise CheckpointError(f"{where}: missing key {error.args[0]!r}") from error
        fields["num_kv_heads"] = fields.get("num_kv_heads") or fields["num_heads"]
        if value.get("hidden_act") not in (None, "silu"):
            raise CheckpointError(f"{where}: hidden_act {value['hidden_act']!r} is not supported", remedy="only silu")
        fields["rope_theta"], fields["rope_scaling"] = _read_rope(value)
        biased = bool(value.get(row.bias_key, False)) if row.bias_key else row.qkv_bias
        ignored = set(known_keys) | {"model_type", "architectures", "rope_theta", "rope_scaling", "rope_parameters"}
        ignored |= {row.bias_key or "", "torch_dtype", "dtype", "transformers_version"}
        extra = {key: item for key, item in value.items() if key not in ignored}
        fields = {
            key: item for key, item in fields.items() if item is not None or key in ("pad_id", "bos_id", "eos_id")
        }
        return ModelConfig(
            family=kind, qkv_bias=biased, out_bias=biased and row.out_bias, extra=extra, **_first_ids(fields)
        )

    def to_hf(self, *, architecture: str | None = None) -> dict[str, Any]:
        """The config.json of this model, readable by transformers (and its remote code for InternLM2)."""
        value: dict[str, Any] = {"architectures": [architecture or self.row.architecture], "model_type": self.family}
        value |= {hf: getattr(self, ours) for ours, hf in _KEYS.items() if getattr(self, ours) is not None}
        value["rope_theta"] = self.rope_theta
        value["rope_scaling"] = dict(self.rope_scaling) if self.rope_scaling else None
        if self.row.bias_key:
            value[self.row.bias_key] = self.qkv_bias
        value["hidden_act"] = "silu"
        return {**self.extra, **value}


_REQUIRED = {"vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size"}

_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
    "quantization": "quantization_config",
}


def _read_rope(value: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    """theta and scaling from the old keys (rope_theta, rope_scaling) or transformers 5's rope_parameters."""
    new = value.get("rope_parameters") or {}
    theta = float(value.get("rope_theta") or new.get("rope_theta") or 10_000.0)
    scaling = value.get("rope_scaling") or None
    if scaling is None and new.get("rope_type", "default") != "default":
        scaling = {key: item for key, item in new.items() if key != "rope_theta"}
    return theta, scaling


def _check_rope_scaling(scaling: Mapping[str, Any] | None) -> None:
    """Dynamic NTK changes nothing within `max_positions`, where this package stays; others are refused by name."""
    if not scaling:
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ("dynamic", "default"):
        raise CheckpointError(f"rope_scaling type {kind!r} is not supported", remedy="supported: default, dynamic")


def _first_ids(fields: dict[str, Any]) -> dict[str, Any]:
    """Some configs list several end ids; the first is the model's own, all of them stop generation."""
    for key in ("bos_id", "eos_id", "pad_id"):
        if isinstance(fields.get(key), list):
            fields[key] = fields[key][0]
    return fields
