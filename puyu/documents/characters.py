"""What is known of single characters, said once for the Python and the C++ side: classes, lower case.

    >>> folded("İSTANBUL Ὀδυσσεύς")
    'istanbul ὀδυσσεύσ'

The classes are those of Python's `str` methods, so that both sides agree to the last character; the tables for C++ are
made from them once and kept beside the library.
"""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puyu.files import atomic_write

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
KANA = "\u3040-\u30ff"
PUNCTUATION = "!-/:-@\\[-`{-~\u2010-\u2027\u2030-\u205e\u3001-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff65"
ODD = "\ufffd\ue000-\uf8ff\u0080-\u009f\U000f0000-\U0010ffff"
"""Replacement, private-use and control characters."""

VERSION = 1
"""Raised by hand when the tables change."""
_SIZE = sys.maxunicode + 1
_ASSIGNED = 0x32400
"""No letter, digit or blank stands beyond."""


def folded(text: str) -> str:
    """Lower case, each character by itself: final sigma and dotted capital I do not depend on their neighbors."""
    return text.replace("İ", "i").lower().replace("ς", "σ")


def tables() -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """(kinds [0x110000], bits as in `cpp/common.h`; lower case of the first characters)."""
    kinds = np.zeros(_SIZE, dtype=np.uint8)
    lower = np.arange(_ASSIGNED, dtype=np.uint32)
    for point in range(_ASSIGNED):
        character = chr(point)
        kinds[point] = (
            character.isalpha() | character.isalnum() << 1 | character.isdecimal() << 2 | character.isspace() << 3
        )
        small = folded(character)
        if small != character:
            lower[point] = ord(small)
    for bit, ranges in ((16, PUNCTUATION), (32, ODD), (64, HAN), (128, KANA)):
        for first, last in _ranges(ranges):
            kinds[first : last + 1] |= bit
    return kinds, lower


def _ranges(characters: str) -> list[tuple[int, int]]:
    """The ranges of a regular expression's class."""
    points = [ord(character) for character in characters.replace("\\", "")]
    found: list[tuple[int, int]] = []
    at = 0
    while at < len(points):
        ranged = at + 2 < len(points) and points[at + 1] == ord("-")
        found.append((points[at], points[at + 2] if ranged else points[at]))
        at += 3 if ranged else 1
    return found


def read_tables(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """The tables, kept in `folder` for the next time."""
    path = folder / f"characters-{unicodedata.unidata_version}-{VERSION}.bin"
    size = _SIZE + 4 * _ASSIGNED
    if not path.is_file() or path.stat().st_size != size:
        kinds, lower = tables()
        with atomic_write(path, "wb") as stream:
            stream.write(kinds.tobytes() + lower.tobytes())
    whole = np.memmap(path, dtype=np.uint8, mode="r")
    return whole[:_SIZE], whole[_SIZE:].view(np.uint32)
