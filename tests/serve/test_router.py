"""A router with two real replicas: the answers of one server, whatever happens to the replicas meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from puyu import Client
from puyu.errors import ResourceError
from puyu.serve.config import ServeConfig
from puyu.serve.fleet import Fleet
from puyu.serve.local import LocalProcess, environment, launcher, replica_config
from puyu.serve.routed import RouterServer
from puyu.serve.router import Router
from puyu.serve.server import address, bind, running_server
from puyu.types import SamplingParams
from tests.serve.conftest import NAME, wait_until

LONG = {"model": NAME, "max_tokens": 900, "ignore_eos": True, "temperature": 0}
OPTIONS: dict[str, Any] = {"port": 0, "dtype": "float32", "cache_tokens": 32768, "replicas": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


class Running:
    """A router in a thread of the test process, so that its fleet can be looked at."""

    def __init__(self, config: ServeConfig) -> None:
        self.config, self.url, self.processes = config, "", [None] * config.replicas
        self.begun = threading.Event()
        self.server: RouterServer
        self.fleet: Fleet

    async def main(self) -> None:
        start = launcher(self.config, key="inner")

        async def launch(index: int) -> LocalProcess:
            self.processes[index] = process = await start(index)
            return process

        self.fleet = Fleet(self.config.replicas, launch, key="inner")
        try:
            await self.fleet.start()
            self.server = RouterServer(Router(self.fleet), self.config)
            with bind(self.config) as listener:
                self.url = address(listener)
                self.begun.set()
                await self.server.serve(sockets=[listener])
        finally:
            self.begun.set()
            await self.fleet.stop()

    def kill(self, index: int) -> None:
        os.kill(self.processes[index].pid, signal.SIGKILL)


@contextmanager
def routed(config: ServeConfig) -> Iterator[Running]:
    running = Running(config)
    thread = threading.Thread(target=lambda: asyncio.run(running.main()))
    thread.start()
    running.begun.wait(60)
    try:
        assert running.url, "the fleet did not start"
        yield running
    finally:
        running.server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def pair(checkpoint: Path, one_thread: None) -> Iterator[Running]:
    with routed(ServeConfig(model=str(checkpoint), **OPTIONS)) as running:
        yield running


@pytest.fixture(scope="module")
def http(pair: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pair.url, timeout=60) as client:
        yield client


def test_answers_are_those_of_one_server(http: httpx.Client, url: str) -> None:
    who = {"messages": [{"role": "user", "content": "Who are you?"}]}
    for path, body in [
        ("/v1/chat/completions", who),
        ("/v1/chat/completions", who | {"temperature": 1.0, "seed": 5, "max_tokens": 9}),
        ("/v1/chat/completions", who | {"stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", who | {"temprature": 1}),
        ("/v1/completions", {"prompt": ["one", "two"], "max_tokens": 5, "logprobs": 1}),
        ("/v1/completions", {"prompt": "one " * 900}),
        ("/v1/embeddings", {"input": ["one", "two"]}),
        ("/tokenize", {"prompt": "浦语"}),
        ("/nothing", {}),
    ]:
        ours, theirs = http.post(path, json=body), httpx.post(url + path, json=body)
        assert ours.status_code == theirs.status_code and _plain(ours) == _plain(theirs)
    assert Client(pair_url := str(http.base_url)).models() == [NAME]
    pairs = [("one", " two"), ("I am", " 浦语")]
    assert asyncio.run(Client(pair_url).score(pairs)) == asyncio.run(Client(url).score(pairs))


def _plain(answer: httpx.Response) -> Any:
    """Without what differs from call to call: ids, times, what a cache held."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        return [event["choices"] for event in events]
    return {k: v for k, v in answer.json().items() if k not in ("id", "created", "usage")}


def test_a_conversation_goes_on_where_its_beginning_is_cached(http: httpx.Client) -> None:
    talks = {name: [{"role": "user", "content": f"I am {name}. Count"}] for name in ("Ada", "Bob", "Cy", "Di")}
    homes: dict[str, set[str]] = {name: set() for name in talks}
    for turn in range(3):
        for name, messages in talks.items():
            answer = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 30})
            homes[name].add(answer.headers["puyu-replica"])
            cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached > 16 * turn or turn == 0
            messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "and more"}]
    assert all(len(places) == 1 for places in homes.values())
    assert set.union(*homes.values()) == {"0", "1"}


