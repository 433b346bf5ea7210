"""spine.1, 2, 3: the whole chain from one command, `puyu --help`, and the chain again with nothing changed.

    python bench/spine_chain.py [--save] [--recipe recipes/nano.yaml] [--out FOLDER]

The chain runs once into a fresh folder (kept when --out names it), then five times more. Where --out is a folder that
exists, spine.1 is left out. `--help` runs ten times after a warm-up. All are wall times of whole processes, as a user
waits for them. Another recipe than nano is timed but its result is never kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

NANO = "recipes/nano.yaml"


def wall_time(arguments: list[str]) -> float:
    """Seconds of one `puyu` command; its output goes to standard error, a failure ends the bench."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "puyu", *arguments], cwd=harness.ROOT, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"puyu {' '.join(arguments)} ended with code {done.returncode}")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default=NANO)
    parser.add_argument("--out", type=Path, help="keep the run here; without spine.1 if the folder exists")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    recipe, kept = arguments.recipe, arguments.out
    fresh = kept is None or not kept.exists()
    # its own name: a run without spine.1 shall not take the place of one that has it
    run = harness.Run("spine_chain" if fresh else "spine_again", versions=versions(), notes={"recipe": recipe})
    wall_time(["--help"])
    helps = [wall_time(["--help"]) for _ in range(10)]
    with tempfile.TemporaryDirectory() as temporary:
        command = ["chain", recipe, "--out", str(kept or Path(temporary) / "chain")]
        first = wall_time(command)
        again = [wall_time(command) for _ in range(5)]
    whole = [harness.Samples("spine.1", [first])] if fresh else []
    found = [*whole, harness.Samples("spine.2", helps), harness.Samples("spine.3", again)]
    run.finish(found, save=arguments.save and recipe == NANO)


def versions() -> dict[str, str]:
    import torch

    return {"torch": torch.__version__}


if __name__ == "__main__":
    main()
