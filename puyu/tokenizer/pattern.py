r"""A pre-tokenizer's pattern as a table that the native splitter walks, exact to the last code point.

Reads the family that byte-level tokenizers use (GPT-2, cl100k, o200k, Llama 3, Qwen, ours): alternatives of characters
and classes with greedy counts, `(?!...)` of one class, and groups of words, also `(?i:...)`. Any other pattern is
refused with None, and the text goes through `tokenizers`. What `\p{L}` means is asked of Oniguruma inside `tokenizers`,
once for each version, so that both cut alike in every version of Unicode.

    >>> program = compile_pattern(r" ?\p{L}+|\s")
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, normalizers

from puyu.errors import ResourceError
from puyu.files import atomic_write, hash_bytes
from puyu.native import native_folder

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` cuts with when it is not told otherwise."""

Set = NDArray[np.bool_]
"""Which code points are in a class, [0x110000]."""

CHARACTERS, NOT_FOLLOWED_BY, WORDS = 0, 1, 2
FOREIGN = 63
"""The kind of characters that no class holds (`cpp/split.h`)."""

_SIZE = sys.maxunicode + 1
_PROPERTY = re.compile(r"\\p\{[A-Z][a-z]?\}|\\[sSpP]")
_ESCAPES = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}


@dataclass(frozen=True, slots=True)
class Item:
    """One step of an alternative: a class and how often, a class that must not follow, or one of some words."""

    kind: int
    least: int
    most: int
    members: int
    """Number of the class; for words none."""
    words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """What the native splitter is made of: numbers as `cpp/split.h` reads them, and the kind of each code point."""

    numbers: NDArray[np.int64]
    kinds: NDArray[np.uint8]


class Unreadable(Exception):
    """A pattern outside the family."""


@lru_cache(maxsize=8)
def compile_pattern(pattern: str, *, nfc: bool = False) -> Program | None:
    """The table of a pattern, or None when it is not of the family.

    With `nfc`, characters that composition may change are foreign: texts that hold one are left to `tokenizers`.
    """
    try:
        parser = Parser(pattern)
        alternatives = parser.alternatives()
    except Unreadable:
        return None
    if not all(any(item.least > 0 for item in items if item.kind != NOT_FOLLOWED_BY) for items in alternatives):
        return None  # an alternative that matches nothing at all
    kinds, masks = _kinds(parser.sets, foreign=~stable_in_nfc() if nfc else None)
    return Program(_numbers(alternatives, masks), kinds) if masks is not None else None


class Parser:
    """Recursive descent over the pattern; `sets` are the classes it met, each once."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0
        self.sets: list[Set] = []
        self._known: dict[bytes, int] = {}

    def alternatives(self) -> list[tuple[Item, ...]]:
        found = [self._items()]
        while self._take("|"):
            found.append(self._items())
        if self.at < len(self.pattern):
            raise Unreadable
        return found

    def _items(self) -> tuple[Item, ...]:
        items = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            items.append(self._item())
        return tuple(items)

    def _item(self) -> Item:
        if self._take("(?!"):
            item = Item(NOT_FOLLOWED_BY, 0, 0, self._number(self._class()))
            self._expect(")")
            return item
        if self._take("(?i:") or self._take("(?:"):
            words = self._words(any_case=self.pattern[self.at - 2] == "i")
            least, most = self._count()
            if (least, most) not in ((0, 1), (1, 1)):
                raise Unreadable
            return Item(WORDS, least, most, 0, words)
        members = self._number(self._class())
        least, most = self._count()
        return Item(CHARACTERS, least, most, members)

    def _words(self, *, any_case: bool) -> tuple[tuple[int, ...], ...]:
        body = self.pattern[self.at : self.pattern.find(")", self.at)]
        self.at += len(body) + 1
        words = body.split("|")
        if not all(re.fullmatch(r"['A-Za-z]+", word) for word in words) or (any_case and _expands(words)):
            raise Unreadable
        return tuple(tuple(self._number(_letter(char, any_case=any_case)) for char in word) for word in words)

    def _count(self) -> tuple[int, int]:
        rest = self.pattern[self.at :]
        match = re.match(r"([?*+])|\{(\d+)(,?)(\d*)\}", rest)
        if match is None:
            return 1, 1
        self.at += match.end()
        if self.pattern[self.at : self.at + 1] in ("?", "*", "+", "{"):
            raise Unreadable  # lazy, possessive or repeated
        if match[1]:
            return {"?": (0, 1), "*": (0, -1), "+": (1, -1)}[match[1]]
        least = int(match[2])
        return least, least if not match[3] else int(match[4] or -1)

    def _class(self) -> Set:
        if self._take("["):
            return self._bracket()
        return self._atom(inside=False)[0]

    def _bracket(self) -> Set:
        negated, found = self._take("^"), np.zeros(_SIZE, dtype=bool)
        while not self._take("]"):
            members, first = self._atom(inside=True)
            if first is not None and re.match(r"-[^\]]", self.pattern[self.at :]):
                self.at += 1
                _, last = self._atom(inside=True)
                if last is None or last < first:
                    raise Unreadable
                members = np.zeros(_SIZE, dtype=bool)
                members[first : last + 1] = True
            found |= members
        return ~found if negated else found

    def _atom(self, *, inside: bool) -> tuple[Set, int | None]:
        """A property or one character, and the character's code point."""
        rest = self.pattern[self.at :]
        if match := _PROPERTY.match(rest):
            name = match[0]
            if name in (r"\p", r"\P"):
                raise Unreadable
            self.at += len(name)
            return (~members_of(r"\s") if name == r"\S" else members_of(name)), None
        if not rest or rest[0] in ("[&" if inside else "()[]{}.^$*+?|"):
            raise Unreadable
        char, width = rest[0], 1
        if char == "\\":
            if len(rest) < 2 or (rest[1].isalnum() and rest[1] not in _ESCAPES):
                raise Unreadable
            char, width = _ESCAPES.get(rest[1], rest[1]), 2
        self.at += width
        return _only([ord(char)]), ord(char)

    def _number(self, members: Set) -> int:
        key = members.tobytes()
        if key not in self._known:
            self._known[key] = len(self.sets)
            self.sets.append(members)
        return self._known[key]

    def _take(self, text: str) -> bool:
        if not self.pattern.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise Unreadable


