"""LoRA adapters beside a model: many in one batch, each token with its own (Hu et al. 2021, arXiv 2106.09685).

y = W x + scale * B (A x), with A [r, in] and B [out, r] of the token's adapter; a token without one gets W x, to the
bit. An `AdapterBank` holds the adapters of one model and adds their share behind its linear layers (S-LoRA, Sheng et
al. 2023, arXiv 2311.03285); the layers and their weights stay as they are, quantized or not. Adapters are read from
peft directories.

    bank = AdapterBank(model)
    bank.load("poet", Path("runs/poet"))
    with bank.using([("poet", 5), ("", 3)]):    # five tokens of the poet, three of the model itself
        model(tokens_T, positions_T, plan)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from puyu.errors import CheckpointError, RequestError
from puyu.files import read_object
from puyu.model.checkpoint import trained_positions
from puyu.model.config import ModelConfig
from puyu.model.families import Join, inputs_of, joins
from puyu.model.heads import CausalLM

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_ALONE = ("use_dora", "modules_to_save", "target_parameters")
_UNSUPPORTED = (
    *("fan_in_fan_out", "trainable_token_indices", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "lora_bias", "arrow_config"),
)


@dataclass(frozen=True, slots=True)
class Delta:
    """One layer of one adapter: A [r, in], and B [out, r] with the scale in it."""

    a: Tensor
    b: Tensor


class AdapterBank:
    """Adapters of one model by name, and which of them each token of the running step uses."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self._adapters: dict[str, dict[str, Delta]] = {}
        self._parts: list[tuple[slice, dict[str, Delta]]] = []
        self._hooks: dict[str, tuple[nn.Module, RemovableHandle]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def load(self, name: str, folder: Path) -> None:
        """Read a peft directory; CheckpointError names what does not fit the model."""
        if not name or name in self._adapters:
            raise CheckpointError(f"an adapter needs a name of its own, {name!r} is not free")
        if trained_positions(folder):
            raise CheckpointError(
                f"{folder} was trained with stretched positions, which it cannot bring to a model beside others",
                remedy="make one checkpoint of it: puyu merge",
            )
        trunk = self.model.trunk
        dtype = trunk.compute_dtype or trunk.embedding.weight.dtype
        self._adapters[name] = read_adapter(Path(folder), self.model.config, dtype=dtype, device=trunk.device)

    def unload(self, name: str) -> None:
        """Forget an adapter; with the last one, the model is as it was."""
        self.check(name)
        self._adapters.pop(name, None)
        if not self._adapters:
            for _, handle in self._hooks.values():
                handle.remove()
            self._hooks.clear()

    def check(self, name: str) -> None:
        """RequestError for an adapter that is not loaded."""
        if name and name not in self._adapters:
            known = ", ".join(self._adapters) or "none is loaded"
            raise RequestError(f"no such adapter: {name!r}", param="adapter", remedy=f"loaded: {known}")

    @contextlib.contextmanager
    def using(self, spans: Sequence[tuple[str, int]]) -> Iterator[None]:
        """(adapter or "", number of tokens) in the order of the tokens of the forward inside; others use none."""
        parts, start = [], 0
        for name, count in spans:
            if name:
                parts.append((slice(start, start + count), self._adapters[name]))
            start += count
        if parts:
            self._attach()
        try:
            self._parts = parts
            yield
        finally:
            self._parts = []

    def _attach(self) -> None:
        """Hook the layers that adapters change, wherever they have been replaced since (by quantized ones)."""
        for name in {name for deltas in self._adapters.values() for name in deltas}:
            module = self.model.get_submodule(name)
            known = self._hooks.get(name)
            if known is None or known[0] is not module:
                self._hooks[name] = (module, module.register_forward_hook(partial(self._add, name)))
                if known is not None:
                    known[1].remove()

    def _add(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The layer's output with each adapter's share on its own tokens."""
        parts = [(rows, deltas[name]) for rows, deltas in self._parts if name in deltas]
        if not parts:
            return None
        output = output.clone()
        for rows, delta in parts:
            x = inputs[0][rows]
            output[rows] += (x @ delta.a.T.to(x.dtype)) @ delta.b.T.to(x.dtype)
        return output


def read_adapter(
    folder: Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Delta]:
    """Our layers' names -> their deltas, from a peft directory."""
    settings, stored = read_settings(folder), read_tensors(folder)
    unused, deltas = set(stored), {}
    for ours, (join, theirs) in joins(config).items():
        pairs = [_take(stored, unused, name) for name in theirs]
        if not any(pairs):
            continue
        if ".experts." in ours:
            raise CheckpointError(
                f"{folder} changes {theirs[0]}: adapters of experts cannot run beside other adapters",
                remedy="merge the adapter into its base: puyu merge ADAPTER --out DIR",
            )
        scales = [scale_of(settings, name, pair) for name, pair in zip(theirs, pairs, strict=True)]
        delta = _fused(ours, join, pairs, scales, inputs=inputs_of(ours, config))
        deltas[ours] = Delta(delta.a.to(device, dtype), delta.b.to(device, dtype))
    if unused:
        raise CheckpointError(f"{folder}: {len(unused)} tensors fit no layer of the model: {sorted(unused)[:3]}")
    return deltas


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a peft directory."""
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}", remedy="copy the adapter again") from error


def read_settings(folder: Path, *, training: bool = False) -> Mapping[str, Any]:
    """peft's settings; CheckpointError names what is not supported (`training`: what only a running batch of many
    adapters cannot do is)."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no adapter_config.json", remedy="give the directory that peft has written")
    settings = read_object(path)
    if settings.get("peft_type", "LORA") != "LORA" or settings.get("bias", "none") != "none":
        kind = f"peft_type {settings.get('peft_type')!r} with bias {settings.get('bias')!r}"
        raise CheckpointError(f"{path}: {kind} is not supported", remedy="LORA with bias none is")
    unsupported = _UNSUPPORTED if training else (*_ALONE, *_UNSUPPORTED)
    wrong = [name for name in unsupported if settings.get(name)]
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong[0]} is not supported",
            remedy="merge the adapter into its base: puyu merge ADAPTER --out DIR",
        )
    return settings


