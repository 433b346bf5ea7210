"""Calibration and agreement against naive twins and values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.data.calibrate import Calibration, agreement, auc, fit, reliability, sigmoid

pairs = st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=40)


def arrays(rows):
    return np.array([float(value) for value, _ in rows]), np.array([flag for _, flag in rows])


def naive_auc(scores, labels):
    yes = [s for s, label in zip(scores, labels, strict=True) if label]
    no = [s for s, label in zip(scores, labels, strict=True) if not label]
    if not yes or not no:
        return 0.5
    return sum((a > b) + (a == b) / 2 for a in yes for b in no) / (len(yes) * len(no))


@given(pairs)
def test_auc_counts_pairs(rows):
    scores, labels = arrays(rows)
    assert auc(scores, labels) == pytest.approx(naive_auc(scores, labels))


@given(pairs)
def test_isotonic_rises_and_keeps_the_mean(rows):
    margins, labels = arrays(rows)
    found = fit(margins, labels, kind="isotonic").of(margins)
    order = np.argsort(margins, kind="stable")
    assert (np.diff(found[order]) >= -1e-9).all()
    assert found.mean() == pytest.approx(labels.mean(), abs=1e-6)


def naive_isotonic(margins, labels):
    """max over beginnings of min over ends of means: the formula of isotonic regression."""
    points = sorted(set(margins))
    groups = [[label for m, label in zip(margins, labels, strict=True) if m == point] for point in points]

    def mean(first, last):
        part = [label for group in groups[first : last + 1] for label in group]
        return sum(part) / len(part)

    size = len(points)
    values = [max(min(mean(a, b) for b in range(at, size)) for a in range(at + 1)) for at in range(size)]
    return dict(zip(points, values, strict=True))


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=20))
def test_isotonic_is_the_formula(rows):
    margins, labels = arrays(rows)
    expected = naive_isotonic(margins.tolist(), labels.tolist())
    found = fit(margins, labels, kind="isotonic").of(margins)
    assert found == pytest.approx([expected[m] for m in margins.tolist()], abs=1e-6)


def test_platt_finds_the_line_that_made_the_labels():
    random = np.random.default_rng(0)
    margins = random.normal(size=20_000) * 2
    labels = random.random(20_000) < sigmoid(1.5 * margins - 0.7)
    line = fit(margins, labels, kind="platt")
    assert line.slope == pytest.approx(1.5, abs=0.06) and line.offset == pytest.approx(-0.7, abs=0.06)
    assert agreement(line.of(margins), labels).ece < 0.02


def test_platt_with_perfect_margins_stays_finite():
    line = fit(np.array([-1.0, 1.0] * 20), np.array([False, True] * 20), kind="platt")
    high = line.of(np.array([1.0]))[0]
    assert 0.9 < high < 1 and np.isfinite(line.slope)
    # Platt's targets: (20 + 1) / (20 + 2)
    assert high == pytest.approx(21 / 22, abs=1e-3)


def test_margins_that_are_wrong_are_not_turned_around():
    line = fit(np.array([-1.0, 1.0] * 20), np.array([True, False] * 20), kind="platt")
    assert line.of(np.array([-1.0, 1.0])) == pytest.approx([0.5, 0.5])


def test_agreement_by_hand():
    said = np.array([0.9, 0.8, 0.3, 0.6])
    found = agreement(said, np.array([True, True, True, False]))
    assert (found.labels, found.positives) == (4, 3)
    assert found.agreement == 0.5 and found.f1 == pytest.approx(2 * 2 / 6, abs=1e-4)
    assert found.auc == pytest.approx(2 / 3, abs=1e-4)
    assert found.kappa == pytest.approx((0.5 - (0.75 * 0.75 + 0.25 * 0.25)) / (1 - 0.625), abs=1e-4)
    assert found.ece == pytest.approx((0.1 + 0.2 + 0.7 + 0.6) / 4, abs=1e-4)
    assert reliability(said, np.array([True, True, True, False]))[0] == (0.3, 1.0, 1)


def test_sigmoid_does_not_overflow():
    assert sigmoid(np.array([-1e9, 0.0, 1e9])).tolist() == [0.0, 0.5, 1.0]
    assert Calibration().of(np.array([0.0])).tolist() == [0.5]
