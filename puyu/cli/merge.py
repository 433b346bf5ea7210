"""`puyu merge ADAPTER --out DIR`: an adapter and its base as one checkpoint.

puyu merge runs/poet --out runs/poet-merged
puyu merge runs/poet --out runs/poet-merged --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    options = argparse.ArgumentParser(prog="puyu merge", description="An adapter and its base as one checkpoint.")
    options.add_argument("adapter", type=Path, metavar="ADAPTER", help="a directory with adapter_config.json")
    options.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    kinds = ("float32", "bfloat16", "float16")
    options.add_argument("--dtype", choices=kinds, help="numbers of the weights [as the base has them]")
    options.add_argument("--max-shard-gb", type=float, default=5.0, help="largest .safetensors file [5]")
    given = options.parse_args(list(arguments))
    from puyu.model.adapter_files import write_merged

    size = write_merged(given.adapter, given.out, dtype=given.dtype, max_shard_bytes=int(given.max_shard_gb * 2**30))
    print(f"{given.out}: {size:,} parameters, base and adapter in one")
    return 0
