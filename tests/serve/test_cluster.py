"""Replicas on a local Ray: the same answers, a lost actor is replaced, nothing stays behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from os import kill
from pathlib import Path
from typing import Any

import httpx
import pytest

from puyu import Client
from puyu.errors import DependencyError
from puyu.serve.cluster import on_ray, shares
from puyu.serve.config import ServeConfig
from puyu.serve.server import running_server
from tests.serve.conftest import NAME, wait_until

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'puyu-llm[ray]'")
OPTIONS: dict[str, Any] = {"port": 0, "dtype": "float32", "cache_tokens": 4096, "replicas": 2, "engine": "ray"}


def test_without_ray_the_remedy_is_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"pip install 'puyu-llm\[ray\]'"):
        with on_ray(ServeConfig(model="m", engine="ray"), key="k"):
            raise AssertionError("it started")


def test_what_an_actor_asks_for() -> None:
    auto = ServeConfig(model="m", engine="ray", replicas=4)
    assert shares(auto, {"CPU": 18.0}) == {"num_gpus": 0, "num_cpus": 4}
    assert shares(auto, {"CPU": 2.0}) == {"num_gpus": 0, "num_cpus": 0.5}
    assert shares(auto, {"CPU": 16.0, "GPU": 4.0}) == {"num_gpus": 1, "num_cpus": 1}
    assert shares(auto.model_copy(update={"device": "cpu"}), {"CPU": 16.0, "GPU": 4.0})["num_gpus"] == 0


@needs_ray
def test_the_same_answers_and_a_lost_actor_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with running_server(ServeConfig(model=str(checkpoint), api_key="s3cret", **OPTIONS), log=log) as url:
        client = Client(url, api_key="s3cret")
        assert client.models() == [NAME] and client.chat("Who are you?").text == "I am 浦语."
        wait_until(lambda: len(_inner(log)) == 2)
        assert {httpx.get(f"{inner}/v1/models").status_code for inner in _inner(log)} == {401}
        kill(int(re.findall(r"Host pid=(\d+)", log.read_text())[0]), signal.SIGKILL)
        for _ in range(4):
            assert client.chat("Who are you?").text == "I am 浦语."
        wait_until(lambda: _states(url) == (["up", "up"], 1))
        wait_until(lambda: len(_inner(log)) == 3)
    assert not any(_answers(inner) for inner in _inner(log)) and log.read_text().rstrip().endswith("stopped")


@needs_ray
def test_nothing_outlives_a_router_that_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    code = "import sys; from puyu.cli.serve import main; sys.exit(main(sys.argv[1:]))"
    log = tmp_path / "server.log"
    with log.open("w") as output:
        with subprocess.Popen([sys.executable, "-c", code, str(checkpoint), *flags], stderr=output) as child:
            wait_until(lambda: len(_inner(log)) == 2, seconds=60)
            child.kill()
            wait_until(lambda: not any(_answers(inner) for inner in _inner(log)))


def _inner(log: Path) -> list[str]:
    """URLs of all replicas that have ever served."""
    return re.findall(r"\[replica \d\] serving \S+ at (\S+)", log.read_text())


def _states(url: str) -> tuple[list[str], int]:
    rows = httpx.get(f"{url}/health").json()["replicas"]
    return [row["state"] for row in rows], sum(row["deaths"] for row in rows)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