def _only(points: Sequence[int]) -> Set:
    found = np.zeros(_SIZE, dtype=bool)
    found[list(points)] = True
    return found


def _letter(char: str, *, any_case: bool) -> Set:
    """Code points that match one character of a word; in any case as Oniguruma folds it."""
    if not any_case or not char.isalpha():
        return _only([ord(char)])
    near = [c for c in map(chr, range(0x80, 0x2200)) if char.lower() in (c.casefold(), c.lower())]
    near += [char.lower(), char.upper()]
    outside = normalizers.Replace(Regex(f"(?i:{char})"), "").normalize_str("".join(near))
    return _only([ord(c) for c in near if c not in outside])


def _expands(words: Sequence[str]) -> bool:
    """Whether one character could stand for several letters of a word (as the sharp s for ss)."""
    many = [c.casefold() for c in map(chr, range(0x80, 0xFB20)) if len(c.casefold()) > 1]
    return any(fold in word.lower() for word in words for fold in many)


@lru_cache(maxsize=32)
def members_of(name: str) -> Set:
    r"""The code points of `\p{..}` or `\s` in this version of `tokenizers`, kept on disk."""
    key = f"{tokenizers.__version__}-{hash_bytes(name.encode())[:12]}"
    path = native_folder() / f"characters-of-{key}.bin"
    if path.is_file() and path.stat().st_size == _SIZE // 8:
        return np.unpackbits(np.fromfile(path, dtype=np.uint8)).astype(bool)
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, _SIZE)]))
    found = normalizers.Replace(Regex(f"[^{name}]+"), "").normalize_str(everything)
    members = _only([ord(char) for char in found])
    try:
        with atomic_write(path, "wb") as stream:
            stream.write(np.packbits(members).tobytes())
    except ResourceError:  # a home that cannot be written to: it is asked again next time
        return members
    return members


@lru_cache(maxsize=1)
def stable_in_nfc() -> Set:
    """Assigned code points that stay as they are in NFC beside any neighbor, in this and all later versions of Unicode
    (its stability policy): starters that are no second half of a composition."""
    found = np.zeros(_SIZE, dtype=bool)
    seconds: set[int] = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}
    for point in range(0x32400):  # no letter stands beyond
        char = chr(point)
        if 0xD800 <= point < 0xE000 or unicodedata.category(char) == "Cn":
            continue
        found[point] = not unicodedata.combining(char) and unicodedata.is_normalized("NFC", char)
        parts = unicodedata.decomposition(char)
        if parts and not parts.startswith("<") and " " in parts:
            seconds.add(int(parts.split()[1], 16))
    found[list(seconds)] = False
    return found


def _kinds(sets: Sequence[Set], *, foreign: Set | None) -> tuple[NDArray[np.uint8], list[int] | None]:
    """(kind of each code point, of each class the kinds it holds as a mask): the classes cut Unicode into kinds."""
    code = np.zeros(_SIZE, dtype=np.uint64)
    for number, members in enumerate(sets[:64]):
        code |= members.astype(np.uint64) << np.uint64(number)
    values, kinds = np.unique(code, return_inverse=True)
    if len(sets) > 64 or len(values) > FOREIGN:
        return kinds.astype(np.uint8), None
    table = kinds.astype(np.uint8)
    if foreign is not None:
        table[foreign] = FOREIGN
    masks = [sum(1 << kind for kind, value in enumerate(values.tolist()) if value >> n & 1) for n in range(len(sets))]
    return table, masks


def _numbers(alternatives: Sequence[Sequence[Item]], masks: Sequence[int]) -> NDArray[np.int64]:
    numbers = [len(alternatives)]
    for items in alternatives:
        numbers.append(len(items))
        for item in items:
            mask = masks[item.members] if item.kind != WORDS else 0
            numbers += [item.kind, item.least, item.most, mask, len(item.words)]
            for word in item.words:
                numbers += [len(word), *(masks[number] for number in word)]
    return np.array(numbers, dtype=np.int64)
