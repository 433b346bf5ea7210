"""Mixture: a permutation per epoch, shares in tokens, and no document twice whatever happens to the weights."""

import json
from collections import Counter
from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.data.mix import Mixture, expected_use, permuted
from puyu.errors import CheckpointError, ConfigError
from tests.data.lengths import Lengths


def two(web=200, code=200):
    return {
        "web": Lengths([1 + (i * 7) % 50 for i in range(web)]),
        "code": Lengths([1 + (i * 11) % 90 for i in range(code)]),
    }


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_permuted_is_a_permutation(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_differ_by_key_and_move_almost_everything():
    first, second = ([permuted(i, 500, key) for i in range(500)] for key in (1, 2))
    assert first != second
    assert sum(i == j for i, j in enumerate(first)) < 10
    # A shuffle has no trend: the mean distance of neighbors in the image is about size / 3.
    distance = sum(abs(a - b) for a, b in pairwise(first)) / 499
    assert 130 < distance < 200


@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    weights=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_no_repeats_until_a_source_is_exhausted(sizes, weights, seed):
    sources = two(*sizes)
    mixture = Mixture(sources, {"web": 1, "code": 1}, seed=seed)
    drawn = []
    for web, code in weights:
        mixture.set_weights({"web": web, "code": code})
        drawn += [mixture.draw() for _ in range(30)]
    for name, source in sources.items():
        mine = [draw.doc for draw in drawn if draw.source == name]
        size = source.num_docs
        for epoch in range(0, len(mine), size):
            part = mine[epoch : epoch + size]
            assert len(set(part)) == len(part)
        # every earlier epoch is complete: counts differ by at most one
        counts = Counter(mine)
        assert max(counts.values(), default=0) - min((counts[d] for d in range(size)), default=0) <= 1


def test_shares_are_of_tokens_and_within_one_document():
    sources = two(5000, 5000)
    mixture = Mixture(sources, {"web": 3, "code": 1}, seed=0)
    tokens = Counter()
    for _ in range(4000):
        draw = mixture.draw()
        tokens[draw.source] += sources[draw.source].length(draw.doc)
        assert abs(tokens["web"] - 0.75 * tokens.total()) <= 90
    assert tokens["web"] / tokens.total() == pytest.approx(0.75, abs=1e-3)


def test_a_phase_counts_its_own_tokens():
    sources = two(5000, 5000)
    mixture = Mixture(sources, {"web": 1}, seed=0)
    for _ in range(1000):
        assert mixture.draw().source == "web"
    mixture.set_weights({"web": 1, "code": 1})
    tokens = Counter()
    for _ in range(1000):
        draw = mixture.draw()
        tokens[draw.source] += sources[draw.source].length(draw.doc)
    assert tokens["code"] / tokens.total() == pytest.approx(0.5, abs=0.01)


def test_state_is_small_json_and_continues_exactly():
    sources = two()
    mixture = Mixture(sources, {"web": 1, "code": 2}, seed=3)
    for _ in range(950):
        mixture.draw()
    state = json.loads(json.dumps(mixture.state()))
    expected = [mixture.draw() for _ in range(300)]
    other = Mixture(sources, {"web": 9}, seed=3)
    other.load(state)
    assert [other.draw() for _ in range(300)] == expected
    assert len(json.dumps(state)) < 1024
    for _ in range(20_000):
        mixture.draw()
    assert len(json.dumps(mixture.state())) < len(json.dumps(state)) + 32


def test_equal_weights_change_nothing():
    sources = two()
    plain, told = (Mixture(sources, {"web": 1, "code": 2}, seed=3) for _ in range(2))
    draws = []
    for _ in range(100):
        told.set_weights({"code": 4, "web": 2})
        draws.append(told.draw())
    assert draws == [plain.draw() for _ in range(100)]


def test_a_foreign_state_is_refused():
    state = Mixture(two(), {"web": 1}, seed=0).state()
    with pytest.raises(CheckpointError, match="seed 0"):
        Mixture(two(), {"web": 1}, seed=1).load(state)
    with pytest.raises(CheckpointError, match="documents"):
        Mixture(two(web=10), {"web": 1}, seed=0).load(state)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"wbe": 1}, "unknown source 'wbe'"),
        ({"web": -1}, "'web' must be"),
        ({"web": float("nan")}, "'web' must be"),
        ({"web": 0}, "above 0"),
        ({"none": 1}, "'none' has no documents"),
    ],
)
def test_bad_weights_are_named(weights, words):
    with pytest.raises(ConfigError, match=words):
        Mixture({**two(), "none": Lengths([])}, weights, seed=0)


names = ("web", "web/high", "code")
phases = st.lists(
    st.tuples(st.tuples(*[st.integers(0, 5)] * 3).filter(any), st.integers(1, 25)), min_size=1, max_size=6
)


