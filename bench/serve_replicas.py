"""serve.8: replicas killed under load, and how many requests are lost of those that were not yet streaming.

    python bench/serve_replicas.py [--save] [--rounds 10] [--replicas 2] [--requests 120] [--at-once 40] [--new 64]

The nano shape behind `--replicas`, deterministic, so that the right answers are known beforehand: those of a round
without a fault. In every round so many clients at once send the requests, half of them streams; when a third has been
answered, one replica is killed with SIGKILL. Lost is a request of which the client had seen nothing and that did not
end in the right answer; what the bar counts is all rounds together. A stream that had begun must end in the right
answer or in an error event and `[DONE]`; any other end counts as lost, too. The next round begins when the killed
replica is up again. Small runs (other values) show that the bench works; --save keeps only one of the usual size.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import harness
import httpx
import spine_decode

START_SECONDS = 120.0


class Outcome(NamedTuple):
    """What a client saw of one request."""

    text: str
    is_whole: bool
    has_begun: bool
    is_stated: bool


def ask(http: httpx.Client, body: dict[str, Any]) -> Outcome:
    """Send one request and read it to whatever end it finds."""
    seen = b""
    try:
        with http.stream("POST", "/v1/completions", json=body) as answer:
            for piece in answer.iter_raw():
                seen += piece
            if answer.status_code != 200:
                return Outcome(f"status {answer.status_code}", False, False, True)
    except httpx.TransportError as error:
        return Outcome(type(error).__name__, False, bool(seen) and body["stream"], False)
    return read_stream(seen) if body["stream"] else read_whole(seen)


def read_whole(seen: bytes) -> Outcome:
    return Outcome(json.loads(seen)["choices"][0]["text"], True, False, True)


def read_stream(seen: bytes) -> Outcome:
    """The text so far, and whether a broken stream says that it is."""
    events = [event.removeprefix("data: ") for event in seen.decode().split("\n\n")[:-1]]
    values = [json.loads(event) for event in events if event != "[DONE]"]
    text = "".join(value["choices"][0]["text"] for value in values if "choices" in value)
    is_whole = any(value["choices"][0]["finish_reason"] for value in values if "choices" in value)
    is_stated = events[-1:] == ["[DONE]"] and (is_whole or "error" in values[-1])
    return Outcome(text, is_whole, bool(text), is_stated)


def judge(outcome: Outcome, right: str) -> str:
    """right, broken (a stream that had begun and says so) or lost."""
    if outcome.is_whole and outcome.text == right:
        return "right"
    broken = outcome.has_begun and not outcome.is_whole and outcome.is_stated and right.startswith(outcome.text)
    return "broken" if broken else "lost"


class Bench:
    """A router, its clients, and the right answers."""

    def __init__(self, url: str, arguments: argparse.Namespace) -> None:
        limits = httpx.Limits(max_connections=arguments.at_once)
        self.http = httpx.Client(base_url=url, timeout=300, limits=limits)
        self.at_once, self.new = arguments.at_once, arguments.new
        self.prompts = [f"{index} is a number, and the next one is " for index in range(arguments.requests)]
        self.router = children(os.getpid())[0]
        self.right = [outcome.text for outcome in self.load()]

    def load(self, kill_after: int = 0) -> list[Outcome]:
        """All requests; after so many answers one replica dies."""
        done, killer = 0, threading.Lock()

        def one(index: int) -> Outcome:
            nonlocal done
            body = {"prompt": self.prompts[index], "max_tokens": self.new, "ignore_eos": True}
            outcome = ask(self.http, body | {"temperature": 0, "stream": index % 2 == 0})
            with killer:
                done += 1
                if done == kill_after:
                    os.kill(children(self.router)[0], signal.SIGKILL)
            return outcome

        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(one, range(len(self.prompts))))

    def round(self) -> dict[str, float]:
        """One kill under load: how the requests ended, and how long the replica was away."""
        began = time.perf_counter()
        outcomes = self.load(kill_after=len(self.prompts) // 3)
        seconds = time.perf_counter() - began
        ends = Counter(judge(outcome, right) for outcome, right in zip(outcomes, self.right, strict=True))
        self.wait_until_up()
        return {name: ends[name] for name in ("right", "broken", "lost")} | {"load_s": round(seconds, 2)}

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while any(row["state"] != "up" for row in self.http.get("/health").json()["replicas"]):
            assert time.monotonic() < deadline, "the killed replica did not come back"
            time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that are alive."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "puyu.serve.server"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def measure(arguments: argparse.Namespace) -> list[dict[str, float]]:
    from puyu.serve.config import ServeConfig
    from puyu.serve.server import running_server

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "nano"
        spine_decode.save_inputs(folder)
        sizes = {"max_running": arguments.at_once, "cache_tokens": 256 * arguments.at_once, "dtype": "float32"}
        config = ServeConfig(model=str(folder), port=0, replicas=arguments.replicas, deterministic=True, **sizes)
        rounds = []
        with running_server(config) as url:
            bench = Bench(url, arguments)
            for number in range(arguments.rounds):
                rounds.append(bench.round())
                print(f"  round {number + 1}/{arguments.rounds}: {rounds[-1]}", file=sys.stderr)
        return rounds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sizes = {"rounds": 10, "replicas": 2, "requests": 120, "at_once": 40, "new": 64}
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args(argv)
    is_usual = all(getattr(arguments, name) >= value for name, value in sizes.items())
    run = harness.Run("serve_replicas", before={}, versions=versions())
    rounds = measure(arguments)
    run.notes = {"each": rounds, "load_s": statistics.median(each["load_s"] for each in rounds)}
    run.notes |= {name: getattr(arguments, name) for name in sizes}
    lost = sum(each["lost"] for each in rounds)
    run.finish([harness.Samples("serve.8", [lost])], save=arguments.save and is_usual)


def versions() -> dict[str, str]:
    import torch
    import uvicorn

    return {"torch": torch.__version__, "uvicorn": uvicorn.__version__, "httpx": httpx.__version__}


if __name__ == "__main__":
    main()
