"""The server that serve_harness.py abuses: `puyu serve` with a tiny model made on the spot, and faults on purpose.

    python bench/fuzz_server.py FOLDER --port 8000 --fault-every 200 --seed 1

Every so many steps one raises, or gives rows that are not numbers. Which cases were hit is written to FOLDER/hits.txt,
one header `x-case` a line, so that an answer 500 can be explained: a case that is not there must not get one. Steps
in which no case of the harness takes part are left alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import faulthandler
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODEL = "tiny"
CASE = contextvars.ContextVar("case", default="")
STALL_SECONDS = 2.0
WORDS = ("calculator", "expression", "parameters", "string", "object", "name", "type", "number", "the", "and")


def make_model(folder: Path) -> Path:
    """A checkpoint of random weights, always the same, with a chat template; returns its folder."""
    from puyu.model.checkpoint import save_model
    from puyu.model.config import ModelConfig
    from puyu.model.heads import CausalLM
    from puyu.model.init import init_weights
    from puyu.tokenizer.template import CHAT_TEMPLATE
    from puyu.tokenizer.tokenizer import from_merges

    path = folder / MODEL
    if path.is_dir():
        return path
    merges = dict.fromkeys((word[:n].encode(), word[n : n + 1].encode()) for word in WORDS for n in range(1, len(word)))
    tokenizer = from_merges(list(merges), chat_template=CHAT_TEMPLATE)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        intermediate_size=128, max_positions=512,
    )  # fmt: skip
    model = CausalLM(shape)
    init_weights(model, seed=0)
    save_model(model, path)
    tokenizer.save(path)
    return path


class Faults:
    """Wraps an engine's runner. `hits` is where the cases are written that a fault has struck."""

    def __init__(self, llm: Any, hits: Path, *, every: int, seed: int) -> None:
        self.driver, self.runner = llm.driver, llm.driver.engine.runner
        self.every, self.random = every, random.Random(seed)
        self.hits = hits.open("a", buffering=1)
        self.cases: dict[str, str] = {}
        self.chunks: Sequence[Any] = ()
        self.run, self.plan = self.runner.run, self.driver.engine.scheduler.step
        self.runner.run, self.driver.engine.scheduler.step = self.faulty_run, self.noted_plan
        self.queue, self.driver._queue = self.driver._queue, self.noted_queue

    def noted_queue(self, items: Sequence[Any]) -> str:
        """Remember whose the requests are."""
        self.cases.update((request.id, CASE.get()) for request, _ in items)
        return str(self.queue(items))

    def noted_plan(self) -> Any:
        plan = self.plan()
        self.chunks = plan.chunks
        return plan

    def case_of(self, request_id: str) -> str:
        """The case of an engine's request; those of beam search have ids of their own."""
        flight = self.driver._flights.get(request_id)
        first = getattr(flight, "request", None)
        return self.cases.get(request_id) or self.cases.get(getattr(first, "id", ""), "")

    def faulty_run(self, spans: Sequence[Any], feed: Any = None) -> Any:
        cases = [self.case_of(chunk.running.request.id) for chunk in self.chunks]
        if not all(cases) or self.random.random() * self.every >= 1:
            return self.run(spans, feed)
        if self.random.random() < 0.4:
            self.note(cases)
            raise RuntimeError("a fault on purpose")
        struck = self.random.sample(range(len(spans)), self.random.choice((1, len(spans))))
        self.note([cases[at] for at in struck])
        return self.poisoned(self.run(spans, feed), spans, struck)

    def poisoned(self, output: Any, spans: Sequence[Any], struck: Sequence[int]) -> Any:
        """The output with rows of the struck spans that are not numbers."""
        starts = [sum(span.rows for span in spans[:at]) for at in range(len(spans))]
        rows = [row for at in struck for row in range(starts[at], starts[at] + spans[at].rows)]
        logits, best = output.logits_SV.clone(), output.best
        logits[rows] = float("nan")
        if best is not None:
            best = [-1 if row in rows else id for row, id in enumerate(best)]
        hidden = {at: state * float("nan") if at in struck else state for at, state in output.hidden.items()}
        return output._replace(logits_SV=logits, best=best, hidden=hidden)

    def note(self, cases: Sequence[str]) -> None:
        self.hits.write("".join(f"{case}\n" for case in dict.fromkeys(cases)))


class Marked:
    """ASGI: makes the header `x-case` known to everything that a request does. From the first request on, the stacks
    of all threads go to standard error when the event loop has stood still for STALL_SECONDS."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.watch: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.watch is None and scope["type"] == "http":
            self.watch = asyncio.create_task(watched())
        names = [value for name, value in scope.get("headers", ()) if name == b"x-case"]
        CASE.set(names[0].decode("latin-1") if names else "")
        await self.app(scope, receive, send)


async def watched() -> None:
    while True:
        faulthandler.dump_traceback_later(STALL_SECONDS)
        await asyncio.sleep(0.2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fault-every", type=int, default=200, help="steps; 0 is never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={}, help="of ServeConfig, as JSON")
    options = parser.parse_args(arguments)
    from puyu.serve import server
    from puyu.serve.config import ServeConfig

    config = ServeConfig(model=str(make_model(options.folder)), port=options.port, **options.settings)
    server.share_memory()
    with contextlib.closing(server.bind(config)) as listener:
        running, _ = server._load(config)
        app: Any = running.config.app
        app.add_middleware(Marked)
        if options.fault_every:
            Faults(running.llm, options.folder / "hits.txt", every=options.fault_every, seed=options.seed)
        print(server.address(listener), flush=True)
        running.run(sockets=[listener])
    sys.exit(1 if running.llm.loop.failure is not None else 0)


if __name__ == "__main__":
    main()
