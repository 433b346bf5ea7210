"""train.1: the certificate of layouts, as `puyu certify layouts` runs it, against one process.

    python bench/train_layouts.py [--save] [--steps 50] [--small]

Every layout trains the same small model on the same documents; the bars are the largest differences over all of them,
the losses that are not equal bit for bit where sums have one order, and the time of the whole command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import harness
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of each run")
    parser.add_argument("--small", action="store_true", help="a selection of layouts, to try the bench")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    run = harness.Run("train_layouts", versions={"torch": torch.__version__})
    command = [sys.executable, "-m", "puyu", "certify", "layouts", "--json", f"--steps={arguments.steps}"]
    if arguments.small:
        command.append("--small")
    began = time.perf_counter()
    done = subprocess.run(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows and done.returncode in (0, 1), f"the certificate ended with {done.returncode}"
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    promised = [row for row in rows if row["bits"] >= 0]
    run.notes = {"layouts": len(rows), "worlds": sorted({row["world"] for row in rows}), "steps": arguments.steps}
    run.notes |= {"compared bit for bit": len(promised), "all hold": done.returncode == 0}
    worst = {name: max(row[name] for row in rows) for name in ("float64", "first", "float32")}
    run.counted("train_layouts_differences").finish(
        [
            harness.Samples("train.1", [worst["float64"]]),
            harness.Samples("train.1b", [worst["first"]]),
            harness.Samples("train.1c", [worst["float32"]]),
            harness.Samples("train.1d", [sum(row["bits"] for row in promised)]),
        ],
        save=arguments.save,
    )
    run.finish([harness.Samples("train.1e", [seconds])], save=arguments.save)


if __name__ == "__main__":
    main()
