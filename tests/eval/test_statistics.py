"""Closed forms, published values, brute force, and coverage."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.eval.statistics import Z95, bootstrap, estimate, paired_difference, quantile, standard_error, wilson

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score without continuity correction)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_bounds_solve_the_score_equation() -> None:
    for bound in wilson(7, 23):
        assert abs(7 / 23 - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / 23))


@given(VALUES)
def test_plain_standard_error_is_s_over_root_n(values: list[float]) -> None:
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert standard_error(values) == pytest.approx(expected, abs=1e-9)


@given(VALUES)
def test_each_sample_in_its_own_cluster_changes_nothing(values: list[float]) -> None:
    clusters = [f"c{i}" for i in range(len(values))]
    assert standard_error(values, clusters=clusters) == pytest.approx(standard_error(values))


@given(VALUES)
def test_copies_of_every_sample_in_its_cluster_add_no_certainty(values: list[float]) -> None:
    doubled = [x for x in values for _ in range(2)]
    clusters = [f"c{i // 2}" for i in range(len(doubled))]
    assert standard_error(doubled, clusters=clusters) == pytest.approx(standard_error(values), abs=1e-9)
    if statistics.stdev(values) > 1e-6:
        assert standard_error(doubled) < standard_error(values)


def test_weighted_error_matches_a_simulation_of_the_ratio() -> None:
    draw = random.Random(0)

    def one() -> tuple[list[float], list[float]]:
        weights = [draw.uniform(1, 9) for _ in range(60)]
        return [draw.gauss(2, 1) for _ in weights], weights

    ratios, errors = [], []
    for _ in range(600):
        values, weights = one()
        ratios.append(estimate(values, weights).value)
        errors.append(standard_error(values, weights))
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(ratios), rel=0.08)


def test_estimate_chooses_wilson_only_for_independent_proportions() -> None:
    assert estimate([1.0, 0.0, 1.0]).method == "wilson"
    assert estimate([1.0, 0.5, 1.0]).method == "normal"
    assert estimate([1.0, 0.0, 1.0], clusters=["a", "a", "b"]).method == "clustered"
    all_right = estimate([1.0] * 20)
    assert (all_right.stderr, all_right.high) == (0.0, 1.0)
    assert all_right.low < 0.85  # twenty right answers do not prove perfection


def test_paired_difference_by_hand() -> None:
    found = paired_difference([0, 0, 1, 1], [1, 0, 1, 1], seed=3)
    assert (found.value, found.n) == (0.25, 4)
    assert found.stderr == pytest.approx(0.25)  # deltas 1 0 0 0: s = 0.5, n = 4
    assert found.low == pytest.approx(0.25 - Z95 * 0.25)
    assert not found.is_clear


def test_pairing_sees_what_two_separate_intervals_cannot() -> None:
    draw = random.Random(1)
    easy = [draw.random() for _ in range(200)]
    harder = [x - 0.02 + draw.gauss(0, 0.02) for x in easy]
    found = paired_difference(easy, harder)
    a, b = estimate(easy), estimate(harder)
    assert b.high > a.low  # the two intervals overlap
    assert found.is_clear and found.high < 0


def test_bootstrap_equals_the_exhaustive_distribution() -> None:
    values = [0.0, 1.0, 3.0, 7.0]
    every = sorted((a + b + c + d) / 4 for a in values for b in values for c in values for d in values)
    found = bootstrap(values, seed=0, resamples=20_000)
    assert found.low == pytest.approx(quantile(every, 0.025), abs=0.26)
    assert found.high == pytest.approx(quantile(every, 0.975), abs=0.26)


def test_bootstrap_and_normal_intervals_cover_the_truth_about_95_times_in_100() -> None:
    draw = random.Random(7)
    normal = boot = 0
    rounds = 300
    for number in range(rounds):
        a = [draw.gauss(0, 1) for _ in range(40)]
        b = [x + 0.3 + draw.gauss(0, 0.5) for x in a]
        found = paired_difference(a, b, seed=number, resamples=300)
        normal += found.low <= 0.3 <= found.high
        boot += found.boot_low <= 0.3 <= found.boot_high
    assert 0.90 <= normal / rounds <= 0.98
    assert 0.89 <= boot / rounds <= 0.98


def test_bootstrap_is_seeded_and_draws_whole_clusters() -> None:
    values = [0.0, 0.0, 1.0, 1.0]
    assert bootstrap(values, seed=5) == bootstrap(values, seed=5)
    clustered = bootstrap(values, clusters=["a", "a", "b", "b"], seed=5)
    assert clustered == (0.0, 1.0)
    assert bootstrap(values * 10, seed=5).low > 0.2
