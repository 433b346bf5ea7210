"""The statistics of the published rule sets: native against Python, and against values worked out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.data import published
from puyu.data.published import (
    C4_SCORES,
    MARKS,
    SCORES,
    TERMINAL,
    LineRules,
    c4_page,
    c4_pages,
    fineweb,
    gopher_quality,
    gopher_repetition,
    measured,
    sentences,
    twin,
)
from puyu.documents.texts import load

PIECES = (
    *("The cat sat on the mat. ", "of the ", "a ", "b ", "ab ", "aa ", "that? ", 'said "no." ', "so...", "…", "# "),
    *("- one\n", "• two…\n", "\n", "\n\n", "\n\n\n", "\r\n", "\r", "\x85", "\u2028", "\x1c", "\v", "    ", "\u3000"),
    *("[1]", "[]", "[٣]", "[edit]", "[Edit]", "[citation needed]", "[", "]", "JavaScript ", "javascr[2]ipt ", "{"),
    *("Lorem Ipsum ", "lorem\u00a0ipsum ", "use coo\u212aies ", "Privacy Policy ", "terms of u\u017fe ", "\u0130n "),
    *("x" * 21 + " ", "今天天气很好。", "「好！」", "かな ", "٪ ", "\U00010074he ", "😀 ", "; , : ", "12 3 ", "\x00"),
)
anything = st.lists(st.sampled_from(PIECES) | st.text(max_size=9), max_size=40).map("".join)
LINE_RULES = (
    LineRules(),
    LineRules(longest_word=20, ends='.?!"', line_words=5, words_after_citations=True),
    LineRules(longest_word=None, citations=False, ends="", line_words=None, lorem_ipsum=None, curly_brackets=1),
    LineRules(ends="。.", line_words=1, lorem_ipsum=1, javascript=False, curly_brackets=None, policy=False),
)
EDGES = [
    "",
    " ",
    "\n",
    "\n\n",
    "one",
    "one line.",
    "...",
    "…",
    "!?。",
    "-",
    "#",
    "{",
    "[1]",
    "[1] [2]",
    "[1] a b c.",
    "\n.\n",
]
EN = "en"


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    assert load() is not None, "run: python -m puyu.documents.texts"


def check(texts: list[str], language: str) -> None:
    for family, names in SCORES.items():
        table = measured(family, texts, [language] * len(texts), short_line=9)
        for text, row in zip(texts, table.tolist(), strict=True):
            expected = twin(family, text, language=language, short_line=9)
            assert dict(zip(names, row, strict=True)) == expected, (family, text)


def check_pages(texts: list[str], rules: LineRules) -> None:
    kept, table = c4_pages(texts, rules)
    for text, left, row in zip(texts, kept, table.tolist(), strict=True):
        assert (left, dict(zip(C4_SCORES, row, strict=True))) == c4_page(text, rules), (rules, text)


@settings(max_examples=150, deadline=None)
@given(st.lists(anything, max_size=4), st.sampled_from(["en", "zh"]))
def test_scores_are_those_of_the_twin(texts, language):
    check(texts, language)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "aa", "b", "ab", "ba", "abcabcabcabcabc", "é"]), max_size=120))
def test_repetition_is_that_of_the_twin_where_words_run_together(words):
    check([" ".join(words), "\n".join(words)], "en")


@settings(max_examples=150, deadline=None)
@given(st.lists(anything, max_size=4), st.sampled_from(LINE_RULES))
def test_pages_are_those_of_the_twin(texts, rules):
    check_pages(texts, rules)


def test_edges():
    for language in ("en", "zh"):
        check(EDGES, language)
    for rules in LINE_RULES:
        check_pages(EDGES, rules)
    assert measured("fineweb", [], []).shape == (0, 5) and c4_pages([], LineRules())[0] == []


def test_every_character_counts_as_the_twin_says():
    ranges = (
        range(0x3400),
        range(0xA000, 0xAC00),
        range(0xF900, 0x12000),
        range(0x16A00, 0x16F00),
        range(0x1BC00, 0x1DB00),
    )
    points = [chr(p) for part in ranges for p in part]
    for start in range(0, len(points), 500):
        found = "".join(points[start : start + 500])
        text = "".join(f"a{c} {c} 1{c}\n" for c in found)
        check([text], "en")
        check_pages([text], LINE_RULES[2])
        check_pages([text], LineRules(line_words=2, ends=found[::7]))


def test_without_the_library_the_twin_answers(monkeypatch):
    texts = ["The cat sat on the mat.\nMenu", ""]
    native = [measured(family, texts, ["en", "en"]).tolist() for family in SCORES], c4_pages(texts, LineRules())
    monkeypatch.setattr(published, "load", lambda: None)
    python = [measured(family, texts, ["en", "en"]).tolist() for family in SCORES], c4_pages(texts, LineRules())
    assert native[0] == python[0] and native[1][0] == python[1][0]
    assert native[1][1].tolist() == python[1][1].tolist()


def test_punctuation_by_hand():
    assert set(".!?。！？") <= TERMINAL <= MARKS and len(TERMINAL) == 159
    assert set("#-_…—“”、\t\x7f") - {"\t"} <= MARKS and not MARKS & set("a1\t中﹏")


def test_gopher_quality_by_hand():
    scores = gopher_quality("The cat, with -- 12 #tags...\n\n• of that", language=EN)
    assert scores["words"] == 8 and scores["mean_word"] == (3 + 4 + 4 + 2 + 8 + 1 + 2 + 4) / 8  # -- is none, • is one
    assert scores["hashes"] == scores["ellipses"] == 1 / 9 and scores["alpha_words"] == 6 / 9
    assert scores["bullet_lines"] == scores["ellipsis_lines"] == 1 / 3  # the blank line is one
    assert scores["stop_words"] == 3  # with, of, that; The is another word


def test_gopher_repetition_by_hand():
    text = "a b\n\na b\nc d\nc d"
    scores = gopher_repetition(text, language=EN)
    assert scores["chars"] == 16 and scores["dup_paragraphs"] == 0 and scores["dup_lines"] == 2 / 4
    assert scores["dup_line_chars"] == 6 / 16
    assert scores["top_2gram"] == 3 * 2 / 16 and scores["top_3gram"] == 5 / 16  # a trigram that stands once counts too
    scores = gopher_repetition("x y z\n\nx y z", language=EN)
    assert scores["dup_paragraphs"] == 1 / 2 and scores["dup_paragraph_chars"] == 5 / 12


def test_repeated_ngrams_do_not_overlap_and_do_not_know_where_words_end():
    text = " ".join("abcdefghij") + " " + " ".join("abcde") + " abc d e f g h"
    scores = gopher_repetition(text, language=EN)
    assert scores["dup_5gram"] == 10 / len(text)  # a b c d e, and d e f g h; abc d e f g are seven letters
    text = "ab c d e f x a b cd e f"
    assert gopher_repetition(text, language=EN)["dup_5gram"] == 6 / len(text)


def test_fineweb_by_hand():
    scores = fineweb("One line.\nOne line.\n \nno end \n", language=EN, short_line=8)
    assert scores["lines"] == 3 and scores["ended_lines"] == 2 / 3 and scores["short_lines"] == 1 / 3
    assert scores["dup_line_chars"] == 9 / 26 and scores["line_breaks"] == 4 / 6


def test_c4_by_hand():
    page = (
        'Menu\nThe cat sat.[1] On it?\n\nOh no...\nHe\'s "here."\nPlease enable JavaScript now.\n'
        f"We use cookies here.\nA {'x' * 1001} word.\nIt is so"
    )
    text, scores = c4_page(page, LineRules())
    assert text == "The cat sat. On it?"
    assert scores == dict.fromkeys(C4_SCORES, 0.0) | {
        "lines": 8, "lines_removed": 7, "unended_lines": 3, "short_lines": 1, "javascript_lines": 1,
        "policy_lines": 1, "long_word_lines": 1, "sentences": 2,
    }  # fmt: skip


def test_a_page_ends_at_its_first_bracket():
    text, scores = c4_page("This is a line.\nIt has { in it.\nHere is lorem ipsum.", LineRules())
    assert (text, scores["curly_brackets"], scores["lorem_ipsum"], scores["lines"]) == ("This is a line.", 1, 0, 2)


def test_words_before_and_after_citations():
    line = "A cat[1] [2] [3]."
    assert c4_page(line, LineRules(line_words=4))[0] == "A cat  ."
    assert c4_page(line, LineRules(line_words=4, words_after_citations=True))[0] == ""


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("One.", 1),
        ("One. Two", 2),
        ('He said "no." And left?!', 2),
        ("v1.2 is out", 1),
        ("好。不好！", 2),
        ("", 1),
        ("...", 1),
    ],
)
def test_sentences_end_at_marks(line, count):
    assert sentences(line) == count
