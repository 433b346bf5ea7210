"""The harness's arithmetic against numbers worked out by hand; void runs; bars without a result."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

import pytest

from bench import harness
from bench.harness import Bar, Samples, drift, judge, load_bars, newest, paired_bound, table

FASTER = Bar("spine.4", "training", "spine_train", ">=", 1.0, "x", "them")
LATENCY = Bar("engine.9", "latency", "engine_x", "<=", 1.0, "x", "them")
ALONE = Bar("spine.2", "help", "spine_chain", "<=", 0.4, "s")


def test_paired_bound_by_hand() -> None:
    """Ratios e^0.1, e^0.2, e^0.3: mean of logs 0.2, deviation 0.1, t(0.95, 2 degrees) 2.920."""
    ours, peer = [math.exp(0.1), 2 * math.exp(0.2), 3 * math.exp(0.3)], [1.0, 2.0, 3.0]
    reach = 2.920 * 0.1 / math.sqrt(3)
    assert paired_bound(ours, peer) == pytest.approx(math.exp(0.2 - reach))
    assert paired_bound(ours, peer, upper=True) == pytest.approx(math.exp(0.2 + reach))


def test_pairing_removes_what_both_sides_share() -> None:
    """A machine that slows down by half in the middle changes no ratio."""
    ours, peer = [22.0, 11.0, 22.0, 11.0, 22.0], [20.0, 10.0, 20.0, 10.0, 20.0]
    assert paired_bound(ours, peer) == pytest.approx(1.1)
    assert judge(FASTER, Samples("spine.4", ours, peer, "tokens/s"))["holds"]


def test_the_bound_decides_and_not_the_mean() -> None:
    peer = [100.0] * 6
    clear = judge(FASTER, Samples("spine.4", [120.0, 121, 119, 120, 122, 118], peer))
    noisy = judge(FASTER, Samples("spine.4", [60.0, 180, 60, 180, 200, 150], peer))
    assert clear["holds"] and clear["bound"] > 1.15
    assert noisy["value"] > 1.0 > noisy["bound"] and not noisy["holds"]
    assert (clear["value"], clear["unit"]) == (pytest.approx(1.2, rel=1e-3), "x")
    assert (clear["ours_value"], clear["peer_value"]) == (120.0, 100.0)


def test_lower_is_better_uses_the_upper_bound() -> None:
    peer = [1.0] * 5
    assert judge(LATENCY, Samples("engine.9", [0.8, 0.81, 0.79, 0.8, 0.8], peer))["holds"]
    row = judge(LATENCY, Samples("engine.9", [0.5, 1.4, 0.5, 1.4, 0.6], peer))
    assert row["value"] < 1.0 < row["bound"] and not row["holds"]


def test_fewer_than_five_pairs_never_hold() -> None:
    assert not judge(FASTER, Samples("spine.4", [9.0] * 4, [1.0] * 4))["holds"]
    assert judge(FASTER, Samples("spine.4", [9.0] * 5, [1.0] * 5))["holds"]
    with pytest.raises(ValueError, match="two pairs"):
        paired_bound([1.0], [1.0])


def test_without_a_peer_the_median_counts() -> None:
    held = judge(ALONE, Samples("spine.2", [0.1, 0.2, 9.0]))
    assert (held["value"], held["holds"], held["peer"]) == (0.2, True, None)
    assert not judge(ALONE, Samples("spine.2", [0.1, 0.5, 9.0]))["holds"]


def test_the_t_table() -> None:
    """Student's t with n degrees of freedom tends to the normal quantile and falls with n."""
    assert len(harness._T95) == 30
    assert all(a > b for a, b in zip(harness._T95, harness._T95[1:], strict=False))
    # the Cornish-Fisher expansion of t about the normal quantile z
    z = statistics.NormalDist().inv_cdf(0.95)
    for n in range(8, 31):
        near = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        assert harness._T95[n - 1] == pytest.approx(near, abs=0.004)


def a_run(before: dict[str, float]) -> harness.Run:
    return harness.Run("spine_train", before=before, load=(0.0, 0.0, 0.0))


@pytest.mark.parametrize(("after", "void"), [(91.0, False), (109.0, False), (89.0, True), (111.0, True)])
def test_a_run_whose_probes_drift_is_void(after: float, void: bool) -> None:
    before = {"memory": 100.0, "matmul": 50.0}
    found = [Samples("spine.4", [2.0] * 5, [1.0] * 5)]
    result = a_run(before).result(found, after={"memory": after, "matmul": 50.0})
    assert drift(before, {"memory": after, "matmul": 50.0}) == pytest.approx(abs(after - 100) / 100)
    assert bool(result["void"]) is void
    assert result["bars"][0]["holds"] is not void


