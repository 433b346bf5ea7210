"""serve.1 to 3: what HTTP costs, sixteen streams against llama.cpp's servers, and steadiness under half the load.

    python bench/serve_cpu.py [--save] [--pairs 7] [--only serve.1 serve.2 serve.3]

The 317M shape of cpu_shape.py, int4 and Q4_0; prompts of 64 tokens, answers of 64, greedy, sixteen at once. The load
generator (`puyu bench serve`) runs on the same cores, for every side alike.

serve.1a: CPU seconds of our server's process outside the engine's threads, as a share of all (servers.py says how they
are told apart). serve.1b: seconds for all sixteen answers, against the same prompts as one batch of an engine in a
process of its own. serve.2: output tokens a second against llama-cpp-python's server, which answers one request at a
time. In the same turns, and in the notes: llama.cpp's own server, which batches, from a prebuilt wheel (AVX2).
serve.3: the rate that saturates our server is measured with sixteen clients that ask without pause; then, in turns, the
median gap between tokens of one stream alone, and the 99th percentile of all gaps under Poisson arrivals at half that
rate.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_shape
import harness
import servers

LONE_TOKENS, SATURATING, STEADY = 192, 96, 64


@dataclass(eq=False)
class Gaps:
    """A side of serve.3: gaps between tokens in milliseconds."""

    server: servers.Server
    share: float
    options: dict[str, Any]
    turn: int = 0

    def measure(self) -> float:
        from puyu.load.report import gaps, percentile

        self.turn += 1
        result = servers.checked(servers.fire(self.server.url, seed=self.turn, **self.options))
        return 1000 * percentile(sorted(gaps(result.rows)), self.share)


def overhead(folder: Path, *, pairs: int) -> tuple[list[harness.Samples], dict[str, str], dict[str, Any]]:
    """serve.1: shares of CPU time, and seconds with and without HTTP."""
    alone = harness.Worker([sys.executable, servers.HERE / "servers.py", "engine", folder])
    with servers.ours(folder) as server:
        streams = servers.Streams(server, "seconds")
        streams.measure()
        streams.turn, streams.shares = 0, []
        ours, peer = harness.alternate(streams, alone, pairs=pairs)  # type: ignore[arg-type]
    alone.close()
    samples = [harness.Samples("serve.1a", streams.shares), harness.Samples("serve.1b", ours, peer, unit="s")]
    return samples, alone.facts["versions"], {"client_cpu": statistics.median(streams.client)}


def throughput(folder: Path, *, pairs: int, pythons: Sequence[Path]) -> tuple[harness.Samples, dict[str, Any]]:
    """serve.2: output tokens a second of three servers, in turns."""
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(servers.ours(folder / "int4")),
            stack.enter_context(servers.llama(pythons[0], folder / "q4_0.gguf")),
            stack.enter_context(servers.xllama(pythons[1], folder / "q4_0.gguf")),
        ]
        sides = [servers.Streams(server, "rate") for server in started]
        for side in sides:
            side.measure()
            side.turn = 0
        found: list[list[float]] = [[] for _ in sides]
        for turn in range(pairs):
            order = list(range(len(sides)))
            for index in order[turn % 3 :] + order[: turn % 3]:
                found[index].append(sides[index].measure())
            print(f"  turn {turn + 1}/{pairs}: " + ", ".join(f"{side[-1]:.1f}" for side in found), file=sys.stderr)
    notes = {
        "llama-cpp-python": "answers one request at a time: its context is behind a lock",
        "llama.cpp server": {
            "samples": found[2],
            "ours_over_it": harness.paired_bound(found[0], found[2]) if pairs > 1 else None,
            "about": "16 slots, continuous batching, prebuilt for AVX2; the number is the lower 95 % bound",
        },
        "client_cpu": [statistics.median(side.client) for side in sides],
    }
    return harness.Samples("serve.2", found[0], found[1], unit="tokens/s"), notes


def steadiness(folder: Path, *, pairs: int) -> tuple[harness.Samples, dict[str, Any]]:
    """serve.3: gaps at half of what saturates the server, against those of one stream."""
    with servers.ours(folder) as server:
        servers.fire(server.url, requests=servers.STREAMS, seed=-1)
        full = servers.checked(servers.fire(server.url, requests=SATURATING, concurrency=servers.STREAMS, seed=-2))
        rate = len(full.rows) / full.seconds / 2
        alone = Gaps(server, 0.5, {"requests": 1, "output": str(LONE_TOKENS)})
        steady = Gaps(server, 0.99, {"requests": STEADY, "rate": rate})
        ours, peer = harness.alternate(steady, alone, pairs=pairs)  # type: ignore[arg-type]
    return harness.Samples("serve.3", ours, peer, unit="ms"), {"requests_per_s": rate, "saturated": 2 * rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="samples of each side")
    parser.add_argument("--only", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--save", action="store_true", help="keep the results in bench/results, a file for each bar")
    arguments = parser.parse_args()
    folder = cpu_shape.inputs(cpu_shape.SHAPES["317m"])
    pythons = [harness.peer_python(name) for name in ("llama", "xllamacpp")] if "serve.2" in arguments.only else []
    for bar in arguments.only:
        # a run of its own for each: the probes then frame few minutes
        run = harness.Run(f"serve_cpu_{bar.partition('.')[2]}", peer_flags=BARS[bar])
        if bar == "serve.1":
            samples, run.versions, run.notes = overhead(folder / "int4", pairs=arguments.pairs)
        elif bar == "serve.2":
            found, run.notes = throughput(folder, pairs=arguments.pairs, pythons=pythons)
            samples = [found]
            run.versions = servers.versions(pythons[0], {"llama-cpp-python": "llama-cpp-python"})
            run.versions |= servers.versions(pythons[1], {"xllamacpp": "xllamacpp"})
        else:
            found, run.notes = steadiness(folder / "int4", pairs=arguments.pairs)
            samples = [found]
        run.finish(samples, save=arguments.save)


BARS = {
    "serve.1": "the same engine and weights, LLM.generate_all",
    "serve.2": "llama_cpp.server: built natively, n_threads 2, n_ctx 4096, logits_all false, interrupt_requests false",
    "serve.3": "the same server, one stream",
}

if __name__ == "__main__":
    main()
