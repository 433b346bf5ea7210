"""The server as a process: start, port in use, SIGTERM, a parent that dies, and what the config refuses."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from puyu import Client
from puyu.engine.core import EngineConfig, Event
from puyu.engine.llm import LLM
from puyu.errors import ConfigError, ResourceError
from puyu.model.heads import CausalLM
from puyu.serve.config import ServeConfig
from puyu.serve.server import bind, read_defaults, running_server
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import SamplingParams
from tests.serve.conftest import NAME, served, wait_until


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of these tests share the cores with other tests."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_child_process_serves_and_stops_cleanly(checkpoint: Path, tmp_path: Path) -> None:
    config = ServeConfig(model=str(checkpoint), port=0, api_key="s3cret", dtype="float32", cache_tokens=2048)
    log = tmp_path / "server.log"
    with running_server(config, log=log) as url:
        client = Client(url, api_key="s3cret")
        assert client.models() == [NAME]
        assert client.chat("Who are you?").text == "I am 浦语."
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    written = log.read_text()
    assert "serving tiny at http://127.0.0.1" in written and written.rstrip().endswith("stopped")
    assert "s3cret" not in written and "Who are you" not in written and "浦语" not in written


def test_sigterm_lets_the_answer_under_way_finish_and_exits_0(checkpoint: Path) -> None:
    with serving(checkpoint) as (child, url), Client(url) as client:
        deltas = client.stream_chat("Count", params=SamplingParams(max_tokens=200, ignore_eos=True))
        next(deltas)
        child.send_signal(signal.SIGTERM)
        last = list(deltas)[-1]
        assert child.wait(20) == 0
        assert child.stderr is not None and child.stderr.read().rstrip().endswith("stopped")
    assert last.finish_reason == "length" and last.usage is not None and last.usage.completion_tokens == 200


@pytest.mark.parametrize("stream", [False, True])
def test_after_the_drain_time_requests_end_with_a_stated_error(
    model: CausalLM, tokenizer: Tokenizer, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM.from_model(model, tokenizer, config=EngineConfig(cache_tokens=1024), name=NAME)
    step = llm.driver.engine.step

    def slow() -> list[Event]:  # a toy model would be done before the server is told to stop
        time.sleep(0.005)
        return step()

    monkeypatch.setattr(llm.driver.engine, "step", slow)
    body = {"prompt": "one", "max_tokens": 900, "ignore_eos": True, "stream": stream}
    answers: list[httpx.Response] = []

    def ask(url: str) -> None:
        answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30))

    with served(llm, drain_seconds=0) as url:
        thread = threading.Thread(target=ask, args=(url,))
        thread.start()
        wait_until(lambda: llm.stats().num_generated_tokens > 2)
    thread.join()
    assert "the server may be stopping" in answers[0].text and answers[0].status_code == (200 if stream else 503)
    assert answers[0].text.endswith("data: [DONE]\n\n") is stream


SERVE = "import sys; from puyu.cli.main import main; sys.exit(main(['serve', *sys.argv[1:]]))"
SLOW = (
    "import time\nfrom puyu.engine.core import Engine\nstep = Engine.step\n"
    "def slow(*_):\n    time.sleep(0.1)\n    return step(*_)\nEngine.step = slow\n"
)
DIES = "from puyu.engine.core import Engine\ndef step(*_):\n    raise MemoryError('no more')\nEngine.step = step\n"


@contextmanager
def serving(checkpoint: Path, *flags: str, code: str = SERVE) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`puyu serve` as a process of its own, and its address."""
    command = [sys.executable, "-c", code, str(checkpoint), "--port", "0", "--dtype", "float32", *flags]
    with subprocess.Popen([*command, "--cache-tokens", "2048"], stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        try:
            yield child, next(line.split(" at ")[1].split()[0] for line in child.stderr if " at " in line)
        finally:
            child.kill()


def test_a_second_signal_does_not_wait(checkpoint: Path) -> None:
    with serving(checkpoint, "--drain-seconds", "600", code=SLOW + SERVE) as (child, url), Client(url) as client:
        deltas = client.stream_chat("Count", params=SamplingParams(max_tokens=900, ignore_eos=True))
        next(deltas)
        child.send_signal(signal.SIGTERM)
        wait_until(lambda: not _answers(url))
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0


def test_a_server_whose_engine_has_died_ends_with_an_error(checkpoint: Path) -> None:
    with serving(checkpoint, code=DIES + SERVE) as (child, url):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "one", "max_tokens": 3}, timeout=20)
        assert answer.status_code in (500, 503) and "error" in answer.json()
        assert child.wait(20) == 5
        assert child.stderr is not None and "the engine has stopped: MemoryError('no more')" in child.stderr.read()


def test_requests_are_logged_without_their_text(checkpoint: Path) -> None:
    with serving(checkpoint) as (child, url):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "my diary", "max_tokens": 3})
        child.terminate()
        assert child.stderr is not None
        log = child.stderr.read()
    (line,) = [line for line in log.splitlines() if "POST /v1/completions" in line]
    assert answer.headers["x-request-id"] in line and " 200, " in line and "diary" not in log


def test_a_child_does_not_outlive_its_parent(checkpoint: Path) -> None:
    code = (
        "import sys, time\nfrom puyu.serve.server import ServeConfig, running_server\n"
        "with running_server(ServeConfig(model=sys.argv[1], port=0, cache_tokens=64)) as url:\n"
        "    print(url, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(checkpoint)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        assert httpx.get(f"{url}/health").status_code == 200
        parent.kill()
        wait_until(lambda: not _answers(url))


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_in_use_names_the_flag() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError) as caught:
            bind(ServeConfig(port=port))
    assert f"port {port} of 127.0.0.1 is in use" in str(caught.value) and "--port" in caught.value.remedy


def test_pieces_are_sent_at_once() -> None:
    async def main() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taken = writer.get_extra_info("socket")
            accepted.set_result(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = bind(ServeConfig(port=0))
        async with await asyncio.start_server(serve, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await accepted

    assert asyncio.run(main()) == 1


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ResourceError, match="cannot listen on 203") as caught:
        bind(ServeConfig(host="203.0.113.7", port=0))
    assert "--host" in caught.value.remedy


def test_a_child_that_cannot_start_says_why(tmp_path: Path) -> None:
    config = ServeConfig(model=str(tmp_path / "nothing"), port=0)
    with pytest.raises(ResourceError, match="no such model folder"), running_server(config):
        raise AssertionError("it started")
    assert threading.active_count() < 20


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_open_addresses_need_a_key_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match="no api_key"):
        ServeConfig(host=host).check_open()
    ServeConfig(host=host, api_key="k").check_open()
    ServeConfig(host=host, open=True).check_open()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_loopback_needs_none(host: str) -> None:
    ServeConfig(host=host).check_open()


def test_defaults_come_from_the_models_makers(tmp_path: Path) -> None:
    assert read_defaults(tmp_path) == SamplingParams()
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20}')
    assert read_defaults(tmp_path) == SamplingParams(temperature=0.7, top_p=0.8, top_k=20)
    path.write_text('{"temperature": 0.7}')
    assert read_defaults(tmp_path) == SamplingParams()
