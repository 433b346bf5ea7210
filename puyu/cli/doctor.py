"""`puyu doctor`: what this machine can do, what is missing, and the command that mends it. Needs nothing installed."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec

from puyu import __version__
from puyu.device import cpu_flags

_EXTRAS = {
    "data": ("numpy", "py3langid", "resiliparse", "zstandard"),
    "local": ("jinja2", "llguidance", "numpy", "safetensors", "tokenizers", "torch"),
    "serve": ("fastapi", "uvicorn"),
    "train": ("tensorboard",),
}
_WHAT = {
    "data": "the data stage",
    "local": "tokenizer, training, engine (torch first: make setup, or pip install torch==2.13.0)",
    "serve": "puyu serve",
    "train": "TensorBoard beside metrics.jsonl",
}


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: puyu doctor\n\nSays what this machine can do, what is missing and how to mend it.")
        return 0
    problems = 0
    for ok, subject, text in checks():
        problems += not ok
        print(f"{'ok     ' if ok else 'missing'}  {subject:<12} {text}")
    print(f"\n{problems} things missing; the remedies stand beside them" if problems else "\nall there")
    return 0


def checks() -> Iterator[tuple[bool, str, str]]:
    """(ok, subject, finding or remedy), one for each thing that a room may need."""
    yield sys.version_info >= (3, 11), "python", f"{platform.python_version()} (3.11 or newer is needed)"
    yield True, "puyu", f"{__version__}; {platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_memory()}"
    for name, remedy in (
        ("g++", "apt-get install g++"),
        ("make", "apt-get install make"),
        ("git", "apt-get install git"),
    ):
        found = shutil.which(name)
        yield bool(found), name, found or f"not on the PATH; remedy: {remedy}"
    for extra, modules in _EXTRAS.items():
        absent = [name for name in modules if find_spec(name) is None]
        remedy = f"without {', '.join(absent)}; remedy: pip install 'puyu-llm[{extra}]'"
        yield not absent, f"[{extra}]", _WHAT[extra] if not absent else f"{_WHAT[extra]}: {remedy}"
    yield from _torch_checks()
    free = shutil.disk_usage(".").free / 2**30
    yield free > 1, "disk", f"{free:.1f} GiB free here"


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return f"{pages / 2**30:.0f} GiB memory"


def _torch_checks() -> Iterator[tuple[bool, str, str]]:
    if find_spec("torch") is None:
        return
    import torch

    version = metadata.version("torch")
    recent = tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= (2, 11)
    yield (
        recent,
        "torch",
        f"{version}, {torch.get_num_threads()} threads" + ("" if recent else "; 2.11 or newer is needed"),
    )
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        yield True, "gpu", f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free; it will be used"
    else:
        yield True, "gpu", "none seen; the CPU will be used"
    yield from _native_checks()
    fast = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "bf16"})
    bf16 = bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
    yield (
        True,
        "cpu",
        f"{' '.join(fast) or 'no vector features seen'}; compute dtype on CPU: {'bf16' if bf16 else 'fp32'}",
    )


def _native_checks() -> Iterator[tuple[bool, str, str]]:
    from puyu.data.ngram_native import LIBRARY as NGRAM
    from puyu.documents.texts import LIBRARY
    from puyu.engine.native import library
    from puyu.model.native import LIBRARY as NF4
    from puyu.tokenizer.library import LIBRARY as BPE
    from puyu.train.native import LIBRARY as LOSS

    steps = "not built, PyTorch does its work; remedy: python -m puyu.engine.native"
    texts = "not built, Python does its work; remedy: python -m puyu.documents.texts"
    bpe = "not built, `tokenizers` and Python do its work; remedy: python -m puyu.tokenizer.library"
    for what, path, remedy in (
        ("step of the engine", library().path(), steps),
        ("measures of texts", LIBRARY.path(), texts),
        ("n-gram model", NGRAM.path(), "not built, Python does its work; remedy: python -m puyu.data.ngram_native"),
        ("byte-level BPE", BPE.path(), bpe),
        ("values of NF4", NF4.path(), "not built, PyTorch does its work; remedy: python -m puyu.model.native"),
        ("loss of training", LOSS.path(), "not built, PyTorch does its work; remedy: python -m puyu.train.native"),
    ):
        yield path.is_file(), "native", f"{what}: {path if path.is_file() else remedy}"
