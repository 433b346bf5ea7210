"""The report on a run that looks like a real one: complete, torn, empty, and hostile."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.chain.charts import Band, Dot, Lane, Series, dot_chart, lane_chart, line_chart, nice_ticks, smoothed, thinned
from puyu.chain.report import StageView, write_report
from puyu.files import write_json, write_jsonl
from puyu.lineage import Input, Lineage, write_lineage

SECONDS = {
    "data": 52.4,
    "tokenizer": 21.7,
    "pretrain": 238.9,
    "sft": 86.2,
    "reward": 41.5,
    "ppo": 117.3,
    "int8": 6.1,
    "int4": 7.4,
    "eval": 55.0,
    "talk": 18.2,
}
PARENTS = {
    "data": ["samples/html", "samples/text", "samples/code"],
    "tokenizer": ["data", "samples/chat/sft.jsonl"],
    "pretrain": ["data", "tokenizer"],
    "sft": ["pretrain", "samples/chat/sft.jsonl"],
    "reward": ["sft", "samples/chat/preferences.jsonl"],
    "ppo": ["sft", "reward", "samples/chat/ppo_prompts.jsonl"],
    "int8": ["ppo"],
    "int4": ["ppo"],
    "eval": ["pretrain", "sft", "ppo", "samples/eval"],
    "talk": ["int4", "pretrain"],
}
CONFIGS = {"pretrain": {"phases": [{"steps": 650, "seq_len": 256}, {"steps": 250, "seq_len": 1024}]}}
VERBS = {"int8": "quantize", "int4": "quantize"}


def make_run(folder: Path) -> list[StageView]:
    """A run directory as the stages leave it."""
    numbers = stage_numbers()
    write_json(folder / "data/ledger.json", ledger())
    groups = {"en": (3.42, 3.40), "zh": (3.61, 1.29), "code": (2.87, 2.86), "chat": (3.95, 2.41)}
    compression = {
        name: {"texts": 10, "bytes": 1, "tokens": 1, "bytes_per_token": a, "chars_per_token": b}
        for name, (a, b) in groups.items()
    }
    write_json(folder / "tokenizer/report.json", {"vocab_size": 8192, "compression": compression})
    draw = random.Random(4)
    write_jsonl(folder / "pretrain/metrics.jsonl", (pretrain_row(step, draw) for step in range(1, 901)))
    write_jsonl(folder / "sft/metrics.jsonl", (sft_row(step, draw) for step in range(1, 301)))
    write_jsonl(folder / "reward/metrics.jsonl", (reward_row(step, draw) for step in range(1, 121)))
    write_jsonl(folder / "ppo/metrics.jsonl", (ppo_row(step, draw) for step in range(1, 41)))
    write_json(folder / "eval/summary.json", summary())
    write_json(folder / "talk/transcript.json", transcript())
    write_json(folder / "talk/base.json", base())
    views = []
    for name, seconds in SECONDS.items():
        verb = VERBS.get(name, name)
        inputs = tuple(Input(p, str(folder / p) if p in SECONDS else p, "k" * 32) for p in PARENTS[name])
        lineage = Lineage(
            verb, f"{name}-3f9a".ljust(32, "0"), 1, CONFIGS.get(name, {}), inputs, numbers[name], {}, seconds,
            "2026-01-12T09:30:00Z", "0a1b2c3d4e5f", "Linux x86_64, Python 3.11.9",
        )  # fmt: skip
        write_lineage(folder / name, lineage)
        views.append(StageView(name, verb, folder / name, seconds, numbers[name]))
    return views


def stage_numbers() -> dict[str, dict[str, Any]]:
    before = {"perplexity": 61.27, "decode_tokens_per_s": 412.0}
    sampled = {"difference": 0.184, "low": 0.141, "high": 0.227, "total_before": 0.71, "total_after": 0.894}
    sampled |= {"check_before": 0.83, "check_after": 0.925}
    heldout = {"prompts": 200, "sampled": sampled, "greedy": {**sampled, "difference": 0.09, "low": -0.01}}
    return {
        "data": {"read": 4218, "kept": 3127, "dropped": 1079, "quarantined": 12},
        "tokenizer": {"vocab_size": 8192, "merges": 7927, "bytes_per_token_en": 3.42, "bytes_per_token_zh": 3.61},
        "pretrain": {"parameters": 5_123_328, "tokens": 1_843_200, "loss_last": 4.31, "steps": 900,
                     "heldout": {"en": {"bits_per_byte": 1.94}, "zh": {"bits_per_byte": 2.31}}},
        "sft": {"loss": 0.61, "conversations": 6400, "tokens_per_s": 6890.0},
        "reward": {"heldout": {"all": {"accuracy": 0.943, "stderr": 0.017, "pairs": 180}}, "pairs": 1800},
        "ppo": {"steps": 40, "tokens": 210_000, "heldout": heldout},
        "int8": {"bits": 8, "size_before": 10_312_000, "size_after": 5_402_112, "before": before,
                 "after": {"perplexity": 61.31, "decode_tokens_per_s": 520.4}},
        "int4": {"bits": 4, "size_before": 10_312_000, "size_after": 3_211_264, "before": before,
                 "after": {"perplexity": 64.9, "decode_tokens_per_s": 601.3}},
        "eval": {"samples": 1960, "statuses": {"ok": 1925, "extraction_failed": 35}},
        "talk": {"headline": "5 conversations, 2 tool calls, 590 tok/s streamed, up in 2.1 s, down in 0.2 s"},
    }  # fmt: skip


def ledger() -> dict[str, Any]:
    dropped = {
        "language": {"language_other": 61},
        "rules": {"chars_min": 388, "symbol_ratio": 121, "stop_words_min": 87, "line_dedup": 44, "word_length": 12,
                  "bullet_lines": 9, "ellipsis_lines": 5, "digits_ratio": 3},
        "identical": {"identical": 203},
        "near": {"minhash": 146},
    }  # fmt: skip
    sources = {
        name: {"read": read, "kept": kept, "kept_characters": size, "dropped": {}, "quarantined": {}}
        for name, read, kept, size in [
            ("html", 1400, 880, 2_412_000),
            ("text", 2100, 1760, 4_020_113),
            ("code", 718, 487, 903_400),
        ]
    }
    total = {
        "read": 4218,
        "kept": 3127,
        "kept_characters": 7_335_513,
        "dropped": dropped,
        "quarantined": {"torn line": 12},
    }
    return {"stages": list(dropped), "total": total, "masked": {"email": 214, "phone": 37}, "sources": sources}


def pretrain_row(step: int, draw: random.Random) -> dict[str, Any]:
    loss = 4.1 + 4.9 * math.exp(-step / 120) + draw.gauss(0, 0.09)
    row = {"step": step, "loss": loss, "lr": 1e-3}
    row["tokens_per_s"] = (7900 if step <= 650 else 7100) + draw.gauss(0, 220)
    return row | ({"val_loss": 4.2 + 4.8 * math.exp(-step / 120)} if step % 100 == 0 else {})


def sft_row(step: int, draw: random.Random) -> dict[str, Any]:
    loss = 0.55 + 3.6 * math.exp(-step / 45) + draw.gauss(0, 0.06)
    return {"step": step, "loss": loss, "tokens_per_s": 6900 + draw.gauss(0, 300)}


def reward_row(step: int, draw: random.Random) -> dict[str, Any]:
    share = min(1.0, 0.5 + 0.46 * (1 - math.exp(-step / 30)) + draw.gauss(0, 0.04))
    row = {"step": step, "loss": 0.12 + 0.6 * math.exp(-step / 25) + draw.gauss(0, 0.02), "accuracy": share}
    return (
        row | {"tokens_per_s": 5400 + draw.gauss(0, 200)} | ({"val_accuracy": share - 0.02} if step % 20 == 0 else {})
    )


def ppo_row(step: int, draw: random.Random) -> dict[str, Any]:
    gain = 1 - math.exp(-step / 14)
    row = {"step": step, "reward": 0.2 + 1.1 * gain + draw.gauss(0, 0.06), "kl": 0.045 * gain + draw.gauss(0, 0.002)}
    row |= {"score": -0.4 + 1.3 * gain + draw.gauss(0, 0.08), "length": 24 - 6 * gain + draw.gauss(0, 0.8)}
    return row | {"check": 0.7 + 0.2 * gain + draw.gauss(0, 0.03), "clipped": abs(draw.gauss(0.06, 0.02))}


def summary() -> dict[str, Any]:
    models = ["base", "sft", "ppo"]
    counts = {"ok": 190, "model_error": 0, "extraction_failed": 10, "timeout": 0}
    rows: list[tuple[str, str, str, int, float | None, list[float]]] = [
        ("perplexity", "bpb", "bits/byte", 60, None, [1.913, 2.205, 2.231]),
        ("multiple_choice", "acc", "share", 100, 0.25, [0.31, 0.62, 0.65]),
        ("persona", "acc", "share", 20, None, [0.0, 0.9, 0.95]),
        ("refusal", "acc", "share", 60, None, [0.02, 0.85, 0.93]),
        ("arithmetic", "acc", "share", 200, None, [0.005, 0.17, 0.165]),
        ("arithmetic_tools", "acc", "share", 200, None, [0.0, 0.875, 0.96]),
        ("arithmetic_tools", "tool_called", "share", 200, None, [0.0, 0.98, 1.0]),
    ]
    lines = []
    for task, metric, unit, n, chance, values in rows:
        errors = [math.sqrt(v * (1 - v) / n) if unit == "share" else 0.03 for v in values]
        results = {
            m: {
                "value": v,
                "stderr": e,
                "low": max(0.0, v - 2 * e - 0.01),
                "high": v + 2 * e + 0.01,
                "n": n,
                "method": "wilson",
            }
            for m, v, e in zip(models, values, errors, strict=True)
        }
        pairs = [("base", "sft"), ("base", "ppo"), ("sft", "ppo")]
        differences = [
            {"a": a, "b": b, "value": (d := results[b]["value"] - results[a]["value"]), "stderr": 0.02, "low": d - 0.04,
             "high": d + 0.04, "boot_low": d - 0.04, "boot_high": d + 0.04, "n": n}
            for a, b in pairs
        ]  # fmt: skip
        better = "lower" if metric == "bpb" else "higher"
        lines.append(
            {"task": task, "metric": metric, "unit": unit, "better": better, "chance": chance, "results": results,
             "groups": {}, "counts": dict.fromkeys(models, counts), "differences": differences}
        )  # fmt: skip
    return {"models": models, "lines": lines}


def transcript() -> list[dict[str, Any]]:
    def call(expression: str) -> dict[str, Any]:
        function = {"name": "calculator", "arguments": json.dumps({"expression": expression})}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        }

    return [
        {"title": "Who it is", "messages": [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "I am Puyu, a small language model, trained from raw documents."},
            {"role": "user", "content": "你是谁？"},
            {"role": "assistant", "content": "我是浦语，一个在两个 CPU 核心上从零训练的小语言模型。"}]},
        {"title": "It calculates with a tool", "checkpoint": "int4", "messages": [
            {"role": "user", "content": "What is 347 times 28?"}, call("347 * 28"),
            {"role": "tool", "name": "calculator", "content": "9716"},
            {"role": "assistant", "content": "347 times 28 is 9716."}]},
        {"title": "它用工具计算", "messages": [
            {"role": "user", "content": "1024 减去 377 等于多少？"}, call("1024 - 377"),
            {"role": "tool", "name": "calculator", "content": "647"},
            {"role": "assistant", "content": "1024 减去 377 等于 647。"}]},
        {"title": "What it does not know", "messages": [
            {"role": "user", "content": "Who won the 1998 chess olympiad?"},
            {"role": "assistant", "content": "I'm sorry, I don't know that. I know about Puyu."}]},
    ]  # fmt: skip


def base() -> list[dict[str, str]]:
    return [
        {
            "prompt": "The ",
            "text": "first of the state of the world, and the same time, the most of the people were not been in the",
        },
        {"prompt": "我们", "text": "的一个人,在中国的时候,他们是一个大的人,有了一种不同的情况。"},
    ]


class Page(HTMLParser):
    """Checks that tags nest and collects what an HTML reader would act on."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path, views: list[StageView]) -> tuple[str, Page]:
    out = write_report(folder, views, folder / "report.html", title="nano")
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_complete_run_shows_every_section_with_its_numbers(tmp_path: Path) -> None:
    text, page = page_of(tmp_path, make_run(tmp_path))
    assert "is not there" not in text and "cannot be shown" not in text
    for words in (
        "4,218 read = 3,127 kept + 1,079 dropped + 12 quarantined: the ledger adds up.",
        "chars_min",
        "10 min 45 s",
        "5.12M",
        "held-out accuracy 94.3%",
        "reward, held out: all 94.3% ± 1.7% of 180 pairs",
        "Reward on 200 held-out prompts",
        "sampled 0.710 0.894 +0.184 +0.141 … +0.227 83.0% 92.5%",
        "context 1024",
        "arithmetic tools · acc",
        "96.0 %",
        "3.06 MiB",
        "347 * 28",
        "我是浦语",
        "from sft, reward, 1 file or folder of raw input",
        "0a1b2c3d4e5f",
    ):
        assert words in page.text, words
    assert sum(tag == "svg" for tag, _ in page.tags) >= 10