Pair = tuple[Tensor, Tensor] | None


def _take(stored: Mapping[str, Tensor], unused: set[str], name: str) -> Pair:
    """A and B of one layer of the checkpoint, if the adapter has it."""
    keys = [f"{PREFIX}{name}.lora_{kind}.weight" for kind in "AB"]
    if not all(key in stored for key in keys):
        return None
    unused.difference_update(keys)
    return stored[keys[0]], stored[keys[1]]


def scale_of(settings: Mapping[str, Any], name: str, pair: Pair) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); `alpha_pattern` holds regular expressions of the
    names' ends, of which the first that fits counts, as in peft."""
    if pair is None:
        return 0.0
    rank, patterns = pair[0].shape[0], settings.get("alpha_pattern") or {}
    named = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)]
    alpha = float(named[0] if named else settings.get("lora_alpha", rank))
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _fused(ours: str, join: Join, pairs: Sequence[Pair], scales: Sequence[float], *, inputs: int) -> Delta:
    """The parts of a fused layer as one: their As below each other, each B in columns of its own."""
    for pair, count in zip(pairs, join.rows, strict=True):
        if pair and (pair[1].shape != (count, pair[0].shape[0]) or pair[0].shape[1] != inputs):
            shapes = f"A {tuple(pair[0].shape)} and B {tuple(pair[1].shape)}"
            raise CheckpointError(
                f"the adapter's {ours} has {shapes}, the model {inputs} inputs and {count} outputs",
                remedy="give an adapter of this very model",
            )
    b = join.beside([pair and pair[1].float() * scale for pair, scale in zip(pairs, scales, strict=True)])
    return Delta(torch.cat([pair[0].float() for pair in pairs if pair]), b)
