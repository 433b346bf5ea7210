"""Scores against a slow twin in plain Python, and against values worked out by hand."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.data.measure import UNIT, measure, ngram_hashes, unit_hashes


def naive_top(units, n):
    """The largest number of characters that one n-gram holds in all its places."""
    grams = Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))
    best = max(grams.values(), default=0)
    if best < 2:
        return 0.0
    return max(sum(map(len, gram)) for gram, count in grams.items() if count == best) * best / sum(map(len, units))


def naive_duplicates(units, n):
    seen, covered = set(), set()
    for i in range(len(units) - n + 1):
        gram = tuple(units[i : i + n])
        if gram in seen:
            covered.update(range(i, i + n))
        seen.add(gram)
    total = sum(map(len, units))
    return sum(len(units[i]) for i in covered) / total if total else 0.0


@settings(max_examples=120, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dd", "e"]), max_size=60))
def test_repetition_equals_the_slow_twin(words):
    scores = measure(" ".join(words), language="en")
    for n in (2, 3, 4):
        assert scores[f"top_{n}gram"] == pytest.approx(naive_top(words, n), abs=1e-4)
    for n in range(5, 11):
        assert scores[f"dup_{n}gram"] == pytest.approx(naive_duplicates(words, n), abs=1e-4)


def test_repetition_in_chinese_counts_characters():
    text = "今天天气很好，" * 3
    units = UNIT.findall(text)
    assert units[:4] == ["今", "天", "天", "气"]
    assert measure(text, language="zh")["dup_5gram"] == pytest.approx(naive_duplicates(units, 5), abs=1e-4)


def test_units_of_mixed_text():
    assert UNIT.findall("使用 api_server 启动 v0.4，café") == [*"使用", "api_server", *"启动", "v0", "4", "café"]


def test_words_lines_and_paragraphs_by_hand():
    text = "- The cat sat...\n- 12 3.\n\nThe cat sat.\n\nThe cat sat.\n#"
    scores = measure(text, language="en")
    assert scores["words"] == 11 and scores["lines"] == 5 and scores["chars"] == len(text)
    assert scores["bullet_lines"] == 2 / 5 and scores["ellipsis_lines"] == 1 / 5 and scores["ended_lines"] == 4 / 5
    assert scores["dup_lines"] == 1 / 5 and scores["dup_paragraphs"] == 0
    assert scores["stop_words"] == 1


def test_chinese_by_hand():
    scores = measure("你好，世界。ab 12", language="zh")
    assert scores["han"] == 4 and scores["han_share"] == 0.4 and scores["sentence_marks"] == 0.5
    assert scores["punctuation"] == pytest.approx(2 / 11, abs=1e-4) and scores["digits"] == pytest.approx(
        2 / 11, abs=1e-4
    )


def test_code_by_hand():
    scores = measure("x = 1\n" + "y" * 20, language="code")
    assert scores["lines"] == 2 and scores["longest_line"] == 20 and scores["mean_line"] == 12.5
    assert scores["letters"] == pytest.approx(21 / 26, abs=1e-4)


def test_a_fence_that_stands_often_is_no_duplicate_line():
    text = "\n".join(f"```\nline {chr(97 + i)} of code\n```" for i in range(9))
    assert measure(text, language="en")["dup_lines"] == 0


@pytest.mark.parametrize("language", ["en", "zh", "code"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=300))
def test_any_text_has_finite_scores(language, text):
    scores = measure(text, language=language)
    assert all(value == value and 0 <= value < 1e6 for value in scores.values())


def test_hashes_are_the_same_everywhere():
    assert [int(h) for h in unit_hashes(["the", "人"])] == [int(h) for h in unit_hashes(["the", "人"])]
    assert [hex(int(h)) for h in unit_hashes(["the", "人"])] == GOLDEN_UNITS
    assert [hex(int(h)) for h in ngram_hashes(unit_hashes(["a", "b", "c"]), 2)] == GOLDEN_BIGRAMS


def test_different_ngrams_have_different_hashes():
    random.seed(0)
    words = [random.choice("abcdefgh") for _ in range(5000)]
    grams = {tuple(words[i : i + 4]) for i in range(len(words) - 3)}
    assert len(set(ngram_hashes(unit_hashes(words), 4).tolist())) == len(grams)


GOLDEN_UNITS = ["0x587c764dc0327f3a", "0x885ff8dab54d9c7d"]
GOLDEN_BIGRAMS = ["0x25fb579765230efb", "0x8bff2c16a79d1e9a"]
