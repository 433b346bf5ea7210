"""`puyu certify layouts`: the same small model under every layout against one process; fails where a number is off."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """The verb; returns 1 where a layout does not agree."""
    options = argparse.ArgumentParser(prog="puyu certify", description="Every layout against one process.")
    options.add_argument("what", choices=("layouts",))
    options.add_argument("--small", action="store_true", help="a selection, 5 steps")
    options.add_argument("--steps", type=int, default=0, metavar="N", help="steps of each run [50; 5 with --small]")
    options.add_argument("--json", action="store_true", help="one line of JSON for each layout instead of the table")
    given = options.parse_args(list(argv))
    from puyu.train.layouts.certify import CASES, LIMITS, certify

    cases = [case for case in CASES if case.small or not given.small]
    steps, began, failed = given.steps or (5 if given.small else 50), time.perf_counter(), 0
    if not given.json:
        print(f"{'largest difference of a loss':<48} processes  float64  float32: step 1  all {steps:<4} bits")
    for row in certify(cases, steps=steps):
        failed += not row.holds
        numbers = {"float64": row.float64, "first": row.first, "float32": row.float32}
        if given.json:
            about = {"layout": row.case.name, "world": row.case.world, "like": row.case.like, "holds": row.holds}
            more = {"weights": row.weights, "norms": row.norms, "bits": row.bits}
            print(json.dumps(about | numbers | more), flush=True)
            continue
        bits = "" if row.bits < 0 else "equal" if row.bits == 0 else f"{row.bits} differ"
        words = f"{row.float64:>10.1e} {row.first:>15.1e} {row.float32:>9.1e}  {bits:<10}"
        print(f"{row.case.name:<48} {row.case.world:>9} {words} {'' if row.holds else 'FAILED'}", flush=True)
    if not given.json:
        said = ", ".join(f"{name} {limit:g}" for name, limit in LIMITS.items())
        print(f"{len(cases)} layouts, {failed} failed; allowed: {said}; {time.perf_counter() - began:.0f} s")
    return int(failed > 0)
