"""Repeated stretches: what is cut stands where it says, nothing shorter goes, long ones are found."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.configure import build
from puyu.data import substring
from puyu.data.clean import DataConfig, run
from puyu.data.measure import UNIT
from puyu.data.substring import SubstringConfig, Substrings, cut, cuts_among, fingerprints, spans_of
from puyu.documents.document import Document
from puyu.errors import ConfigError
from tests.data.test_clean import contents, essay, rows_of

CONFIG = SubstringConfig(units=12, left_min=20)


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words(rng, count):
    return ["".join(rng.choices(LETTERS, k=5)) for _ in range(count)]


def planted(seed):
    """Texts, the first of which is the best, with stretches of it in others: (text, where, length)."""
    rng = random.Random(seed)
    best = words(rng, 400)
    texts, places = [" ".join(best)], []
    for number in range(1, 25):
        own, length, at = words(rng, 120), rng.randrange(4, 80), rng.randrange(300)
        where = rng.randrange(100)
        texts.append(" ".join([*own[:where], *best[at : at + length], *own[where:]]))
        places.append((number, where, length))
    return texts, places


def stretches(texts):
    stage = Substrings(CONFIG)
    documents = [Document(str(at), text, "", "") for at, text in enumerate(texts)]
    return stage.cuts(stage.keys(documents), np.arange(len(texts)))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_cut_stands_in_the_document_that_stays(seed):
    texts, places = planted(seed)
    units = [UNIT.findall(text) for text in texts]
    found = stretches(texts)
    assert len(found.rows) > 5
    for row, begin, end, of in zip(found.rows, found.begins, found.ends, found.of, strict=True):
        gone, there = units[row][begin:end], units[of]
        assert len(gone) >= CONFIG.units and of <= row
        assert any(there[at : at + len(gone)] == gone for at in range(len(there)))
    for row, where, length in places:
        mine = [(b, e) for r, b, e in zip(found.rows, found.begins, found.ends, strict=True) if r == row]
        if length >= 2 * CONFIG.units:
            begin, end = min(mine)[0], max(mine)[1]
            reach = CONFIG.window - 1
            assert where <= begin <= where + reach and where + length - reach <= end <= where + length
        if length < CONFIG.units:
            assert not mine


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["a", "b", "中", "文", "7", "2024", " ", "\n", ".", "É"]), max_size=120),
    st.integers(8, 20),
)
def test_the_library_finds_what_its_twin_finds(parts, units):
    texts, config = ["".join(parts), " ".join(parts), ""], SubstringConfig(units=units)
    native = fingerprints(texts, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(substring, "load", lambda: None)
        plain = fingerprints(texts, config)
    for one, other in zip(native, plain, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_repetition_within_a_document_is_cut():
    rng = random.Random(1)
    chorus, verses = " ".join(words(rng, 40)), [" ".join(words(rng, 30)) for _ in range(3)]
    song = f"{verses[0]}. {chorus}.\n{verses[1]}. {chorus}.\n{verses[2]}."
    (spans,) = cuts_among(Substrings(CONFIG), [song])
    assert len(spans) == 1 and spans[0][0] > song.index(verses[1])
    left = cut(song, spans)
    assert left.count(chorus[40:120]) == 1 and all(verse in left for verse in verses)


def test_case_punctuation_and_numbers_do_not_count():
    rng = random.Random(2)
    shared = [*words(rng, 20), "2023", *words(rng, 20)]
    other = " - ".join(word.upper().replace("2023", "7") for word in shared)
    texts = ["Before it. " + " ".join(shared), f"Another one begins here. {other}! And it ends."]
    first, second = cuts_among(Substrings(CONFIG), texts)
    assert first == [] and len(second) == 1
    assert cut(texts[1], second).startswith("Another one begins here.")


def test_spans_are_characters_of_units():
    text = "One, two -- three 四五 six."
    assert [text[a:b] for a, b in spans_of(text, [(1, 3), (2, 4), (5, 6)])] == ["two -- three 四", "six"]
    assert cut("a b, c d", [(2, 6)]) == "a\n\nd" and cut("abc", [(0, 3)]) == "" and cut("abc", []) == "abc"


def test_the_data_stage_cuts_and_says_so(tmp_path, monkeypatch):
    shared = essay(1)
    rows = [shared + "\n\n" + essay(2), shared.upper() + "\n\n" + essay(3), shared + " End of it.", essay(4)]
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    dedup = {"near": None, "substrings": {"units": 20, "left_min": 100}}
    config = build(DataConfig, {"sources": [{"name": "web", "path": str(path), "kind": "jsonl"}], "dedup": dedup})
    numbers = run(config, out=tmp_path / "out")
    kept = {row["text"]: row for row in rows_of(tmp_path / "out", "kept")}
    assert numbers["dropped_by_rule"] == {"cut_left_min": 1} and numbers["kept"] == 3
    whole = [text for text in kept if shared.upper()[200:600] in text.upper()]
    assert len(whole) == 1 and essay(4) in kept
    other = next(row for text, row in kept.items() if text != whole[0] and text != essay(4))
    begin, end, of = other["metadata"]["cut"][0]
    assert of == kept[whole[0]]["id"] and other["scores"]["cut_characters"] == end - begin > 0.9 * len(shared)
    (gone,) = rows_of(tmp_path / "out", "dropped")
    assert (gone["stage"], gone["threshold"]) == ("substrings", 100) and gone["value"] < 100
    monkeypatch.setattr("puyu.documents.raw.BLOCK_RECORDS", 1)
    run(config, out=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_too_short_is_refused():
    with pytest.raises(ConfigError, match="too short"):
        Substrings(SubstringConfig(units=4))
