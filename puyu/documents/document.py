"""One Document: a text with its source. Its id comes from content and source, never from position.

    >>> make_document("Hello.", source="notes").id == make_document("Hello.", source="notes", metadata={"path": "x"}).id
    True

It knows no file format and no rule. Equal texts of one source share one id on purpose: a second copy is a duplicate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from puyu.files import hash_bytes


@dataclass(frozen=True, slots=True)
class Document:
    """A row of the corpus. `metadata` holds small JSON values only (path, url, title, part)."""

    id: str
    text: str
    source: str
    domain: str
    language: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def document_id(text: str, source: str) -> str:
    """128 bits of BLAKE2b over source and text, as hex."""
    return hash_bytes(source.encode() + b"\x00" + text.encode("utf-8"))


def make_document(
    text: str, *, source: str, domain: str = "", language: str = "", metadata: Mapping[str, Any] | None = None
) -> Document:
    """A Document with its id computed."""
    return Document(document_id(text, source), text, source, domain, language, metadata or {})


def is_writable(text: str) -> bool:
    """Whether a text has its UTF-8: half of a surrogate pair, which JSON may hold, has none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\u200b\u2060]")
_CONTROL_BYTES = bytes(range(9)) + b"\x0b\x0c" + bytes(range(14, 32)) + b"\x7f"
# Only from the first blank of a run on: else a long run within a line is searched again from each of its blanks. (That
# no two blanks end there is asked behind the first one, since an expression that begins with a character is faster.)
_LINE_END = re.compile(r"[ \t\u00a0\u3000](?<![ \t\u00a0\u3000]{2})[ \t\u00a0\u3000]*\n")
_LINE_ENDS = (" \n", "\t\n", "\u3000\n")
_BLANK_LINES = re.compile(r"\n{3,}")


def normalize(text: str, *, code: bool = False) -> str:
    """Line ends to `\\n`, no control characters, no trailing blanks, at most one empty line, stripped.

    Code keeps its indentation and its empty lines.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Bytes are cleaned many times as fast as the expression cleans characters.
    ascii = text.isascii()
    text = text.encode("ascii").translate(None, _CONTROL_BYTES).decode("ascii") if ascii else _CONTROL.sub("", text)
    if code:
        return text.strip("\n")
    # Searches for a string are many times as fast as the expressions, which most texts do not need.
    if "\u00a0" in text:
        text = text.replace("\u00a0", " ")
    text += "\n"
    if any(map(text.__contains__, _LINE_ENDS)):
        text = _LINE_END.sub("\n", text)
    if "\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n", text)
    return text.strip()
