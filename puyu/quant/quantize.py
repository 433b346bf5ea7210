"""The `quantize` verb: a language model with int8 or int4 weights, and a receipt.

    puyu quantize --model runs/nano/ppo --bits 8 --out runs/nano/int8

Every linear layer of the trunk becomes integers; embedding, norms and head keep full precision (`rest`). The
result is a checkpoint directory like any other, with `quantization_config` in its config.json. How good and how
fast it is needs an engine, which this room may not see: the caller passes `measure`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from puyu.configure import Config
from puyu.errors import CheckpointError, ConfigError
from puyu.log import Progress
from puyu.model.checkpoint import copy_side_files, is_scalar_checkpoint, load_model, read_config, save_model
from puyu.model.heads import CausalLM
from puyu.model.linear import Linear, QuantFormat
from puyu.quant.rtn import quantize_weight

Measure = Callable[[Path], dict[str, Any]]


class QuantizeConfig(Config):
    model: Path
    """Checkpoint directory of a language model in full precision."""
    bits: Literal[8, 4] = 8
    """Bits of a weight: 8 (one scale a row) or 4 (a scale and a zero point a group)."""
    group: Literal[32, 64, 128] = 64
    """int4: inputs that share a scale; must divide every layer's inputs. Smaller is more exact and larger in size."""
    rest: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of what stays: embedding, norms, head, biases."""


@dataclass
class WeightError:
    """Differences between dequantized and original weights, gathered over layers."""

    count: int = 0
    largest: float = 0.0
    total: float = 0.0
    squared: float = 0.0
    signal: float = 0.0

    def add(self, original: torch.Tensor, stands_for: torch.Tensor) -> None:
        difference = (stands_for - original.float()).abs()
        self.count += difference.numel()
        self.largest = max(self.largest, difference.max().item())
        self.total += difference.sum(dtype=torch.float64).item()
        self.squared += difference.double().square().sum().item()
        self.signal += original.double().square().sum().item()

    def numbers(self) -> dict[str, float]:
        """`relative` is the norm of the differences over the norm of the weights."""
        relative = math.sqrt(self.squared / self.signal) if self.signal else 0.0
        return {"max": self.largest, "mean": self.total / max(self.count, 1), "relative": relative}


def run(config: QuantizeConfig, *, out: Path, measure: Measure | None = None) -> dict[str, Any]:
    """Quantize `config.model` into `out`; returns sizes in bytes, weight errors and what `measure` found.

    Work that a kill left in `out` is written anew: every file appears by rename, with the same bytes.
    """
    form = QuantFormat(config.bits, 0 if config.bits == 8 else config.group)
    check_source(config.model)
    model = load_model(config.model)
    error = quantize_model(model, form)
    shape = model.config.with_(quantization=form.to_config())
    rest = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.rest]
    save_model(model, out, dtype=rest, config=shape)
    _carry_files(config.model, out)
    numbers = {
        "bits": form.bits,
        "group": form.group,
        "size_before": weight_bytes(config.model),
        "size_after": weight_bytes(out),
        "weight_error": error.numbers(),
    }
    if measure is not None:
        numbers |= {"before": measure(config.model), "after": measure(out)}
    return numbers


def check_source(folder: Path) -> None:
    """Refuse what cannot be quantized, before any weight is read."""
    if read_config(folder).quantization:
        raise ConfigError(f"{folder} is quantized already", remedy="give the full-precision checkpoint it was made of")
    if is_scalar_checkpoint(folder):
        raise ConfigError(f"{folder} is a reward model", remedy="only language models are quantized")


def quantize_model(model: CausalLM, form: QuantFormat) -> WeightError:
    """Replace every linear layer of the trunk, in place; returns the errors of their weights."""
    layers = [(name, child) for name, child in model.trunk.named_modules() if isinstance(child, Linear)]
    for name, layer in layers:
        _check_layer(name, layer, form)
    error, progress = WeightError(), Progress("quantize", len(layers), unit="layers")
    for name, layer in layers:
        found = quantize_weight(layer.weight.detach(), form)
        error.add(layer.weight.detach(), found.dequantized())
        parent, _, child = name.rpartition(".")
        owner: nn.Module = model.trunk.get_submodule(parent)
        setattr(owner, child, found.layer(bias=layer.bias))
        progress.update()
    progress.close()
    return error


def _check_layer(name: str, layer: Linear, form: QuantFormat) -> None:
    if not form.fits(layer.in_features):
        fitting = [group for group in (128, 64, 32) if layer.in_features % group == 0]
        remedy = f"set group={fitting[0]}" if fitting else "use bits=8"
        raise ConfigError(f"group {form.group} does not divide the {layer.in_features} inputs of {name}", remedy=remedy)
    if not layer.weight.isfinite().all():
        raise CheckpointError(f"{name}.weight holds NaN or infinity", remedy="quantize an earlier checkpoint")


def _carry_files(source: Path, out: Path) -> None:
    copy_side_files(source, out)
    if (source / "generation_config.json").is_file():  # may name more stop tokens than config.json does
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")


def weight_bytes(folder: Path) -> int:
    """Bytes of all weight files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
