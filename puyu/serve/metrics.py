"""Counters of one server in Prometheus' text format; names follow vLLM's, with the prefix `puyu:`.

Changed only in the event loop's thread, so there are no locks. Holds numbers, never a word of a prompt.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from puyu.engine.core import Stats
from puyu.log import logger
from puyu.types import FinishReason, Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(slots=True)
class Histogram:
    """Counts per bucket, sum and count."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        rows, below = [f"# TYPE {name} histogram"], 0
        for edge, count in zip((*SECONDS, "+Inf"), self.counts, strict=True):
            below += count
            rows.append(f'{name}_bucket{{le="{edge}"}} {below}')
        return [*rows, f"{name}_sum {self.total}", f"{name}_count {below}"]


@dataclass(slots=True)
class Metrics:
    """What the server has done since it started."""

    finished: Counter[str] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)

    def ended(self, reason: FinishReason, usage: Usage, seconds: float) -> None:
        """Count one request that came to its end."""
        self.finished[reason] += 1
        self.prompt_tokens += usage.prompt_tokens
        self.generated_tokens += usage.completion_tokens
        self.whole.add(seconds)

    def render(self, stats: Stats) -> str:
        """The page of /metrics."""
        used = 1 - stats.num_free_blocks / max(stats.num_blocks, 1)
        rows = [
            *_one("num_requests_running", "gauge", stats.num_running),
            *_one("num_requests_waiting", "gauge", stats.num_waiting),
            *_one("kv_cache_usage_perc", "gauge", round(used, 6)),
            *_one("num_preemptions_total", "counter", stats.num_preemptions),
            *_one("engine_steps_total", "counter", stats.num_steps),
            *_one("prefix_cached_tokens_total", "counter", stats.num_cached_tokens),
            *_one("prompt_tokens_total", "counter", self.prompt_tokens),
            *_one("generation_tokens_total", "counter", self.generated_tokens),
            "# TYPE puyu:request_success_total counter",
            *(f'puyu:request_success_total{{finished_reason="{r}"}} {n}' for r, n in sorted(self.finished.items())),
            "# TYPE puyu:request_refused_total counter",
            *(f'puyu:request_refused_total{{status="{s}"}} {n}' for s, n in sorted(self.refused.items())),
            *self.first_token.lines("puyu:time_to_first_token_seconds"),
            *self.whole.lines("puyu:e2e_request_latency_seconds"),
        ]
        return "\n".join(rows) + "\n"


def _one(name: str, kind: str, value: float) -> list[str]:
    return [f"# TYPE puyu:{name} {kind}", f"puyu:{name} {value}"]


class Watch:
    """The clock of one request; its end is counted once."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.began = metrics, time.monotonic()
        self.answering = self.over = False

    def began_to_answer(self) -> None:
        if not self.answering:
            self.answering = True
            self.metrics.first_token.add(time.monotonic() - self.began)

    def ended(self, reason: FinishReason, usage: Usage) -> None:
        if not self.over:
            self.over, seconds = True, time.monotonic() - self.began
            self.metrics.ended(reason, usage, seconds)
            counts = (usage.prompt_tokens, usage.completion_tokens)
            logger.info("request ended: %s, %d + %d tokens, %.3f s", reason, *counts, seconds)
