"""Samples nearest to a threshold, against sorting everything; where the threshold comes from; the command."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.data.borderline import Rule, excerpt, nearest, sample
from puyu.errors import ConfigError, InputError
from puyu.files import read_jsonl, read_object, write_json, write_jsonl
from tests.conftest import puyu
from tests.data.looked import make, rows_of


def row(id, score, **more):
    head = {"id": id, "source": "s", "domain": "web", "language": "en"}
    return {**head, "text": f"text of {id}", "scores": {"x": score}, **more}


@given(st.lists(st.integers(0, 12), max_size=40), st.integers(1, 5), st.sampled_from(["x_max", "x_min"]))
def test_the_nearest_are_those_of_sorting(numbers, count, name):
    rows = [row(f"{at:02}", value / 4) for at, value in enumerate(numbers)]
    found = nearest(rows, Rule(name, 1.5), count=count)
    good = (lambda v: v >= 1.5) if name == "x_min" else (lambda v: v <= 1.5)
    expected = []
    for side in (True, False):
        there = [r for r in rows if good(r["scores"]["x"]) == side]
        expected += sorted(there, key=lambda r: (abs(r["scores"]["x"] - 1.5), r["id"]))[:count]
    assert sorted(s.id for s in found) == sorted(r["id"] for r in expected)
    assert [s.value for s in found] == sorted(s.value for s in found)
    assert all(s.passes == good(s.value) for s in found)
    assert [s.id for s in nearest(rows[::-1], Rule(name, 1.5), count=count)] == [s.id for s in found]


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "kept.jsonl", [row(f"k{i}", i / 10) for i in range(6)] + [row("none", 0, scores={})])
    dropped = [
        row(f"d{i}", 0.5 + i / 10, stage="long", rule="x_max", value=0.5 + i / 10, threshold=0.5) for i in range(1, 6)
    ]
    dropped += [row("zh", 0.72, language="zh", stage="long", rule="x_max", threshold=0.7, head="开头")]
    dropped += [row("y", 0.55, stage="long", rule="y_max", threshold=3)]
    write_jsonl(tmp_path / "dropped.jsonl", dropped)
    return tmp_path


def test_thresholds_are_those_of_the_rows_that_were_dropped(folder):
    found = sample(folder, "x_max", count=2)
    assert [(s.id, s.passes) for s in found] == [("k4", True), ("k5", True), ("zh", False), ("y", False)]
    assert {s.id: s.threshold for s in found}["zh"] == 0.7
    assert [s.id for s in sample(folder, "x_max", count=1, language="zh")] == ["zh"]
    assert [s.id for s in sample(folder, "x_max", count=1, threshold=0.15)] == ["k1", "k2"]


def test_else_it_stands_in_the_ledger_or_must_be_given(folder):
    with pytest.raises(ConfigError, match="--threshold"):
        sample(folder, "x_min", count=1)
    config = {"policies": {"words": {"x_min": 0.25, "z_max": None}}}
    write_json(folder / "ledger.json", {"total": {"dropped": {"rules": {"x_min": 7}}}, "config": config})
    assert [s.id for s in sample(folder, "x_min", count=1)] == ["k2", "k3"]
    with pytest.raises(ConfigError, match="no rule"):
        sample(folder, "x", count=1)
    with pytest.raises(InputError, match="'w'"):
        sample(folder, "w_max", count=1, threshold=1)


def test_counts_in_the_ledger_of_a_run_are_no_thresholds(tmp_path):
    data = make(tmp_path)
    [limit] = {row["threshold"] for row in rows_of(data, "dropped") if row["rule"] == "words_min"}
    assert {s.threshold for s in sample(data, "words_min", count=3)} == {limit}
    unused = read_object(data / "ledger.json")["config"]["policies"]["words"]["mean_word_max"]
    assert {s.threshold for s in sample(data, "mean_word_max", count=3)} == {unused}


def test_an_excerpt_shows_the_border():
    assert excerpt({"metadata": {"border": "a | b"}, "text": "long"}) == "a | b"
    text = "a" * 500 + "b" * 500
    assert excerpt({"text": text, "scores": {"splice_at": 500}}) == "a" * 200 + " | " + "b" * 200
    assert excerpt({"head": text, "scores": {}}) == text[:400]


def test_the_command(folder):
    done = puyu("data", "borderline", folder, "--rule", "x_max", "-n", 1)
    assert "## 0.5 against 0.5: passes" in done.stdout and "> text of k5" in done.stdout
    out = folder / "look.jsonl"
    puyu("data", "borderline", folder, "--rule", "x_max", "-n", 2, "--out", out)
    rows = list(read_jsonl(out))
    assert [r["id"] for r in rows] == ["k4", "k5", "zh", "y"] and rows[3]["rule"] == "y_max"
    assert json.dumps(rows[0])
    done = puyu("data", "borderline", folder, "--rule", "nothing", check=False)
    assert done.returncode == 2 and "splice_max" in done.stderr
