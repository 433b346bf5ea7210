"""Counters of one server in Prometheus' text format, under vLLM's names and labels, so that its dashboards work.

What vLLM does not count has the prefix `puyu:`. Changed only in the event loop's thread, so there are no locks. Holds
numbers, never a word of a prompt.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from puyu.engine.core import Stats
from puyu.types import FinishReason, Times, Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
GAPS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


@dataclass(slots=True)
class Histogram:
    """Counts per bucket, sum and count."""

    edges: Sequence[float] = SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.edges) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> list[str]:
        rows, below = [f"# TYPE {name} histogram"], 0
        for edge, count in zip((*(f"{edge:g}" for edge in self.edges), "+Inf"), self.counts, strict=True):
            below += count
            rows.append(f'{name}_bucket{{{labels},le="{edge}"}} {below}')
        return [*rows, f"{name}_sum{{{labels}}} {self.total}", f"{name}_count{{{labels}}} {below}"]


_HISTOGRAMS = {
    "time_to_first_token_seconds": SECONDS,
    "inter_token_latency_seconds": GAPS,
    "request_time_per_output_token_seconds": GAPS,
    "e2e_request_latency_seconds": SECONDS,
    "request_queue_time_seconds": SECONDS,
    "request_inference_time_seconds": SECONDS,
    "request_prefill_time_seconds": SECONDS,
    "request_decode_time_seconds": SECONDS,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_params_n": (1, 2, 5, 10, 20),
}


class Metrics:
    """What the server has done since it started."""

    def __init__(self, model: str) -> None:
        self.labels = f'model_name="{_escaped(model)}",engine="0"'
        self.finished: Counter[str] = Counter()
        self.refused: Counter[int] = Counter()
        self.tokens: Counter[str] = Counter()
        self.histograms = {name: Histogram(edges) for name, edges in _HISTOGRAMS.items()}

    def add(self, name: str, value: float) -> None:
        """One observation of a histogram."""
        self.histograms[name].add(value)

    def ended(self, reason: FinishReason, usage: Usage) -> None:
        """Count one request that came to its end."""
        self.finished[reason] += 1
        self.tokens["prompt"] += usage.prompt_tokens
        self.tokens["generation"] += usage.completion_tokens
        self.tokens["cached"] += usage.cached_tokens
        if usage.times is not None:
            self._timed(usage, usage.times)

    def _timed(self, usage: Usage, times: Times) -> None:
        count = usage.completion_tokens
        self.add("request_prompt_tokens", usage.prompt_tokens)
        self.add("request_generation_tokens", count)
        self.add("e2e_request_latency_seconds", times.ended)
        self.add("request_queue_time_seconds", times.began)
        self.add("request_inference_time_seconds", times.ended - times.began)
        self.add("request_prefill_time_seconds", times.first_token - times.began)
        self.add("request_decode_time_seconds", times.ended - times.first_token)
        self.add("time_to_first_token_seconds", times.first_token)
        if count > 1:
            self.add("request_time_per_output_token_seconds", (times.ended - times.first_token) / (count - 1))

    def mean_seconds(self) -> float:
        """How long a request has taken so far; 1 before the first."""
        whole = self.histograms["e2e_request_latency_seconds"]
        return whole.total / sum(whole.counts) if sum(whole.counts) else 1.0

    def render(self, stats: Stats) -> str:
        """The page of /metrics."""
        used = 1 - stats.num_free_blocks / max(stats.num_blocks, 1)
        rows = [
            *self._one("vllm:num_requests_running", "gauge", stats.num_running),
            *self._one("vllm:num_requests_waiting", "gauge", stats.num_waiting),
            *self._one("vllm:kv_cache_usage_perc", "gauge", round(used, 6)),
            *self._one("vllm:num_preemptions_total", "counter", stats.num_preemptions),
            *self._one("vllm:prefix_cache_queries_total", "counter", self.tokens["prompt"]),
            *self._one("vllm:prefix_cache_hits_total", "counter", self.tokens["cached"]),
            *self._one("vllm:prompt_tokens_total", "counter", self.tokens["prompt"]),
            *self._one("vllm:generation_tokens_total", "counter", self.tokens["generation"]),
            *self._one("vllm:corrupted_requests_total", "counter", stats.num_failed),
            *self._one("vllm:spec_decode_num_draft_tokens_total", "counter", stats.num_drafted),
            *self._one("vllm:spec_decode_num_accepted_tokens_total", "counter", stats.num_accepted),
            *self._one("puyu:engine_steps_total", "counter", stats.num_steps),
            *self._one("puyu:engine_tokens_total", "counter", stats.num_generated_tokens),
            *self._many("vllm:request_success_total", "finished_reason", self.finished),
            *self._many("puyu:request_refused_total", "status", self.refused),
        ]
        for name, histogram in self.histograms.items():
            rows += histogram.lines(f"vllm:{name}", self.labels)
        return "\n".join(rows) + "\n"

    def _one(self, name: str, kind: str, value: float) -> list[str]:
        return [f"# TYPE {name} {kind}", f"{name}{{{self.labels}}} {value}"]

    def _many(self, name: str, label: str, counts: Counter[str] | Counter[int]) -> list[str]:
        rows = [f"# TYPE {name} counter"]
        return rows + [f'{name}{{{self.labels},{label}="{key}"}} {counts[key]}' for key in sorted(counts)]  # type: ignore


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Watch:
    """The clock of one HTTP request: gaps between its pieces, and its end, which is counted once."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._last = 0.0
        self._over = False

    def piece(self) -> None:
        """Some text has come."""
        now = time.monotonic()
        if self._last:
            self.metrics.add("inter_token_latency_seconds", now - self._last)
        self._last = now

    def ended(self, reason: FinishReason, usage: Usage) -> None:
        if not self._over:
            self._over = True
            self.metrics.ended(reason, usage)
