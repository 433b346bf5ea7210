"""What the server promises (docs/serving.md, the table): each row by name, with the fault itself."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from puyu import Client
from puyu.engine.core import EngineConfig, Event
from puyu.engine.llm import LLM
from puyu.engine.runner import Output, Span
from puyu.model.heads import CausalLM
from puyu.serve.app import build_app
from puyu.serve.config import ServeConfig
from puyu.serve.drain import DrainingServer
from puyu.serve.server import address, bind
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import SamplingParams
from tests.serve.conftest import NAME, served, wait_until

JSON = {"Content-Type": "application/json"}
TEXT = {"model": NAME, "prompt": "one", "max_tokens": 3}
ENDLESS = TEXT | {"max_tokens": 900, "ignore_eos": True}


def engine_of(model: CausalLM, tokenizer: Tokenizer, **sizes: Any) -> LLM:
    return LLM.from_model(model, tokenizer, config=EngineConfig(**({"cache_tokens": 2048} | sizes)), name=NAME)


@pytest.fixture
def lone(model: CausalLM, tokenizer: Tokenizer) -> LLM:
    """An engine of one test's own, whose blocks all come back."""
    return engine_of(model, tokenizer, prefix_cache=False)


@pytest.fixture
def slow(lone: LLM) -> LLM:
    """The same at a pace at which something can happen in between."""
    return slowed(lone)


def slowed(llm: LLM) -> LLM:
    step = llm.driver.engine.step

    def slowly() -> list[Event]:
        time.sleep(0.004)
        return step()

    llm.driver.engine.step = slowly  # type: ignore[method-assign, assignment]
    return llm


def post(url: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60, **options)


def in_background(url: str, bodies: Sequence[dict[str, Any]]) -> tuple[list[threading.Thread], list[httpx.Response]]:
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda body=body: answers.append(post(url, body))) for body in bodies]
    for thread in threads:
        thread.start()
    return threads, answers


# -- what is wrong with one request costs nobody else -----------------------------------------------------------


def test_malformed_bodies_leave_the_engine_untouched(lone: LLM) -> None:
    with served(lone) as url:
        before = lone.stats().num_steps
        for content in (b"{", b"[]", b"\xff", b"null", b'{"prompt": 1}'):
            answer = httpx.post(f"{url}/v1/completions", content=content, headers=JSON)
            assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
        assert lone.stats().num_steps == before


BOMBS = (
    {"structured_outputs": {"regex": "((a{1000}){1000}){1000}"}},
    {"structured_outputs": {"regex": "(" * 5000 + ")" * 5000}},
    {"structured_outputs": {"grammar": "start: " + " | ".join(f"a{i}" for i in range(9000))}},
    {"structured_outputs": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}},
    {"structured_outputs": {"json": {"type": "string", "pattern": "(x{500}){500}"}}},
    {"structured_outputs": {"choice": []}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
)


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_grammar_bombs_are_400_and_others_go_on(lone: LLM, bomb: dict[str, Any]) -> None:
    with served(lone) as url:
        body = {"model": NAME, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 4} | bomb
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
        assert answer.status_code == 400 and answer.json()["error"]["param"] in bomb
        assert post(url, TEXT).status_code == 200


def test_a_prompt_beyond_the_context_is_400_with_its_code(lone: LLM) -> None:
    with served(lone) as url:
        answer = post(url, TEXT | {"prompt": "word " * 3000})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_prompt_beyond_the_pool_is_400_and_never_waits(model: CausalLM, tokenizer: Tokenizer) -> None:
    small = engine_of(model, tokenizer, cache_tokens=64)
    with served(small) as url:
        answer = post(url, TEXT | {"prompt": "word " * 100})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert post(url, TEXT).status_code == 200


def test_logits_that_are_not_numbers_fail_one_request_alone(lone: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = lone.tokenizer.encode("seven")
    run = lone.driver.engine.runner.run

    def poisoned(spans: Sequence[Span], feed: Any = None) -> Output:
        output = run(spans, feed)
        rows = [row for row, span in enumerate(spans) if list(span.tokens)[-len(poison) :] == poison]
        logits = output.logits_SV.clone()
        logits[rows] = torch.nan
        return output._replace(logits_SV=logits)

    monkeypatch.setattr(lone.driver.engine.runner, "run", poisoned)
    lone.driver.engine.runner.native = None
    with served(lone) as url:
        bodies = [TEXT | {"prompt": "one"}, TEXT | {"prompt": "seven"}, TEXT | {"prompt": "two"}]
        threads, answers = in_background(url, bodies)
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 200, 500]
        assert post(url, TEXT | {"prompt": "seven", "stream": True}).status_code == 500  # before any text: no 200
        page = httpx.get(f"{url}/metrics").text
        assert f'vllm:corrupted_requests_total{{model_name="{NAME}",engine="0"}} 2' in page


