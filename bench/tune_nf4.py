"""tune.10: NF4 codes, scales and values of whole matrices against bitsandbytes, bit for bit, double quantization too.

    python bench/tune_nf4.py [--save] [--peer-python PATH]

Matrices of many shapes and kinds of numbers (normal, heavy tails, rows of different size, bf16 and fp32) are quantized
on both sides; the other side is bitsandbytes' quantize_4bit on this CPU. Counted are codes, codes of scales, scales and
dequantized values that differ in a bit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness

SHAPES = ((1, 64), (7, 192), (96, 512), (1024, 4096), (333, 1408), (4096, 4096))
KINDS = ("normal", "tails", "rows", "tiny")
DTYPES = ("float32", "bfloat16")


def matrices() -> Any:
    """Name and numbers of each."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for rows, columns in SHAPES:
        for kind in KINDS:
            weight = torch.randn(rows, columns, generator=generator)
            if kind == "tails":
                weight = weight**3
            elif kind == "rows":
                weight = weight * torch.rand(rows, 1, generator=generator) ** 4
            elif kind == "tiny":
                weight = weight * 1e-6
            for dtype in DTYPES:
                yield f"{rows} x {columns} {kind} {dtype}", (weight * 0.02).to(getattr(torch, dtype))


def theirs(path: Path) -> None:
    """What bitsandbytes makes, into a file."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors.torch import save_file

    found = {"version": torch.tensor([int(part) for part in bitsandbytes.__version__.split(".")])}
    for name, weight in matrices():
        codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        found |= {f"{name}/codes": codes.flatten(), f"{name}/scale_codes": state.absmax.flatten()}
        found |= {f"{name}/scales": state.state2.absmax, f"{name}/offset": state.offset.reshape(1)}
        found[f"{name}/values"] = dequantize_4bit(codes, state).contiguous()
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    parser.add_argument("--peer-python", type=Path, help="interpreter with the peer; default: made in .venv-peers")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        theirs(given.worker)
        return
    import torch
    from safetensors.torch import load_file

    from puyu.model.native import load
    from puyu.model.nf4 import NF4

    run = harness.Run("tune_nf4", versions={"torch": torch.__version__}, before={})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "theirs.safetensors"
        python = harness.peer_python("tune", given.peer_python)
        subprocess.run([python, __file__, "--worker", path], check=True, stdout=sys.stderr)
        right = load_file(path)
    run.versions["bitsandbytes"] = ".".join(map(str, right.pop("version").tolist()))
    differing = values = 0
    for name, weight in matrices():
        made = NF4.of(weight)
        parts = {"codes": made.codes.flatten(), "scale_codes": made.scale_codes, "scales": made.scales}
        parts |= {"offset": made.offset.reshape(1), "values": made.dequantized(weight.dtype)}
        for part, found in parts.items():
            expected = right[f"{name}/{part}"].reshape(found.shape)
            size = found.element_size()
            bits = [one.contiguous().view(torch.uint8).reshape(-1, size) for one in (found, expected)]
            count = int((bits[0] != bits[1]).any(1).sum())
            values += len(bits[0])
            differing += count
            if count:
                run.notes[f"{name}/{part}"] = count
    run.notes |= {"matrices": len(SHAPES) * len(KINDS) * len(DTYPES), "values": values, "native": load() is not None}
    run.finish([harness.Samples("tune.10", [float(differing)])], save=given.save)


if __name__ == "__main__":
    main()
