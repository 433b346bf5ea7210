"""Everything that may go wrong between router and replica, with scripted replicas, so that it goes wrong on time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from functools import wraps
from pathlib import Path
from typing import Any

import httpx
import pytest

from puyu.errors import ResourceError
from puyu.serve.fleet import Fleet, Patience
from puyu.serve.keys import new_key
from puyu.serve.merge import merge
from tests.serve.replicas import QUICK, STREAM, WHOLE, Fake, chunk, event, silent, staged, torn, until, whole

FINE = whole({"answer": 42})
BODY = {"prompt": "one"}
SPEAK = torn(STREAM, chunk(event("a")), chunk(event("b")))
END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


async def ask(http: httpx.AsyncClient, **more: Any) -> httpx.Response:
    return await http.post("/v1/completions", json=BODY | more)


# -- sent again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [torn(), torn(WHOLE), torn(WHOLE, b'{"ans'), torn(b"HTTP/1.1 200"), torn(STREAM), torn(STREAM, chunk(b"data: {"))],
    ids=["before head", "after head", "mid body", "mid head", "stream without event", "stream in its first event"],
)
@in_loop
async def test_a_request_whose_answer_has_not_begun_is_sent_again(broken: Any) -> None:
    async with staged(broken, FINE) as stage:
        for number in range(6):
            answer = await ask(stage.http, prompt=str(number))
            assert (answer.status_code, answer.json(), answer.headers["puyu-replica"]) == (200, {"answer": 42}, "1")
        assert stage.asked()[0] >= 1 and stage.router.counts.again["torn"] == stage.asked()[0]
        assert stage.lives[0][-1].asked[0].endswith(stage.lives[1][-1].asked[0].partition(b"\r\n\r\n")[2])


@in_loop
async def test_a_replica_that_is_not_there() -> None:
    async with staged(FINE, FINE, patience=Patience(health_every=60)) as stage:
        stage.lives[0][0].server.close()
        answers = [await ask(stage.http, prompt=str(number)) for number in range(4)]
        assert {answer.status_code for answer in answers} == {200} and stage.asked() == [0, 4]
        assert stage.router.counts.again == {"unreached": 1}


@in_loop
async def test_one_that_hangs_is_taken_out_and_its_requests_go_elsewhere() -> None:
    async with staged(silent, FINE) as stage:
        waiting = [asyncio.create_task(ask(stage.http, prompt=str(number))) for number in range(6)]
        await until(lambda: sum(stage.asked()) == 6)
        stage.lives[0][0].is_sick = True
        assert {(await each).json()["answer"] for each in waiting} == {42}
        assert stage.fleet.replicas[0].deaths == 1 and stage.fleet.replicas[1].deaths == 0
        await until(lambda: stage.fleet.replicas[0].state == "up")
        assert len(stage.lives[0]) == 2


@in_loop
async def test_what_was_under_way_at_two_deaths_is_refused() -> None:
    async with staged(torn(), torn(), torn(), FINE) as stage:
        stage.fleet.affinity.choose([], {stage.fleet.replicas[3].serial: 0})  # the good one is last in turn
        answer = await ask(stage.http)
        assert answer.status_code == 500 and "2 replicas failed" in answer.json()["error"]["message"]
        assert sum(stage.asked()) == 2


# -- streams ---------------------------------------------------------------------------------------------------


@in_loop
async def test_a_stream_passes_as_it_comes() -> None:
    go = asyncio.Event()

    async def slow(writer: asyncio.StreamWriter, body: bytes) -> None:
        first = chunk(event("浦语") + b"data:") + chunk(b" {}\n")
        writer.write(STREAM + first)
        await go.wait()
        writer.write(chunk(b"\n") + END)

    async with staged(slow) as stage, stage.http.stream("POST", "/v1/completions", json=BODY) as answer:
        pieces = answer.aiter_raw()
        assert await anext(pieces) == event("浦语")
        go.set()
        assert b"".join([piece async for piece in pieces]) == b"data: {}\n\ndata: [DONE]\n\n"
        assert answer.headers["content-type"] == "text/event-stream" and len(answer.headers.get_list("date")) == 1


@pytest.mark.parametrize("rest", [b"", chunk(b'data: {"te'), b"7\r\nda"])
@in_loop
async def test_a_stream_that_had_begun_ends_with_an_error_and_done(rest: bytes) -> None:
    async with staged(torn(STREAM, chunk(event("a")), chunk(event("b")) + rest), silent) as stage:
        text = (await ask(stage.http)).text
        *said, error, done, empty = text.split("\n\n")
        assert said == ['data: {"text": "a"}', 'data: {"text": "b"}'] and (done, empty) == ("data: [DONE]", "")
        assert "incomplete" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert stage.asked() == [1, 0] and stage.router.counts.broken_streams == 1


@in_loop
async def test_one_that_dies_after_done_has_said_all() -> None:
    async with staged(torn(STREAM, chunk(event("a")), chunk(b"data: [DONE]\n\n"))) as stage:
        assert (await ask(stage.http)).content == event("a") + b"data: [DONE]\n\n"


@in_loop
async def test_a_client_that_leaves_ends_the_work_at_once() -> None:
    async def endless(writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(STREAM)
        while True:
            writer.write(chunk(event("x")))
            await asyncio.sleep(0.002)

    async with staged(endless, silent) as stage:
        async with stage.http.stream("POST", "/v1/completions", json=BODY) as answer:
            await anext(answer.aiter_raw())
        await until(lambda: stage.lives[0][0].left == 1)
        with pytest.raises(httpx.ReadTimeout):
            await stage.http.post("/v1/completions", json=BODY | {"prompt": "two"}, timeout=0.05)
        await until(lambda: stage.lives[1][0].left == 1)
        assert [replica.in_flight for replica in stage.fleet.replicas] == [0, 0]
        assert not stage.router.counts.again


# -- full, stopping, none --------------------------------------------------------------------------------------


@in_loop
async def test_a_full_replica_hands_over_and_when_all_are_full_the_client_hears_it() -> None:
    full = whole({"error": {"message": "too many"}}, 429, Retry_After="3")
    async with staged(full, FINE) as stage:
        for number in range(4):
            assert (await ask(stage.http, prompt=str(number))).json() == {"answer": 42}
        assert stage.asked()[0] > 0 and stage.fleet.replicas[0].state == "up"
    async with staged(full, full, full) as stage:
        answer = await ask(stage.http)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3") and stage.asked() == [1, 1, 1]


@in_loop
async def test_a_stopped_engine_hands_over() -> None:
    stopped = whole({"error": {"message": "the engine has stopped"}}, 503)
    async with staged(stopped, FINE) as stage:
        stage.lives[0][0].is_sick = True
        for number in range(4):
            assert (await ask(stage.http, prompt=str(number))).json() == {"answer": 42}
        assert stage.asked() == [1, 4]
        await until(lambda: len(stage.lives[0]) == 2)
    async with staged(stopped) as stage:
        answer = await ask(stage.http)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1


@in_loop
async def test_no_replica_at_all() -> None:
    async with staged(FINE, FINE, patience=Patience(first_pause=60)) as stage:
        for lives in stage.lives.values():
            lives[0].die()
        await until(lambda: not stage.fleet.up())
        answer = await ask(stage.http)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        health = await stage.http.get("/health")
        assert health.status_code == 503 and [row["state"] for row in health.json()["replicas"]] == ["down"] * 2


@in_loop
async def test_other_refusals_are_passed_on_as_they_are() -> None:
    error = {"error": {"message": "no", "param": "prompt"}}
    async with staged(whole(error, 400), whole(error, 400)) as stage:
        answer = await ask(stage.http)
        assert (answer.status_code, answer.json()) == (400, error) and sum(stage.asked()) == 1
        broken = await stage.http.post("/v1/completions", content=b"[" * 5000)
        assert broken.status_code == 400 and stage.lives[1][0].asked[0].endswith(b"[" * 5000)


# -- lives -----------------------------------------------------------------------------------------------------


@in_loop
async def test_the_dead_start_again_with_growing_pauses() -> None:
    async with staged(FINE, FINE) as stage:
        pauses = []
        for number in range(3):
            began = time.monotonic()
            stage.lives[0][-1].die()
            await until(lambda expected=number + 2: len(stage.lives[0]) == expected)
            pauses.append(time.monotonic() - began)
            await until(lambda: stage.fleet.replicas[0].state == "up")
            assert (await ask(stage.http)).status_code == 200
        assert pauses[0] >= 0.05 and pauses[1] >= 0.1 and pauses[2] >= 0.2
        assert len({id(life) for life in stage.lives[0]}) == 4 and stage.fleet.replicas[0].deaths == 3


@in_loop
async def test_a_replica_that_never_starts_is_said_at_once() -> None:
    async def launch(index: int) -> Fake:
        fake = await Fake(FINE).open()
        if index == 1:
            fake.is_sick = True
            asyncio.get_running_loop().call_later(0.05, fake.die)
        return fake

    fleet = Fleet(2, launch, patience=QUICK)
    with pytest.raises(ResourceError, match=r"replica 1 did not start \(was ended\): its last words"):
        await fleet.start()
    await fleet.stop()
    assert [replica.state for replica in fleet.replicas] == ["down", "down"]


# -- stopping --------------------------------------------------------------------------------------------------


@in_loop
async def test_what_is_under_way_may_finish_and_nothing_new_is_taken() -> None:
    go = asyncio.Event()

    async def slow(writer: asyncio.StreamWriter, body: bytes) -> None:
        await go.wait()
        await FINE(writer, body)

    async with staged(slow, drain_seconds=5) as stage:
        under_way = asyncio.create_task(ask(stage.http))
        await until(lambda: stage.asked() == [1])
        stage.server.should_exit = True
        await until(lambda: stage.router.is_draining)
        assert stage.router.health().status == 503
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient(base_url=stage.http.base_url) as other:
                await ask(other)
        go.set()
        assert (await under_way).json() == {"answer": 42}


@in_loop
async def test_after_the_drain_time_everything_ends_with_a_stated_error() -> None:
    async def endless(writer: asyncio.StreamWriter, body: bytes) -> None:
        if b"stream" in body:
            writer.write(STREAM + chunk(event("a")))
        await asyncio.sleep(60)

    async with staged(endless, endless, drain_seconds=0) as stage:
        whole_one = asyncio.create_task(ask(stage.http))
        stream = asyncio.create_task(ask(stage.http, stream=True))
        await until(lambda: sum(stage.asked()) == 2)
        began = time.monotonic()
        stage.server.should_exit = True
        refused, broken = await whole_one, (await stream).text
        assert refused.status_code == 503 and "stopping" in refused.json()["error"]["message"]
        assert broken.startswith('data: {"text": "a"}\n\ndata: {"error"') and broken.endswith("data: [DONE]\n\n")
        assert time.monotonic() - began < 1


# -- the door --------------------------------------------------------------------------------------------------


@in_loop
async def test_the_key_and_the_limits_stand_at_the_router() -> None:
    async with staged(FINE, api_key="s3cret", max_body_mb=0.001) as stage:
        assert (await ask(stage.http)).status_code == 401 and stage.asked() == [0]
        assert (await stage.http.get("/metrics")).status_code == 401
        assert (await stage.http.get("/health")).status_code == 200
        stage.http.headers["authorization"] = "Bearer s3cret"
        assert (await ask(stage.http)).status_code == 200
        head = stage.lives[0][0].asked[0].lower()
        assert b"bearer inner" in head and b"s3cret" not in head and head.count(b"host:") == 1
        assert (await ask(stage.http, prompt="x" * 2000)).status_code == 413
        parts = stage.http.post("/v1/completions", content=_parts())
        assert (await parts).status_code == 413 and stage.asked() == [1]
        assert (await stage.http.get("/v1/models", headers={"Host": "evil.example"})).status_code == 403
        assert (await stage.http.request("TRACE", "/v1/models")).status_code == 405


async def _parts() -> Any:
    yield b"x" * 2000


@in_loop
async def test_paths_and_answers_pass_as_they_are() -> None:
    async with staged(whole({"a": 1}, 404, X_Own="yes")) as stage:
        answer = await stage.http.get("/v1/%61?b=%20c", headers={"X-Mine": "1"})
        assert (answer.status_code, answer.json(), answer.headers["x-own"]) == (404, {"a": 1}, "yes")
        head = stage.lives[0][0].asked[0].lower()
        assert head.startswith(b"get /v1/%61?b=%20c http/1.1\r\n") and b"x-mine: 1" in head


def test_pages_are_merged_under_one_heading() -> None:
    one = '# TYPE a counter\na 1\n# TYPE b histogram\nb_bucket{le="+Inf"} 3\nb_sum 0.5\n'
    assert merge({"0": one, "1": "# TYPE a counter\na 7\n# TYPE c gauge\n", "2": ""}) == (
        '# TYPE a counter\na{replica="0"} 1\na{replica="1"} 7\n'
        '# TYPE b histogram\nb_bucket{le="+Inf",replica="0"} 3\nb_sum{replica="0"} 0.5\n'
    )


# -- keys, control routes, slow readers ------------------------------------------------------------------------


@in_loop
async def test_limits_of_a_key_hold_with_what_replicas_tell(tmp_path: Path) -> None:
    key = new_key(tmp_path / "keys.yaml", "one", tokens_per_minute=50)
    spent = chunk(event("a")) + chunk(b"data: [DONE]\n\n") + chunk(b": spent 60\n\n") + b"0\r\n\r\n"

    async def stream(writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(STREAM + spent)

    for script, expected in ((stream, event("a") + b"data: [DONE]\n\n"), (whole({}, puyu_spent="60"), b"{}")):
        async with staged(script, keys_file=str(tmp_path / "keys.yaml")) as stage:
            stage.http.headers["authorization"] = f"Bearer {key}"
            answer = await ask(stage.http)
            assert answer.content == expected and "puyu-spent" not in answer.headers
            assert len(answer.headers.get_list("x-request-id")) == 1
            limited = await ask(stage.http)
            assert limited.status_code == 429 and int(limited.headers["retry-after"]) > 1
            assert b"puyu-spent: tell" in stage.lives[0][0].asked[0].lower()


@in_loop
async def test_control_goes_everywhere_and_to_those_that_start_later() -> None:
    state = whole({"asleep": False})
    async with staged(state, state, control_key="boss") as stage:
        assert (await stage.http.post("/control/wake")).status_code == 401
        stage.http.headers["authorization"] = "Bearer boss"
        for path, body in [
            ("weights", {"path": "a"}), ("adapters", {"name": "x", "path": "p"}), ("sleep", {"level": 1}),
            ("weights", {"path": "b"}), ("reset_prefix_cache", {}), ("wake", {}),
        ]:  # fmt: skip
            answer = await stage.http.post(f"/control/{path}", json=body)
            assert answer.json() == {"replicas": {"0": {"asleep": False}, "1": {"asleep": False}}}
        assert (await stage.http.get("/control/state")).status_code == 200
        await stage.http.delete("/control/adapters/x")
        assert stage.asked() == [8, 8]
        assert all(b"bearer inner-control\r\n" in head.lower() for head in stage.lives[0][0].asked)
        stage.lives[1][0].die()
        await until(lambda: len(stage.lives[1]) == 2 and stage.fleet.replicas[1].state == "up")
        lines = [head.split(b" HTTP")[0] for head in stage.lives[1][1].asked]
        assert lines == [b"POST /control/weights", b"POST /control/wake", b"DELETE /control/adapters/x"]
        assert b'"b"' in stage.lives[1][1].asked[0]
    async with staged(whole({"error": "no"}, 400), state, control_key="boss") as stage:
        answer = await stage.http.post("/control/weights", headers={"Authorization": "Bearer boss"})
        assert answer.status_code == 400 and not stage.fleet.settled.questions


@in_loop
async def test_a_responses_stream_breaks_in_its_own_words() -> None:
    async with staged(torn(STREAM, chunk(b"event: response.created\ndata: {}\n\n"))) as stage:
        text = (await stage.http.post("/v1/responses", json={"input": "Hi"})).text
        assert text.startswith("event: response.created\ndata: {}\n\nevent: error\ndata: ") and "[DONE]" not in text
        error = json.loads(text.rstrip().rpartition("data: ")[2])
        assert (error["type"], error["code"], error["sequence_number"]) == ("error", "server_error", 1)


@in_loop
async def test_a_client_that_takes_nothing_is_cut_off() -> None:
    async def flood(writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(STREAM)
        while True:
            writer.write(chunk(event("x" * 60_000)))
            await writer.drain()

    async with staged(flood) as stage:
        stage.router.slow_seconds = 0.2
        _, writer = await asyncio.open_connection("127.0.0.1", stage.http.base_url.port, limit=1024)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        await until(lambda: stage.asked() == [1])
        await until(lambda: stage.fleet.replicas[0].in_flight == 0)
        writer.transport.abort()