def test_results_are_kept_unless_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(harness, "probe", lambda: {"memory": 100.0})
    found = [Samples("spine.4", [2.0] * 5, [1.0] * 5)]
    a_run({"memory": 50.0}).finish(found, save=True)
    assert not (tmp_path / "results").exists()
    a_run({"memory": 100.0}).finish(found, save=False)
    assert not (tmp_path / "results").exists()
    result = a_run({"memory": 100.0}).finish(found, save=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    (path,) = (tmp_path / "results").iterdir()
    assert path.name == f"{result['date'][:10]}-spine_train.json"
    assert json.loads(path.read_text()) == result
    needed = {"bench", "date", "commit", "machine", "load", "versions", "peer_flags", "command", "bars"}
    assert needed <= result.keys()
    columns = {"id", "value", "unit", "op", "goal", "peer", "peer_value", "samples", "peer_samples", "holds"}
    assert columns <= result["bars"][0].keys()


def write_result(folder: Path, name: str, date: str, rows: list[dict[str, object]], void: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"date": date, "bars": rows, "void": void}))


def test_the_table_shows_the_newest_and_names_what_is_missing(tmp_path: Path) -> None:
    old = judge(FASTER, Samples("spine.4", [2.0] * 5, [1.0] * 5, "tokens/s"))
    new = judge(FASTER, Samples("spine.4", [3000.0] * 5, [2000.0] * 5, "tokens/s"))
    write_result(tmp_path, "b.json", "2026-01-02T00:00:00Z", [new])
    write_result(tmp_path, "a.json", "2026-01-01T00:00:00Z", [old])
    write_result(tmp_path, "c.json", "2026-01-03T00:00:00Z", [old], void="probes drifted")
    assert newest(tmp_path)["spine.4"] == ("2026-01-02T00:00:00Z", new)
    lines = table([FASTER, ALONE], tmp_path).splitlines()
    them = "them: 2,000 tokens/s"
    assert lines[2] == (
        f"| spine.4 | training | >= 1 x | 1.5 x (at least 1.5): 3,000 tokens/s | {them} | yes | 2026-01-02 |"
    )
    assert lines[3] == "| spine.2 | help | <= 0.4 s | no result | – | not held | – |"
    assert "| not held | 2026-01-02 |" in table([Bar(**{**vars_of(FASTER), "goal": 1.6})], tmp_path)


def vars_of(bar: Bar) -> dict[str, object]:
    return {name: getattr(bar, name) for name in Bar.__slots__}


def test_the_spine_has_its_five_bars() -> None:
    bars = {bar.id: (bar.op, bar.goal, bar.unit) for bar in load_bars()}
    assert bars["spine.1"] == ("<=", 720, "s")
    assert bars["spine.2"] == ("<=", 0.4, "s")
    assert bars["spine.3"] == ("<=", 5, "s")
    assert bars["spine.4"] == (">=", 1.0, "x")
    assert bars["spine.5"] == (">=", 2.0, "x")
    assert all((harness.ROOT / "bench" / f"{bar.bench}.py").is_file() for bar in load_bars())
    assert len(load_bars()) == len(bars)


def test_recorded_results_are_of_known_bars_and_honest() -> None:
    """What lies in bench/results was judged as the harness judges, by the goal of its day."""
    known = {bar.id for bar in load_bars()}
    for _, row in newest().values():
        bar = Bar(row["id"], "", "", row["op"], row["goal"], row["unit"], row["peer"] or "")
        again = judge(bar, Samples(row["id"], row["samples"], row["peer_samples"]))
        assert bar.id in known
        assert again["holds"] == row["holds"]


def test_a_result_says_nothing_of_places_outside_the_project() -> None:
    typed = ["/somewhere/bench/x.py", "--model", "/home/me/model", "--save", "--data", "samples/a.jsonl"]
    assert harness.command(typed) == "python bench/x.py --model PATH --save --data samples/a.jsonl"
    for path in harness.RESULTS.glob("*.json"):
        words = json.loads(path.read_text(encoding="utf-8"))["command"].split()
        assert not [word for word in words if word.startswith("/")], path.name


WORKER = """
import sys
sys.path.insert(0, {folder!r})
import worker
print("a library talks")
worker.ready(versions={{"it": "1"}})
number = 0.0
while worker.told():
    number += {step}
    print("noise")
    worker.answer(number)
"""


def test_workers_take_turns_and_noise_is_no_answer(tmp_path: Path) -> None:
    sides = []
    for name, step in (("ours", 2.0), ("peer", 1.0)):
        (tmp_path / f"{name}.py").write_text(WORKER.format(folder=str(harness.ROOT / "bench"), step=step))
        sides.append(harness.Worker([sys.executable, tmp_path / f"{name}.py"]))
    assert sides[0].facts == {"versions": {"it": "1"}}
    assert harness.alternate(*sides, pairs=3) == ([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    for side in sides:
        side.close()
        assert side.process.returncode == 0


def test_a_worker_that_dies_ends_the_bench(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("raise SystemExit(7)")
    with pytest.raises(SystemExit, match="ended with code 7"):
        harness.Worker([sys.executable, tmp_path / "bad.py"])
