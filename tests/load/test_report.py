"""Percentiles, rates and goodput worked out by hand; the table, the JSON and the drawing of a run."""

from __future__ import annotations

import json
import statistics
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.cli.load_plot import cumulative, drawing, output_over_time
from puyu.load.report import gaps, percentile, spread, summary, table, to_json
from puyu.load.run import LoadConfig, Result, Row


def row(index: int, chunks: list[float], **changes: object) -> Row:
    values = {"sent": float(index), "ended": chunks[-1] if chunks else 0.1, "status": "ok", "finish_reason": "length"}
    values |= {"prompt_tokens": 10, "output_tokens": 1 + len(chunks), "has_usage": True, **changes}
    return Row(index, 10, 8, chunks=chunks, **values)  # type: ignore[arg-type]


def run_of(*rows: Row) -> Result:
    return Result(list(rows), max(item.sent + item.ended for item in rows), "tiny", 512, True, ["by hand"], 0.1)


RUN = run_of(
    row(0, [0.1, 0.2, 0.3]),
    row(1, [0.4, 0.5, 0.9]),
    row(2, [], status="refused 429", detail="busy", output_tokens=None, prompt_tokens=None),
    row(3, [0.2], ended=2.0),
    row(4, [0.1], status="torn"),
)


def test_percentiles_by_hand() -> None:
    values = [10.0, 20.0, 30.0, 40.0, 50.0]
    assert [percentile(values, q) for q in (0, 0.5, 0.9, 1)] == [10, 30, 46, 50]
    assert percentile([7.0], 0.99) == 7.0


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=200))
def test_percentiles_against_the_standard_library(values: list[float]) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    found = [percentile(sorted(values), index / 100) for index in range(1, 100)]
    assert found == pytest.approx(cuts)


def test_spread_is_in_milliseconds() -> None:
    assert spread([]) == {}
    found = spread([0.3, 0.1, 0.2])
    assert found["mean"] == pytest.approx(200) and found["median"] == pytest.approx(200)
    assert found["max"] == pytest.approx(300) and list(found) == ["mean", "median", "p90", "p95", "p99", "max"]


def test_numbers_by_hand() -> None:
    found = summary(RUN, LoadConfig())
    assert (found["requests"], found["completed"], found["refused"], found["failed"]) == (5, 3, 1, 1)
    assert found["seconds"] == 5.0 and found["requests_per_s"] == pytest.approx(0.6)
    assert (found["input_tokens"], found["output_tokens"]) == (30, 10)
    assert found["output_tokens_per_s"] == pytest.approx(2.0) and found["goodput"] is None
    assert gaps([RUN.rows[1]]) == pytest.approx([0.1, 0.4])
    latency = found["latency_ms"]
    assert latency["itl"]["mean"] == pytest.approx(1000 * 0.7 / 4) and latency["itl"]["max"] == pytest.approx(400)
    assert latency["ttft"]["mean"] == pytest.approx(700 / 3), "only of what was completed"
    # (0.3 - 0.1) / 3, (0.9 - 0.4) / 3, (2.0 - 0.2) / 1
    assert latency["tpot"]["mean"] == pytest.approx(1000 * (0.2 / 3 + 0.5 / 3 + 1.8) / 3)


@pytest.mark.parametrize(
    ("limits", "good"),
    [((300.0, 0.0), 2), ((300.0, 500.0), 1), ((0.0, 100.0), 1), ((50.0, 0.0), 0), ((1e6, 1e6), 3)],
)
def test_goodput_counts_what_meets_every_limit(limits: tuple[float, float], good: int) -> None:
    config = LoadConfig(slo_ttft_ms=limits[0], slo_tpot_ms=limits[1])
    found = summary(RUN, config)["goodput"]
    assert found["requests"] == good and found["share"] == good / 5
    assert found["requests_per_s"] == pytest.approx(good / 5.0)
    assert any("goodput" in line for line in table(RUN, config))


def test_the_table_is_aligned_and_says_what_went_wrong() -> None:
    lines = table(RUN, LoadConfig(url="http://x:1", workload="random", prompt="4-9", output="8", rate=2.0, requests=5))
    page = "\n".join(lines)
    assert "random 4-9 + 8 tokens, completions, 5 requests, 2/s (Poisson), seed 0" in page
    assert "3 completed, 1 refused, 1 failed" in page and "note: 1 x refused 429: busy" in page and "by hand" in page
    head = next(at for at, line in enumerate(lines) if line.startswith("ms"))
    assert len({len(line) for line in lines[head : head + 5]}) == 1
    assert [line.split()[0] for line in lines[head + 1 : head + 5]] == ["TTFT", "TPOT", "ITL", "E2E"]


def test_json_has_every_request_and_no_key() -> None:
    value = to_json(RUN, LoadConfig(api_key="s3cret"))
    text = json.dumps(value, allow_nan=False)
    assert "s3cret" not in text and value["config"]["rate"] == "inf"
    assert [item["status"] for item in value["requests"]] == ["ok", "ok", "refused 429", "ok", "torn"]
    assert value["requests"][0]["ttft"] == 0.1 and value["requests"][0]["chunks"] == [0.1, 0.2, 0.3]


def test_the_drawing_is_an_svg_with_all_panels() -> None:
    picture = drawing(RUN, LoadConfig(url="http://x:1/<&>"))
    tree = ET.fromstring(picture)
    words = [item.text or "" for item in tree.iter() if item.tag.endswith("text")]
    assert any("Time to first token" in word for word in words) and any("Output, tokens" in word for word in words)
    assert len([item for item in tree.iter() if item.tag.endswith("polyline")]) == 3
    empty = ET.fromstring(drawing(run_of(row(0, [], status="torn")), LoadConfig()))
    assert any("no values" in (item.text or "") for item in empty.iter())


def test_what_is_drawn() -> None:
    points = list(cumulative([1.0, 2.0, 3.0, 4.0]))
    assert points == [(1.0, 0.0), (2.0, 1 / 3), (3.0, 2 / 3), (4.0, 1.0)] and list(cumulative([7.0])) == [(7.0, 1.0)]
    many = list(cumulative([float(value) for value in range(10_000)]))
    assert len(many) < 400 and many[-1] == (9999.0, 1.0) and (9990.0, 9990 / 9999) in many
    bins, counted = output_over_time([RUN.rows[0], RUN.rows[3]], 5.0)
    assert counted and sum(value for _, value in bins) * 5.0 / len(bins) == pytest.approx(4 + 2)
