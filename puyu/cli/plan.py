"""`puyu plan --serve MODEL --context N`: what serving a model will need, before anything is loaded or downloaded.

Works from config.json alone (of a folder, or one of the published shapes below), and without torch for plain dense
models; what has experts or norms of its own is counted on the empty model. Weights are counted as they are loaded:
int8 has one scale a row, int4 a scale and a zero point for each group; embedding, head and norms stay bf16.

    puyu plan --serve internlm2-7b --dtype int4 --context 32768 --streams 4
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puyu.errors import CheckpointError, ConfigError, InputError
from puyu.files import read_json

if TYPE_CHECKING:
    from puyu.model.config import ModelConfig
    from puyu.model.heads import CausalLM

_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

SHAPES: dict[str, tuple[int, ...]] = {
    "internlm-7b": (103168, 4096, 32, 32, 11008, 32, 2048),
    "internlm-20b": (103168, 5120, 60, 40, 13824, 40, 4096),
    "internlm2-1.8b": (92544, 2048, 24, 16, 8192, 8, 32768),
    "internlm2-7b": (92544, 4096, 32, 32, 14336, 8, 32768),
    "internlm2-20b": (92544, 6144, 48, 48, 16384, 8, 32768),
}
"""Published shapes: the keys above, key/value heads, and the context."""

PLAIN = ("internlm", "internlm2", "llama", "mistral", "qwen2")
"""Families whose layers are all alike and have nothing but what `Shape` counts."""
GROUP = 64
DTYPES = ("bf16", "int8", "int4")
KV_BYTES = {"bf16": 2, "fp32": 4}
BESIDE = 0.5 * 2**30
"""Activations, logits and libraries, roughly."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model, as config.json has it."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    kv_heads: int
    context: int
    head_dim: int
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False

    @property
    def products(self) -> Iterator[tuple[int, int]]:
        """(outputs, inputs) of the products of one layer."""
        wide = self.heads * self.head_dim
        yield wide + 2 * self.kv_heads * self.head_dim, self.hidden
        yield self.hidden, wide
        yield 2 * self.intermediate, self.hidden
        yield self.hidden, self.intermediate

    @property
    def num_plain(self) -> int:
        """Parameters that are never quantized: embedding, head, norms, biases."""
        biases = self.qkv_bias * (self.heads + 2 * self.kv_heads) * self.head_dim + self.out_bias * self.hidden
        tables = (1 if self.tied else 2) * self.vocab * self.hidden
        return tables + self.hidden + self.layers * (2 * self.hidden + biases)

    @property
    def num_parameters(self) -> int:
        return self.num_plain + self.layers * sum(rows * columns for rows, columns in self.products)

    def weight_bytes(self, dtype: str, *, group: int = GROUP) -> int:
        """Bytes of all weights."""
        each = {"bf16": _bf16, "int8": _int8, "int4": lambda rows, columns: _int4(rows, columns, group)}[dtype]
        return 2 * self.num_plain + self.layers * sum(each(rows, columns) for rows, columns in self.products)

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * KV_BYTES[dtype]


def _bf16(rows: int, columns: int) -> int:
    return 2 * rows * columns


def _int8(rows: int, columns: int) -> int:
    return rows * columns + 2 * rows


def _int4(rows: int, columns: int, group: int) -> int:
    if columns % group:
        raise CheckpointError(f"{columns} inputs do not split into groups of {group}", remedy="plan with int8")
    return rows * columns // 2 + 4 * rows * (columns // group)


