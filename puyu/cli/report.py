"""`puyu report RUN [RUN2 ...] [--out FILE]`: the page about a training run, or about some beside each other.

puyu report runs/nano/pretrain
puyu report runs/raw/pretrain runs/clean/pretrain --out compare.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="puyu report", description="one page about a training run, or up to six")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of training runs (their --out)")
    parser.add_argument("--out", type=Path, help="the page [report.html in the first folder]")
    given = parser.parse_args(list(arguments))
    from puyu.chain.run_report import write_run_report
    from puyu.chain.run_view import RunView
    from puyu.errors import ConfigError

    if len(given.runs) > 6:
        raise ConfigError(f"puyu report takes one run to six, got {len(given.runs)}")
    runs = [RunView(path) for path in given.runs]
    print(write_run_report(runs, given.out or runs[0].folder / "report.html"))
    return 0
