"""AdamW as InternLM2 used it, or Muon, or one-byte moments; rates of their groups, and the factor that clips.

Loshchilov and Hutter 2019; betas (0.9, 0.95), eps 1e-8, decay on matrices only, global norm clipped at 1.

    optimizer = make_optimizer(model.named_parameters(), OptimConfig(lr=1e-3))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from puyu.configure import Config
from puyu.train.adam8 import AdamW8
from puyu.train.muon import MuonAdamW, Parts, adam_state
from puyu.train.schedule import Kind, lr_at


class OptimConfig(Config):
    """Optimizer and learning-rate schedule."""

    kind: Literal["adamw", "muon", "adamw8"] = "adamw"
    """adamw; muon for the matrices of the blocks and AdamW for the rest; adamw8 with moments of one byte a number."""
    lr: float = 1e-3
    """Peak learning rate (AdamW)."""
    muon_lr: float = 0.03
    """Peak learning rate of Muon's matrices; it follows the same schedule."""
    muon_momentum: float = 0.95
    """Muon's momentum."""
    muon_split: bool = False
    """Muon takes query, key and value of each key head, gate and up, as matrices of their own."""
    schedule: Kind = "cosine"
    """cosine, constant, or wsd (warm-up, stable, linear decay)."""
    warmup: float = 0.05
    """Steps of linear warm-up; below 1 it is a share of all steps."""
    floor: float = 0.1
    """Share of the peak rate at the last step (cosine and wsd)."""
    decay: float = 0.2
    """Share of the steps in which wsd falls."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.95
    """AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    scale: dict[str, float] = Field(default={})
    """Prefix of parameter names, or a pattern with *, -> factor on their learning rate."""

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of the 0-based `step` of `steps`."""
        warmup = round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)
        return lr_at(
            step, steps=steps, peak=self.lr, kind=self.schedule, warmup=warmup, floor=self.floor, decay=self.decay
        )


class _Role(NamedTuple):
    """What the parameters of one group have in common."""

    decay: float
    scale: float
    momentum: float


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, *, parts: Mapping[str, Parts] | None = None
) -> torch.optim.Optimizer:
    """The optimizer over the parameters that train; matrices alone have weight decay. `parts`: what Muon splits."""
    named = list(named)
    groups: dict[_Role, list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault(_role(name, parameter, config), []).append(parameter)
    rows = [{"params": p, "weight_decay": r.decay, "scale": r.scale, "momentum": r.momentum} for r, p in groups.items()]
    betas = (config.beta1, config.beta2)
    if config.kind == "muon":
        split = {parameter: parts[name] for name, parameter in named if name in parts} if parts else {}
        return MuonAdamW(rows, betas=betas, eps=config.eps, parts=split)
    if config.kind == "adamw8":
        return AdamW8(rows, betas=betas, eps=config.eps)
    return torch.optim.AdamW(rows, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def _role(name: str, parameter: nn.Parameter, config: OptimConfig) -> _Role:
    decay = config.weight_decay if parameter.ndim >= 2 else 0.0
    scale = next(
        (factor for key, factor in config.scale.items() if name.startswith(key) or fnmatchcase(name, key)), 1.0
    )
    if config.kind == "muon" and parameter.ndim == 2 and ".layers." in name:
        return _Role(decay, scale * config.muon_lr / config.lr, config.muon_momentum)
    return _Role(decay, scale, 0.0)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, each times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Make the states that the first step would make, at zero; those that exist are left alone."""
    if isinstance(optimizer, MuonAdamW | AdamW8):
        optimizer.allocate()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = adam_state(parameter)


def part_of(name: str) -> str:
    """Which part of a model a parameter belongs to, for numbers by part: one of `PARTS`."""
    if "norm" in name:
        return "norms"
    if ".experts." in name:
        return "experts"
    return "blocks" if ".layers." in name else "embedding" if "embedding" in name else "head"


PARTS = ("embedding", "blocks", "experts", "norms", "head")


def clip_factor(norm: float, *, clip: float) -> float:
    """What gradients of that norm are multiplied by, so that their norm is at most `clip` (0: any)."""
    return clip / norm if 0 < clip < norm else 1.0
