"""`puyu data export DIR FILE`: clean documents as Parquet, JSONL or text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from puyu.log import say


def main(arguments: Sequence[str]) -> int:
    """What follows the verb; returns the exit code."""
    options = argparse.ArgumentParser(prog="puyu data export", description="Clean documents for other tools.")
    options.add_argument("folder", type=Path, metavar="DIR", help="what puyu data wrote, or a JSONL file")
    options.add_argument("target", type=Path, metavar="FILE", help=".parquet, .jsonl, .jsonl.gz, .jsonl.zst or .txt")
    for name in ("source", "domain", "language"):
        options.add_argument(f"--{name}", help=f"only documents of this {name}")
    given = options.parse_args(list(arguments))
    from puyu.data.export import export

    wanted = {name: value for name in ("source", "domain", "language") if (value := getattr(given, name)) is not None}
    say(f"{given.target}: {export(given.folder, given.target, **wanted)} documents")
    return 0