def test_pages_of_all_replicas(http: httpx.Client, pair: Running) -> None:
    for number in range(4):
        http.post("/v1/completions", json={"prompt": f"{number}", "max_tokens": 2})
    rows = _metrics(http)
    names = [line.split()[2] for line in http.get("/metrics").text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    for index in (0, 1):
        mine = {name.partition("{")[0]: n for name, n in rows.items() if f'replica="{index}"' in name}
        assert mine["vllm:generation_tokens_total"] > 0 and mine["vllm:e2e_request_latency_seconds_count"] > 0
        assert rows[f'puyu:router_forwarded_total{{replica="{index}"}}'] > 0
        assert rows[f'puyu:router_replica_up{{replica="{index}"}}'] == 1


def _metrics(http: httpx.Client) -> dict[str, float]:
    rows = [line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def test_nobody_reaches_a_replica_without_the_inner_key(pair: Running) -> None:
    for replica in pair.fleet.replicas:
        inner = f"http://127.0.0.1:{replica.address[1]}/v1/models"
        assert httpx.get(inner).status_code == 401
        assert httpx.get(inner, headers={"Authorization": "Bearer inner"}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_on_the_replica(http: httpx.Client, stream: bool) -> None:
    def aborted() -> float:
        return sum(n for name, n in _metrics(http).items() if 'finished_reason="abort"' in name)

    def running() -> list[float]:
        return [n for name, n in _metrics(http).items() if name.startswith("vllm:num_requests_running")]

    before = aborted()
    body = json.dumps(LONG | {"prompt": "one", "stream": stream}).encode()
    lines = (b"POST /v1/completions HTTP/1.1", b"Host: localhost", b"Content-Type: application/json")
    head = b"\r\n".join((*lines, b"Content-Length: %d", b"", b""))
    with socket.create_connection((http.base_url.host, http.base_url.port or 80), timeout=30) as client:
        client.sendall(head % len(body) + body)
        wait_until(lambda: sum(running()) == 1)  # a client that leaves before it is taken was never there
    wait_until(lambda: aborted() == before + 1)
    assert running() == [0, 0]


def test_kill_9_of_a_replica_under_load_loses_nothing_that_had_not_begun(http: httpx.Client, pair: Running) -> None:
    prompts = [f"one two {number}" for number in range(30)]

    def ask(number: int) -> httpx.Response:
        body = LONG | {"prompt": prompts[number], "stream": number % 2 == 0, "max_tokens": 160}
        return http.post("/v1/completions", json=body)

    with ThreadPoolExecutor(30) as pool:
        right = [_said(answer)[0] for answer in pool.map(ask, range(30))]
        again = [pool.submit(ask, number) for number in range(30)]
        wait_until(lambda: min(replica.in_flight for replica in pair.fleet.replicas) >= 8)
        pair.kill(0)
        answers = [each.result() for each in again]
    broken = 0
    for number, answer in enumerate(answers):
        text, error = _said(answer)
        assert answer.status_code == 200 and (text == right[number] or (error and right[number].startswith(text)))
        assert not error or number % 2 == 0
        broken += error
    assert pair.server.router.counts.broken_streams == broken and pair.server.router.counts.again["torn"] > 0
    wait_until(lambda: pair.fleet.replicas[0].state == "up")
    assert pair.fleet.replicas[0].deaths == 1
    assert {http.post("/v1/completions", json={"prompt": str(n)}).headers["puyu-replica"] for n in "ab"} == {"0", "1"}


def _said(answer: httpx.Response) -> tuple[str, bool]:
    """The text, and whether the stream said that it is incomplete."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.json()["choices"][0]["text"], False
    *events, done, empty = answer.text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    values = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(value["choices"][0]["text"] for value in values if "choices" in value)
    return text, "error" in values[-1]


# -- as a command ----------------------------------------------------------------------------------------------


@contextmanager
def command(checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """`puyu serve --replicas 2`: the process, its URL and those of its replicas."""
    flags = ["--port", "0", "--dtype", "float32", "--cache-tokens", "2048", "--replicas", "2"]
    code = "import sys; from puyu.cli.serve import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(checkpoint), *flags], stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        inner = []
        for line in child.stderr:
            if " at " in line and line.startswith("[replica"):
                inner.append(line.split(" at ")[1].split()[0])
            elif " at " in line:
                yield child, line.split(" at ")[1].split()[0], inner
                return


def test_sigterm_lets_answers_finish_and_ends_everything(checkpoint: Path) -> None:
    with command(checkpoint) as (child, url, inner), Client(url) as client:
        deltas = client.stream_chat("Count", params=SamplingParams(max_tokens=200, ignore_eos=True))
        next(deltas)
        child.send_signal(signal.SIGTERM)
        last = list(deltas)[-1]
        assert last.finish_reason == "length" and last.usage is not None and last.usage.completion_tokens == 200
        assert child.wait(5) == 0 and child.stderr is not None and child.stderr.read().rstrip().endswith("stopped")
        assert len(inner) == 2 and not any(_answers(each) for each in inner)


def test_replicas_do_not_outlive_a_router_that_is_killed(checkpoint: Path) -> None:
    with command(checkpoint) as (child, url, inner):
        assert _answers(url) and all(_answers(each) for each in inner)
        child.kill()
        wait_until(lambda: not any(_answers(each) for each in inner))


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_fleet_that_cannot_start_says_why(tmp_path: Path) -> None:
    config = ServeConfig(model=str(tmp_path / "nothing"), **OPTIONS)
    with pytest.raises(ResourceError, match=r"replica \d did not start .*exit code 3(.|\n)*no such model folder"):
        with running_server(config):
            raise AssertionError("it started")


def test_the_router_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import puyu.serve.routed, puyu.serve.cluster"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- what each replica gets ------------------------------------------------------------------------------------


def test_cores_memory_and_gpus_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServeConfig(model="m", replicas=4, api_key="outer", host="0.0.0.0", port=80, device="cpu")
    own = replica_config(config, key="k", host="127.0.0.1", sharers=4)
    assert (own.host, own.port, own.api_key, own.replicas, own.cache_fraction) == ("127.0.0.1", 0, "k", 1, 0.3 / 4)
    monkeypatch.setattr("puyu.serve.local.num_cores", lambda: 9)
    assert environment(config, index=1)["OMP_NUM_THREADS"] == "1"  # the user's word
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment(config, index=1)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    auto = config.model_copy(update={"device": "auto"})
    assert [environment(auto, index=i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["3", "5", "3"]
