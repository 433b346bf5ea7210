"""Rotary positions and their stretchings for contexts beyond the trained one.

Su et al. 2021 (arXiv 2104.09864), halves rotated as Hugging Face does. Kinds: linear (Chen et al. 2023, arXiv
2306.15595), dynamic NTK, YaRN (Peng et al. 2023, arXiv 2309.00071), llama3 (arXiv 2407.21783). Both spellings of the
settings are read: `rope_scaling` with `type` or `rope_type`, and `rope_parameters`.

Dynamic NTK: transformers makes the base anew whenever a sequence grows, which a cache of rotated keys cannot follow.
Here, as in LMDeploy, the base is fixed beforehand. Within the trained length nothing changes, as in transformers; for
a longer one, `ModelConfig.stretched(length)` (`load_model(context=length)`) fixes the base that transformers has at a
sequence of exactly `length` tokens, for all positions and all sequences.

    >>> angles = rotation(torch.arange(4), theta=1e4, head_dim=64, dtype=torch.float32)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from puyu.errors import CheckpointError

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
RopeKind = Literal["yarn", "linear", "ntk", "llama3", "none"]
"""How a model is made longer for training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How frequencies are stretched; `original` is the context length before stretching, in tokens."""

    kind: str
    factor: float
    original: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    amplitude: float = 1.0
    """YaRN: factor on cos and sin."""
    truncate: bool = True

    @staticmethod
    def read(value: Mapping[str, Any] | None, *, max_positions: int) -> RopeScaling | None:
        """From config.json's settings; None when they change nothing. CheckpointError names what cannot be used."""
        kind = (value or {}).get("rope_type", (value or {}).get("type", "default"))
        if not value or kind == "default":
            return None
        if kind not in KINDS:
            raise CheckpointError(
                f"rope_scaling type {kind!r} is not supported", remedy=f"supported: {', '.join(KINDS)}"
            )
        original = int(value.get("original_max_position_embeddings") or max_positions)
        factor = _number(value, "factor", max_positions / original if kind == "yarn" else None)
        settings = {"kind": kind, "original": original, "factor": factor}
        if kind == "llama3":
            settings |= {key: _number(value, key, None) for key in ("low_freq_factor", "high_freq_factor")}
        if kind == "yarn":
            settings |= {"beta_fast": _number(value, "beta_fast", 32.0), "beta_slow": _number(value, "beta_slow", 1.0)}
            settings |= {"amplitude": _amplitude(value, factor), "truncate": value.get("truncate", True)}
        return RopeScaling(**settings)

    def dynamic_theta(self, theta: float, *, head_dim: int, length: int) -> float:
        """The base that dynamic NTK has at a sequence of `length` tokens."""
        growth = self.factor * max(length, self.original) / self.original - (self.factor - 1)
        return float(theta * growth ** (head_dim / (head_dim - 2)))


def _number(value: Mapping[str, Any], key: str, default: float | None) -> float:
    found = default if value.get(key) is None else value[key]
    if not isinstance(found, int | float) or isinstance(found, bool) or found <= 0:
        raise CheckpointError(f"rope_scaling.{key} must be a number above 0, got {found!r}", remedy="mend config.json")
    return float(found)


def _amplitude(value: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor on attention: given, from the two mscales, or 0.1 ln(factor) + 1."""
    if value.get("attention_factor") is not None:
        return _number(value, "attention_factor", None)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, over = value.get("mscale"), value.get("mscale_all_dim")
    return magnitude(mscale) / magnitude(over) if mscale and over else magnitude(1.0)


class Rotation(NamedTuple):
    """cos and sin of each token's angles, [T, 1, 1, H], both halves equal."""

    cos: Tensor
    sin: Tensor


def rotation(
    positions_T: Tensor, *, theta: float, head_dim: int, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> Rotation:
    """Angles position * frequency, frequencies theta^(-2i/H), computed in fp32 (fp64 for an fp64 model)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if scaling is None or scaling.kind == "dynamic":  # dynamic: within the trained length nothing changes
        exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=wide) / head_dim
        angles = positions_T.to(wide)[:, None] / theta**exponents
    else:
        angles = positions_T.to(wide)[:, None] * _stretched(scaling, theta, head_dim, positions_T.device).to(wide)
    angles = torch.cat((angles, angles), dim=-1)[:, None, None, :]
    if scaling is None or scaling.amplitude == 1.0:
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))
    return Rotation((angles.cos() * scaling.amplitude).to(dtype), (angles.sin() * scaling.amplitude).to(dtype))


def rotate(x_TxxH: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each (i, i + H/2) pair; x is [T, groups, heads, H]."""
    first, second = x_TxxH.chunk(2, dim=-1)
    return x_TxxH * rotation.cos + torch.cat((-second, first), dim=-1) * rotation.sin


@lru_cache(maxsize=16)
def _stretched(scaling: RopeScaling, theta: float, head_dim: int, device: torch.device) -> Tensor:
    """Frequencies [H / 2], fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / theta**exponents
    if scaling.kind == "linear":
        return (plain / scaling.factor).to(device)
    if scaling.kind == "llama3":
        return _llama3(plain, scaling).to(device)
    kept = _kept_share(scaling, theta, head_dim)
    return (plain / scaling.factor * (1 - kept) + plain * kept).to(device)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Short waves stay, long ones are stretched, between the two borders they are mixed."""
    turns = scaling.original * plain / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def _kept_share(scaling: RopeScaling, theta: float, head_dim: int) -> Tensor:
    """YaRN: how much of each frequency stays as it was, from 1 (turns often) to 0 (hardly turns)."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
