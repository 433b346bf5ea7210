"""ModelConfig: the shape of the network, read from and written to a Hugging Face `config.json`.

One frozen dataclass for all families; what differs between them is a row of `families.py`.
Sources: InternLM2 report (arXiv 2403.17297) and the config.json files of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from puyu.errors import CheckpointError, ConfigError
from puyu.model.families import FAMILIES, REFUSED, Family
from puyu.model.rope import RopeKind, RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """A mixture of experts: how many, how many of them a token gets, and their inner units."""

    count: int
    per_token: int
    size: int
    shared_size: int = 0
    """Inner units of the expert that all tokens get; 0 is none."""
    normalize: bool = True
    """Whether the weights of a token's experts are scaled to a sum of one."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have a plain MLP instead."""

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count or self.size < 1:
            raise ConfigError(f"{self.per_token} of {self.count} experts a token, of {self.size} units, cannot be")


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
    mlp_bias: bool = False
    experts: ExpertShape | None = None
    windows: tuple[int, ...] = ()
    """For each layer, how many tokens a query sees, itself included; 0 is all before it. Empty: no layer has one."""
    initializer_range: float = 0.02
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = 2
    stop_ids: tuple[int, ...] = ()
    """All ids that end a text, when they are more than `eos_id`."""
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
        if self.windows and (len(self.windows) != self.num_layers or self.row.slides is None):
            raise ConfigError(f"{len(self.windows)} windows for {self.num_layers} layers of a {self.family} model")
        if self.experts is not None and self.row.mixture is None:
            raise ConfigError(f"a {self.family} model has no experts")
        _ = self.scaling  # settings that cannot be used are found here

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

    @property
    def scaling(self) -> RopeScaling | None:
        """How rotary positions are stretched."""
        return RopeScaling.read(self.rope_scaling, max_positions=self.max_positions)

    def window(self, layer: int) -> int:
        """How many tokens a query of that layer sees, itself included; 0 is all before it."""
        return self.windows[layer] if self.windows else 0

    def stretched(self, length: int) -> ModelConfig:
        """This model for contexts of `length` tokens. Beyond `max_positions`, dynamic NTK becomes a fixed larger base
        (see rope.py); the other kinds of scaling, and models without one, keep their angles."""
        scaling = self.scaling
        if length <= self.max_positions:
            return self
        if scaling is None:
            return self.with_(max_positions=length)
        if scaling.kind == "dynamic":
            theta = scaling.dynamic_theta(self.rope_theta, head_dim=self.head_dim, length=length)
            return self.with_(max_positions=length, rope_theta=theta, rope_scaling=None)
        settled = {"original_max_position_embeddings": scaling.original, "factor": scaling.factor}
        return self.with_(max_positions=length, rope_scaling={**(self.rope_scaling or {}), **settled})

    def longer(self, length: int, rope: RopeKind) -> ModelConfig:
        """This model for training on contexts of `length` tokens beyond its own, with its positions stretched: `yarn`,
        `linear` or `llama3` as rope.py says, `ntk` by a larger base, `none` not at all."""
        if length <= self.max_positions:
            return self
        if rope == "none":
            return self.with_(max_positions=length)
        original = self.scaling.original if self.scaling else self.max_positions
        if rope == "ntk":
            theta = self.rope_theta * (length / original) ** (self.head_dim / (self.head_dim - 2))
            return self.with_(max_positions=length, rope_theta=theta, rope_scaling=None)
        settings = {"rope_type": rope, "factor": length / original, "original_max_position_embeddings": original}
        if rope == "llama3":
            settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return self.with_(max_positions=length, rope_scaling=settings)

    @staticmethod
    def from_hf(value: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face config; CheckpointError names a missing key or an unsupported family."""
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{where} must hold a JSON object, not {type(value).__name__}")
        row = _family(value, where)
        value = {**row.defaults, **{row.aliases.get(key, key): item for key, item in value.items()}}
        _check_values(value, where)
        try:
            fields = {ours: value[hf] for ours, hf in _KEYS.items() if hf in value or ours in _REQUIRED}
            experts = _read_experts(value, row)
        except KeyError as error:
            raise CheckpointError(f"{where}: missing key {error.args[0]!r}") from error
        fields["num_kv_heads"] = fields.get("num_kv_heads") or fields["num_heads"]
        if value.get("hidden_act") not in (None, "silu"):
            raise CheckpointError(f"{where}: hidden_act {value['hidden_act']!r} is not supported", remedy="only silu")
        fields = {key: item for key, item in fields.items() if item is not None or key in _IDS}
        return ModelConfig(
            family=value["model_type"],
            **_read_rope(value, where),
            qkv_bias=_flag(row.qkv_bias, value),
            out_bias=_flag(row.out_bias, value),
            mlp_bias=_flag(row.mlp_bias, value),
            **_read_ids(fields),
            experts=experts,
            windows=_read_windows(value, row, where),
            extra={key: item for key, item in value.items() if key not in _keys_of(row)},
        )

    def to_hf(self, *, architecture: str | None = None) -> dict[str, Any]:
        """The config.json of this model, readable by transformers (and its remote code for InternLM2)."""
        row = self.row
        value: dict[str, Any] = {"architectures": [architecture or row.architecture], "model_type": self.family}
        value |= {hf: item for ours, hf in _KEYS.items() if (item := getattr(self, ours)) is not None or ours in _IDS}
        if self.stop_ids:
            value["eos_token_id"] = list(self.stop_ids)
        value["rope_theta"] = self.rope_theta
        value["rope_scaling"] = dict(self.rope_scaling) if self.rope_scaling else None
        value |= _bias_keys(self) | _expert_keys(self) | _window_keys(self) | _rotary_keys(self)
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


_IDS = ("pad_id", "bos_id", "eos_id")
_BIASES = ("qkv_bias", "out_bias", "mlp_bias")
_WINDOW_KEYS = {"sliding_window", "use_sliding_window", "layer_types"}


_COUNTS = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "head_dim", "max_positions")
_OBJECTS = ("rope_scaling", "rope_parameters", "rotary", "quantization_config")


def _check_values(value: Mapping[str, Any], where: str) -> None:
    """CheckpointError for the first key that holds another kind of value than it must."""
    for name in ("vocab_size", *_COUNTS):
        found = value.get(_KEYS[name], 1)
        fits = isinstance(found, int) and not isinstance(found, bool) and found >= 1
        if not (fits or (found is None and name not in _REQUIRED)):
            raise CheckpointError(f"{where}: {_KEYS[name]} must be a number of at least 1, got {found!r}")
    for name in _IDS:
        found = value.get(_KEYS[name])
        ids = found if isinstance(found, list) else [found]
        if not ids or not all(id is None or isinstance(id, int) for id in ids):
            raise CheckpointError(f"{where}: {_KEYS[name]} must be a token id or a list of them, got {found!r}")
    for key in _OBJECTS:
        if not isinstance(value.get(key) or {}, Mapping):
            raise CheckpointError(f"{where}: {key} must be an object, got {value[key]!r}")
    for key in ("rms_norm_eps", "rope_theta"):
        if not isinstance(value.get(key, 0.0), int | float | None):
            raise CheckpointError(f"{where}: {key} must be a number, got {value[key]!r}")


def _family(value: Mapping[str, Any], where: str) -> Family:
    kind = value.get("model_type")
    if kind in REFUSED:
        raise CheckpointError(f"{where}: model_type {kind!r} is not supported: {REFUSED[kind]}")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{where}: model_type {kind!r} is not supported", remedy=f"supported: {known}")
    return FAMILIES[kind]


def _keys_of(row: Family) -> set[str]:
    """The config keys that are read, and written anew; all others are carried along."""
    keys = {*_KEYS.values(), "model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}
    keys |= {"rope_theta", "rope_scaling", "rope_parameters"}
    keys |= {key for name in _BIASES if isinstance(key := getattr(row, name), str)}
    if row.slides is not None:
        keys |= _WINDOW_KEYS
    if row.mixture is not None:
        keys |= {row.mixture.count_key, row.mixture.size_key, "num_experts_per_tok", "shared_expert_intermediate_size"}
        keys |= {"norm_topk_prob", "mlp_only_layers", "decoder_sparse_step"}
    return keys


def _flag(source: str | bool, value: Mapping[str, Any]) -> bool:
    """What a family fixes, or what its config key says."""
    return bool(value.get(source, False)) if isinstance(source, str) else source


def _read_rope(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """theta and scaling from the old keys (rope_theta, rope_scaling), transformers 5's rope_parameters, or the first
    InternLM's `rotary`."""
    new, rotary = value.get("rope_parameters") or {}, value.get("rotary") or {}
    if any(isinstance(item, Mapping) for item in new.values()):
        raise CheckpointError(f"{where}: rope_parameters differ from layer to layer, which is not supported")
    if value.get("partial_rotary_factor", new.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise CheckpointError(f"{where}: partial_rotary_factor is not supported", remedy="heads are rotated whole")
    theta = float(new.get("rope_theta") or value.get("rope_theta") or rotary.get("base") or 10_000.0)
    scaling = value.get("rope_scaling") or None
    if scaling is None and new.get("rope_type", "default") != "default":
        scaling = {key: item for key, item in new.items() if key != "rope_theta"}
    if scaling is None and rotary.get("type") == "dynamic":
        scaling = {"type": "dynamic", "factor": float(rotary.get("scaling_factor") or 1.0)}
    return {"rope_theta": theta, "rope_scaling": scaling}


def _rotary_keys(config: ModelConfig) -> dict[str, Any]:
    """The first InternLM's settings, where they came with the model, as they are now."""
    if "rotary" not in config.extra:
        return {}
    kind = config.scaling.kind if config.scaling else "origin"
    return {"rotary": {**(config.extra["rotary"] or {}), "base": config.rope_theta, "type": kind}}


def _bias_keys(config: ModelConfig) -> dict[str, Any]:
    """A key may stand for several biases; ConfigError when they do not agree."""
    keys: dict[str, Any] = {}
    for name in _BIASES:
        source, biased = getattr(config.row, name), getattr(config, name)
        if biased != (keys.setdefault(source, biased) if isinstance(source, str) else source):
            raise ConfigError(f"{name}={biased} cannot be said in the config.json of a {config.family} model")
    return keys


def _read_ids(fields: dict[str, Any]) -> dict[str, Any]:
    """Some configs list several end ids; the first is the model's own, all of them stop generation."""
    ends = fields.get("eos_id")
    several = {"stop_ids": tuple(ends)} if isinstance(ends, list) and len(ends) > 1 else {}
    firsts = {key: fields[key][0] for key in _IDS if isinstance(fields.get(key), list)}
    return {**fields, **firsts, **several}


def _read_windows(value: Mapping[str, Any], row: Family, where: str) -> tuple[int, ...]:
    count, kinds = value["num_hidden_layers"], value.get("layer_types")
    if kinds is not None and (len(kinds) != count or set(kinds) - {"full_attention", "sliding_attention"}):
        remedy = f"{count} entries, each full_attention or sliding_attention"
        raise CheckpointError(f"{where}: layer_types {kinds} cannot be used", remedy=remedy)
    if row.slides is None and "sliding_attention" in (kinds or ()):
        raise CheckpointError(f"{where}: sliding windows are not part of a {value['model_type']} model")
    size = value.get("sliding_window") or 0
    if row.slides is None or not size or not value.get("use_sliding_window", True):
        return ()
    slides = [kind == "sliding_attention" for kind in kinds] if kinds else _by_rule(row, count, value)
    return tuple(size if slide else 0 for slide in slides) if any(slides) else ()


def _by_rule(row: Family, num_layers: int, value: Mapping[str, Any]) -> list[bool]:
    """Which layers have the window where config.json does not list them."""
    border = value.get("max_window_layers", row.defaults.get("max_window_layers", 0))
    return [row.slides is not None and row.slides(layer, border) for layer in range(num_layers)]


def _window_keys(config: ModelConfig) -> dict[str, Any]:
    row = config.row
    if row.slides is None:
        return {}
    slides = [size > 0 for size in config.windows] or [False] * config.num_layers
    keys: dict[str, Any] = {"sliding_window": max(config.windows, default=0) or None}
    if "use_sliding_window" in row.defaults:
        keys["use_sliding_window"] = any(slides)
    if any(slides) and slides != _by_rule(row, config.num_layers, config.extra):
        keys["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return keys


def _read_experts(value: Mapping[str, Any], row: Family) -> ExpertShape | None:
    names = row.mixture
    if names is None or not value.get(names.count_key, 1):
        return None
    step, count = value.get("decoder_sparse_step") or 1, value["num_hidden_layers"]
    dense = {*(value.get("mlp_only_layers") or ()), *(i for i in range(count) if (i + 1) % step)}
    return ExpertShape(
        count=value[names.count_key],
        per_token=value["num_experts_per_tok"],
        size=value[names.size_key],
        shared_size=(value.get("shared_expert_intermediate_size") or 0) if names.shared_gate_up else 0,
        normalize=_flag(names.normalize, value),
        dense_layers=tuple(sorted(dense)),
    )


def _expert_keys(config: ModelConfig) -> dict[str, Any]:
    names, shape = config.row.mixture, config.experts
    if names is None:
        return {}
    if shape is None:
        return {names.count_key: 0}
    keys: dict[str, Any] = {names.count_key: shape.count, "num_experts_per_tok": shape.per_token}
    keys[names.size_key] = shape.size
    if isinstance(names.normalize, str):
        keys |= {
            names.normalize: shape.normalize,
            "mlp_only_layers": list(shape.dense_layers),
            "decoder_sparse_step": 1,
        }
    if names.shared_gate_up:
        keys["shared_expert_intermediate_size"] = shape.shared_size
    return keys
