"""serve.5: 10,000 requests that hurt, against our server, and the same against llama-cpp-python's.

    python bench/serve_harness.py [--requests 10000] [--seed 0] [--save]
    python bench/serve_harness.py --peer [--save]    the peer alone; --save adds its table to the newest kept result
    python bench/serve_harness.py --only 1234        one case again, with what was sent and what came back

Requests come from schemathesis over the server's own /openapi.json, from valid bodies with something wrong, from hard
grammars, from abuse of the protocol, and from normal traffic whose answers are read; 32 at a time over real sockets.
In our server steps of the engine fail on purpose meanwhile. The value is the number of deaths, hangs (and answers that
never came), leaks, and answers 500 that no such fault explains; both tables stand in the notes of the result.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import harness
from fuzz_cases import Case, Place, make_case
from fuzz_client import play
from fuzz_ledger import COUNTED, Failure, Ledger, by_status, counts, slowest, table
from fuzz_schema import schema_requests
from fuzz_server import make_model
from fuzz_target import CONTROL_KEY, PEER_FLAGS, Ours, Peer, Target

PEER = "llama-cpp-python"
AT_ONCE, SLOW_AT_ONCE = 32, 6
LIMIT_SECONDS = 60.0
PLACE = re.compile(r"(?:/[\w.-]+)+/(?=site-packages|llama_cpp|lib/)")
"""Where a server is installed is nobody's business."""
STUCK_SECONDS = 40.0
"""A server that answers nobody for so long, while half of all clients wait, is dead though its process is not."""


