"""Adapters of experts as peft writes them since transformers 5, which holds all experts of a layer in two tensors.

Such an adapter has one pair for the stacked gate and up projections of E experts, A [R * E, D] and B [2 I, R * E] (the
experts' ranks alternate in the columns of B), and one for the down projections, A [R * E, I] and B [D, R * E]; both
hang on `mlp.experts`, one as the other's base layer. Here every matrix of an expert has a share of its own, so they
are taken apart; gate and up of an expert share their A. D hidden, I inner units of an expert, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from puyu.model.config import ExpertShape, ModelConfig
from puyu.model.families import name_pairs
from puyu.model.lora import PREFIX, scale_of

_STACKED = re.compile(re.escape(PREFIX) + r"(.*\.layers\.(\d+)\.mlp\.experts)(\.base_layer)*\.lora_A\.weight")


def take_apart(stored: dict[str, Tensor], settings: Mapping[str, Any], config: ModelConfig) -> dict[str, float]:
    """Replace what is stacked by the pairs of each expert's matrices, in place; returns the scales of those, by name.

    What does not have the shape of the model's experts stays as it is.
    """
    scales: dict[str, float] = {}
    if config.experts is None:
        return scales
    names = dict(name_pairs(config, head=None))
    for found in [found for key in stored if (found := _STACKED.fullmatch(key))]:
        keys = found[0], found[0].replace("lora_A", "lora_B")
        part = _part(stored[keys[0]], stored.get(keys[1]), config.experts, config.hidden_size)
        place = f"trunk.layers.{found[2]}.mlp.experts."
        if f"{place}0.{part}" not in names:
            continue
        a, b = (stored.pop(key) for key in keys)
        count, rank = config.experts.count, len(a) // config.experts.count
        scale = scale_of(settings, f"{found[1]}.{part}_proj", (a[:rank], b[:, :rank]))
        as_ERI, bs_ORE = a.unflatten(0, (count, rank)), b.unflatten(1, (rank, count))
        for number in range(count):
            theirs = names[f"{place}{number}.{part}"]
            for name, rows in zip(theirs, bs_ORE[:, :, number].chunk(len(theirs)), strict=True):
                stored[f"{PREFIX}{name}.lora_A.weight"] = as_ERI[number].clone()
                stored[f"{PREFIX}{name}.lora_B.weight"] = rows.contiguous()
                scales[name] = scale
    return scales


def _part(a: Tensor, b: Tensor | None, shape: ExpertShape, hidden: int) -> str | None:
    """Which projection of the experts a pair belongs to, by its inputs and outputs."""
    if b is None or len(a) != b.shape[1] or len(a) % shape.count:
        return None
    return {(hidden, 2 * shape.size): "gate_up", (shape.size, hidden): "down"}.get((a.shape[1], len(b)))
