"""Whole runs against a scripted server: counting, refusing, tearing; times come from a clock that the test turns."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from itertools import islice, pairwise
from typing import Any

import pytest

from puyu.errors import ConfigError, ResourceError
from puyu.load.http import Response
from puyu.load.report import summary, table
from puyu.load.run import Answer, LoadConfig, Result, arrivals, load
from tests.load.conftest import (
    END,
    STREAM,
    Asked,
    Script,
    Scripted,
    Write,
    answer,
    care,
    chunk,
    event,
    plain,
    scripted,
    text,
    usage,
)


class Clock:
    """Stands still until somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def loaded(script: Script, **options: Any) -> tuple[Result, LoadConfig, Scripted, Clock]:
    """A run against a script, after the care for models and tokens."""
    clock = Clock()

    async def whole(asked: Asked, write: Write) -> None:
        if not await care(asked, write):
            await script(asked, write)

    async def main() -> tuple[Result, LoadConfig, Scripted]:
        async with scripted(whole) as server:
            defaults = {
                "url": server.url,
                "workload": "fixed",
                "prompt": "12",
                "output": "6",
                "requests": 5,
                "warmup": 1,
            }
            config = LoadConfig(**{**defaults, **options})
            return await load(config, clock=clock, sleep=clock.sleep), config, server

    return *asyncio.run(main()), clock


def once(script: Script) -> Script:
    """The probe and the warm-up are answered well, what follows by the script."""
    seen = [0]

    async def wrapped(asked: Asked, write: Write) -> None:
        seen[0] += 1
        await (answer if seen[0] <= 2 else script)(asked, write)

    return wrapped


# --- one answer, byte by byte ---------------------------------------------------------------------------------------


def ok() -> Response:
    response = Response()
    response.status = 200
    return response


def test_times_are_those_of_the_bytes() -> None:
    got = Answer()
    got.push(ok(), event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}), 1.0)
    got.push(ok(), event({"choices": [{"delta": {"content": "浦语"}}]}), 2.0)
    got.push(ok(), b": keep-alive\n\n", 2.5)
    got.push(ok(), text("a") + text("b"), 3.0)
    got.push(ok(), text("", "stop") + usage(3, 4) + event("[DONE]"), 4.0)
    assert got.times == [2.0, 3.0, 3.0] and got.finish_reason == "stop"
    assert got.verdict() == ("ok", "") and got.usage["completion_tokens"] == 4


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_events_and_characters_in_pieces(size: int) -> None:
    data = "".join(
        piece.decode() for piece in (text("浦"), text("语 \u2028"), text("", "length"), usage(1, 2))
    ).encode()
    got = Answer()
    for at in range(0, len(data), size):
        got.push(ok(), data[at : at + size], float(at))
    assert len(got.times) == 2 and got.verdict() == ("ok", "")
    first_end = data.index(b"\n")
    assert got.times[0] == first_end - first_end % size, "the event counts when its last byte is there"


