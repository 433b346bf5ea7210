"""The servers of serve_harness.py as processes: ours with faults on purpose, and llama-cpp-python's; what they hold.

A target can be started again when it has died, and says what a leak would show in: open files, threads, memory, and,
of ours, running requests and blocks of the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import harness
from fuzz_bodies import HELLO, MODEL, Dialect
from fuzz_ledger import Failure

CONTROL_KEY = "control-key-of-the-harness"
START_SECONDS, STOP_SECONDS = 120.0, 20.0
SETTLE_SECONDS = 20.0
"""How long files and threads of the last requests may take to go."""
SPARE_FILES, SPARE_THREADS = 4, 8
SETTINGS: dict[str, Any] = {
    "control_key": CONTROL_KEY,
    "dtype": "float32",
    "cache_tokens": 4096,
    "max_running": 16,
    "max_queue": 64,
    "max_queue_tokens": 20_000,
    "body_seconds": 3.0,
    "slow_seconds": 2.0,
    "answer_seconds": 40.0,
    "drain_seconds": 5,
}
"""Small on purpose: queues fill, requests are preempted, clients are too slow."""
PEER_FLAGS = "--n_ctx 512 --n_threads 2 --embedding true --model_alias tiny"


class Target:
    """One server process. Subclasses say how it is started."""

    dialect: Dialect = "puyu"
    hits: frozenset[str] = frozenset()
    """Cases that a fault on purpose has struck."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, _free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.right_answer: Any = None

    def command(self) -> list[str]:
        raise AssertionError("a target says how it is started")

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.port)

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process and wait until it answers; SystemExit when it does not."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(harness.ROOT)}
        environment.pop("PUYU_API_KEY", None)
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, env=environment)
        self.starts += 1
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.is_alive:
            with contextlib.suppress(OSError):
                self.get("/v1/models")
                return
            time.sleep(0.1)
        raise SystemExit(f"the server did not start: {(self.folder / 'server.log').read_text()[-2000:]}")

    def last_words(self) -> str:
        """Where a crash has happened: the stack of its thread, if the interpreter could still write it."""
        text = (self.folder / "server.log").read_text(errors="replace")
        crash = text[max(text.rfind("Fatal Python error"), 0) :]
        return crash[max(crash.find("Current thread"), 0) :][:800]

    def stop(self) -> int:
        """Its exit code."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def get(self, path: str, body: Any = None, *, key: str = "", timeout: float = 60.0) -> bytes:
        """One well-behaved request; OSError when it gets none or a refusal."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
            return bytes(answer.read())

    def ask(self) -> Any:
        """What a plain greedy chat says: the same before and after everything else."""
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0}
        return json.loads(self.get("/v1/chat/completions", body))["choices"][0]

    def held(self) -> dict[str, float]:
        """Open files, threads, and megabytes of memory."""
        assert self.process is not None
        place = Path(f"/proc/{self.process.pid}")
        rows = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
        files = float(len(list((place / "fd").iterdir())))
        return {"files": files, "threads": float(rows["Threads"]), "mb": int(rows["VmRSS"].split()[0]) / 1000}

    def warm_up(self) -> dict[str, float]:
        """Remember the right answer; what the process holds after some ordinary requests."""
        self.right_answer = self.ask()
        for _ in range(20):
            self.ask()
        return self.held()

    def leaks(self, before: dict[str, float], *, restarts: int) -> list[Failure]:
        """What is left behind, or wrong, after all cases. A process that was restarted has a new base."""
        found = []
        try:
            if self.ask() != self.right_answer:
                found.append(Failure("leak", -1, "the plain answer is not what it was before"))
        except (OSError, ValueError, KeyError) as error:
            found.append(Failure("leak", -1, f"a plain request is not answered any more: {error!r}"))
        return found + ([] if restarts else self._held_too_much(before))

    def _held_too_much(self, before: dict[str, float]) -> list[Failure]:
        limits = {"files": before["files"] + SPARE_FILES, "threads": before["threads"] + SPARE_THREADS}
        until = time.monotonic() + SETTLE_SECONDS
        now = self.held()
        while any(now[name] > limit for name, limit in limits.items()) and time.monotonic() < until:
            time.sleep(0.5)
            now = self.held()
        over = [name for name, limit in limits.items() if now[name] > limit]
        return [Failure("leak", -1, f"{name}: {before[name]:.0f} before, {now[name]:.0f} after") for name in over]


class Ours(Target):
    """`puyu serve` through fuzz_server.py."""

    def __init__(self, folder: Path, *, seed: int, fault_every: int) -> None:
        super().__init__(folder)
        self.seed, self.fault_every = seed, fault_every

    def command(self) -> list[str]:
        script = str(Path(__file__).with_name("fuzz_server.py"))
        options = ["--port", str(self.port), "--fault-every", str(self.fault_every), "--seed", str(self.seed)]
        return [sys.executable, script, str(self.folder), *options, "--settings", json.dumps(SETTINGS)]

    @property
    def hits(self) -> frozenset[str]:  # type: ignore[override]
        path = self.folder / "hits.txt"
        return frozenset(path.read_text().split()) if path.is_file() else frozenset()

    def state(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/control/state", key=CONTROL_KEY)))

    def leaks(self, before: dict[str, float], *, restarts: int) -> list[Failure]:
        return super().leaks(before, restarts=restarts) + self._engine_leaks()

    def _engine_leaks(self) -> list[Failure]:
        """Requests that still run or wait, and blocks that nobody uses and nobody has."""
        found = []
        try:
            self.get("/health")
            until = time.monotonic() + SETTLE_SECONDS
            while (state := self.state())["running"] + state["waiting"] and time.monotonic() < until:
                time.sleep(0.2)
            page = self.get("/metrics").decode()
            self.get("/control/reset_prefix_cache", {}, key=CONTROL_KEY)
            after = self.state()
        except (OSError, ValueError) as error:
            return [Failure("leak", -1, f"health, metrics or state are not answered: {error!r}")]
        if state["running"] or state["waiting"]:
            found.append(Failure("leak", -1, f"requests that nobody waits for: {state}"))
        for name in ("running", "waiting"):
            if f'vllm:num_requests_{name}{{model_name="{MODEL}",engine="0"}} 0\n' not in page:
                found.append(Failure("leak", -1, f"/metrics still counts requests as {name}"))
        if after["free_blocks"] != after["blocks"]:
            found.append(Failure("leak", -1, f"{after['blocks'] - after['free_blocks']} blocks are not free"))
        return found


class Peer(Target):
    """llama-cpp-python's server over the same tiny model as GGUF, with its own defaults."""

    dialect: Dialect = "llama"

    def __init__(self, folder: Path, *, python: Path, model: Path) -> None:
        super().__init__(folder)
        self.python, self.model = python, model

    def command(self) -> list[str]:
        place = ["--model", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)]
        return [str(self.python), "-m", "llama_cpp.server", *place, *PEER_FLAGS.split()]


def _free_port() -> int:
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        return int(plug.getsockname()[1])
