"""Counting and learning against a naive trainer; the order and the shards of the texts change nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.tokenizer import bpe, learn
from puyu.tokenizer.library import MOST_CHARACTERS, Pieces, load

Merges = list[tuple[bytes, bytes]]
TEXTS = st.lists(st.text("ab c我你1é\n", max_size=40), min_size=1, max_size=6)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    assert load() is not None, "run: python -m puyu.tokenizer.library"


def naive_merges(pieces: Mapping[bytes, int], num_tokens: int, min_count: int = 2, kept: Merges = []) -> Merges:  # noqa: B006
    """As in a textbook: count all pairs anew, merge the most frequent one (of equals the one with the lower ids)."""
    tokens = list(bpe.base_tokens())
    words = {piece: [piece[i : i + 1] for i in range(len(piece))] for piece in pieces}

    def merge(pair: tuple[bytes, bytes]) -> None:
        tokens.append(pair[0] + pair[1])
        for word in words.values():
            at = 0
            while at + 1 < len(word):
                if (word[at], word[at + 1]) == pair:
                    word[at : at + 2] = [pair[0] + pair[1]]
                at += 1

    for pair in kept:
        merge(pair)
    merges: Merges = []
    while len(tokens) < num_tokens:
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for piece, word in words.items():
            for pair in pairwise(word):
                counts[pair] += pieces[piece]
        frequent = [pair for pair, count in counts.items() if count >= min_count]
        if not frequent:
            break
        best = min(frequent, key=lambda pair: (-counts[pair], tokens.index(pair[0]), tokens.index(pair[1])))
        merge(best)
        merges.append(best)
    return merges


def native(texts: list[str], **options: object) -> learn.Learned:
    table = learn.piece_table()
    assert isinstance(table, Pieces)
    table.add(texts)
    return learn.learn(table, **options)  # type: ignore[arg-type]


@settings(max_examples=150)
@given(TEXTS, st.integers(1, 3))
def test_merges_equal_the_naive_ones(texts: list[str], min_count: int) -> None:
    expected = naive_merges(bpe.count_pieces(texts), 300, min_count)
    assert native(texts, num_tokens=300, min_count=min_count).merges == expected
    assert bpe.learn_merges(bpe.count_pieces(texts), num_tokens=300, min_count=min_count) == expected


@settings(max_examples=60)
@given(TEXTS, TEXTS)
def test_merges_that_follow_on_others(first: list[str], second: list[str]) -> None:
    kept = naive_merges(bpe.count_pieces(first), 262)
    expected = naive_merges(bpe.count_pieces(second), 290, kept=kept)
    assert native(second, num_tokens=290, kept=kept).merges == expected
    assert bpe.learn_merges(bpe.count_pieces(second), num_tokens=290, kept=kept) == expected


@settings(max_examples=60)
@given(st.lists(st.text("aab", min_size=2, max_size=120), min_size=1, max_size=3))
def test_runs_that_overlap_themselves(texts: list[str]) -> None:
    assert native(texts, num_tokens=330).merges == naive_merges(bpe.count_pieces(texts), 330)


def test_a_larger_corpus(corpus: list[str]) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.sample(rng.choice(corpus).split(" "), 3)) for _ in range(300)]
    assert native(texts, num_tokens=700).merges == naive_merges(bpe.count_pieces(texts), 700)


def test_order_and_shards_do_not_matter(corpus: list[str]) -> None:
    texts = [f"{text} {n}" for n, text in enumerate(corpus)] * 2
    shuffled = random.Random(1).sample(texts, len(texts))
    for every in (1, 2, 8):
        found = []
        for order in (texts, shuffled):
            table = learn.piece_table()
            for start in range(0, len(order), 5):
                table.add(order[start : start + 5])
            found.append(dict(table.weighed(every).items()))
        assert found[0] == found[1] and found[0]
    limit = learn.piece_table()
    limit.add(texts)
    most = limit.size(1)[1] // 2
    first = native(texts, num_tokens=500, most_bytes=most)
    assert first.every > 1 and first == native(shuffled, num_tokens=500, most_bytes=most)


@settings(max_examples=100)
@given(TEXTS, st.sampled_from([1, 2, 16]), st.integers(1, 5))
def test_the_native_table_equals_its_twin(texts: list[str], every: int, weight: int) -> None:
    table, plain = learn.piece_table(longest=8), learn.PlainPieces(bpe.PATTERN, 8)
    for one in (table, plain):
        one.add(texts, weight)
        one.weigh({b"12": 1 << 40, "你好".encode(): 3})
    assert dict(table.weighed(every).items()) == dict(plain.weighed(every).items())
    assert table.size(every) == plain.size(every)


def test_a_sample_of_rare_pieces_is_right_on_average() -> None:
    plain = learn.PlainPieces(bpe.PATTERN, 64)
    plain.weigh({f"word{n}".encode(): 1 + n % 3 for n in range(4000)} | {b"the": 900})
    kept = dict(plain.weighed(8).items())
    assert kept[b"the"] == 900 and set(kept.values()) == {8, 900}
    total = sum(1 + n % 3 for n in range(4000)) + 900
    assert abs(sum(kept.values()) - total) < 0.1 * total


def test_long_runs_are_cut() -> None:
    """Without a bound each merge in the run would read all of it again."""
    rng = random.Random(2)
    run = "".join(chr(rng.randrange(0x4E00, 0x4F00)) for _ in range(300_000))
    table = learn.piece_table()
    table.add([run, "a" * 1_000_000])
    assert max(len(piece.decode()) for piece, _ in table.weighed(1).items()) == learn.LONGEST
    assert len(learn.learn(table, num_tokens=2000).merges) == 1744


def test_pieces_longer_than_a_block_are_refused() -> None:
    longest = learn.piece_table(longest=MOST_CHARACTERS)
    longest.add(["我" * (MOST_CHARACTERS + 1)] * 2)
    assert sorted(len(piece) // 3 for piece, _ in longest.weighed(1).items()) == [1, MOST_CHARACTERS]
    with pytest.raises(AssertionError):
        learn.piece_table(longest=MOST_CHARACTERS + 1)


def test_without_the_library_the_same_is_learned(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = native(corpus, num_tokens=400, most_bytes=400)
    monkeypatch.setattr("puyu.tokenizer.learn.load", lambda: None)
    table = learn.piece_table()
    assert isinstance(table, learn.PlainPieces)
    table.add(corpus)
    assert learn.learn(table, num_tokens=400, most_bytes=400) == expected
