"""Hung, lost and slow processes: the diagnosis on paper, then real ones, found, named, and healed by a new start."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from puyu.dist import SUPERVISED, World
from puyu.files import read_jsonl
from puyu.train.health import HealthConfig, Heartbeat, Journal, Pace
from puyu.train.health.heartbeat import Beat, diagnose
from tests.train import run_ill, toys

ROOT = Path(__file__).resolve().parents[2]


def beat(rank, *, step=7, spans=2, span="backward", count=1, still=9.0):
    return Beat(rank, count, step, spans, span, still, "node", 100 + rank)


def test_whoever_is_furthest_behind_is_named():
    now = {rank: beat(rank, count=5) for rank in range(4)}
    now[2] = beat(2, spans=1, span="data", count=5)
    found = diagnose({rank: beat(rank) for rank in range(4)}, now, size=4)
    assert [late.rank for late in found.late] == [2] and not found.gone
    assert found.text == "hung: rank 2 (node, pid 102) in step 7, data for 9 s"


def test_a_silent_heart_is_gone_and_more_than_late():
    before = {rank: beat(rank) for rank in range(3)}
    now = {0: beat(0, count=4), 1: beat(1), 2: beat(2, count=4, step=6)}
    found = diagnose(before, now, size=4)
    assert found.gone == (1, 3)
    assert "rank 1 (node, pid 101) in step 7, backward; rank 3, which never began" in found.text


def test_all_in_one_place_is_nobodys_fault():
    now = {rank: beat(rank, count=2) for rank in range(3)}
    text = diagnose({rank: beat(rank) for rank in range(3)}, now, size=3).text
    assert text == "all 3 processes stand in step 7, backward: a collective or the network"


@pytest.mark.parametrize("seed", range(20))
def test_diagnosis_against_a_naive_twin(seed):
    rng = random.Random(seed)
    size = rng.randint(1, 6)
    before = {r: beat(r, count=1) for r in range(size) if rng.random() < 0.9}
    now = {r: beat(r, count=rng.randint(1, 2), step=rng.randint(6, 7), spans=rng.randint(0, 3)) for r in range(size)}
    now = {r: b if b.count > 1 or r not in before else before[r] for r, b in now.items()}
    found = diagnose(before, now, size=size)
    gone = [r for r in range(size) if r in before and now[r].count == before[r].count]
    assert list(found.gone) == gone
    alive = [now[r] for r in range(size) if r not in gone]
    ahead = [b for b in alive if not any((o.step, o.spans) < (b.step, b.spans) for o in alive)]
    assert list(found.late) == ahead


class Ranks:
    """Watchdogs of several ranks on one clock, without threads."""

    def __init__(self, folder, size, **config):
        self.now, self.left = 0.0, []
        journal = Journal(folder)
        self.hearts = [Heartbeat(folder, World(r, size), HealthConfig(**config), journal) for r in range(size)]
        for rank, heart in enumerate(self.hearts):
            heart.clock = lambda: self.now
            heart.leave = lambda code, rank=rank: self.left.append((rank, code))
            heart.begin(1)

    def run(self, seconds, *, silent=()):
        for _ in range(seconds):
            self.now += 1.0
            for rank, heart in enumerate(self.hearts):
                if rank not in silent and rank not in [r for r, _ in self.left]:
                    heart.tick()


def step(ranks, number, *, hung=(), span="data"):
    for rank, heart in enumerate(ranks.hearts):
        heart.begin(number)
        heart.at(span)
        if rank not in hung:
            heart.at("backward")


def test_all_leave_and_the_hung_rank_tells_its_stacks(tmp_path):
    ranks = Ranks(tmp_path, 3, hang_seconds=20)
    step(ranks, 1)
    step(ranks, 2, hung=[1])
    ranks.run(19)
    assert not ranks.left
    ranks.run(6)
    assert sorted(ranks.left) == [(0, 75), (1, 75), (2, 75)]
    (row,) = read_jsonl(tmp_path / "health.jsonl")
    assert row["event"] == "hang" and row["late"] == [1] and row["gone"] == [] and "step 2, data" in row["text"]
    assert [path.name for path in tmp_path.glob("hang-*")] == ["hang-rank-00001.txt"]
    assert "most recent call first" in (tmp_path / "hang-rank-00001.txt").read_text()


def test_a_process_that_is_gone_is_named_by_those_who_wait(tmp_path):
    ranks = Ranks(tmp_path, 2, hang_seconds=20)
    step(ranks, 1)
    step(ranks, 2)
    ranks.run(10)
    ranks.run(16, silent=[0])
    assert ranks.left == [(1, 75)]
    (row,) = read_jsonl(tmp_path / "health.jsonl")
    assert row["gone"] == [0] and "rank 0" in row["text"] and "step 2, backward" in row["text"]


def test_saving_and_the_first_step_may_take_ten_times_as_long(tmp_path):
    ranks = Ranks(tmp_path, 2, hang_seconds=20)
    ranks.run(150)
    step(ranks, 1)
    ranks.run(150)
    assert not ranks.left
    step(ranks, 2, hung=[0], span="save")
    ranks.run(150)
    assert not ranks.left
    ranks.run(60)
    assert sorted(ranks.left) == [(0, 75), (1, 75)]


def test_a_process_that_dies_while_it_saves_is_found_gone(tmp_path):
    ranks = Ranks(tmp_path, 2, hang_seconds=20)
    step(ranks, 1)
    step(ranks, 2, hung=[0], span="save")
    ranks.run(30)
    assert not ranks.left
    ranks.run(8, silent=[0])
    assert ranks.left == [(1, 75)]
    (row,) = read_jsonl(tmp_path / "health.jsonl")
    assert row["gone"] == [0] and "step 2, save" in row["text"]


def test_a_part_of_a_step_may_take_three_times_the_longest_and_at_most_ten_times_the_setting(tmp_path):
    ranks = Ranks(tmp_path, 2, hang_seconds=20)
    for number in (1, 2, 3):
        step(ranks, number)
        ranks.run(50)
    assert not ranks.left
    step(ranks, 4)
    ranks.run(149)
    assert not ranks.left
    ranks.run(6)
    assert sorted(ranks.left) == [(0, 75), (1, 75)]
    slow = Ranks(tmp_path / "slow", 2, hang_seconds=20)
    step(slow, 1)
    slow.run(150)
    step(slow, 2)
    slow.run(210)
    assert sorted(slow.left) == [(0, 75), (1, 75)]


def test_outside_of_the_steps_nobody_is_hurried_while_one_process_moves(tmp_path):
    ranks = Ranks(tmp_path, 2, hang_seconds=20, phase_seconds=300)
    for heart in ranks.hearts:
        heart.at("reading data")
    for _ in range(100):  # rank 0 reads for both
        ranks.hearts[0].at("reading data")
        ranks.run(10)
    assert not ranks.left
    ranks.run(285)
    assert not ranks.left
    ranks.run(20)
    assert sorted(ranks.left) == [(0, 75), (1, 75)]
    (row,) = read_jsonl(tmp_path / "health.jsonl")
    assert row["late"] == [1] and "hung: rank 1" in row["text"] and "in reading data" in row["text"]
    patient = Ranks(tmp_path / "patient", 2, hang_seconds=20, phase_seconds=0)
    for heart in patient.hearts:
        heart.at("writing the model")
    patient.run(700)
    assert not patient.left
    together = Ranks(tmp_path / "together", 2, hang_seconds=20, phase_seconds=30)
    for heart in together.hearts:
        heart.at("loading a state")
    together.run(40)
    (row,) = read_jsonl(tmp_path / "together" / "health.jsonl")
    assert row["text"] == "all 2 processes stand in loading a state: a collective or the network"


def test_alone_and_unsupervised_it_only_tells(tmp_path, monkeypatch):
    monkeypatch.delenv(SUPERVISED, raising=False)
    ranks = Ranks(tmp_path, 1, hang_seconds=20)
    step(ranks, 1)
    step(ranks, 2, hung=[0])
    ranks.run(24)
    assert not ranks.left and (tmp_path / "hang-rank-00000.txt").is_file()
    monkeypatch.setenv(SUPERVISED, "1")
    ranks.run(24)
    assert ranks.left == [(0, 75)]


def test_pace_names_who_is_slow_three_times_in_a_row():
    pace = Pace(HealthConfig(slow_factor=1.5))
    even, slow = [[0.01, 0.001]] * 4, [[0.01, 0.001]] * 3 + [[0.3, 0.002]]
    found = [pace.judge(rows, step_seconds=1.0) for rows in (even, slow, slow, even, slow, slow, slow)]
    assert [len(names) for names in found] == [0, 0, 0, 0, 0, 0, 2]
    assert [(one.rank, one.what, round(one.ratio)) for one in found[-1]] == [
        (3, "reading data", 30),
        (3, "computing", 2),
    ]


def test_reading_that_costs_little_slows_nobody():
    pace = Pace(HealthConfig())
    rows = [[0.0001, 0.001], [0.09, 0.001]]
    assert [pace.judge(rows, step_seconds=1.0) for _ in range(4)] == [[]] * 4


@pytest.mark.parametrize("seed", range(10))
def test_pace_against_a_naive_twin(seed):
    rng, pace, history = random.Random(seed), Pace(HealthConfig()), []
    for _ in range(30):
        rows = [[0.0, rng.choice([1.0, 1.2, 4.0])] for _ in range(rng.choice([5]))]
        history.append([row[1] > 1.5 * sorted(r[1] for r in rows)[2] for row in rows])
        wanted = [rank for rank in range(5) if len(history) >= 3 and all(h[rank] for h in history[-3:])]
        assert [one.rank for one in pace.judge(rows, step_seconds=1.0)] == wanted


# --- real processes ------------------------------------------------------------------------------------------------


def test_slow_and_then_hung_it_is_named_and_all_begin_again_with_the_losses_of_a_clean_run(tmp_path):
    plan = {"steps": 16, "rank": 1, "slow": True, "health": {"hang_seconds": 20, "compare_every": 2}}
    plan |= {"out": str(tmp_path / "ill"), "fault": "hang", "at": 7}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, *torchrun, "--monitor-interval", "0.2", "-m", "tests.train.run_ill", json.dumps(plan)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert run_ill.main(plan | {"out": str(tmp_path / "clean"), "rank": -1}) == 0
    assert toys.losses(tmp_path / "ill") == pytest.approx(toys.losses(tmp_path / "clean"), abs=1e-10)

    state = tmp_path / "ill" / "train_state"
    slow = [row["slow"] for row in read_jsonl(tmp_path / "ill" / "metrics.jsonl") if "slow" in row]
    named = re.findall(r"rank (\d) takes [\d.]+ times the median for reading data", ", ".join(slow))
    assert set(named) == {"1"}  # who is slow at computing, a busy machine decides
    events = list(read_jsonl(state / "health.jsonl"))
    assert any(1 in row["ranks"] for row in events if row["event"] == "slow")
    (hang,) = [row for row in events if row["event"] == "hang"]
    assert (hang["late"], hang["gone"]) == ([1], []) and "step 7, data" in hang["text"]
    assert "in strike" in (state / "hang-rank-00001.txt").read_text()
    assert "leaves with code 75" in done.stderr and "going on from step 4" in done.stderr
