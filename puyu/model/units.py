"""The tensors of a plain decoder one by one, wherever they are stored: what conversion between folders is made of.

A `Slot` names a tensor of the model, a `Unit` is that tensor in the package's own layout (queries, keys and values
fused by kv groups, see families.py; gate and up apart), made of mapped parts of which nothing is read before `load`.
Knows no files and no form but the names of a family's row.

    for slot in slots(config):
        print(slot, shape_of(config, slot), tensor_names(config.row, slot))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from puyu.errors import CheckpointError
from puyu.model.config import ModelConfig
from puyu.model.families import Family

LAYER = ("attention_norm", "qkv", "out", "mlp_norm", "gate", "up", "down")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Slot(NamedTuple):
    """One tensor of a model: `layer` counts from 0 and is None outside the layers."""

    layer: int | None
    name: str
    suffix: str = "weight"

    def __str__(self) -> str:
        return f"{'' if self.layer is None else f'layers.{self.layer}.'}{self.name}.{self.suffix}"


def slots(config: ModelConfig) -> Iterator[Slot]:
    """All tensors of a model without experts and norms of heads, embedding first, head last."""
    biases = {"qkv": config.qkv_bias, "out": config.out_bias, **dict.fromkeys(("gate", "up", "down"), config.mlp_bias)}
    yield Slot(None, "embedding")
    for layer in range(config.num_layers):
        for name in LAYER:
            yield Slot(layer, name)
            if biases.get(name):
                yield Slot(layer, name, "bias")
    yield Slot(None, "norm")
    if not config.tie_embeddings:
        yield Slot(None, "head")


def shape_of(config: ModelConfig, slot: Slot) -> tuple[int, ...]:
    """The shape of a tensor in the package's layout."""
    hidden, wide = config.hidden_size, config.num_heads * config.head_dim
    shapes = {
        "embedding": (config.vocab_size, hidden),
        "head": (config.vocab_size, hidden),
        "qkv": (wide + 2 * config.num_kv_heads * config.head_dim, hidden),
        "out": (hidden, wide),
        "gate": (config.intermediate_size, hidden),
        "up": (config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size),
    }
    shape = shapes.get(slot.name, (hidden,))
    return shape if slot.suffix == "weight" else shape[:1]


def tensor_names(row: Family, slot: Slot, layer: int | None = None) -> tuple[str, ...]:
    """What a family calls the parts of a tensor; `layer`: the number it has there, when that is another one."""
    stems = {
        "embedding": (row.embedding,),
        "norm": (row.norm,),
        "head": (row.head,),
        "attention_norm": (row.attention_norm,),
        "qkv": row.qkv,
        "out": (row.out,),
        "mlp_norm": (row.mlp_norm,),
        "gate": row.gate_up[:1],
        "up": row.gate_up[1:],
        "down": (row.down,),
    }[slot.name]
    before = "" if slot.layer is None else row.layer.format(slot.layer if layer is None else layer)
    return tuple(f"{before}{stem}.{slot.suffix}" for stem in stems)


Join = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Unit:
    """One tensor: its stored parts, and how they become it."""

    slot: Slot
    parts: tuple[Tensor, ...]
    join: Join

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def outline(self) -> Tensor:
        """The tensor without its numbers (on the meta device)."""
        return self.join([torch.empty_like(part, device="meta") for part in self.parts])

    def load(self) -> Tensor:
        """The tensor; reads its parts."""
        return self.join(self.parts)

    def then(self, change: Callable[[Tensor], Tensor]) -> Unit:
        """The same with a change applied whenever it is loaded."""
        join = self.join
        return replace(self, join=lambda parts: change(join(parts)))


def checked(unit: Unit, config: ModelConfig, where: str) -> Unit:
    """CheckpointError when its numbers are not plain ones, of one kind, or its shape is not what `config` says."""
    kinds = {part.dtype for part in unit.parts}
    if len(kinds) > 1 or unit.dtype not in DTYPES:
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise CheckpointError(f"{where}: {unit.slot} is stored as {found}", remedy="one of bf16, fp16, fp32, fp64")
    try:
        shape = tuple(unit.outline().shape)
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in unit.parts)
        raise CheckpointError(f"{where}: the parts of {unit.slot} do not fit each other: {shapes}") from error
    if shape != shape_of(config, unit.slot):
        said = f"{shape} stored, {shape_of(config, unit.slot)} by its config"
        raise CheckpointError(f"{where}: {unit.slot} has the wrong shape: {said}")
    return unit


@dataclass(frozen=True)
class Source:
    """A model that is open for reading."""

    config: ModelConfig
    units: tuple[Unit, ...]
    interleaved: bool = False
    """InternEvo: rows of queries and keys stand there in even and odd pairs (the units never have them so)."""
    norm_head: bool = False
    """InternEvo: the rows of the head are normalized whenever they are used."""
