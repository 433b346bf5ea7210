"""The native library against its twins in Python, character by character."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.data import dedup
from puyu.data.dedup import NearConfig, NearDedup
from puyu.data.measure import BOILERPLATE, SCORES, measure
from puyu.documents import language as languages
from puyu.documents.characters import folded, tables
from puyu.documents.texts import TextLibrary, Texts, load

PIECES = (
    *("the cat sat on the mat. ", "The THAT with, (and) have! ", "price 12,345 #1 ... … ", "\n", "\n \n", "\r\n\n\t"),
    *(
        "今天天气很好，我们去公园散步吧。",
        "かな カナ ー",
        "안녕하세요 ",
        "İstanbul ςΣσ ſK ",
        "\ue000\ufffd\x85",
        "é́ ǅ ½ ² ٣ ",
    ),
    *(
        "LOREM Ipsum ",
        "- a\n",
        "• b\n",
        "aaaaaaaaaaaaaaaaaaaaaaaaa",
        "        " * 4,
        "Privacy Policy\n",
        "ICP备 ",
        "use of cookies",
    ),
    *("_ab_1 ", "😀👍🏽 ", "\u3000", "\x00", "x" * 300, "end:\n", "「引用」\n", "advertisement " * 20),
)
anything = st.lists(st.sampled_from(PIECES) | st.text(max_size=12), max_size=40).map("".join)
HOWS = {"en": 0, "zh": 1, "code": 2}


@pytest.fixture(scope="module")
def library() -> TextLibrary:
    found = load()
    assert found is not None, "run: python -m puyu.documents.texts"
    return found


def check_scores(library: TextLibrary, texts: Sequence[str], language: str) -> None:
    found = library.measure(Texts(texts), [HOWS[language]] * len(texts), library.automaton(BOILERPLATE))
    for text, row in zip(texts, found.tolist(), strict=True):
        expected = measure(text, language=language)
        got = {name: value for name, value in zip(SCORES, row, strict=True) if not math.isnan(value)}
        assert got == expected, text


@given(st.lists(anything, max_size=4), st.sampled_from(list(HOWS)))
def test_scores_are_those_of_the_twin(library: TextLibrary, texts: list[str], language: str) -> None:
    check_scores(library, texts, language)


def test_every_character_is_of_the_same_kind(library: TextLibrary) -> None:
    """All code points, a thousand a text, with letters between so that lines and words begin and end at each."""
    points = [chr(p) for p in range(0x33000) if not 0xD800 <= p < 0xE000] + [chr(p) for p in range(0xE0000, 0xE0200)]
    for start in range(0, len(points), 1000):
        text = "".join(f"a{c}{c}1 {c}\n" for c in points[start : start + 1000])
        for language in HOWS:
            check_scores(library, [text], language)


def test_scores_have_the_names_of_the_library(library: TextLibrary) -> None:
    assert library.num_scores == len(SCORES)


@given(st.lists(anything, max_size=4))
def test_digests_are_those_of_the_twin(library: TextLibrary, texts: list[str]) -> None:
    expected = [hashlib.blake2b(" ".join(folded(t).split()).encode(), digest_size=16).digest() for t in texts]
    assert [row.tobytes() for row in library.digests(Texts(texts))] == expected


def test_a_digest_of_any_length(library: TextLibrary) -> None:
    texts = ["a" * size for size in (0, 1, 127, 128, 129, 255, 256, 257, 5000)]
    expected = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    assert [row.tobytes() for row in library.digests(Texts(texts))] == expected


@given(st.lists(anything, max_size=4), st.sampled_from([0, 2, 4096]))
def test_signatures_and_sketches_are_those_of_the_twin(library: TextLibrary, texts: list[str], sketch: int) -> None:
    near = NearDedup(NearConfig(sketch=sketch))
    found = near.minhashes(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "load", lambda: None)
        plain = near.minhashes(texts)
    np.testing.assert_array_equal(found.counts, plain.counts)
    np.testing.assert_array_equal(found.signatures[found.counts > 0], plain.signatures[found.counts > 0])
    np.testing.assert_array_equal(found.sketches, plain.sketches)
    np.testing.assert_array_equal(found.starts, plain.starts)


def test_sketches_of_long_texts(library: TextLibrary) -> None:
    near, rng = NearDedup(NearConfig(sketch=500)), random.Random(4)
    texts = [" ".join(str(rng.random()).replace("0.", "w") for _ in range(size)) for size in (3, 499, 504, 505, 3000)]
    found = near.minhashes(texts)
    for text, start, end in zip(texts, found.starts[:-1], found.starts[1:], strict=True):
        hashes = (near.shingles(text) >> np.uint64(32)).astype(np.uint32)
        assert found.sketches[start:end].tolist() == sorted(set(np.sort(hashes)[:500].tolist()))


def test_lower_case_is_one_character_each() -> None:
    _, lower = tables()
    for point in (*range(0xD800), *range(0xE000, 0x32400)):
        assert chr(lower[point]) == folded(chr(point))


@given(anything)
def test_languages_are_those_of_the_twin(library: TextLibrary, text: str) -> None:
    expected, found = languages.detect(text), languages.detect_all([text])[0]
    assert found.language == expected.language
    assert found.confidence == pytest.approx(expected.confidence, abs=1e-4)


@given(st.lists(st.text("abAB ", min_size=1, max_size=4), min_size=1, max_size=8), st.text("abAB é", max_size=60))
def test_all_places_of_all_phrases(library: TextLibrary, phrases: list[str], text: str) -> None:
    phrases = list(dict.fromkeys(phrase.lower() for phrase in phrases))
    encoded, low = text.encode(), text.encode().lower()
    expected = {
        (at, at + len(phrase.encode()), number)
        for number, phrase in enumerate(phrases)
        for at in range(len(encoded))
        if low.startswith(phrase.encode(), at)
    }
    anywhere = np.zeros(len(phrases), dtype=np.uint8)
    counts = library.count_words(Texts([text]), library.automaton(phrases), anywhere)
    assert counts[0].tolist() == [len({number for _, _, number in expected}), len(expected)]
