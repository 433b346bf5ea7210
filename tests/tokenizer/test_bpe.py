"""The trainer against `tokenizers`' own, the backend's encoder against the naive one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from puyu.tokenizer import bpe
from puyu.tokenizer.tokenizer import LEADING_SPECIALS, Tokenizer

Merges = list[tuple[bytes, bytes]]
ANY_TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aab  \n\t12我是你好'é-=")), max_size=40)


def pieces(text: str) -> list[str]:
    return [piece for piece, _ in bpe.pre_tokenizer().pre_tokenize_str(text)]


def encode_piece(piece: bytes, ranks: Mapping[tuple[bytes, bytes], int]) -> list[bytes]:
    """The naive encoder of one pre-token: merge the pair of the lowest rank, leftmost first, until none is left."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        found = [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            break
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def hf_merges(texts: list[str], num_tokens: int) -> list[tuple[str, str]]:
    backend = Backend(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([bpe.pre_tokenizer(), to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens + len(LEADING_SPECIALS),
        special_tokens=list(LEADING_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]


def our_merges(texts: list[str], num_tokens: int) -> list[tuple[str, str]]:
    merges = bpe.learn_merges(bpe.count_pieces(texts), num_tokens=num_tokens)
    return [(bpe.to_chars(left), bpe.to_chars(right)) for left, right in merges]


def test_merges_equal_those_of_tokenizers(corpus: list[str]) -> None:
    ours = our_merges(corpus, 600)
    assert len(ours) > 200
    assert ours == hf_merges(corpus, 600)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab c我1", max_size=30), min_size=1, max_size=4))
def test_merges_equal_those_of_tokenizers_on_repetitive_texts(texts: list[str]) -> None:
    assert our_merges(texts, 275) == hf_merges(texts, 275)


def test_stops_at_the_wanted_number_of_tokens_or_when_pairs_are_rare() -> None:
    assert bpe.learn_merges({b"low": 5, b"lower": 2}, num_tokens=258) == [(b"l", b"o"), (b"lo", b"w")]
    assert bpe.learn_merges({b"ab": 1}, num_tokens=1000) == []
    assert bpe.learn_merges({b"ab": 1}, num_tokens=1000, min_count=1) == [(b"a", b"b")]


def test_a_tie_goes_to_the_smaller_ids() -> None:
    assert bpe.learn_merges({b"cd": 2, b"ab": 2}, num_tokens=258) == [(b"a", b"b"), (b"c", b"d")]


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_encode_equals_the_naive_encoder(tokenizer: Tokenizer, merges: Merges, text: str) -> None:
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    naive = [part for piece in pieces(text) for part in encode_piece(piece.encode("utf-8"), ranks)]
    assert [tokenizer.token_bytes(id) for id in tokenizer.encode(text)] == naive


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_pre_tokens_lose_nothing(text: str) -> None:
    assert "".join(pieces(text)) == text


def test_numbers_and_line_breaks_stand_alone() -> None:
    assert pieces("a 12\n\nb٣") == ["a", " ", "12", "\n", "\n", "b", "٣"]
    assert pieces("x=1234567.89") == ["x", "=", "123", "456", "7", ".", "89"]
    assert pieces("if x:\n    y  \r\n") == ["if", " x", ":", "\n", "   ", " y", "  ", "\r", "\n"]


@given(ANY_TEXT, ANY_TEXT)
@settings(deadline=None)
def test_a_line_break_is_a_border_of_tokens(before: str, after: str) -> None:
    joined = pieces(f"{before}x\n{after}")
    assert joined == pieces(f"{before}x\n") + pieces(after)


def test_bytes_have_one_character_each() -> None:
    assert len(set(bpe.byte_to_char().values())) == 256
    assert bpe.char_to_byte()["Ġ"] == ord(" ")
    assert sorted(bpe.base_tokens()) == [bytes([byte]) for byte in range(256)]
    assert set(bpe.byte_to_char().values()) == set(pre_tokenizers.ByteLevel.alphabet())
