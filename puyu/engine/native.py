"""The native decode step: a whole forward of a few decoding sequences in one call, for dense models on a CPU.

`decode.cpp` has a plain C interface and is built once, at set-up, for this machine's processor; without it, or for
anything that it does not know (quantized layers, a GPU, float64, larger batches), the torch modules do the same.
Weights are read where they are: pointers are taken anew for each step, so shared weights may change between steps.

    python -m puyu.engine.native      # build, print the path of the library
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from puyu.device import cpu_flags
from puyu.errors import DependencyError
from puyu.files import hash_json
from puyu.model.attention import Attention
from puyu.model.heads import CausalLM
from puyu.model.layers import GatedMLP, RMSNorm
from puyu.model.linear import Linear
from puyu.model.paged import KVCache
from puyu.model.rope import RopeScaling
from puyu.model.transformer import Block

MAX_BATCH = 8
"""Beyond it torch's matrix products catch up with one dot product after another."""

_SOURCE = Path(__file__).with_name("decode.cpp")
_MATH = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", *_MATH]
_TYPES = {torch.float32: "step_float", torch.bfloat16: "step_bfloat16"}


def library_path() -> Path:
    """Where the library for this source and this processor belongs."""
    folder = Path(os.environ.get("PUYU_NATIVE_DIR") or Path.home() / ".cache" / "puyu" / "native")
    key = hash_json([_SOURCE.read_text(encoding="utf-8"), _FLAGS, platform.machine(), sorted(cpu_flags())])
    return folder / f"decode-{key[:16]}.so"


