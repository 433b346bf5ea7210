"""Quantized modules of a checkpoint <-> the QuantLinear layers of a model: which they are, rows fused and split.

A module is quantized when all of the checkpoint's modules that make it up are stored so; the rest stays as it is,
whatever the config says of `modules_to_not_convert`. Files are unpacked module by module and fused afterwards,
because formats that pack along the outputs cannot be cut at any row.

    fill_quantized(model, form, pairs=pairs, take=stored.take, names=stored.unused)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from puyu.errors import CheckpointError
from puyu.model.config import ModelConfig
from puyu.model.families import fuse_qkv
from puyu.model.linear import Linear, QuantFormat, QuantLinear, QuantWeight
from puyu.model.quant_files import FileForm, Take

Pairs = Sequence[tuple[str, tuple[str, ...]]]
"""(our module name, the checkpoint's module names)."""
Split = Callable[[str, Tensor, int], list[Tensor]]
"""(our module name, a fused tensor, number of parts) -> the rows of each of the checkpoint's modules."""


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def make_quantized(model: nn.Module, form: QuantFormat) -> None:
    """Replace every Linear of the trunk by an empty QuantLinear of the same shape, in place."""
    for name, child in list(model.named_modules()):
        if isinstance(child, Linear) and name.startswith("trunk."):
            empty = QuantLinear(child.in_features, child.out_features, form=form, bias=child.bias is not None)
            replace_module(model, name, empty)


def fill_quantized(model: nn.Module, form: FileForm, *, pairs: Pairs, take: Take, names: Collection[str]) -> None:
    """Replace the layers that are stored quantized by QuantLinear layers with the stored codes, biases empty."""
    config: ModelConfig = model.trunk.config  # type: ignore[union-attr, assignment]
    for ours, theirs in pairs:
        stored = [form.is_stored(names, name) for name in theirs]
        if not any(stored):
            continue
        old = model.get_submodule(ours)
        if not isinstance(old, Linear) or not all(stored):
            problem = "no linear layer" if not isinstance(old, Linear) else f"quantized only in part: {theirs}"
            raise CheckpointError(f"{theirs[0]} is stored quantized, but {ours} is {problem}")
        weight = _fused([form.read(take, name) for name in theirs], ours, theirs, config).simplified()
        if weight.shape != (old.out_features, old.in_features):
            shapes = f"{weight.shape} stored, {(old.out_features, old.in_features)} by config.json"
            raise CheckpointError(f"{theirs[0]} has the wrong shape [outputs, inputs]: {shapes}")
        _drop_empty_biases(old, theirs, take, names)
        layer = QuantLinear.of(weight)
        layer.bias = None if old.bias is None else nn.Parameter(torch.empty_like(old.bias))
        replace_module(model, ours, layer)


def _fused(parts: list[QuantWeight], ours: str, theirs: Sequence[str], config: ModelConfig) -> QuantWeight:
    if len({None if part.perm is None else tuple(part.perm.tolist()) for part in parts}) > 1:
        raise CheckpointError(
            f"{', '.join(theirs)} have groups of different inputs (g_idx), but are one matrix here",
            remedy="take a checkpoint that was quantized without act-order (desc_act), or with one order for all",
        )
    if ours.endswith(".qkv"):
        return QuantWeight.fused(parts, lambda tensors: fuse_qkv(tensors, num_kv_heads=config.num_kv_heads))
    return QuantWeight.fused(parts, torch.cat)


def _drop_empty_biases(old: Linear, theirs: Sequence[str], take: Take, names: Collection[str]) -> None:
    """Some tools store a bias of zeros for layers that have none; any other stays unread, which is an error later."""
    for name in (f"{module}.bias" for module in theirs):
        if old.bias is None and name in names and bool(take(name).any()):
            raise CheckpointError(f"tensor {name!r} is not zero, but the model has no bias there")


def quantized_tensors(model: nn.Module, form: FileForm, *, pairs: Pairs, split: Split) -> dict[str, Tensor]:
    """The tensors of all QuantLinear layers as the checkpoint stores them, biases left out."""
    tensors: dict[str, Tensor] = {}
    for ours, theirs in pairs:
        layer = model.get_submodule(ours)
        if isinstance(layer, QuantLinear):
            for index, name in enumerate(theirs):
                part = layer.matrix().rows(_part(split, ours, len(theirs), index))
                tensors |= {key: value.cpu().contiguous() for key, value in form.write(part, name).items()}
    return tensors


def _part(split: Split, ours: str, count: int, index: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: split(ours, rows, count)[index]
