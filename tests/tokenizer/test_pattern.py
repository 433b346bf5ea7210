"""Which patterns are read, and that what is read means what Oniguruma means."""

from __future__ import annotations

import pytest
from tokenizers import Regex, pre_tokenizers

from puyu.tokenizer import pattern
from tests.tokenizer.kinds import PATTERNS


@pytest.mark.parametrize("name", PATTERNS)
def test_the_patterns_of_published_models_are_read(name: str) -> None:
    assert pattern.compile_pattern(PATTERNS[name]) is not None


@pytest.mark.parametrize(
    "other",
    [
        r"a*",  # may match nothing
        r"a++|b",
        r"a+?",
        r"(a|b)+",
        r"(?=a)a",
        r"(?<!a)b",
        r"(?!ab)c",
        r"(?i:ss)",  # one sharp s would match
        r"(?i:a+)",
        r"^a|a$",
        r".+",
        r"\d+",
        r"\p{Script=Han}+",
        r"[[:alpha:]]",
        r"[a-z&&[^b]]",
        r"a{,3}",
        r"(?i:a",
        r"[a",
        r"[a-",
        "",
    ],
)
def test_other_patterns_are_refused(other: str) -> None:
    assert pattern.compile_pattern(other) is None


def test_classes_are_those_of_oniguruma() -> None:
    for name in (r"\s", r"\p{L}", r"\p{N}"):
        members = pattern.members_of(name)
        split = pre_tokenizers.Split(Regex(name), "removed")
        for point in [*range(0, 0xD800, 37), *range(0xE000, 0x20000, 41)]:
            assert bool(members[point]) == (not split.pre_tokenize_str(chr(point))), hex(point)


def test_letters_in_any_case_are_folded_as_there() -> None:
    assert {chr(p) for p in pattern._letter("s", any_case=True).nonzero()[0]} == set("sSſ")
    assert {chr(p) for p in pattern._letter("k", any_case=True).nonzero()[0]} == {"k", "K", "\u212a"}
    assert {chr(p) for p in pattern._letter("'", any_case=True).nonzero()[0]} == {"'"}


def test_characters_that_composition_may_change_are_foreign() -> None:
    stable = pattern.stable_in_nfc()
    assert all(stable[ord(char)] for char in "aé我か각👍\u200d\ufe0f")
    assert not any(stable[ord(char)] for char in "\u0301\u3099\u1161\u11a8\u0958\u212b\u09be")
