"""Pictures of a page: kept in place through the extraction, then markdown links and entries of an `img_list`.

    pictures = mark_pictures(tree, html, "https://a.org/page")     # each <img> of resiliparse's tree becomes a word
    text, entries = pictures.link(text_of(tree))             # each word that is left becomes ![alt](address)

Addresses are absolute where the page's own is known. A picture that loads late is taken from where its address waits
(`data-src`, `srcset`). Data addresses, and pictures of less than 32 pixels (icons, counters, smileys), are none.
Nothing is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin

from puyu.documents.interleaved import ADDRESS_SAFE, Image

_WAITING = ("data-src", "data-original", "data-lazy-src", "data-srcset", "srcset")
_SMALL = 32
_DIGITS = re.compile(r"\s*(\d{1,5})(?:\.\d*)?\s*(?:px)?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures behind the marks `PREFIX + number + z`."""

    prefix: str = ""
    entries: tuple[Mapping[str, str], ...] = ()

    def stand_in(self, text: str) -> bool:
        """Whether a text holds a mark."""
        return bool(self.prefix) and self.prefix in text

    def link(self, text: str) -> tuple[str, tuple[Mapping[str, str], ...]]:
        """The text with links for marks, and the entries of the pictures that it links to, once each."""
        if not self.prefix:
            return text, ()
        used: dict[str, Mapping[str, str]] = {}

        def replaced(match: re.Match[str]) -> str:
            entry = self.entries[int(match.group(1))]
            used.setdefault(entry["url"], entry)
            return Image(entry["url"], entry["caption"]).link()

        linked = re.sub(rf"{self.prefix}(\d+)z", replaced, text)
        return linked, tuple(used.values())


def mark_pictures(tree: Any, html: str, url: str) -> Pictures:
    """Put a mark in the place of each picture of the tree (of the page `html`, whose address is `url`)."""
    number = next(number for number in range(len(html) + 1) if f"picture{number}n" not in html)
    prefix = f"picture{number}n"
    entries: list[Mapping[str, str]] = []
    base = _base(tree, url)
    for element in tree.document.query_selector_all("img")[:] if tree.document else []:
        entry = _entry(element, base)
        place = _place(element)
        if entry is None or place.parent is None:
            continue
        place.parent.insert_before(tree.create_text_node(f" {prefix}{len(entries)}z "), place)
        entries.append(entry)
    return Pictures(prefix, tuple(entries))


def _base(tree: Any, url: str) -> str:
    found = tree.document.query_selector("base") if tree.document else None
    return _joined(url, (found.getattr("href") or "").strip()) if found is not None else url


def _place(element: Any) -> Any:
    """Before what the mark is put: the picture, its figure, or the link around it when that holds nothing else.

    resiliparse leaves out figures, and takes bare links for menus.
    """
    figure = element.closest("figure")
    if figure is not None:
        return figure
    link = element.closest("a")
    return element if link is None or link.text.strip() else link


def _entry(element: Any, base: str) -> dict[str, str] | None:
    """Its row of an `img_list`; None for what is no picture of the text."""
    address = _address(element)
    width, height = _size(element.getattr("width")), _size(element.getattr("height"))
    if not address or any(size and int(size) < _SMALL for size in (width, height)):
        return None
    caption = " ".join((element.getattr("alt") or "").split())
    absolute = quote(_joined(base, address), safe=ADDRESS_SAFE)
    return Image(absolute, caption).entry(width=width, height=height)


def _address(element: Any) -> str:
    for name in ("src", *_WAITING):
        value = (element.getattr(name) or "").strip()
        first = value.split(",")[0].split()[0] if "srcset" in name and value.strip(", ") else value
        if first and not first.lower().startswith(("data:", "about:", "javascript:", "blob:")):
            return first
    return ""


def _joined(base: str, address: str) -> str:
    try:
        return urljoin(base, address)
    except ValueError:  # a broken host name: the address stays as it was written
        return address


def _size(value: str | None) -> str:
    found = _DIGITS.fullmatch(value or "")
    return found.group(1) if found else ""
