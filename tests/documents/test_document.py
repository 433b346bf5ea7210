"""A Document's text: what normalizing leaves, against the plain expression."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.documents.document import is_writable, normalize


def plain(text):
    """Line ends by the expression that tries every blank."""
    text = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\u200b\u2060]", "", re.sub("\r\n?", "\n", text))
    text = re.sub("[ \t\u3000]+\n", "\n", text.replace("\u00a0", " ") + "\n")
    return re.sub("\n{3,}", "\n\n", text).strip()


@given(st.text(st.sampled_from("ab \t\u00a0\u3000\n\r\u200b")))
def test_blanks_at_line_ends_go(text):
    assert normalize(text) == plain(text)


@pytest.mark.parametrize("blank", [" ", "\t", "\u3000", "\u00a0"])
def test_a_long_run_of_blanks_within_a_line_is_read_at_once(blank):
    """With an expression that begins anew at each blank this does not end."""
    text = normalize("a \nb" + blank * 1_000_000 + "c")
    assert text == f"a\nb{blank.replace(chr(0xA0), ' ') * 1_000_000}c"


def test_half_a_character_cannot_be_written():
    assert is_writable("人😀") and not is_writable("a\ud800")
