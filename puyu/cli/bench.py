"""`puyu bench engine --model DIR`: quick local numbers, as a table. Not a comparison: those are in bench/.

`puyu bench serve --url URL`, load on a server, stands in `bench_serve.py`.

Prefill is one prompt without its answer; decode is what all streams together generate a second, after their prompts.
Prompts are random ids, the prefix cache is off, and each line is the best of a few runs.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from puyu.errors import ConfigError
from puyu.log import say
from puyu.types import SamplingParams

if TYPE_CHECKING:
    from puyu.engine.core import Engine

BATCHES = (1, 4, 16)


def main(argv: Sequence[str]) -> int:
    """The verb; returns the exit code."""
    if list(argv[:1]) == ["serve"]:
        from puyu.cli.bench_serve import main as serve

        return serve(argv[1:])
    about = "Quick numbers of this machine. For load on a server: puyu bench serve --help"
    options = argparse.ArgumentParser(prog="puyu bench", description=about)
    options.add_argument("what", choices=("engine", "serve"), help="what is measured")
    options.add_argument("--model", required=True, help="model folder or hub id (owner/name, ms:owner/name)")
    options.add_argument("--prompt", type=int, default=512, help="tokens of a prompt, at most half the context [512]")
    options.add_argument("--tokens", type=int, default=64, help="tokens of an answer [64]")
    options.add_argument("--runs", type=int, default=3, help="of which the best counts [3]")
    options.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    options.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 [auto]")
    given = options.parse_args(list(argv))
    if min(given.prompt, given.tokens, given.runs) < 1:
        raise ConfigError("prompt, tokens and runs must be at least 1")
    from puyu.engine.core import EngineConfig
    from puyu.engine.llm import LLM

    config = EngineConfig(prefix_cache=False, max_running=max(BATCHES))
    with LLM(given.model, device=given.device, dtype=given.dtype, config=config) as llm:
        engine = llm.driver.engine
        say(f"{llm.name}, {engine.runner.cache.rows.dtype}, native step: {engine.runner.native is not None}")
        say(f"greedy answers may differ between schedules within {engine.margin_bound:.0e} of the largest logit")
        for line in table(engine, prompt=given.prompt, tokens=given.tokens, runs=given.runs):
            print(line, flush=True)
    return 0


def table(engine: Engine, *, prompt: int, tokens: int, runs: int) -> Iterator[str]:
    """One line for prefill and one for each batch."""
    prompt = max(min(prompt, engine.context // 2), 1)
    tokens = max(min(tokens, engine.context - prompt), 1)
    yield f"{'':<10} {'streams':>7} {'prompt':>7} {'tokens/s':>10}"
    best = max(_prefill(engine, prompt) for _ in range(runs + 1))  # the first one warms up
    yield f"{'prefill':<10} {1:>7} {prompt:>7} {best:>10.1f}"
    for batch in BATCHES:
        best = max(_decode(engine, batch, min(prompt, 16), tokens) for _ in range(runs))
        yield f"{'decode':<10} {batch:>7} {min(prompt, 16):>7} {best:>10.1f}"


def _prefill(engine: Engine, length: int) -> float:
    _add(engine, 1, length, 1)
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    return length / (time.perf_counter() - began)


def _decode(engine: Engine, batch: int, length: int, tokens: int) -> float:
    _add(engine, batch, length, tokens + 1)
    while engine.stats().num_waiting or any(running.num_remaining > 1 for running in engine.scheduler.running):
        engine.step()
    first, began = engine.stats().num_generated_tokens, time.perf_counter()
    while engine.has_work:
        engine.step()
    return max(engine.stats().num_generated_tokens - first, 1) / (time.perf_counter() - began)


def _add(engine: Engine, batch: int, length: int, tokens: int) -> None:
    from puyu.engine.request import Request

    rng, vocab = random.Random(0), engine.num_ids or engine.model.config.vocab_size
    tokens = min(tokens, engine.context - length)
    for index in range(batch):
        prompt = tuple(rng.randrange(vocab) for _ in range(length))
        engine.add(Request(f"bench-{index}", prompt, tokens, SamplingParams(max_tokens=tokens)))
