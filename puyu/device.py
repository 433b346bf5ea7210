"""Device and dtype: what this machine can do, asked once and printed by `puyu doctor`.

Imports torch inside functions only where it must stay importable without it.
"""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from puyu.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    import torch


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_torch() -> None:
    """Raise DependencyError, with the install line, when torch cannot be imported."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        remedy = "run `make setup`, or: pip install torch==2.13.0 and then pip install 'puyu-llm[local]'"
        raise DependencyError("this command needs PyTorch", remedy=remedy) from error


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes an accelerator when there is one; under torchrun, the one of the local rank."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device 'cuda' was asked for, but torch sees no GPU", remedy="use device: auto or cpu")
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}", remedy="use auto, cpu or cuda") from error


def total_memory(device: torch.device) -> int:
    """Bytes that this process may use at most there: of the GPU, or of the host within its control group's limit."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            found = min(found, int(text))
    return found


def release_memory(device: torch.device) -> None:
    """Give what torch keeps for later use back to the device, for other processes."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


@cache
def cpu_flags() -> frozenset[str]:
    """Feature words of the processor (Linux; empty elsewhere)."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return frozenset()
    for line in path.read_text(errors="replace").splitlines():
        if line.lower().startswith(("flags", "features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware: a recent GPU, or AVX512-BF16 / AMX / Arm BF16."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the processor has it, else fp32."""
    import torch

    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    known = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"unknown dtype {name!r}", remedy=f"use auto, {', '.join(known)}")
    return known[name]


_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12), ("B200", 2250e12), ("GH200", 989e12), ("H200", 989e12),
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H800 PCIe", 756e12), ("H800", 989e12),
    ("H20", 148e12), ("A100", 312e12), ("A800", 312e12), ("A30", 165e12), ("A40", 149.7e12), ("A10", 125e12),
    ("A6000", 154.8e12), ("L40S", 362e12), ("L40", 181e12), ("L20", 119.5e12), ("L4", 121e12), ("6000 Ada", 364.2e12),
    ("RTX 5090", 209.5e12), ("RTX 4090", 165.2e12), ("RTX 3090", 71e12), ("MI300X", 1307e12),
)  # fmt: skip
"""Words of a device's name, and its dense bf16 product rate with fp32 sums, from the makers' data sheets. Their larger
numbers are with 2:4 sparsity, which training has not."""


def table_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None when the table has it not."""
    words = set(name.replace("-", " ").split())
    return next((flops for found, flops in _PEAKS if set(found.split()) <= words), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that this device can do at most, and where the number is from: the table, or a product measured now."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if flops := table_peak(name):
            return flops, f"dense bf16 of {name}"
        return measured_flops(device, dtype, 8192), f"{name} is not in the table: product of {dtype} measured"
    return measured_flops(device, dtype, 1024), f"product of {str(dtype).removeprefix('torch.')} measured on this CPU"


@cache
def measured_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The best of a few products of two square matrices, in FLOP/s."""
    import torch

    left, right = (torch.full((size, size), 0.5, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        (left @ right)[0, 0].item()  # on a GPU, this waits for the product
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
