"""Decisions on numbers: against a naive twin, over random histories, and over clean runs of many shapes."""

import json
import math
import random
import statistics

import pytest

from puyu.train.health import HealthConfig, Watch

CONFIG = HealthConfig(window=32)


class Naive:
    """The rules said once more, over the whole history, without state that slides."""

    def __init__(self, config):
        self.config, self.good, self.errors = config, {"loss": [], "norm": []}, {"loss": [], "norm": []}
        self.held = []

    def expected(self, name):
        return statistics.median(self.good[name][-(self.config.window // 8) :])

    def spike(self, name, value, floor):
        errors = self.errors[name][-self.config.window :]
        if len(errors) < 32:
            return False
        center = statistics.median(errors)
        deviation = 1.4826 * statistics.median([abs(e - center) for e in errors])
        above = value - self.expected(name)
        return above > self.config.spike * deviation and above > floor and above > 2 * max(errors)

    def is_bad(self, loss, norm):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return True
        values = {"loss": loss, "norm": math.log(max(norm, 1e-30))}
        floors = {"norm": math.log(10)}
        floors["loss"] = max(0.3, abs(self.expected("loss")) / 10) if self.good["loss"] else 0
        if any(self.spike(name, value, floors[name]) for name, value in values.items()):
            self.held.append({name: value - self.expected(name) for name, value in values.items()})
            return True
        for held in self.held:
            for name, error in held.items():
                self.errors[name].append(error)
        self.held = []
        for name, value in values.items():
            if self.good[name]:
                self.errors[name].append(value - self.expected(name))
            self.good[name].append(value)
        return False


def history(seed, steps=300):
    """A falling loss with noise, and now and then a spike or a value that is not finite."""
    rng = random.Random(seed)
    noise = rng.choice([0.001, 0.05, 0.5])
    for step in range(steps):
        loss = 2 + 6 * math.exp(-step / 40) + rng.gauss(0, noise)
        norm = math.exp(rng.gauss(0, 0.3))
        odd = rng.random()
        if odd < 0.02:
            loss += rng.choice([1, 5, 50])
        elif odd < 0.04:
            norm *= rng.choice([5, 100, 1e6])
        elif odd < 0.05:
            loss, norm = rng.choice([(math.nan, 1.0), (math.inf, 1.0), (loss, math.nan), (loss, math.inf)])
        yield loss, norm


@pytest.mark.parametrize("seed", range(12))
def test_what_is_bad_equals_a_naive_twin(seed):
    watch, naive = Watch(CONFIG), Naive(CONFIG)
    for step, (loss, norm) in enumerate(history(seed), 1):
        assert (watch.judge(step, loss, norm).action != "update") == naive.is_bad(loss, norm), step


@pytest.mark.parametrize("seed", range(6))
def test_saved_anywhere_and_loaded_it_decides_the_same(seed):
    whole, rows = Watch(CONFIG), list(history(seed, 150))
    handed = Watch(CONFIG)
    for step, row in enumerate(rows, 1):
        assert handed.judge(step, *row) == whole.judge(step, *row)
        saved, handed = json.loads(json.dumps(handed.state())), Watch(CONFIG)
        handed.load(saved)
    assert handed.skip == whole.skip


def clean(kind, seed):
    """Losses and norms of sound runs: steep falls, plateaus, long tails, a minority of hard batches, small batches."""
    rng = random.Random(seed)
    for step in range(1000):
        fall = {"steep": 8 * math.exp(-step / 15), "slow": 6 / (1 + step / 50), "flat": 0.0}[kind[0]]
        noise = {
            "quiet": rng.gauss(0, 0.002),
            "loud": rng.gauss(0, 0.5),
            "tails": 0.3 * (rng.expovariate(1) - rng.expovariate(1)),
            "hard": rng.gauss(0, 0.05) + (0.4 if rng.random() < 0.1 else 0.0),
        }[kind[1]]
        yield 2.5 + fall + noise, math.exp(rng.gauss(0.0, 0.5) + fall / 4)


@pytest.mark.parametrize("fall", ["steep", "slow", "flat"])
@pytest.mark.parametrize("noise", ["quiet", "loud", "tails", "hard"])
def test_no_alarm_in_a_thousand_clean_steps(fall, noise):
    alarms = []
    for seed in range(3):
        watch = Watch(HealthConfig())
        alarms += [
            step for step, row in enumerate(clean((fall, noise), seed), 1) if watch.judge(step, *row).action != "update"
        ]
    assert len(alarms) == 0, alarms


def test_hard_batches_of_a_new_kind_are_an_alarm_once_not_each_time():
    rng, watch = random.Random(0), Watch(HealthConfig())
    hard = [step > 100 and step % 20 == 0 for step in range(1000)]
    rows = [2.5 + rng.gauss(0, 0.02) + 4.0 * odd for odd in hard]
    alarms = [step for step, loss in enumerate(rows, 1) if watch.judge(step, loss, 1.0).action != "update"]
    assert alarms == [121]


def test_another_phase_has_levels_of_its_own():
    watch = Watch(HealthConfig())
    for step in range(1, 200):
        watch.enter(0 if step < 100 else 1)
        assert watch.judge(step, 2.0 + 0.01 * (step % 7) + 3.0 * (step >= 100), 1.0).action == "update"
    assert watch.judge(200, 15.0, 1.0).action == "skip"


def test_one_bad_step_is_skipped_and_a_streak_goes_back_ever_further():
    watch = Watch(HealthConfig(patience=2, rollbacks=2))
    assert [watch.judge(s, x, 1.0).action for s, x in [(10, math.nan), (11, 2.0), (12, math.inf)]] == [
        "skip",
        "update",
        "skip",
    ]
    back = watch.judge(13, math.nan, 1.0)
    assert (back.action, back.before, watch.streak) == ("roll back", 10, [])
    assert watch.skip == {10, 11, 12, 13}
    watch.judge(14, math.nan, 1.0)
    back = watch.judge(15, 2.0, math.inf)
    assert (back.action, back.before) == ("roll back", 10) and {10, 13, 14, 15} <= watch.skip
    watch.judge(16, math.nan, 1.0)
    assert watch.judge(17, math.nan, 1.0).action == "stop"


def test_a_place_far_from_the_last_has_patience_of_its_own():
    watch = Watch(HealthConfig(patience=1, rollbacks=1, window=32))
    assert watch.judge(10, math.nan, 1.0).action == "roll back"
    assert watch.judge(43, math.nan, 1.0).action == "roll back"
    assert watch.judge(44, math.nan, 1.0).action == "stop"


def test_a_roll_back_forgets_what_was_seen_and_keeps_what_was_decided():
    watch = Watch(HealthConfig(patience=1))
    for step in range(1, 40):
        watch.judge(step, 2.0, 1.0)
    saved = watch.state()
    for step in range(40, 60):
        watch.judge(step, 1.0, 1.0)
    watch.judge(60, math.nan, 1.0)
    watch.load(saved, rolled_back=39)
    after = watch.state()
    assert after["loss"] == saved["loss"] and after["skip"] == [59, 60] and after["rollbacks"] == [60, 1]


def test_what_the_state_of_a_roll_back_was_trained_on_is_not_called_skipped():
    watch = Watch(HealthConfig(patience=2))
    watch.skip.add(3)
    saved = watch.state()
    for step in (10, 11):
        watch.judge(step, math.nan, 1.0)
    assert watch.skip == {3, 8, 9, 10, 11}
    watch.load(saved, rolled_back=9)
    assert watch.skip == {3, 10, 11}