@given(
    sizes=st.tuples(*[st.integers(1, 25)] * 3),
    epochs=st.tuples(*[st.none() | st.floats(0.1, 4)] * 3),
    phases=phases,
    cuts=st.sets(st.integers(0, 60)),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_epochs_bound_every_document_over_any_phases_and_resumes(sizes, epochs, phases, cuts, seed):
    sources = {name: Lengths([1 + i * 7 % 13 for i in range(size)]) for name, size in zip(names, sizes, strict=True)}
    allowed = {name: count for name, count in zip(names, epochs, strict=True) if count is not None}

    def drawn(cuts):
        mixture = Mixture(sources, {"web": 1}, seed=seed, epochs=allowed)
        draws = []
        for weights, count in phases:
            mixture.set_weights(dict(zip(names, weights, strict=True)))
            for _ in range(count):
                if len(draws) in cuts:  # killed here: a new process goes on from the saved state
                    state = json.loads(json.dumps(mixture.state()))
                    mixture = Mixture(sources, {"code": 1}, seed=seed, epochs=allowed)
                    mixture.load(state)
                if not mixture.can_draw:
                    break
                draws.append(mixture.draw())
                assert weights[names.index(draws[-1].source)] > 0
        return draws, mixture

    draws, mixture = drawn(set())
    assert drawn(cuts)[0] == draws
    counts = Counter((draw.source, draw.doc) for draw in draws)
    for name, count in allowed.items():
        seen = [counts[name, doc] for doc in range(sources[name].num_docs)]
        assert max(seen) <= ceil(count) and max(seen) - min(seen) <= 1
        tokens = sum(n * length for n, length in zip(seen, sources[name].lengths, strict=True))
        limit = max(round(count * sources[name].num_tokens), 1)
        assert tokens < limit + max(sources[name].lengths)
        assert mixture.report()[name]["used_up"] == (tokens >= limit)


def test_a_source_that_leaves_gives_its_weight_to_the_others():
    sources = {name: Lengths([10] * 400) for name in "abc"}
    mixture = Mixture(sources, {"a": 2, "b": 3, "c": 1}, seed=0, epochs={"a": 0.5, "b": 2})
    left = []
    mixture.on_leave = left.append
    first = Counter(mixture.draw().source for _ in range(600))
    assert first == {"a": 200, "b": 300, "c": 100} and left == ["a"]
    assert Counter(mixture.draw().source for _ in range(400)) == {"b": 300, "c": 100}
    assert Counter(mixture.draw().source for _ in range(400)) == {"b": 200, "c": 200} and left == ["a", "b"]
    assert {name: row["used_up"] for name, row in mixture.report().items()} == {"a": True, "b": True, "c": False}
    mixture.set_weights({"a": 1, "b": 9})
    assert not mixture.can_draw
    mixture.set_weights({"a": 1, "c": 1})
    assert {mixture.draw().source for _ in range(9)} == {"c"}


def test_whole_epochs_draw_every_document_that_often():
    sources = two(31, 17)
    mixture = Mixture(sources, {"web": 1, "code": 5}, seed=4, epochs={"web": 1, "code": 3})
    counts = Counter()
    while mixture.can_draw:
        counts[mixture.draw()] += 1
    assert sorted(counts.values()) == [1] * 31 + [3] * 17


@given(
    sizes=st.tuples(*[st.integers(20, 200)] * 3),
    weights=st.tuples(*[st.integers(1, 9)] * 3),
    share=st.floats(0.1, 1.2),
)
@settings(max_examples=40, deadline=None)
def test_expected_use_is_what_a_mixture_draws(sizes, weights, share):
    sources = {name: Lengths([3] * size) for name, size in zip(names, sizes, strict=True)}
    given = dict(zip(names, weights, strict=True))
    left = {name: source.num_tokens for name, source in sources.items()}
    tokens = int(share * sum(left.values()))
    mixture = Mixture(sources, given, seed=0, epochs=dict.fromkeys(names, 1))
    drawn = Counter()
    while drawn.total() < tokens and mixture.can_draw:
        drawn[mixture.draw().source] += 3
    expected = expected_use(left, given, tokens)
    assert sum(expected.values()) == pytest.approx(min(tokens, sum(left.values())))
    for name in names:
        assert abs(expected[name] - drawn[name]) <= 9 and expected[name] <= left[name] + 1e-6


def test_expected_use_without_end():
    assert expected_use({"a": 10, "b": float("inf")}, {"a": 1, "b": 1}, 100) == pytest.approx({"a": 10, "b": 90})
    assert expected_use({"a": 10, "b": 0}, {"a": 1, "b": 1}, 100) == {"a": 10, "b": 0}


def test_bad_epochs_are_named_and_other_epochs_are_another_run():
    with pytest.raises(ConfigError, match="unknown source 'wbe'"):
        Mixture(two(), {"web": 1}, seed=0, epochs={"wbe": 1})
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="epochs of 'web' must be"):
            Mixture(two(), {"web": 1}, seed=0, epochs={"web": bad})
    state = Mixture(two(), {"web": 1}, seed=0, epochs={"web": 1}).state()
    with pytest.raises(CheckpointError, match="tokens to draw"):
        Mixture(two(), {"web": 1}, seed=0, epochs={"web": 2}).load(state)
