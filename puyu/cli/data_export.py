"""`puyu data export DIR FILE`: clean documents as Parquet, JSONL, WanJuan's records or text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from puyu.files import BadRecord
from puyu.log import say


def main(arguments: Sequence[str]) -> int:
    """What follows the verb; returns the exit code."""
    options = argparse.ArgumentParser(prog="puyu data export", description="Clean documents for other tools.")
    options.add_argument("folder", type=Path, metavar="DIR", help="what puyu data wrote, or a JSONL file")
    options.add_argument("target", type=Path, metavar="FILE", help=".parquet, .jsonl, .jsonl.gz, .jsonl.zst or .txt")
    options.add_argument("--form", choices=("wanjuan",), help="records of this form instead of rows, in JSONL")
    for name in ("source", "domain", "language"):
        options.add_argument(f"--{name}", help=f"only documents of this {name}")
    given = options.parse_args(list(arguments))
    from puyu.data.export import export, export_wanjuan

    wanted = {name: value for name in ("source", "domain", "language") if (value := getattr(given, name)) is not None}
    if given.form is None:
        say(f"{given.target}: {export(given.folder, given.target, **wanted)} documents")
        return 0
    bad: list[BadRecord] = []
    count = export_wanjuan(given.folder, given.target, quarantine=bad.append, **wanted)
    for record in bad:
        say(f"  left out: {record.reason}")
    say(f"{given.target}: {count} documents, {len(bad)} left out")
    return 0
