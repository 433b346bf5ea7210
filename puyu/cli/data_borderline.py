"""`puyu data borderline DIR --rule RULE`: the documents nearest to a threshold, for a person to read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from puyu.log import say


def main(arguments: Sequence[str]) -> int:
    """The words after the verb; returns the exit code."""
    options = argparse.ArgumentParser(prog="puyu data borderline", description=(__doc__ or "").partition(": ")[2])
    options.add_argument("folder", type=Path, metavar="DIR", help="what puyu data wrote")
    options.add_argument("--rule", required=True, help="such as splice_max, cohesion_min, dup_lines_max")
    options.add_argument("-n", "--count", type=int, default=20, metavar="N", help="documents on each side [20]")
    options.add_argument("--threshold", type=float, help="[that of the run]")
    for name in ("domain", "language", "source"):
        options.add_argument(f"--{name}", default="", help=f"only of this {name}")
    options.add_argument("--out", type=Path, metavar="FILE", help=".jsonl, or .md [markdown on the screen]")
    given = options.parse_args(list(arguments))

    from puyu.data.borderline import markdown, sample
    from puyu.files import write_jsonl, write_text

    only = {"domain": given.domain, "language": given.language, "source": given.source}
    found = sample(given.folder, given.rule, count=given.count, threshold=given.threshold, **only)
    if given.out is None:
        print(markdown(found, given.rule))
        return 0
    if given.out.suffix == ".jsonl":
        write_jsonl(given.out, (row.to_json() for row in found))
    else:
        write_text(given.out, markdown(found, given.rule))
    say(f"{given.out}: {len(found)} documents near {given.rule}")
    return 0