def build() -> Path:
    """Compile, unless it is there; DependencyError when there is no compiler or it fails."""
    path = library_path()
    if path.is_file():
        return path
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise DependencyError("no C++ compiler was found", remedy="install g++; without it decoding uses torch alone")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    for threads in (["-fopenmp"], []):  # some compilers come without OpenMP; one thread is better than none
        command = [compiler, *_FLAGS, *threads, str(_SOURCE), "-o", str(temporary)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            os.replace(temporary, path)
            load.cache_clear()
            return path
    raise DependencyError(f"{compiler} cannot build {_SOURCE.name}: {result.stderr.strip()[-500:]}")


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The library, when it has been built for this machine."""
    path = library_path()
    if not path.is_file():
        return None
    library = ctypes.CDLL(str(path))
    library.scratch_floats.restype = ctypes.c_int64
    library.scratch_floats.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return library


class _Shape(ctypes.Structure):
    _names = ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "layers")
    _sizes = ("block_size", "num_slots", "threads")
    _fields_ = [*((name, ctypes.c_int64) for name in (*_names, *_sizes)), ("eps", ctypes.c_float)]


class _Step(ctypes.Structure):
    _sizes = ("batch", "table_width")
    _pointers = (
        *("tokens", "positions", "tables", "cos", "sin"),
        *("embedding", "norm", "head", "cache", "scratch", "logits"),
    )
    _fields_ = [*((name, ctypes.c_int64) for name in _sizes), *((name, ctypes.c_void_p) for name in _pointers)]


class NativeStep:
    """Runs decode steps of one model over one cache; `make` says whether it can."""

    def __init__(self, library: ctypes.CDLL, model: CausalLM, cache: KVCache) -> None:
        self.model, self.cache, self._library = model, cache, library
        config = model.config
        self._shape = _Shape(
            *(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
            *(config.intermediate_size, config.vocab_size, config.num_layers),
            *(cache.block_size, cache.num_slots, 1, config.norm_eps),
        )
        self._run = getattr(library, _TYPES[cache.rows.dtype])
        self._run.restype, self._run.argtypes = None, [ctypes.c_void_p] * 3
        self._weights = _layer_weights(model)
        self._layers = (ctypes.c_void_p * len(self._weights))()
        self._scratch = torch.empty(0)
        self._angles: tuple[tuple[float, RopeScaling | None], Tensor, Tensor] | None = None

    @staticmethod
    def make(model: CausalLM, cache: KVCache) -> NativeStep | None:
        """None where the torch modules must do it."""
        library = load()
        if library is None or cache.device.type != "cpu" or cache.rows.dtype not in _TYPES:
            return None
        return NativeStep(library, model, cache) if _is_plain(model, cache.rows.dtype) else None

    def run(self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] after one token for each sequence; its key and value are written to the cache."""
        batch, width, longest = len(tokens), max(map(len, tables)), max(positions) + 1
        assert min(tokens) >= 0 and max(tokens) < self._shape.vocab, "a token id outside the vocabulary"
        self._shape.threads = torch.get_num_threads()
        self._layers[:] = [0 if weight is None else weight.data_ptr() for weight in self._weights]
        floats = self._library.scratch_floats(ctypes.byref(self._shape), batch, longest)
        if self._scratch.numel() < floats:
            self._scratch = torch.empty(2 * floats)
        table_BW = np.zeros((batch, width), dtype=np.int64)
        for row, table in enumerate(tables):
            table_BW[row, : len(table)] = table
        ids_2B = np.array([tokens, positions], dtype=np.int64)
        logits_BV = torch.empty(batch, self._shape.vocab)
        cos, sin = self._rotation(longest)
        trunk, head = self.model.trunk, self.model.head
        embedding = trunk.embedding.weight
        step = _Step(
            *(batch, width, ids_2B[0].ctypes.data, ids_2B[1].ctypes.data, table_BW.ctypes.data),
            *(cos.data_ptr(), sin.data_ptr(), embedding.data_ptr(), trunk.norm.weight.data_ptr()),
            *((embedding if head is None else head.weight).data_ptr(), self.cache.rows.data_ptr()),
            *(self._scratch.data_ptr(), logits_BV.data_ptr()),
        )
        self._run(ctypes.byref(self._shape), self._layers, ctypes.byref(step))
        return logits_BV

    def _rotation(self, longest: int) -> tuple[Tensor, Tensor]:
        """cos and sin of all positions so far, [positions, H], made again when the base changes."""
        trunk = self.model.trunk
        rope = (trunk.rope_theta, trunk.config.scaling)
        if self._angles is None or self._angles[0] != rope or len(self._angles[1]) < longest:
            turn = trunk.rotation(torch.arange(max(2 * longest, 256)), torch.float32)
            self._angles = (rope, turn.cos.flatten(1).contiguous(), turn.sin.flatten(1).contiguous())
        return self._angles[1], self._angles[2]


def _layer_weights(model: CausalLM) -> list[Tensor | None]:
    """The tensors of all layers, in the order of `Layer` in decode.cpp."""
    weights: list[Tensor | None] = []
    for block in model.trunk.layers:
        assert isinstance(block, Block) and isinstance(block.mlp, GatedMLP)
        attention, mlp = block.attention, block.mlp
        weights += [block.attention_norm.weight, attention.qkv.weight, attention.qkv.bias, attention.out.weight]
        weights += [attention.out.bias, block.mlp_norm.weight, mlp.gate_up.weight, mlp.down.weight]
    return weights


def _is_plain(model: CausalLM, dtype: torch.dtype) -> bool:
    """Whether the model is made of exactly the layers that decode.cpp knows, all weights in the cache's dtype."""
    leaves = Counter(type(module) for module in model.modules() if not list(module.children()))
    layers = model.config.num_layers
    known = {Linear: 4 * layers + (model.head is not None), RMSNorm: 2 * layers + 1, nn.Embedding: 1}
    return (
        leaves == known
        and all(_is_plain_block(block) for block in model.trunk.layers)
        and (model.head is None or model.head.bias is None)
        and all(parameter.dtype == dtype and parameter.is_contiguous() for parameter in model.parameters())
    )


def _is_plain_block(block: nn.Module) -> bool:
    """No experts, windows, norms of heads or biases in the MLP."""
    if type(block) is not Block or type(block.mlp) is not GatedMLP or type(block.attention) is not Attention:
        return False
    attention, mlp = block.attention, block.mlp
    plain = not attention.window and attention.q_norm is None and attention.k_norm is None
    return plain and mlp.gate_up.bias is None and mlp.down.bias is None


if __name__ == "__main__":
    print(build(), file=sys.stdout)