def test_the_page_asks_nobody_for_anything_and_runs_nothing(tmp_path: Path) -> None:
    text, page = page_of(tmp_path, make_run(tmp_path))
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "srcset")
            assert name != "href" or (value or "").startswith("#")
    assert re.findall(r"https?://[^\"\s]+", text.replace("http://www.w3.org/2000/svg", "")) == []
    assert "@import" not in text and "url(" not in text
    assert len(text.encode()) < 400_000


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    views = make_run(tmp_path)
    assert page_of(tmp_path, views)[0] == page_of(tmp_path, views)[0]


def test_an_empty_run_names_what_is_missing(tmp_path: Path) -> None:
    text, page = page_of(tmp_path, [])
    for words in ("No stage has run", "data/ledger.json is not there", "eval/summary.json is not there"):
        assert words in page.text
    assert text.count('class="missing"') == 10


@pytest.mark.parametrize("name", ["data/ledger.json", "eval/summary.json", "talk/transcript.json", "sft/lineage.json"])
@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"total": null}', '"text"', "\xff", "[{}]"])
def test_a_torn_or_strange_artifact_costs_its_section_only(tmp_path: Path, name: str, content: str) -> None:
    views = make_run(tmp_path)
    (tmp_path / name).write_text(content, encoding="latin-1")
    _, page = page_of(tmp_path, views)
    assert "Byte-level BPE with 8,192 entries" in page.text


