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
import logging
import os
import platform
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from puyu.device import cpu_flags
from puyu.errors import DependencyError
from puyu.files import hash_json

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpu")
_MATH = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fopenmp-simd", *_MATH]


def library_path() -> Path:
    """Where the library for these sources and this processor belongs."""
    folder = Path(os.environ.get("PUYU_NATIVE_DIR") or Path.home() / ".cache" / "puyu" / "native")
    texts = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    key = hash_json([texts, FLAGS, platform.machine(), sorted(cpu_flags())])
    return folder / f"step-{key[:16]}.so"


def build() -> Path:
    """Compile, unless it is there; DependencyError when there is no compiler or it fails."""
    path = library_path()
    if path.is_file():
        return path
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise DependencyError("no C++ compiler was found", remedy="install g++; without it the engine uses torch alone")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, source = path.with_name(f"{path.name}.tmp-{os.getpid()}"), SOURCES / "step.cpp"
    for threads in (["-fopenmp"], []):  # some compilers come without OpenMP; one thread is better than none
        command = [compiler, *FLAGS, *threads, str(source), "-o", str(temporary)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            os.replace(temporary, path)
            load.cache_clear()
            return path
    raise DependencyError(f"{compiler} cannot build {source.name}: {result.stderr.strip()[-500:]}")


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The library, when it has been built for this machine."""
    path = library_path()
    if not path.is_file():
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:  # a home folder shared with another system
        logger.warning("%s cannot be loaded, torch computes alone: %s", path, error)
        return None
    library.puyu_scratch_bytes.restype = ctypes.c_int64
    library.puyu_scratch_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.puyu_step.restype, library.puyu_step.argtypes = None, [ctypes.c_void_p] * 3
    for function in (library.puyu_pack, library.puyu_unpack):
        function.restype, function.argtypes = None, [ctypes.c_void_p]
    numbers = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    library.puyu_round_rows.restype, library.puyu_round_rows.argtypes = None, numbers
    library.puyu_give_back.restype, library.puyu_give_back.argtypes = None, []
    return library


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
