"""engine.9 to 11: start, prefix cache and memory of the smaller int4 model of cpu_shape.py.

    python bench/engine_start.py [--save]

engine.9: a new process imports, loads and gives its first token, ten times after a warm-up that leaves the files in
the page cache; nothing is compiled. engine.10: in one process, the time to the first token of a prompt of 2,048 tokens
and 16 more, and of another one with the same 2,048; seven pairs. engine.11: resident memory of a process after load
and one request, as a share of 1.2 x packed weights + cache + 300 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import cpu_shape
import harness

PREFIX, OWN, CACHE_TOKENS = 2048, 16, 4096


def start(path: Path) -> dict[str, float]:
    """What a new process does from its first line to its first token."""
    from puyu.engine.core import EngineConfig
    from puyu.engine.llm import LLM

    llm = LLM(path, device="cpu", dtype="bfloat16", config=EngineConfig(cache_tokens=CACHE_TOKENS))
    llm.complete("Hello", max_tokens=1)
    cache = llm.driver.engine.runner.cache.rows
    return {"resident": resident(), "cache": cache.numel() * cache.element_size(), "done": time.time()}


def resident() -> int:
    """Resident bytes of this process, the pages of mapped files included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def fresh(path: Path) -> tuple[float, dict[str, float]]:
    """Seconds from the start of a process to its first token, and what it reports."""
    began = time.time()
    command = [sys.executable, __file__, "--start", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=harness.ROOT)
    facts = json.loads(done.stdout.splitlines()[-1])
    return facts["done"] - began, facts


def prefixes(path: Path, *, pairs: int) -> tuple[list[float], list[float]]:
    """First tokens a second: of prompts whose beginning is cached, and of the same prompts before."""
    import torch

    from puyu.engine.core import EngineConfig
    from puyu.engine.llm import LLM
    from puyu.engine.request import Request

    torch.set_num_threads(harness.cores())
    engine = LLM(path, device="cpu", dtype="bfloat16", config=EngineConfig(cache_tokens=CACHE_TOKENS)).driver.engine

    def first_token(name: str, ids: list[int]) -> float:
        engine.add(Request(name, tuple(ids), 1))
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        return 1 / (time.perf_counter() - began)

    found: tuple[list[float], list[float]] = ([], [])
    first_token("warm", cpu_shape.prompt(PREFIX))
    for index in range(pairs):
        engine.reset_prefix_cache()
        common = cpu_shape.prompt(PREFIX, start=index)
        cold = first_token(f"cold{index}", common + cpu_shape.prompt(OWN, start=1)[1:])
        warm = first_token(f"warm{index}", common + cpu_shape.prompt(OWN, start=2)[1:])
        found[0].append(warm)
        found[1].append(cold)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start)))
        return
    shape = cpu_shape.SHAPES["317m"]
    path = cpu_shape.inputs(shape) / "int4"
    run = harness.Run("engine_start")
    fresh(path)
    starts = [fresh(path) for _ in range(10)]
    warm, cold = prefixes(path, pairs=7)
    packed = shape.packed_bytes("int4") + shape.vocab * shape.hidden * 2
    allowed = [1.2 * packed + facts["cache"] + 300e6 for _, facts in starts]
    run.notes = {"packed_bytes": packed, "resident_bytes": starts[-1][1]["resident"]}
    run.finish(
        [
            harness.Samples("engine.9", [seconds for seconds, _ in starts]),
            harness.Samples("engine.10", warm, cold, unit="first tokens/s"),
            harness.Samples("engine.11", [f["resident"] / a for (_, f), a in zip(starts, allowed, strict=True)]),
        ],
        save=arguments.save,
    )


if __name__ == "__main__":
    main()