@dataclass(frozen=True)
class Counted:
    """A model of any family, counted on modules that hold no numbers."""

    config: ModelConfig

    @property
    def context(self) -> int:
        return self.config.max_positions

    @property
    def products(self) -> Iterator[tuple[int, int]]:
        """(outputs, inputs) of all products."""
        from puyu.model.linear import Linear

        found = [module for module in self._empty().modules() if isinstance(module, Linear)]
        return ((module.out_features, module.in_features) for module in found)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._empty().parameters())

    def weight_bytes(self, dtype: str, *, group: int = GROUP) -> int:
        """Bytes of all weights."""
        from puyu.model.linear import QuantFormat
        from puyu.model.quant_modules import make_quantized

        model = self._empty()
        if dtype != "bf16":
            make_quantized(model, QuantFormat(8) if dtype == "int8" else QuantFormat(4, group, symmetric=False))
        tensors = model.bfloat16().state_dict().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of the keys and values of one token."""
        config = self.config
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * KV_BYTES[dtype]

    def _empty(self) -> CausalLM:
        import torch

        from puyu.model.heads import CausalLM

        with torch.device("meta"):
            return CausalLM(self.config)


def shape_of(model: str) -> Shape | Counted:
    """Read config.json of a folder, or take a published shape by its name."""
    if model in SHAPES:
        vocab, hidden, layers, heads, intermediate, kv_heads, context = SHAPES[model]
        return Shape(vocab, hidden, layers, heads, intermediate, kv_heads, context, head_dim=128)
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if path.name != "config.json" or not path.is_file():
        known = ", ".join(SHAPES)
        raise InputError(f"{model} is no folder with a config.json", remedy=f"published shapes: {known}")
    value = read_json(path)
    if value.get("model_type") not in PLAIN:
        from puyu.model.config import ModelConfig

        return Counted(ModelConfig.from_hf(value, where=str(path)))
    missing = [key for key in _KEYS if not isinstance(value.get(key), int)]
    if missing:
        raise CheckpointError(f"{path}: missing key {missing[0]!r}")
    return _read_shape(value)


def _read_shape(value: Mapping[str, Any]) -> Shape:
    vocab, hidden, layers, heads, intermediate = (value[key] for key in _KEYS)
    biased = bool(value.get("bias") or value.get("attention_bias"))
    return Shape(
        *(vocab, hidden, layers, heads, intermediate),
        kv_heads=value.get("num_key_value_heads") or heads,
        context=value.get("max_position_embeddings") or 2048,
        head_dim=value.get("head_dim") or hidden // heads,
        tied=bool(value.get("tie_word_embeddings", False)),
        qkv_bias=biased or value.get("model_type") == "qwen2",
        out_bias=biased,
    )


_ABOUT = "What serving a model will need. For a training run: puyu plan CONFIG.yaml --gpus N --device h100"


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    if not any(word.startswith("--serve") for word in argv) and set(argv) - {"-h", "--help"}:
        from puyu.cli.plan_train import main as train

        return train(argv)
    options = argparse.ArgumentParser(prog="puyu plan", description=_ABOUT)
    options.add_argument("--serve", required=True, metavar="MODEL", help=f"folder, or one of {', '.join(SHAPES)}")
    options.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights [bf16]")
    options.add_argument("--kv", choices=tuple(KV_BYTES), default="bf16", help="of keys and values [bf16]")
    options.add_argument("--context", type=int, default=0, help="tokens of one request, answer included [the model's]")
    options.add_argument("--streams", type=int, default=1, help="requests at the same time [1]")
    options.add_argument("--group", type=int, default=GROUP, help=f"inputs that share a scale in int4 [{GROUP}]")
    given = options.parse_args(list(argv))
    if given.context < 0 or given.streams < 1 or given.group < 1:
        raise ConfigError("context, streams and group must be positive")
    for line in plan_lines(shape_of(given.serve), given):
        print(line)
    return 0


def plan_lines(shape: Shape | Counted, given: argparse.Namespace) -> Iterator[str]:
    """The plan, a fact a line."""
    context = given.context or shape.context
    weights, token = shape.weight_bytes(given.dtype, group=given.group), shape.kv_bytes(given.kv)
    stream = context * token
    total = weights + given.streams * stream + BESIDE
    yield f"model       {given.serve}: {shape.num_parameters / 1e9:.3f} B parameters, context {shape.context}"
    if context > shape.context:
        yield f"            {context} tokens are more than the model was made for"
    possible = _possible(shape, given)
    sizes = ", ".join(f"{name} {_size(shape.weight_bytes(name, group=given.group))}" for name in possible)
    yield f"weights     {_size(weights)} in {given.dtype}   ({sizes})"
    each = ", ".join(f"{name} {_size(shape.kv_bytes(name))}" for name in KV_BYTES)
    yield f"KV cache    {_size(token)} a token in {given.kv}   ({each})"
    yield f"a stream    {_size(stream)} for {context} tokens"
    yield f"streams     {given.streams}: {_size(given.streams * stream)}"
    yield f"in all      {_size(total)}, with {_size(BESIDE)} for activations and libraries"
    for name, memory in memories():
        spare = memory - weights - BESIDE
        verdict = "fits" if total <= memory else "does not fit"
        room = f"room for {int(spare // stream)} streams of {context} tokens, or one of {int(spare // token)}"
        yield f"{name:<11} {_size(memory)}: {verdict}; {room if spare > 0 else 'not even the weights do'}"


def _possible(shape: Shape | Counted, given: argparse.Namespace) -> list[str]:
    divides = all(columns % given.group == 0 for _, columns in shape.products)
    return [name for name in DTYPES if name != "int4" or divides]


def memories() -> Iterator[tuple[str, int]]:
    """(name, bytes) of this machine's memory and of each GPU that its driver shows."""
    if hasattr(os, "sysconf"):
        yield "this memory", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
        for index, line in enumerate(answer.stdout.split()):
            if line.isdigit():
                yield f"GPU {index}", int(line) * 2**20


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
