"""Numbers of a run: percentiles, rates, goodput; as a table, and as JSON with a row for each request.

TTFT: from sending to the first text. TPOT: (end - TTFT) / (tokens - 1), one value a request. ITL: every gap between
pieces of text, of all requests; pieces that arrive together have a gap of 0. E2E: from sending to the last byte. Only
completed requests count. Percentiles are interpolated linearly between the nearest ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from puyu.configure import dump
from puyu.load.run import LoadConfig, Result, Row

QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
MEASURES = ("ttft", "tpot", "itl", "e2e")


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum in milliseconds; empty without values."""
    if not seconds:
        return {}
    ordered = sorted(1000 * value for value in seconds)
    return {"mean": sum(ordered) / len(ordered)} | {name: percentile(ordered, q) for name, q in QUANTILES.items()}


def gaps(rows: Sequence[Row]) -> list[float]:
    """Every gap between two pieces of text, in seconds."""
    return [after - before for row in rows for before, after in pairwise(row.chunks)]


def samples(rows: Sequence[Row]) -> dict[str, list[float]]:
    """The values of each measure over completed requests, in seconds."""
    done = [row for row in rows if row.is_ok]
    return {
        "ttft": [row.ttft for row in done if row.ttft is not None],
        "tpot": [row.tpot for row in done if row.tpot is not None],
        "itl": gaps(done),
        "e2e": [row.ended for row in done],
    }


def summary(result: Result, config: LoadConfig) -> dict[str, Any]:
    """All numbers of a run; None for what the server did not let us know."""
    done = [row for row in result.rows if row.is_ok]
    seconds = max(result.seconds, 1e-9)
    reasons = Counter(row.status for row in result.rows if not row.is_ok)
    refused = sum(number for reason, number in reasons.items() if reason.startswith("refused"))
    prompt, output = _total(done, "prompt_tokens"), _total(done, "output_tokens")
    chunks = sum(len(row.chunks) for row in done if row.output_tokens is not None)
    return {
        "seconds": result.seconds,
        "requests": len(result.rows),
        "completed": len(done),
        "refused": refused,
        "failed": sum(reasons.values()) - refused,
        "reasons": dict(reasons),
        "requests_per_s": len(done) / seconds,
        "input_tokens": prompt,
        "output_tokens": output,
        "input_tokens_per_s": None if prompt is None else prompt / seconds,
        "output_tokens_per_s": None if output is None else output / seconds,
        "tokens_per_chunk": output / chunks if output and chunks else None,
        "goodput": _goodput(done, len(result.rows), config, seconds),
        "latency_ms": {name: spread(values) for name, values in samples(result.rows).items()},
        "client_cpu": result.client_cpu,
    }


def _total(rows: Sequence[Row], name: str) -> int | None:
    """The sum over the requests that know; None when none does."""
    known = [getattr(row, name) for row in rows if getattr(row, name) is not None]
    return sum(known) if known else None


def _goodput(done: Sequence[Row], asked: int, config: LoadConfig, seconds: float) -> dict[str, float] | None:
    """Completed requests that met every limit that was set; None without limits."""
    if not config.slo_ttft_ms and not config.slo_tpot_ms:
        return None
    good = sum(_within(row.ttft, config.slo_ttft_ms) and _within(row.tpot, config.slo_tpot_ms) for row in done)
    return {"requests": good, "share": good / max(asked, 1), "requests_per_s": good / seconds}


def _within(seconds: float | None, limit_ms: float) -> bool:
    """A time that is not known (a one-token answer has no TPOT) breaks no limit."""
    return not limit_ms or seconds is None or 1000 * seconds <= limit_ms


def table(result: Result, config: LoadConfig) -> list[str]:
    """The report for the terminal."""
    found = summary(result, config)
    counts = ", ".join(f"{found[name]:,} {name}" for name in ("completed", "refused", "failed"))
    lines = [
        f"{'server':<10} {config.url}  {result.model}",
        f"{'load':<10} {describe(config)}",
        f"{'requests':<10} {counts}  in {found['seconds']:.2f} s",
        f"{'rate':<10} {rates(found)}",
    ]
    if found["goodput"]:
        good = found["goodput"]
        limits = [f"TTFT <= {config.slo_ttft_ms:g} ms"] if config.slo_ttft_ms else []
        limits += [f"TPOT <= {config.slo_tpot_ms:g} ms"] if config.slo_tpot_ms else []
        lines.append(
            f"{'goodput':<10} {good['requests_per_s']:.2f} requests/s ({good['share']:.0%}) with {', '.join(limits)}"
        )
    lines += ["", f"{'ms':<10}" + "".join(f"{name:>10}" for name in ("mean", *QUANTILES))]
    for name in MEASURES:
        values = found["latency_ms"][name]
        cells = [f"{values[key]:,.1f}" if values else "–" for key in ("mean", *QUANTILES)]
        lines.append(f"{name.upper():<10}" + "".join(f"{cell:>10}" for cell in cells))
    notes = [f"{number} x {reason}{_example(result.rows, reason)}" for reason, number in found["reasons"].items()]
    notes += result.notes
    if found["client_cpu"] > 0.5:
        notes.append(f"this client took {found['client_cpu']:.0%} of a core; on a small machine that slows the server")
    return lines + ([""] if notes else []) + [f"note: {note}" for note in notes]


def _example(rows: Sequence[Row], reason: str) -> str:
    detail = next((row.detail for row in rows if row.status == reason and row.detail), "")
    return f": {detail}" if detail else ""


def rates(found: dict[str, Any]) -> str:
    """Requests and tokens a second, in words."""
    parts = [f"{found['requests_per_s']:.2f} requests/s"]
    for name in ("input", "output"):
        value = found[f"{name}_tokens_per_s"]
        parts.append(f"{name} {'unknown' if value is None else f'{value:,.1f}'} tokens/s")
    if found["tokens_per_chunk"] and found["tokens_per_chunk"] > 1.05:
        parts.append(f"{found['tokens_per_chunk']:.2f} tokens a chunk")
    return ", ".join(parts)


def describe(config: LoadConfig) -> str:
    """The workload and its arrivals, in words."""
    lengths = f" {config.prompt} + {config.output} tokens" if config.workload in ("fixed", "random", "prefix") else ""
    if config.workload == "prefix":
        lengths = f" {config.prefixes} x {config.prefix_tokens} +{lengths}"
    amount = f"{config.wanted} requests" if config.wanted else f"for {config.seconds:g} s"
    pace = "all at once" if math.isinf(config.rate) else f"{config.rate:g}/s (Poisson)"
    seats = f", at most {config.concurrency} in flight" if config.concurrency else ""
    form = "chat" if config.chat else "completions"
    return f"{config.workload}{lengths}, {form}, {amount}, {pace}{seats}, seed {config.seed}"


def to_json(result: Result, config: LoadConfig) -> dict[str, Any]:
    """Everything: config without its key, numbers, notes, and each request. Times are in seconds unless named."""
    given = dump(config) | {"api_key": "given" if config.api_key else "", "rate": _finite(config.rate)}
    server = {"model": result.model, "context": result.context, "exact_lengths": result.exact_lengths}
    rows = [_rounded(asdict(row) | {"ttft": row.ttft, "tpot": row.tpot}) for row in result.rows]
    return {
        "config": given,
        "server": server,
        "summary": summary(result, config),
        "notes": result.notes,
        "requests": rows,
    }


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Times to the microsecond: more is noise."""
    values = {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
    return values | {"chunks": [round(at, 6) for at in row["chunks"]]}


def _finite(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "inf"
