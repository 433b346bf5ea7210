"""Rows: every token in exactly one row, documents whole where that is promised, and the same rows after any kill."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.data.mix import Mixture
from puyu.data.rows import WINDOW, Rows, Stretch, in_order, least_slack, one_alone, whole_first
from tests.data.lengths import Lengths

MODES = ("hard", "soft", "document")


def rows_of(sources, packing, *, epochs=1.0, seed=0):
    mixture = Mixture(sources, dict.fromkeys(sources, 1), seed=seed, epochs=dict.fromkeys(sources, epochs))
    return Rows(sources, mixture, packing=packing)


def drain(rows, seq_len):
    return list(iter(lambda: rows.next_row(seq_len), []))


sources = st.fixed_dictionaries(
    {name: st.lists(st.integers(1, 60), min_size=1, max_size=90).map(Lengths) for name in ("web", "code")}
)


@given(sources=sources, packing=st.sampled_from(MODES), seq_len=st.integers(1, 40), epochs=st.sampled_from([1, 2]))
@settings(max_examples=80, deadline=None)
def test_every_token_is_in_exactly_one_row_an_epoch(sources, packing, seq_len, epochs):
    rows = rows_of(sources, packing, epochs=epochs)
    found = drain(rows, seq_len)
    seen = Counter((s.source, s.doc, at) for row in found for s in row for at in range(s.begin, s.end))
    assert seen == {
        (name, doc, at): epochs
        for name, source in sources.items()
        for doc, length in enumerate(source.lengths)
        for at in range(length)
    }
    sizes = [sum(s.end - s.begin for s in row) for row in found]
    assert max(sizes) <= seq_len
    assert rows.fill == pytest.approx(sum(sizes) / (seq_len * len(sizes)))
    if packing == "hard":
        assert all(size == seq_len for size in sizes[:-1])
    if packing == "document":
        assert all(len(row) == 1 for row in found)
    if packing != "hard":
        cut = [s for row in found for s in row if s.end - s.begin < sources[s.source].lengths[s.doc]]
        assert all(sources[s.source].lengths[s.doc] > seq_len for s in cut)


@given(
    sources=sources,
    packing=st.sampled_from(MODES),
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4),
    cuts=st.sets(st.integers(0, 30)),
)
@settings(max_examples=80, deadline=None)
def test_rows_after_any_kill_are_those_without(sources, packing, shapes, cuts):
    """Also when the length of the rows changes, and the weights with it: the tokens are still all different."""

    def walk(cuts):
        rows, found = rows_of(sources, packing), []
        for number, (seq_len, count) in enumerate(shapes):
            rows.mixture.set_weights({"web": 1 + number, "code": 2})
            for _ in range(count):
                if len(found) in cuts:
                    state = json.loads(json.dumps(rows.state()))
                    rows = rows_of(sources, packing)
                    rows.load(state)
                found.append(rows.next_row(seq_len))
        return found, rows

    plain, rows = walk(set())
    killed, others = walk(cuts)
    assert killed == plain and others.state() == rows.state() and others.fill == rows.fill
    tokens = Counter((s.source, s.doc, at) for row in plain for s in row for at in range(s.begin, s.end))
    assert not tokens or max(tokens.values()) == 1


def chunks(values, size):
    return [values[at : at + size] for at in range(0, len(values), size)]


@given(sources=sources, seq_len=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_hard_and_document_rows_against_lists_of_tokens(sources, seq_len):
    mixture = rows_of(sources, "hard").mixture
    drawn = []
    while mixture.can_draw:
        drawn.append(mixture.draw())
    streams = [[(d.source, d.doc, at) for at in range(sources[d.source].length(d.doc))] for d in drawn]

    def tokens(packing):
        found = drain(rows_of(sources, packing), seq_len)
        return [[(s.source, s.doc, at) for s in row for at in range(s.begin, s.end)] for row in found]

    assert tokens("hard") == chunks(list(itertools.chain(*streams)), seq_len)
    assert tokens("document") == [row for stream in streams for row in chunks(stream, seq_len)]


@given(sizes=st.lists(st.integers(1, 25), max_size=9), room=st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_least_slack_against_all_subsets(sizes, room):
    subsets = itertools.product((True, False), repeat=len(sizes))  # those with earlier items first
    fitting = [s for s in subsets if sum(itertools.compress(sizes, s)) <= room]
    best = max(fitting, key=lambda subset: sum(itertools.compress(sizes, subset)))  # the first of equals
    assert least_slack(sizes, room) == list(itertools.compress(range(len(sizes)), best))


def test_heads_by_hand():
    assert in_order([5, 7, 4], 10) == [5, 5, 0]
    assert one_alone([12, 3], 10) == [10, 0]
    assert whole_first([6, 5, 3, 1], 10) == [6, 0, 3, 1]
    assert whole_first([4, 2, 3, 3], 10) == [4, 0, 3, 3]  # 4 + 2 + 3 would leave a token open
    assert whole_first([23, 7], 10) == [10, 0]  # a row's length of the oldest
    assert whole_first([7, 8, 23], 10) == [7, 0, 3]  # the head that leaves two whole rows
    assert whole_first([7, 8, 24, 25], 10) == [7, 0, 0, 3]  # no head fits: the longest is cut once more
    assert whole_first([7, 8, 10], 10) == [7, 0, 0]  # nothing is cut that fits a row


def test_the_oldest_document_never_waits_for_another():
    sources = {"web": Lengths([1 + i * 37 % 80 for i in range(500)])}
    rows = rows_of(sources, "soft")
    rows.next_row(100)
    while waiting := rows.state()["waiting"]:
        source, doc, begin = waiting[0]
        first = rows.next_row(100)[0]
        assert first == Stretch(source, doc, begin, sources[source].lengths[doc])
        assert len(rows.state()["waiting"]) < WINDOW
    assert not rows.mixture.can_draw


@pytest.mark.parametrize(("median", "spread"), [(90, 1.0), (500, 1.1), (1100, 1.6), (8000, 1.2)])
@pytest.mark.parametrize("seq_len", [256, 2048, 4096])
def test_soft_rows_are_full_on_lengths_like_those_of_texts(median, spread, seq_len):
    lengths = np.random.default_rng(0).lognormal(np.log(median), spread, 3000).clip(8, 50_000).astype(int)
    rows = rows_of({"web": Lengths(lengths.tolist())}, "soft")
    for _ in range(min(100, int(lengths.sum() * 0.7) // seq_len)):
        rows.next_row(seq_len)
    assert rows.fill >= 0.997
    assert len(json.dumps(rows.state())) < 16_384


def test_what_cannot_be_filled_is_said():
    rows = rows_of({"web": Lengths([70] * 50)}, "soft")
    assert rows.fill == 1.0
    assert len(drain(rows, 100)) == 50 and rows.fill == pytest.approx(0.7)
