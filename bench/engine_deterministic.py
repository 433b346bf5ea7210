"""engine.12: random schedules in deterministic mode against lone runs, to the bit; and what the mode costs.

    python bench/engine_deterministic.py [--save] [--schedules 1000]

The schedules are those of tests/engine/test_deterministic.py: random arrivals, chunks, pools, priorities, several
answers, drafts, prefix hits, aborts of others; with the native step and without. The value is how many schedules gave
every request exactly what it gets alone, if all did, else 0. The cost is new tokens a second of 16 requests at a time
on the nano shape, with the mode and without, in the notes of the result.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import nano_shape

TESTS = "tests/engine/test_deterministic.py"
REQUESTS, PROMPT, NEW = 16, 64, 64


def schedules(count: int) -> float:
    """Run the tests with so many schedules; their output goes to standard error."""
    command = [sys.executable, "-m", "pytest", "-q", TESTS, "-k", "what_it_gets_alone"]
    environment = {**os.environ, "PUYU_SCHEDULES": str(count)}
    done = subprocess.run(command, cwd=harness.ROOT, env=environment, stdout=sys.stderr)
    return float(count if done.returncode == 0 else 0)


def speed(folder: Path, *, deterministic: bool) -> float:
    """New tokens a second, prompts included; the best of three runs after a warm-up."""
    import torch

    from puyu.engine.core import Engine, EngineConfig
    from puyu.model.checkpoint import load_model

    config = EngineConfig(prefix_cache=False, deterministic=deterministic, cache_tokens=REQUESTS * 256)
    engine = Engine(load_model(folder, dtype=torch.bfloat16), config)
    return max([run(engine) for _ in range(4)][1:])


def run(engine: object) -> float:
    from puyu.engine.core import Engine
    from puyu.engine.request import Request

    assert isinstance(engine, Engine)
    for index in range(REQUESTS):
        prompt = tuple((37 * index + 11 * at) % nano_shape.VOCAB for at in range(PROMPT))
        engine.add(Request(f"r{index}", prompt, NEW))
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    return REQUESTS * NEW / (time.perf_counter() - began)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    bench = harness.Run("engine_deterministic", versions={"torch": torch.__version__})
    with tempfile.TemporaryDirectory() as name:
        nano_shape.save_checkpoint(Path(name))
        speeds = {
            mode: speed(Path(name), deterministic=mode == "deterministic") for mode in ("default", "deterministic")
        }
    bench.notes = {"tokens_per_second": speeds, "cost": speeds["default"] / speeds["deterministic"]}
    bench.finish([harness.Samples("engine.12", [schedules(arguments.schedules)])], save=arguments.save)


if __name__ == "__main__":
    main()