def test_a_call_of_a_tool_and_reasoning_count_as_text() -> None:
    got = Answer()
    got.push(ok(), event({"choices": [{"delta": {"reasoning_content": "hm"}}]}), 1.0)
    got.push(ok(), event({"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}), 2.0)
    assert got.times == [1.0, 2.0] and got.verdict()[0] == "cut"


# --- runs ------------------------------------------------------------------------------------------------------------


def test_usage_is_what_counts_and_not_chunks() -> None:
    result, config, server, _ = loaded(answer)
    assert [row.status for row in result.rows] == ["ok"] * 5
    assert {(row.prompt_tokens, row.output_tokens, len(row.chunks)) for row in result.rows} == {(12, 6, 3)}
    found = summary(result, config)
    assert (found["completed"], found["output_tokens"], found["tokens_per_chunk"]) == (5, 30, 2.0)
    assert len(server.generations) == 5 + 1 + 1 and result.model == "scripted" and result.context == 512
    body = server.generations[-1]
    assert body["ignore_eos"] is True and body["stream_options"] == {"include_usage": True}
    assert body["model"] == "scripted" and len(body["prompt"].split()) == 11 and body["max_tokens"] == 6
    assert server.connections <= 16, "connections are used again"


def test_the_same_seed_sends_the_same_bodies() -> None:
    def bodies(seed: int) -> list[str]:
        server = loaded(answer, workload="random", prompt="4-30", output="1-9", seed=seed, concurrency=1)[2]
        return [body["prompt"] for body in server.generations]

    assert bodies(3) == bodies(3) != bodies(4)


def test_chat_bodies_have_messages() -> None:
    _, _, server, _ = loaded(answer, chat=True, workload="prefix", prefix_tokens=20, prefixes=1, body={"top_k": 5})
    body = server.generations[-1]
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"] and body["top_k"] == 5
    assert "prompt" not in body and body["messages"][0] == server.generations[-2]["messages"][0]


def test_refused_is_counted_and_not_asked_again() -> None:
    statuses = iter([429, 503, 429, 500, 400])

    async def script(asked: Asked, write: Write) -> None:
        status = next(statuses)
        await write(plain({"error": {"message": f"busy {status}"}}, status))

    result, config, server, _ = loaded(once(script), concurrency=1)
    found = summary(result, config)
    assert (found["completed"], found["refused"], found["failed"]) == (0, 3, 2)
    assert found["reasons"] == {"refused 429": 2, "refused 503": 1, "http 500": 1, "http 400": 1}
    assert len(server.generations) == 7 and found["output_tokens"] is None
    assert "note: 2 x refused 429: busy 429" in table(result, config)


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ([STREAM, chunk(text("a"))], "torn"),
        ([STREAM, chunk(text("a")), END], "cut"),
        ([STREAM, chunk(text("a")), chunk(event({"error": {"message": "broken"}})), END], "error event"),
        ([STREAM, chunk(b"data: {torn\n\n"), END], "not JSON"),
        ([b"HTTP/1.1 200 OK\r\n\r\n", text("a"), text("", "stop")], "ok"),
        ([], "torn"),
    ],
)
def test_every_end_has_a_name(pieces: list[bytes], status: str) -> None:
    async def script(asked: Asked, write: Write) -> None:
        for piece in pieces:
            await write(piece)
        raise ConnectionAbortedError

    result, config, _, _ = loaded(once(script), requests=2, concurrency=1)
    assert [row.status for row in result.rows] == [status] * 2
    assert status != "error event" or result.rows[0].detail == "broken"
    assert summary(result, config)["completed"] == (2 if status == "ok" else 0)


def test_a_request_that_takes_too_long() -> None:
    async def script(asked: Asked, write: Write) -> None:
        await write(STREAM)
        await asyncio.sleep(30)

    result, _, _, _ = loaded(once(script), requests=1, timeout=0.2)
    assert [row.status for row in result.rows] == ["timeout"]


def test_a_field_that_the_server_names_is_left_out() -> None:
    async def script(asked: Asked, write: Write) -> None:
        for name in ("ignore_eos", "stream_options"):
            if name in asked.body:
                await write(plain({"error": {"message": f"unknown field '{name}'"}}, 400))
                return
        await write(STREAM + chunk(text("a")) + chunk(text("b", "length")) + chunk(event("[DONE]")) + END)

    result, config, server, _ = loaded(script)
    assert [row.status for row in result.rows] == ["ok"] * 5 and "ignore_eos" not in server.generations[-1]
    assert {row.output_tokens for row in result.rows} == {6}, "an answer that ended at its limit is that long"
    page = "\n".join(table(result, config))
    assert "does not take ignore_eos" in page and "5 answers came without usage" in page


def test_without_usage_and_limit_the_number_is_unknown() -> None:
    async def script(asked: Asked, write: Write) -> None:
        await write(STREAM + chunk(text("a")) + chunk(text("b", "stop")) + END)

    result, config, _, _ = loaded(script)
    found = summary(result, config)
    assert found["completed"] == 5 and found["output_tokens"] is None and found["latency_ms"]["tpot"] == {}
    assert "output unknown tokens/s" in "\n".join(table(result, config))


def test_short_answers_are_told() -> None:
    async def script(asked: Asked, write: Write) -> None:
        await write(STREAM + chunk(text("a", "stop")) + chunk(usage(5, 1)) + END)

    assert "5 answers ended before the length that was asked for" in loaded(script)[0].notes


def test_a_server_that_counts_no_tokens() -> None:
    async def main() -> Result:
        async def script(asked: Asked, write: Write) -> None:
            if not await care(asked, write, counts=False):
                await answer(asked, write)

        async with scripted(script) as server:
            return await load(LoadConfig(url=server.url, workload="fixed", prompt="40", requests=1))

    result = asyncio.run(main())
    assert not result.exact_lengths and any("estimates" in note for note in result.notes)


# --- when ------------------------------------------------------------------------------------------------------------


def test_arrivals_are_poisson_and_seeded() -> None:
    times = list(islice(arrivals(4.0, 1), 4000))
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert times == list(islice(arrivals(4.0, 1), 4000)) and times[0] == 0.0
    assert mean == pytest.approx(0.25, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)
    assert list(islice(arrivals(math.inf, 1), 3)) == [0.0, 0.0, 0.0]


def test_requests_are_sent_by_the_clock() -> None:
    result, config, _, clock = loaded(answer, rate=2.0, requests=8)
    due = list(islice(arrivals(2.0, config.seed), 8))
    assert [row.due for row in result.rows] == due
    assert [row.sent for row in result.rows] == pytest.approx(due)
    assert sum(clock.slept) == pytest.approx(due[-1])


def test_a_time_limit_ends_the_sending() -> None:
    result, config, _, _ = loaded(answer, rate=3.0, requests=0, seconds=4.0)
    due = [at for at in islice(arrivals(3.0, config.seed), 100) if at < 4.0]
    assert len(result.rows) == len(due) and all(row.is_ok for row in result.rows)


@pytest.mark.parametrize("seats", [1, 3])
def test_no_more_are_in_flight_than_allowed(seats: int) -> None:
    result, _, server, _ = loaded(answer, requests=12, concurrency=seats)
    assert server.most_busy <= seats and len(result.rows) == 12


def test_times_of_rows_by_hand() -> None:
    clock = Clock()

    async def script(asked: Asked, write: Write) -> None:
        """Each event is read before the clock goes on: the client answers to pings by reading."""
        if await care(asked, write):
            return
        await write(STREAM)
        for wait, piece in ((0.5, text("a")), (0.1, text("b")), (0.3, text("c")), (0.2, text("", "length"))):
            clock.now += wait
            await write(chunk(piece))
            await settle()
        await write(chunk(usage(9, 5)) + END)

    async def settle() -> None:
        for _ in range(20):
            await asyncio.sleep(0.001)

    async def main() -> tuple[Result, LoadConfig]:
        async with scripted(script) as server:
            config = LoadConfig(url=server.url, workload="fixed", prompt="9", output="5", requests=2, concurrency=1)
            return await load(config, clock=clock, sleep=clock.sleep), config

    result, config = asyncio.run(main())
    row = result.rows[1]
    assert row.chunks == pytest.approx([0.5, 0.6, 0.9]) and row.ended == pytest.approx(1.1)
    assert (row.ttft, row.tpot) == (pytest.approx(0.5), pytest.approx(0.15)) and row.sent == pytest.approx(1.1)
    found = summary(result, config)
    assert found["latency_ms"]["itl"]["max"] == pytest.approx(300) and found["seconds"] == pytest.approx(2.2)
    assert found["output_tokens_per_s"] == pytest.approx(10 / 2.2)


# --- refusals --------------------------------------------------------------------------------------------------------


def run_against(script: Callable[[Asked, Write], Awaitable[None]], **options: Any) -> Result:
    async def main() -> Result:
        async with scripted(script) as server:
            return await load(LoadConfig(url=server.url, **options))

    return asyncio.run(main())


def test_servers_that_cannot_be_used_are_said_at_once() -> None:
    async def locked(asked: Asked, write: Write) -> None:
        await write(plain({"error": {"message": "a key is needed"}}, 401))

    async def chat_only(asked: Asked, write: Write) -> None:
        if not await care(asked, write):
            await write(plain({"error": {"message": "not here"}}, 404))

    with pytest.raises(ResourceError, match="answered 401 to /v1/models"):
        run_against(locked)
    with pytest.raises(ResourceError, match="--chat true"):
        run_against(chat_only)
    with pytest.raises(ResourceError, match="no answer from"):
        asyncio.run(load(LoadConfig(url="http://127.0.0.1:9")))


def test_configs_that_cannot_be_used() -> None:
    async def script(asked: Asked, write: Write) -> None:
        if not await care(asked, write):
            await answer(asked, write)

    with pytest.raises(ConfigError, match="fixed has one length"):
        run_against(script, workload="fixed", prompt="3-9")
    with pytest.raises(ConfigError, match="file"):
        run_against(script, workload="conversations")
