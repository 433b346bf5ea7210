"""Splitting loses nothing and keeps its bound, for any text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.documents.document import normalize
from puyu.documents.split import split

TEXT = st.text(alphabet="ab .。！\n\r\t　第一回C", max_size=400)


@settings(max_examples=150, deadline=None)
@given(TEXT, st.integers(1, 50))
def test_pieces_join_to_the_text_and_are_bounded(text, limit):
    pieces = split(text, limit)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_cuts_stand_at_paragraphs_then_sentences():
    assert split("aaaa\n\nbbbb\n\ncccc", 12) == ["aaaa\n\nbbbb\n\n", "cccc"]
    assert split("一二三。四五六。七八九。", 9) == ["一二三。四五六。", "七八九。"]
    assert split("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]


def test_a_chapter_starts_a_new_piece():
    text = "第一回 甲\n\n" + "文字。" * 20 + "\n\n第二回 乙\n\n" + "文字。" * 20
    assert [piece[:3] for piece in split(text, 110)] == ["第一回", "第二回"]


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_normalize_is_idempotent(text):
    once = normalize(text)
    assert normalize(once) == once and "\r" not in once and "\n\n\n" not in once


def test_the_same_characters_go_from_texts_of_any_kind():
    points = "".join(f"a{chr(p)}b" for p in range(128))
    assert normalize(points + "…").rstrip("…") == normalize(points + "c").rstrip("c")