def test_a_step_that_raises_fails_its_requests_and_the_next_are_served(
    lone: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, broken = lone.driver.engine.runner.run, iter([True])

    def once(spans: Sequence[Span], feed: Any = None) -> Output:
        if next(broken, False):
            raise RuntimeError("out of luck")
        return run(spans, feed)

    monkeypatch.setattr(lone.driver.engine.runner, "run", once)
    with served(lone) as url:
        failed = post(url, TEXT)
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert post(url, TEXT).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


def test_when_the_engine_dies_everybody_is_told_and_the_server_ends(lone: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies() -> list[Event]:
        raise SystemError("the engine is gone")

    with served(lone) as url:
        assert post(url, TEXT).status_code == 200
        monkeypatch.setattr(lone.driver.engine, "step", dies)
        assert post(url, TEXT).status_code in (500, 503)
        wait_until(lambda: not answers_health(url))
        monkeypatch.undo()
        lone.driver.pump()


def answers_health(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_health_says_when_the_engine_makes_no_progress(lone: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    going, step = threading.Event(), lone.driver.engine.step

    def stuck() -> list[Event]:
        going.wait(20)
        return step()

    monkeypatch.setattr(lone.driver.engine, "step", stuck)
    with served(lone, stall_seconds=0.2) as url:
        threads, answers = in_background(url, [TEXT])
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        going.set()
        threads[0].join()
        assert answers[0].status_code == 200 and httpx.get(f"{url}/health").status_code == 200


# -- limits -----------------------------------------------------------------------------------------------------


def test_waiting_prompt_tokens_are_limited(model: CausalLM, tokenizer: Tokenizer) -> None:
    llm = slowed(engine_of(model, tokenizer, max_running=1, cache_tokens=4096))
    with served(llm, max_queue_tokens=200) as url:
        long = ENDLESS | {"prompt": "word " * 20, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as first:
            chunks = first.iter_bytes()
            assert next(chunks)
            threads, answers = in_background(url, [TEXT | {"prompt": "word " * 20}])
            wait_until(lambda: llm.driver.waiting_tokens > 0)
            refused = post(url, TEXT | {"prompt": "word " * 40})
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
            assert "prompt tokens" in refused.json()["error"]["message"]
        threads[0].join()
        assert answers[0].status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_is_504_or_an_error_event(slow: LLM, stream: bool) -> None:
    with served(slow) as url:
        answer = post(url, ENDLESS | {"timeout": 0.3, "stream": stream})
        assert "longer than the request allowed" in answer.text
        assert answer.status_code == (200 if stream else 504) and answer.text.endswith("[DONE]\n\n") is stream


def test_the_server_has_a_deadline_of_its_own(slow: LLM) -> None:
    with served(slow, answer_seconds=0.3) as url:
        assert post(url, ENDLESS | {"timeout": 100.0}).status_code == 504


def test_a_limit_of_waiting_is_504(model: CausalLM, tokenizer: Tokenizer) -> None:
    llm = slowed(engine_of(model, tokenizer, max_running=1))
    with served(llm, queue_seconds=0.3) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json=ENDLESS | {"stream": True}, timeout=60) as first:
            chunks = first.iter_bytes()
            assert next(chunks)
            assert post(url, TEXT | {"queue_timeout": 0.05}).status_code == 504
            assert post(url, TEXT).status_code == 504


def test_preempted_requests_give_what_they_give_alone(model: CausalLM, tokenizer: Tokenizer) -> None:
    roomy = engine_of(model, tokenizer, deterministic=True)
    bodies = [ENDLESS | {"prompt": f"count {word}", "max_tokens": 60} for word in ("one", "two", "three", "four")]
    with served(roomy) as url:
        alone = {json.dumps(body): post(url, body).json()["choices"] for body in bodies}
    tight = engine_of(model, tokenizer, deterministic=True, cache_tokens=176, prefix_cache=False)
    with served(tight) as url:
        with tight.driver.lock:  # nothing runs until all are there
            threads, answers = in_background(url, bodies)
            wait_until(lambda: len(tight.driver._inbox) == len(bodies))
        for thread in threads:
            thread.join()
    assert tight.stats().num_preemptions > 0, "nothing was preempted, so nothing was tested"
    assert sorted(json.dumps(a.json()["choices"]) for a in answers) == sorted(map(json.dumps, alone.values()))


# -- clients that misbehave -------------------------------------------------------------------------------------


def num_accepted(url: str) -> int:
    """Connections that the server has open."""
    port = f":{int(url.rsplit(':', 1)[1]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    # columns: local address, foreign address, state (0A listens), ..., inode (0 when no process has it any more)
    return sum(row[1].endswith(port) and row[3] != "0A" and row[9] != "0" for row in rows)


def connection(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=30)


def head(body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    lines = (b"POST /v1/completions HTTP/1.1", b"Host: localhost", b"Content-Type: application/json")
    return b"\r\n".join((*lines, b"Content-Length: %d" % size, b"", b"")) + body


def test_a_reader_that_takes_nothing_is_cut_off(slow: LLM) -> None:
    total = slow.stats().num_free_blocks
    with served(slow, slow_seconds=0.5) as url:
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
            many = ENDLESS | {"stream": True, "n": 16, "logprobs": 20, "temperature": 1.0}
            request = head(json.dumps(many).encode())  # what a proxy, or anybody, says about the client is not believed
            reader.sendall(request.replace(b"Host: localhost", b"Host: localhost\r\nX-Forwarded-For: 192.0.2.7"))
            wait_until(lambda: slow.stats().num_running == 16)
            assert num_accepted(url) == 1
            wait_until(lambda: slow.stats().num_running == 0)
            assert slow.stats().num_free_blocks == total
            wait_until(lambda: num_accepted(url) == 0)
            assert slow.stats().num_generated_tokens < 16 * 900, "it was written to its end"
        assert post(url, TEXT).status_code == 200


def test_a_head_or_a_body_that_never_comes_is_given_up(lone: LLM) -> None:
    with served(lone, body_seconds=0.3) as url:
        with connection(url) as silent, connection(url) as torn, connection(url) as half:
            torn.sendall(b"POST /v1/comple")
            half.sendall(head(b'{"prompt": ', length=400))
            assert silent.recv(100) == b"" and torn.recv(100) == b""
            assert half.recv(100).startswith(b"HTTP/1.1 408")
        assert post(url, TEXT).status_code == 200


def test_idle_means_idle(lone: LLM) -> None:
    """After all kinds of ends: blocks, tasks and file descriptors are those of the beginning."""
    with served(lone) as url:
        total = lone.stats().num_free_blocks
        post(url, TEXT)
        for at in range(30):
            body = (TEXT, ENDLESS, TEXT | {"stream": True}, TEXT | {"max_tokens": -1})[at % 4]
            with connection(url) as client:
                client.sendall(head(json.dumps(body).encode()))
                if at % 4 != 1:
                    client.recv(100)
        wait_until(lambda: lone.stats().num_running + lone.stats().num_waiting == 0)
        wait_until(lambda: num_accepted(url) == 0 and lone.stats().num_free_blocks == total)
        lone.driver.engine.audit()


def test_a_stream_has_the_form_that_clients_expect(lone: LLM) -> None:
    with served(lone) as url:
        body = {"model": NAME, "messages": [{"role": "user", "content": "Who are you?"}], "stream": True, "n": 2}
        options = {"include_usage": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"stream_options": options}, timeout=30)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]" and answer.text.count("[DONE]") == 1
    chunks = [json.loads(line) for line in lines[:-1]]
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:2]] == ["assistant"] * 2
    for index in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content") or "" for choice in mine) == "I am 浦语."
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 10
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


# -- stopping ---------------------------------------------------------------------------------------------------


def test_while_it_drains_new_requests_are_refused(slow: LLM) -> None:
    async def main(url: str) -> None:
        async with httpx.AsyncClient(timeout=30) as http:
            running = asyncio.create_task(http.post(f"{url}/v1/completions", json=ENDLESS | {"max_tokens": 100}))
            while slow.stats().num_running == 0:
                await asyncio.sleep(0.005)
            closing = asyncio.create_task(asyncio.to_thread(slow.loop.close, drain=20))
            await asyncio.sleep(0.05)
            refused = await http.post(f"{url}/v1/completions", json=TEXT)
            assert refused.status_code == 503 and "Retry-After" in refused.headers
            assert (await http.get(f"{url}/health")).status_code == 503
            assert (await running).status_code == 200
            await closing

    with served(slow) as url:
        asyncio.run(main(url))


def test_a_second_signal_ends_at_once(slow: LLM) -> None:
    config = ServeConfig(port=0, drain_seconds=60)
    with bind(config) as listener:
        server = DrainingServer(build_app(slow, config), slow, config)
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        serving.start()
        threads, answers = in_background(address(listener), [ENDLESS | {"stream": True}])
        wait_until(lambda: slow.stats().num_generated_tokens > 2)
        server.handle_exit(signal.SIGTERM, None)
        threads[0].join(0.3)
        assert serving.is_alive() and threads[0].is_alive(), "the first one drains"
        server.handle_exit(signal.SIGTERM, None)
        serving.join(20)
        threads[0].join(20)
    assert slow.stats().num_generated_tokens < 900
    assert "the server may be stopping" in answers[0].text and answers[0].text.endswith("data: [DONE]\n\n")


def test_a_sleeping_engine_refuses_until_it_wakes(lone: LLM) -> None:
    with served(lone) as url:
        lone.sleep()
        asleep = post(url, TEXT)
        assert asleep.status_code == 503 and "asleep" in asleep.text
        lone.wake()
        assert Client(url).complete("one", params=SamplingParams(max_tokens=2)).finish_reason == "length"
