"""A SentencePiece model written by us, read by the library itself; a refusal where it would give other ids."""

from __future__ import annotations

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.errors import InputError
from puyu.tokenizer.sentencepiece_export import to_sentencepiece
from puyu.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.test_sentencepiece import HARD, both, sentences


def exported(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=to_sentencepiece(tokenizer))


@pytest.mark.parametrize("kind", ["LLaMA's", "no prefix", "whole digits, no bytes"])
def test_ids_equal_sentencepiece(kind: str) -> None:
    _, ours = both(kind)
    theirs = exported(ours)
    assert theirs.vocab_size() == ours.vocab_size
    assert [theirs.id_to_piece(n) for n in range(3)] == ["<unk>", "<s>", "</s>"]
    for text in [*sentences(200, seed=3), *HARD]:
        assert theirs.encode(text) == ours.encode(text), repr(text)


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text(text: str) -> None:
    _, ours = both("LLaMA's")
    assert exported(ours).encode(text) == ours.encode(text)


def test_a_byte_level_tokenizer_is_refused_with_the_reason(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"the pattern that cuts text.*part of a character \(id \d+ is b'") as caught:
        to_sentencepiece(tokenizer)
    assert "export tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("kind", ["BPE, nmt_nfkc", "unigram", "symbols"])
def test_what_is_not_plain_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match="cannot|is not SentencePiece's way"):
        to_sentencepiece(both(kind)[1])


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_that_the_model_would_lose_are_named(special: bool) -> None:
    content = json.loads(both("LLaMA's")[1].json_text)
    vocab = content["model"]["vocab"]
    word = next(name for name in vocab if len(name) > 2 and name.isalpha())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for name, id in (("<think>", len(vocab)), (word, vocab[word])):
        added = {"id": id, "content": name, "special": special, **flags}
        changed = {**content, "added_tokens": [*content["added_tokens"], added]}
        if special and name == word:
            continue  # it is a control piece then
        with pytest.raises(InputError, match=f"cannot express its added tokens '{name}'"):
            to_sentencepiece(Tokenizer(json.dumps(changed), {}))


def test_merges_that_sentencepiece_would_not_make_are_refused() -> None:
    content = json.loads(both("LLaMA's")[1].json_text)
    content["model"]["merges"] = content["model"]["merges"][:-1]
    with pytest.raises(InputError, match="cannot express its merges"):
        to_sentencepiece(Tokenizer(json.dumps(content), {}))
