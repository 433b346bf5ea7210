"""Compiles every kernel for Hopper with Triton's own compiler, which needs no GPU; prints what it would run with.

A process of its own, because the tests beside it have the interpreter in the compiler's place. One line of JSON:
kernel -> bytes of registers that spill, bytes of shared memory, whether the tensor cores are used.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from puyu.engine.kernels import attention, fp8, matmul, norm, rope, sampling

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
HALF, INTS, FLOATS = "*bf16", "*i32", "*fp32"


def compiled(kernel: Any, types: dict[str, str], fixed: dict[str, Any], **options: int) -> dict[str, Any]:
    """Pointers and the sizes of a real model are multiples of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    even = [
        i for i, name in enumerate(names) if signature[name].startswith("*") or name in ("size", "stride", "num_slots")
    ]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in fixed.items()},
        {(index,): [["tt.divisibility", 16]] for index in even},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [str(PTXAS), "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", told)))
    tensor = "wgmma" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"]
    return {"spills": spills, "shared": made.metadata.shared, "tensor_cores": tensor}


def products() -> dict[str, dict[str, Any]]:
    """The tiles of the table, with everything around the product."""
    pointers = ("x", "norm", "scales", "zeros", "bias", "y", "residual")
    types = {f"{name}_ptr": HALF for name in pointers} | {"eps": "fp32"}
    found = {}
    for bits, kind in ((16, HALF), (8, "*i8"), (4, INTS)):
        weight = matmul.Weight(torch.empty(16, 16), bits)
        for rows in {16: (1, 16), 8: (1,), 4: (1, 64)}[bits]:
            tile = matmul.choose_tile(rows, weight)
            assert tile is not None
            fixed = {"BITS": bits, "E4M3": False, "GROUP": 128 if bits == 4 else 1, "NORM": rows < 64}
            fixed |= {"ZEROS": bits == 4}
            fixed |= {"GATED": False, "BIAS": False, "RESIDUAL": rows == 64, "BLOCK_N": tile.outputs}
            fixed |= {"BLOCK_K": tile.inputs, "BLOCK_M": tile.rows, "STAGES": tile.stages}
            made = compiled(matmul._multiply, types | {"w_ptr": kind}, fixed, num_warps=tile.warps)
            found[f"multiply {bits} x {rows}"] = made
    return found


def attentions() -> dict[str, dict[str, Any]]:
    names = ("tables_ptr", "lengths_ptr", "sequences_ptr", "starts_ptr", "ends_ptr", "places_ptr")
    types = {"q_ptr": HALF, "rows_ptr": HALF, "out_ptr": HALF, "scale": "fp32"} | dict.fromkeys(names, INTS)
    types |= {"partial_ptr": FLOATS, "weight_ptr": FLOATS}
    shape = {"GROUP": 4, "HEAD": 128, "BLOCK_SIZE": 16, "BLOCK_H": 128, "BLOCK_S": 64}
    prefill = shape | {"HEIGHT": 32, "BLOCK_M": 128, "BLOCK_G": 4}
    return {
        "decode": compiled(attention._decode, types, shape | {"BLOCK_G": 16}, num_warps=4, num_stages=3),
        "join": compiled(attention._join, types, {"SPLITS": 64, "HEAD": 128, "BLOCK_H": 128}, num_warps=4),
        "prefill": compiled(attention._prefill, types, prefill, num_warps=8, num_stages=2),
    }


def others() -> dict[str, dict[str, Any]]:
    halves = dict.fromkeys(
        ("x_ptr", "weight_ptr", "out_ptr", "qkv_ptr", "rows_ptr", "q_ptr", "cos_ptr", "sin_ptr"), HALF
    )
    types = halves | {"positions_ptr": INTS, "slots_ptr": INTS, "eps": "fp32", "values_ptr": "*fp8e4nv"}
    knobs = ("temperature", "top_k", "top_p", "min_p", "uniform", "logprobs")
    sampled = {f"{name}_ptr": FLOATS for name in knobs} | {"logits_ptr": HALF, "tokens_ptr": INTS}
    turned = {"GROUP": 4, "HALF": 64, "BLOCK_G": 8, "BLOCK_H": 64}
    return {
        "rms_norm": compiled(norm._rms_norm, types, {"BLOCK": 4096}, num_warps=8),
        "silu_mul": compiled(norm._silu_mul, types, {"BLOCK": 1024}, num_warps=4),
        "rope_and_cache": compiled(rope._rope_and_cache, types, turned, num_warps=2),
        "to_rows": compiled(fp8._to_rows, types | {"scales_ptr": FLOATS}, {"BLOCK": 4096}, num_warps=8),
        "sample": compiled(sampling._sample, sampled, {"BITS": 16, "BLOCK": 2048}, num_warps=16),
    }


if __name__ == "__main__":
    print(json.dumps(products() | attentions() | others()))
