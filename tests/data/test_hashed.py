"""Hashed features and the classifier: the native library against the twin in Python, and what both must be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.data import hashed
from puyu.data.hashed import Plan, Shape, features, margins, text_features, text_margin, train, train_slowly
from puyu.documents.texts import load

PIECES = (
    "The cat ",
    "sat 12,345 ",
    "今天天气",
    "很好。",
    "かな ",
    "\n \t",
    "İstanbul ςΣ ",
    "é́ ½ ² ٣ ",
    "😀",
    "\x00",
    "__a1 ",
)
anything = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=20).map("".join)
SHAPES = (Shape(), Shape(bits=8), Shape(bits=12, words=2, shortest=2, longest=4), Shape(words=0), Shape(longest=0))


@settings(max_examples=80)
@given(texts=st.lists(anything, max_size=4), shape=st.sampled_from(SHAPES))
def test_features_are_those_of_the_twin(texts, shape):
    assert load() is not None, "run: python -m puyu.documents.texts"
    for text, found in zip(texts, features(texts, shape=shape), strict=True):
        assert found.tolist() == text_features(text, shape=shape).tolist(), text


@settings(max_examples=30)
@given(texts=st.lists(anything, min_size=1, max_size=4), seed=st.integers(0, 9))
def test_margins_are_those_of_the_twin(texts, seed):
    shape = Shape(bits=10)
    weights = np.random.default_rng(seed).normal(size=(1 << 10) + 1).astype(np.float32)
    expected = [text_margin(text, weights, shape=shape) for text in texts]
    assert margins(texts, weights, shape=shape) == pytest.approx(expected, abs=1e-9)


def test_training_is_that_of_the_twin():
    texts = [f"{kind} {at} {word}" for at, word in enumerate(["alpha", "beta", "今天"] * 4) for kind in ("yes", "no")]
    labels = [text.startswith("yes") for text in texts]
    shape, plan = Shape(bits=12), Plan(epochs=3, seed=5)
    ours, slow = (call(texts, labels, shape=shape, plan=plan) for call in (train, train_slowly))
    assert np.abs(ours - slow).max() < 1e-5
    assert (train(texts, labels, shape=shape, plan=plan) == ours).all()
    assert ((margins(texts, ours, shape=shape) > 0) == labels).all()


def test_without_the_library_the_twin_answers(monkeypatch):
    texts, labels, shape = ["good good", "bad"] * 4, [True, False] * 4, Shape(bits=8)
    native = train(texts, labels, shape=shape, plan=Plan())
    said = margins(texts, native, shape=shape)
    seen = features(texts, shape=shape)
    monkeypatch.setattr(hashed, "load", lambda: None)
    assert np.abs(train(texts, labels, shape=shape, plan=Plan()) - native).max() < 1e-5
    assert margins(texts, native, shape=shape) == pytest.approx(said)
    assert [row.tolist() for row in features(texts, shape=shape)] == [row.tolist() for row in seen]


def test_a_text_counts_each_feature_once_and_has_length_one():
    shape = Shape(bits=16, words=1, longest=0)
    assert len(text_features("a b a A", shape=shape)) == 2
    weights = np.zeros((1 << 16) + 1, dtype=np.float32)
    weights[text_features("a b c d", shape=shape)] = 1
    assert text_margin("a b c d a b c d", weights, shape=shape) == pytest.approx(2.0)  # 4 features / sqrt(4)


def test_numbers_are_alike_and_case_does_not_count():
    shape = Shape()
    assert set(text_features("In 1984", shape=shape)) == set(text_features("in 2026", shape=shape))


def test_hashes_are_the_same_everywhere():
    assert text_features("the 人", shape=Shape(bits=20)).tolist() == GOLDEN


def test_an_empty_text_has_the_bias_alone():
    shape = Shape(bits=8, longest=0)
    weights = np.full((1 << 8) + 1, 0.5, dtype=np.float32)
    assert margins(["", " "], weights, shape=shape).tolist() == [0.5, 0.5]
    assert margins([], weights, shape=shape).tolist() == [] and features([], shape=shape) == []


def test_many_texts_go_through_in_parts(monkeypatch):
    monkeypatch.setattr(hashed, "_BATCH_BYTES", 10)
    texts, shape = [f"text number {at}" for at in range(9)], Shape(bits=10)
    weights = np.arange((1 << 10) + 1, dtype=np.float32)
    assert margins(texts, weights, shape=shape) == pytest.approx([text_margin(t, weights, shape=shape) for t in texts])
    assert [row.tolist() for row in features(texts, shape=shape)] == [
        text_features(text, shape=shape).tolist() for text in texts
    ]


GOLDEN = [
    67324,
    989109,
    701691,
    383602,
    424009,
    539722,
    47413,
    848460,
    624699,
    337122,
    1038397,
    738560,
    184874,
    881724,
    419777,
    366874,
    191417,
    63635,
    845014,
]
