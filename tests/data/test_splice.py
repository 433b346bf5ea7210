"""Cuts of a text: gains against the slow twin, values by hand, and joins that were planted."""

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.data import ngram, ngram_native, splice
from puyu.data.ngram import NgramConfig, train
from puyu.data.splice import SpliceConfig, gains, splices

SMALL = SpliceConfig(segment_bytes=60, reach=3)
TOPICS = [[f"{c}{a}{b}{c}" for a in "abcdefg" for b in "mnopq"] for c in "vwxyz"]
GLUE = ["the", "of", "and", "to", "in", "that", "it", "was", "for", "with"]


@pytest.fixture(scope="module", autouse=True)
def library():
    ngram_native.build()


@pytest.fixture(scope="module")
def model():
    return train([topic_text(topic, 3000, seed=9) for topic in range(5)], NgramConfig(vocabulary_min=1))


def topic_text(topic, size, *, seed):
    rng = random.Random(seed * 100 + topic)
    words = rng.sample(TOPICS[topic], 12)
    text = ""
    while len(text) < size:
        text += rng.choice(words if rng.random() < 0.4 else GLUE) + " "
    return text[:size]


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["the ", "cat. ", "猫咪", "\n", "a1 ", "x" * 70, "，"]), max_size=60).map("".join))
def test_gains_are_those_of_the_twin(model, text):
    [(table, starts)] = gains([text], model, SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splice, "load", lambda: None)
        patch.setattr(ngram, "load", lambda: None)
        [(twin, twin_starts)] = gains([text], model, SMALL)
    assert starts.tolist() == twin_starts.tolist()
    np.testing.assert_allclose(table, twin, rtol=1e-9, atol=1e-12)


def test_a_batch_is_its_texts_one_by_one(model):
    texts = [topic_text(0, 700, seed=1), "", topic_text(1, 90, seed=1), "猫" * 100]
    for text, (table, starts) in zip(texts, gains(texts, model, SMALL), strict=True):
        [(alone, alone_starts)] = gains([text], model, SMALL)
        np.testing.assert_array_equal(table, alone)
        assert starts.tolist() == alone_starts.tolist()


def test_segments_are_cut_at_units_and_a_short_rest_is_joined(model):
    [(table, starts)] = gains(["ab " * 49], model, SpliceConfig(segment_bytes=60, reach=2))
    assert starts.tolist() == [0, 60] and table.shape == (2, 5)  # 27 bytes are left: less than half of one
    [(_, starts)] = gains(["ab " * 50], model, SpliceConfig(segment_bytes=60, reach=2))
    assert starts.tolist() == [0, 60, 120]
    assert np.isnan(table[0]).tolist() == [True, True, True, False, True]


def naive_value(matrix, group):
    """The definition, segment by segment."""
    n, found = len(matrix), []
    for j in range(n):
        own = [matrix[j][i] for i in range(n) if (i in group) == (j in group) and not np.isnan(matrix[j][i])]
        other = [matrix[j][i] for i in range(n) if (i in group) != (j in group) and not np.isnan(matrix[j][i])]
        if own and other:
            found.append(np.mean(own) - np.mean(other))
    smaller = min(len(group), n - len(group))
    return np.mean(found) * np.sqrt(smaller / (smaller + 1)) if found else 0.0


@given(st.integers(3, 7), st.integers(0, 10**6))
def test_the_best_cut_is_that_of_the_definition(n, seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(n, 2 * 7 + 1))
    for j in range(n):
        for column in range(15):
            if column == 7 or not 0 <= j + column - 7 < n:
                table[j, column] = np.nan
    matrix = splice._window(table, 0, n)
    found = splice._worst(table, list(range(0, 10 * n + 1, 10)))
    borders = [naive_value(matrix, set(range(at, n))) for at in range(1, n)]
    runs = [naive_value(matrix, set(range(a, b))) for a, b in combinations(range(1, n), 2)]
    assert found.splice.value == pytest.approx(max(borders), abs=1e-4) or max(borders) < 0
    assert found.insert.value == pytest.approx(max(runs), abs=1e-4) or max(runs) < 0
    if max(borders) > 0:
        assert found.splice.begin == 10 * (1 + int(np.argmax(np.round(borders, 9)))) and found.splice.end == 10 * n


def test_a_window_of_the_table_is_a_matrix():
    table = np.array([[np.nan, np.nan, 1.0], [2.0, np.nan, 3.0], [4.0, np.nan, 5.0], [6.0, np.nan, np.nan]])
    matrix = splice._window(table, 1, 4)
    assert matrix[0, 1] == 3 and matrix[1, 0] == 4 and matrix[2, 1] == 6
    assert np.isnan(matrix[0, 0]) and np.isnan(matrix[0, 2])


def test_the_leading_eigenvector_is_that_of_lapack():
    matrix = np.random.default_rng(2).normal(size=(12, 12))
    found, expected = splice._leading(matrix + matrix.T), np.linalg.eigh(matrix + matrix.T)[1][:, -1]
    assert abs(found @ expected) / np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    assert splice._leading(np.zeros((3, 3))).shape == (3,)


def test_planted_joins_are_found_where_they_are(model):
    config = SpliceConfig(segment_bytes=400)
    whole = [topic_text(topic, 6000, seed=seed) for topic in range(5) for seed in (1, 2)]
    joined = [topic_text(0, 2500, seed=s) + topic_text(1 + s % 4, 3500, seed=s) for s in range(10)]
    good, bad = (splices(texts, model, config) for texts in (whole, joined))
    assert max(found.splice.value for found in good) < min(found.splice.value for found in bad)
    for found in bad:
        assert 2100 <= found.splice.begin <= 2900 and found.splice.gain < found.context


def test_foreign_pieces_and_turns_are_found(model):
    config = SpliceConfig(segment_bytes=400)
    host, guest = topic_text(0, 6000, seed=1), topic_text(3, 6000, seed=2)
    inserted, turns = host[:2400] + guest[:1600] + host[2400:], ""
    for at in range(0, 4000, 1000):
        turns += host[at : at + 1000] + guest[at : at + 1000]
    whole, piece, mixed = splices([host, inserted, turns], model, config)
    assert piece.insert.value > 2 * whole.insert.value and piece.insert.value > piece.splice.value
    assert abs(piece.insert.begin - 2400) < 400 and abs(piece.insert.end - 4000) < 400
    assert mixed.mixed.value > 2 * whole.mixed.value and mixed.mixed.value > mixed.insert.value
    assert (mixed.mixed.begin, mixed.mixed.end) == (0, 0)


def test_a_join_far_into_a_long_text_is_found(model):
    config = SpliceConfig(segment_bytes=200, reach=4)
    text = topic_text(0, 9000, seed=1) + topic_text(1, 9000, seed=1)
    assert abs(splices([text], model, config)[0].splice.begin - 9000) <= 400


@pytest.mark.parametrize("text", ["", "one", "one two " * 40, "a" * 5000, "\n" * 5000])
def test_texts_that_cannot_be_cut(model, text):
    found = splices([text], model, SpliceConfig(segment_bytes=400))[0]
    assert found.splice.value == found.insert.value == found.mixed.value == 0.0