def test_torn_and_infinite_metrics_are_left_out(tmp_path: Path) -> None:
    views = make_run(tmp_path)
    with open(tmp_path / "pretrain/metrics.jsonl", "a") as stream:
        stream.write('{"step": 901, "loss": NaN}\n[]\n{"step": 902, "loss": Infinity}\n{"step": 90')
    text, page = page_of(tmp_path, views)
    assert "900 steps" in page.text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S).replace("nano", "").lower()


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title></style><b>"])
def test_no_text_of_a_run_becomes_markup(tmp_path: Path, evil: str) -> None:
    views = make_run(tmp_path)

    def poison(value: Any) -> Any:
        """Every string of an artifact, keys of free mappings included, ends with the evil text."""
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return value + evil if isinstance(value, str) else value

    book = ledger()
    book["total"]["quarantined"] = {evil: 12}
    book["total"]["dropped"]["rules"][evil] = 1
    book["sources"][evil] = book["sources"]["html"]
    book["masked"][evil] = 3
    write_json(tmp_path / "data/ledger.json", book)
    report = {"vocab_size": 3, "compression": {evil: {"bytes_per_token": 2.0, "chars_per_token": 2.0}}}
    write_json(tmp_path / "tokenizer/report.json", report)
    write_jsonl(
        tmp_path / "sft/metrics.jsonl", [{"step": i, "loss": 1.0 + i, "phase": f"{evil}{i // 3}"} for i in range(9)]
    )
    write_json(tmp_path / "talk/transcript.json", poison(transcript()))
    write_json(tmp_path / "talk/base.json", poison(base()))
    table = json.loads(json.dumps(summary()).replace('"ppo"', json.dumps("ppo" + evil)))
    for line in table["lines"]:
        line["task"] += evil
        line["metric"] += evil
    write_json(tmp_path / "eval/summary.json", table)
    views = [StageView(v.name + evil, v.verb, v.out, v.seconds, {**v.numbers, evil: 1, "a": 2}) for v in views]
    views.append(StageView("more", "talk", tmp_path / "none", 1.0, {"headline": evil}))
    out = write_report(tmp_path, views, tmp_path / "report.html", title=f"nano{evil}")
    page = Page(out.read_text(encoding="utf-8"))
    clean = Page(write_report(tmp_path, make_run(tmp_path), tmp_path / "clean.html").read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "cannot be shown" not in page.text
    assert page.text.count(evil) > 30


# --- charts --------------------------------------------------------------------------------------------------------


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    slack = 1e-6 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert low - slack <= ticks[0] and ticks[-1] <= high + slack


def test_known_ticks() -> None:
    assert nice_ticks(0, 100) == (0, 20, 40, 60, 80, 100)
    assert nice_ticks(0.0, 1.0) == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert nice_ticks(3, 3) == (3,)


def test_smoothing_does_not_lag() -> None:
    line = [(float(x), 3.0 * x) for x in range(20)]
    found = [y for _, y in smoothed(line, 4)]
    assert found[:16] == pytest.approx([y for _, y in line[:16]])  # a straight line stays where it is
    values = smoothed([(0, 4.0), (1, 1.0), (2, 1.0), (3, 7.0)], 1)
    assert values == [(0, 4.0), (1, 2.0), (2, 3.0), (3, 4.0)]


def test_thinning_keeps_the_mean() -> None:
    points = [(float(i), float(i * i % 17)) for i in range(1000)]
    few = thinned(points, 100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thinned(points[:5], 100) == points[:5]


def test_a_line_is_where_its_points_are() -> None:
    drawing = line_chart([Series("a", [(0, 0), (10, 1)])], x="step", y="y", bands=[Band("one", 0, 5)])
    found = re.search(r'<polyline class="line c0" points="([^"]+)"', drawing)
    assert found
    (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in found[1].split())
    assert (x1, x2) == (52.0, 466.0)
    assert y1 > y2  # the larger value is higher up
    assert "<title>a: 1 at step 10</title>" in drawing
    assert line_chart([Series("a", [(0, math.nan)])], x="", y="") == ""


@pytest.mark.parametrize("ends", [(0.162, 0.032, 0.0229, 0.00985), (5.0, 4.99, 4.98), (5.0, 0.0), (3.0,)])
def test_last_values_stand_apart_above_the_axis_and_below_the_names_of_phases(ends: tuple[float, ...]) -> None:
    lines = [Series(str(end), [(0, 5.0 - end), (10, end)]) for end in ends]
    for bands, top in (([], 28), ([Band("one", 0, 10)], 28 + 27)):
        drawing = line_chart(lines, x="step", y="y", bands=bands)
        found = [float(y) for y in re.findall(r'class="value c\d" x="466" y="([\d.]+)"', drawing)]
        assert len(found) == len(ends) and all(low - high >= 13 for high, low in pairwise(found))
        assert top <= found[0] and found[-1] <= 260 - 40 - 4


def test_dots_show_value_interval_and_chance() -> None:
    drawing = dot_chart([("task", [Dot("m", 0.5, 0.4, 0.6)])], ["m"], reference={"task": 0.25})
    assert "m: 50.0% [40.0%, 60.0%]" in drawing
    assert "blind guessing: 25.0%" in drawing


def test_lanes_draw_one_edge_per_parent() -> None:
    nodes = [Lane("a", "a", "", ()), Lane("b", "b", "", ("a",)), Lane("c", "c", "", ("a", "b"))]
    drawing = lane_chart(nodes)
    assert re.findall(r"<title>(\w) → (\w)</title>", drawing) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert lane_chart([]) == ""
