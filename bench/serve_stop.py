"""serve.6 and 7: from SIGTERM under load to the end of the process, and from its start to the first 200 of /health.

    python bench/serve_stop.py [--save] [--starts 10]

The 317M shape, int4, on the CPU, as `puyu serve` starts it. serve.7: ten starts after one that leaves the files in the
page cache. serve.6: sixteen streams that would take far longer, SIGTERM in their middle, for drain limits of 0, 1 and 3
seconds; a sample is the time beyond the limit, the largest of the three limits each round. Every client must have been
told how its answer ended, and the process must have ended with code 0, or there is no result.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from pathlib import Path

import cpu_shape
import harness
import servers

from puyu.load.run import LoadConfig, Row, Session
from puyu.load.workload import Ask

LIMITS, ROUNDS, LONG = (0, 1, 3), 5, 3000
TOLD = ("ok", "error event", "refused 503")


def started(folder: Path, **options: object) -> servers.Server:
    """The command as users give it."""
    port = servers.free_port()
    return servers.spawn([sys.executable, "-m", "puyu", "serve", folder, *servers.flags(port=port, **options)], port)


def start(folder: Path) -> float:
    """Seconds from the start of a process until it takes requests."""
    server = started(folder)
    seconds = server.wait_until_ready()
    server.stop()
    server.log.unlink()
    return seconds


async def stop_under_load(server: servers.Server, streams: int) -> tuple[float, Counter[str]]:
    """Seconds from SIGTERM to the end of the process, and how the clients' answers ended."""

    session = Session(LoadConfig(url=server.url), clock=time.perf_counter)
    rows = [Row(index, servers.PROMPT, LONG) for index in range(streams)]
    asks = [Ask(ask.prompt, ask.prompt_tokens, LONG) for ask in servers.prompts(0, streams)]
    tasks = [asyncio.create_task(session.run(row, ask)) for row, ask in zip(rows, asks, strict=True)]
    while await _taken(session) < streams and not any(task.done() for task in tasks):
        await asyncio.sleep(0.02)
    seconds = await asyncio.to_thread(server.stop)
    await asyncio.gather(*tasks)
    return seconds, Counter(row.status for row in rows)


async def _taken(session: Session) -> float:
    """Requests that run or wait."""
    _, page = await session.endpoint.ask("GET", "/metrics")
    found = servers.gauges(page)
    return found["num_requests_running"] + found["num_requests_waiting"]


def overtime(folder: Path, limit: int) -> tuple[float, Counter[str]]:
    """Seconds beyond a drain limit."""
    server = started(folder, drain_seconds=limit)
    try:
        server.wait_until_ready()
        seconds, ends = asyncio.run(stop_under_load(server, servers.STREAMS))
    finally:
        server.stop()
    code, log = server.process.returncode, server.log.read_text(errors="replace")
    server.log.unlink()
    if code != 0 or set(ends) - set(TOLD):
        raise SystemExit(f"exit code {code}, answers ended as {dict(ends)}:\n{log[-2000:]}")
    return seconds - limit, ends


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--starts", type=int, default=10, help="samples of serve.7")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    folder = cpu_shape.inputs(cpu_shape.SHAPES["317m"]) / "int4"
    run = harness.Run("serve_stop")
    start(folder)
    starts = [start(folder) for _ in range(arguments.starts)]
    stops: list[dict[int, float]] = []
    for _ in range(ROUNDS):
        stops.append({limit: overtime(folder, limit)[0] for limit in LIMITS})
        print(f"  beyond the limits: {stops[-1]}", file=sys.stderr)
    run.notes = {"beyond_limits": stops}
    worst = [max(found.values()) for found in stops]
    run.finish([harness.Samples("serve.6", worst), harness.Samples("serve.7", starts)], save=arguments.save)


if __name__ == "__main__":
    main()
