"""Statistics of long texts by hand, and the native side against its twin."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.data import discourse as module
from puyu.data import ngram, ngram_native
from puyu.data.discourse import CONNECTIVES, NAMES, PRONOUNS, discourse

PIECES = (
    *(
        "However, ",
        "on the other hand ",
        "on the ",
        "因此，",
        "他们",
        "也就是说",
        "the cats ",
        "running. ",
        "\n",
        "\n\n",
    ),
    *("12345 ", "......", "x" * 90 + " ", "_" + "y" * 85, "。", "カナ", "她", "! ", "é", "_"),
)
anything = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=60).map("".join)


@pytest.fixture(scope="module", autouse=True)
def library():
    ngram_native.build()


@settings(max_examples=60)
@given(st.lists(anything, max_size=3), st.booleans())
def test_the_native_side_is_its_twin(texts, long):
    texts = [text * 8 for text in texts] if long else texts
    found = discourse(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load", lambda: None)
        patch.setattr(ngram, "load", lambda: None)
        assert found == discourse(texts)


def test_every_character_is_judged_as_by_the_twin(monkeypatch):
    points = [chr(p) for p in (*range(0x2100), *range(0x2E80, 0x3200), *range(0xFF00, 0xFFF0))]
    texts = ["".join(f"a{c}{c}1 {c}。\n" for c in points[at : at + 1000]) for at in range(0, len(points), 1000)]
    found = discourse(texts)
    monkeypatch.setattr(module, "load", lambda: None)
    assert found == discourse(texts)


def one(text):
    return discourse([text])[0]


def test_discourse_words_by_hand():
    found = one("On the other hand, they left; because of that we stayed.")
    assert found["words"] == 11
    assert found["connectives"] == round(2 / 11, 4)  # "on the other hand" is one, "because"
    assert found["pronouns"] == round(3 / 11, 4)  # they, that, we
    assert one("也就是说，他们走了，但是我们没走。")["connectives"] == round(2 / 14, 4)
    assert one("也就是说，他们走了，但是我们没走。")["pronouns"] == round(2 / 14, 4)


def test_no_phrase_is_in_both_lists():
    assert not set(CONNECTIVES) & set(PRONOUNS)
    assert len(set(CONNECTIVES)) == len(CONNECTIVES) and len(set(PRONOUNS)) == len(PRONOUNS)


def test_cohesion_by_hand():
    passages = [
        " ".join(words.split() * 10) for words in ("apple bread cheese dates to of", "bread cheese flour to of in")
    ]
    # 4 and 3 long words, two in both
    assert one("\n".join(passages))["cohesion"] == round(2 / 3, 4)
    assert one("\n".join([passages[0]] * 3))["cohesion"] == 1.0
    assert one(passages[0])["cohesion"] == 0.0


def test_complexity_by_hand():
    assert one("one two three four " * 250)["type_token"] == 4 / 500
    assert one("one two two. one\n\nthree four!")["type_token"] == round(4 / 6, 4)
    found = one("one two two. one\n\nthree four!")
    assert found["line_words"] == 3 and found["sentence_words"] == 3


def test_nonsense_by_hand():
    assert one("good line\n12 34 56\n")["nonsense"] == round(6 / 14, 4)
    assert one("a" * 100)["nonsense"] == 1.0 and one("猫" * 100)["nonsense"] == 0.0
    assert one("")["nonsense"] == 0.0 and set(one("")) == set(NAMES)