@dataclass(slots=True)
class Campaign:
    """Cases against one target."""

    target: Target
    limit: float = LIMIT_SECONDS
    ledger: Ledger = field(default_factory=Ledger)
    under_way: dict[int, Case] = field(default_factory=dict)
    news: float = 0.0
    """When somebody was answered last."""

    async def run(self, cases: Iterable[Case]) -> None:
        """Play all cases; a target that dies is started again and the rest goes on."""
        waiting, self.news = iter(cases), time.monotonic()
        slow = asyncio.Semaphore(SLOW_AT_ONCE)
        watch = asyncio.create_task(self._watch())
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._worker(waiting, slow))
        watch.cancel()

    async def _watch(self) -> None:
        """Start a stuck target again."""
        while True:
            await asyncio.sleep(1.0)
            if len(self.under_way) >= AT_ONCE // 2 and time.monotonic() - self.news > STUCK_SECONDS:
                self._revive("stuck: it answered nobody")

    async def _worker(self, waiting: Any, slow: asyncio.Semaphore) -> None:
        for case in waiting:
            async with slow if case.is_slow else contextlib.nullcontext():
                await self._play(case)
            if len(self.ledger.entries) % 500 == 0:
                say(f"  {len(self.ledger.entries)} requests, {self.target.held()['mb']:.0f} MB")

    async def _play(self, case: Case) -> None:
        self._revive()
        self.under_way[case.id] = case
        limit = case.limit or self.limit
        outcome = await play(self.target.address, case.steps, owed=case.owed, limit=limit, heads=case.heads)
        if outcome.ended in ("closed", "refused"):
            await asyncio.sleep(0.1)  # a process that dies closes its connections first
        self._revive()
        self.under_way.pop(case.id, None)
        self.ledger.add(case, outcome)
        if outcome.answers:
            self.news = time.monotonic()

    def _revive(self, why: str = "") -> None:
        """Count a death and start the target again. Blocks the loop: nothing else could happen anyway."""
        if self.target.is_alive and not why:
            return
        code = self.target.stop()
        how = why or f"exit code {code}"
        labels = sorted({case.label for case in self.under_way.values()})
        note = f"{how}; under way: {', '.join(labels)[:300]}; cases {sorted(self.under_way)}"
        self.ledger.deaths.append(Failure("death", -1, note))
        self.ledger.excused |= set(self.under_way)
        say(f"  the server died: {note}\n{self.target.last_words()}")
        self.target.start()
        self.news = time.monotonic()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def place_of(target: Target, *, requests: int, seed: int) -> Place:
    """The routes of a running target, and what schemathesis makes of them: a fifth of all requests, each sent about
    twice."""
    openapi = json.loads(target.get("/openapi.json"))
    made = schema_requests(openapi, count=max(requests // 10, 40), seed=seed) if requests else []
    return Place(target.dialect, tuple(openapi["paths"]), tuple(made), CONTROL_KEY)


def attack(target: Target, *, requests: int, seed: int, limit: float = LIMIT_SECONDS) -> dict[str, Any]:
    """Start the target, play all cases, look for leaks, stop it; the report."""
    target.start()
    try:
        place = place_of(target, requests=requests, seed=seed)
        before = target.warm_up()
        campaign, began = Campaign(target, limit), time.monotonic()
        say(f"{requests} requests, seed {seed}")
        asyncio.run(campaign.run(make_case(id, place, seed=seed) for id in range(requests)))
        seconds, restarts = time.monotonic() - began, target.starts - 1
        campaign.ledger.leaks += target.leaks(before, restarts=restarts)
        after = target.held()
    finally:
        code = target.stop()
    if code:
        campaign.ledger.leaks.append(Failure("leak", -1, f"exit code {code} when it was stopped"))
    return report(campaign.ledger, target, before=before, after=after) | {"seconds": round(seconds, 1)}


def report(ledger: Ledger, target: Target, *, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Everything that is worth keeping."""
    hits = target.hits
    found = ledger.failures(hits)
    wires = {entry.case.id: entry.wire for entry in ledger.entries if entry.wire}
    first: dict[str, list[Any]] = {}
    for failure in found:
        note = PLACE.sub("", failure.note[:600])
        row = {"case": failure.case, "note": note, "sent": repr(wires.get(failure.case, b"")[:600])}
        if len(first.setdefault(failure.kind, [])) < 12:
            first[failure.kind].append(row)
    return {
        "requests": len(ledger.entries),
        "statuses": by_status(ledger.entries),
        "failures": counts(found),
        "value": sum(count for kind, count in counts(found).items() if kind in COUNTED),
        "first_failures": first,
        "struck_by_faults": len(hits),
        "explained_500": ledger.explained(hits),
        "slowest": slowest(ledger.entries),
        "before": before,
        "after": after,
    }


def show(name: str, found: dict[str, Any]) -> str:
    """A report as text."""
    failures = ", ".join(f"{count} {kind}" for kind, count in found["failures"].items())
    held = {key: f"{found['before'][key]:.0f} -> {found['after'][key]:.0f}" for key in found["before"]}
    lines = [
        f"{name}: {found['requests']} requests in {found['seconds']} s",
        "",
        table(found["statuses"]),
        "",
        failures,
    ]
    lines += [
        f"struck by faults: {found['struck_by_faults']}, of these 500 or an error event: {found['explained_500']}"
    ]
    lines += [f"held: {held}", f"slowest: {found['slowest']}"]
    for kind, rows in found["first_failures"].items():
        lines += [f"{kind}: case {row['case']}: {row['note']}\n    {row['sent']}" for row in rows]
    return "\n".join(lines)


def replay(target: Target, id: int, *, requests: int, seed: int) -> None:
    """Play one case and print everything."""
    target.start()
    try:
        case = make_case(id, place_of(target, requests=requests, seed=seed), seed=seed)
        outcome = asyncio.run(play(target.address, case.steps, owed=case.owed, limit=LIMIT_SECONDS, heads=case.heads))
        ledger = Ledger()
        ledger.add(case, outcome)
        print(case.source, case.label, case.wire[:4000], sep="\n")
        print(outcome.ended, f"{outcome.seconds:.2f} s", *outcome.answers, sep="\n")
        print(*ledger.failures(target.hits), sep="\n")
    finally:
        target.stop()


def peer(folder: Path, python: Path | None) -> Peer:
    """llama-cpp-python's server over the same weights."""
    model = folder / "tiny.gguf"
    export = [sys.executable, "-m", "puyu", "export", "--model", str(make_model(folder)), "--gguf", str(model)]
    subprocess.run(export, check=True, cwd=harness.ROOT, stdout=sys.stderr)
    return Peer(folder, python=harness.peer_python("llama", python), model=model)


def keep_peer(found: dict[str, Any], folder: Path = harness.RESULTS) -> None:
    """Add the peer's report to the notes of the newest kept result: nothing is timed, so the runs may be apart."""
    path = max(folder.glob("*-serve_harness.json"), default=None)
    if path is None:
        raise SystemExit("no result of ours is kept; run: python bench/serve_harness.py --no-peer --save")
    result = json.loads(path.read_text(encoding="utf-8"))
    result["notes"][PEER] = found | {"date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault-every", type=int, default=200, help="steps of our engine; 0 is never")
    parser.add_argument("--only", type=int, help="play one case and print it")
    parser.add_argument("--peer", action="store_true", help="llama-cpp-python's server instead of ours")
    parser.add_argument("--peer-python", type=Path, help="interpreter with the peer; default: made in .venv-peers")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = Ours(folder, seed=options.seed, fault_every=options.fault_every)
        sizes = {"requests": options.requests, "seed": options.seed}
        if options.only is not None:
            replay(peer(folder, options.peer_python) if options.peer else ours, options.only, **sizes)
            return
        found = {}
        if not options.peer:
            found["ours"] = attack(ours, **sizes)
            say(show("ours", found["ours"]))
        if not options.no_peer:
            found[PEER] = attack(peer(folder, options.peer_python), **sizes)
            say(show(PEER, found[PEER]))
    if "ours" not in found and options.save:
        keep_peer(found[PEER])
    if "ours" in found:
        run = harness.Run("serve_harness", before={}, peer_flags=PEER_FLAGS, notes=found)
        run.finish([harness.Samples("serve.5", [float(found["ours"]["value"])])], save=options.save)


if __name__ == "__main__":
    main()
