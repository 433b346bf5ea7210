"""The native step: a whole forward of the engine in one call on a CPU.

`cpu/step.cpp` has a plain C interface and is built once, at set-up, for this machine's processor; without it, or for
anything that it does not know (a GPU, float64, experts), the torch modules do the same. Quantized layers are packed
once, when the step is made, and keep no codes of their own; dense weights are read where they are, so shared
weights may change between steps. Dense models run here while they decode a few sequences, where one call saves more
than torch's faster products; quantized ones always.

    python -m puyu.engine.native      # build, print the path of the library
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

from puyu.native import Library

SOURCE = Path(__file__).parent / "cpu" / "step.cpp"
_MATH = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fopenmp-simd", *_MATH]


def library() -> Library:
    """The step for this machine."""
    return Library("step", SOURCE, FLAGS, without="torch computes alone")


def build() -> Path:
    """Compile, unless it is there; DependencyError when there is no compiler or it fails."""
    path = library().build()
    load.cache_clear()
    return path


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The library, when it has been built for this machine."""
    found = library().open()
    if found is None:
        return None
    found.puyu_scratch_bytes.restype = ctypes.c_int64
    found.puyu_scratch_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    found.puyu_step.restype, found.puyu_step.argtypes = None, [ctypes.c_void_p] * 3
    for function in (found.puyu_pack, found.puyu_unpack):
        function.restype, function.argtypes = None, [ctypes.c_void_p]
    number, place = ctypes.c_int64, ctypes.c_void_p
    found.puyu_round_rows.restype = None
    found.puyu_round_rows.argtypes = [number, place, number, number, place, place]
    found.puyu_give_back.restype, found.puyu_give_back.argtypes = None, []
    return found


class Matrix(ctypes.Structure):
    """`Matrix` of common.h."""

    _sizes = ("kind", "inputs", "outputs", "group", "unit")
    _pointers = ("data", "scales", "zeros", "bias", "order")
    _fields_ = [*((name, ctypes.c_int64) for name in _sizes), *((name, ctypes.c_void_p) for name in _pointers)]


class Pack(ctypes.Structure):
    """`Pack` of pack.h."""

    _sizes = ("four", "gated", "outputs", "inputs", "groups")
    _pointers = ("codes", "scales", "zeros", "packed", "packed_scales", "packed_zeros")
    _fields_ = [*((name, ctypes.c_int64) for name in _sizes), *((name, ctypes.c_void_p) for name in _pointers)]


class Layer(ctypes.Structure):
    """`Layer` of common.h."""

    _norms = ("attention_norm", "mlp_norm", "query_norm", "key_norm")
    _matrices = ("qkv", "attention_out", "gate_up", "down")
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _norms),
        *((name, Matrix) for name in _matrices),
        ("window", ctypes.c_int64),
    ]


class Shape(ctypes.Structure):
    """`Shape` of common.h."""

    _names = ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "layers")
    _sizes = ("block_size", "num_slots", "threads", "invariant", "kind", "cache_kind")
    _fields_ = [*((name, ctypes.c_int64) for name in (*_names, *_sizes)), ("eps", ctypes.c_float)]


class Call(ctypes.Structure):
    """`Call` of common.h."""

    _sizes = ("num_tokens", "num_sequences", "num_rows", "num_ids")
    _inputs = ("plan", "cos", "sin", "embedding", "norm")
    _fields_ = [
        *((name, ctypes.c_int64) for name in _sizes),
        *((name, ctypes.c_void_p) for name in _inputs),
        ("head", Matrix),
        *((name, ctypes.c_void_p) for name in ("cache", "sides", "scratch", "logits", "best")),
    ]


if __name__ == "__main__":
    print(build(), file=sys.stdout)
