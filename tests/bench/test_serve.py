"""The benches of the server on a tiny model: how threads are told apart, and how a soak is judged."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.harness import load_bars
from tests.serve.conftest import checkpoint, model, tokenizer  # noqa: F401 - fixtures

ROOT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are read from /proc")


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import serve_soak
    import serve_stop
    import servers

    monkeypatch.setattr(servers.harness, "cores", lambda: 1)
    return servers, serve_soak, serve_stop


def test_the_bars_are_there() -> None:
    ids = {bar.id for bar in load_bars()}
    assert {f"serve.{name}" for name in ("1a", "1b", "2", "3", "4a", "4b", "6", "7")} <= ids


def test_growth_compares_quarters(benches: Any) -> None:
    rows = [(float(at), 100.0 if at < 50 else 110.0) for at in range(100)]
    ratio, medians = benches[1].growth(rows, 100.0)
    assert ratio == pytest.approx(1.1) and medians == [100.0, 100.0, 110.0, 110.0]
    assert math.isnan(benches[1].growth([(1.0, 1.0)], 100.0)[0])


@linux
def test_threads_of_the_engine_are_told_apart(benches: Any, checkpoint: Path) -> None:  # noqa: F811
    servers = benches[0]
    with servers.ours(checkpoint, dtype="float32", cache_tokens=2048) as server:
        result = servers.fire(server.url, prompt="30", output="20", requests=4, warmup=1)
        assert all(row.is_ok and row.output_tokens == 20 for row in result.rows)
        clocks = server.clocks()
        assert 0 < clocks["engine"] < clocks["all"]
        assert server.descriptors() > 3 and server.resident() > 1e7
    assert server.process.returncode == 0


@linux
def test_a_short_soak_ends_where_it_began(benches: Any, checkpoint: Path) -> None:  # noqa: F811
    servers, soak, _ = benches

    async def all_of(server: Any) -> tuple[Any, dict[str, Any]]:
        found: tuple[Any, dict[str, Any]] = await soak.soak(server, minutes=0.03)
        return found

    with servers.ours(checkpoint, dtype="float32", cache_tokens=4096, max_running=8, max_queue=200) as server:
        found, notes = asyncio.run(all_of(server))
    assert not found.wrong and found.counts["short"] and notes["end"]["num_requests_running"] == 0
    assert notes["descriptors"][1] >= notes["descriptors"][0] + soak.IDLE


@linux
def test_a_stop_under_load_is_told_to_everybody(benches: Any, checkpoint: Path, monkeypatch: Any) -> None:  # noqa: F811
    _, _, stop = benches
    monkeypatch.setattr(stop, "LONG", 900)
    seconds, ends = stop.overtime(checkpoint, 0)
    assert seconds > 0 and set(ends) <= set(stop.TOLD) and sum(ends.values()) == 16
