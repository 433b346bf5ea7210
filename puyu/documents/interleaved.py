"""WanJuan's records: text, text with pictures in place, text of a video; read into Documents and written again.

    {"id", "content"}                                                              text
    {"id", "img_list": [{"url", "sha256", "caption", "width", "height"}], "content"}     pictures as ![](url) in content
    {"id", "video_list": [{"url", "sha256", "caption", "width", "height", "duration"}], "content"}

    >>> images_of("A cat. ![a cat](https://a.org/cat.jpg)")
    [Image(url='https://a.org/cat.jpg', caption='a cat')]

The first two forms are those of WanJuan 1.0 (He et al., arXiv 2308.10755): `sha256` is of the url, not of the picture,
and sizes are strings. Its video part has files and no published record; the third form follows the second.
A picture linked in the text must have its entry, and a `sha256` that is there must be right: else the record is
quarantined (`image`). An entry that no link names is kept and counted. Pictures are never fetched.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from puyu.documents.document import Document, is_writable
from puyu.files import BadRecord, Quarantine, write_jsonl

CONTENT = "content"
LISTS = {"img_list": "images", "video_list": "videos"}
"""The field of a record that lists entries, and where a Document's metadata keep them."""
UNLINKED = "image without a link"
_TEXTS = ("url", "sha256", "caption")
_SIZES = ("width", "height", "duration")
# The address may hold balanced parentheses; a title may stand behind it (CommonMark 6.4, addresses without blanks).
_ADDRESS = r"(?:[^\s()<>]|\((?:[^\s()<>]|\([^\s()<>]*\))*\))*"
_LINK = re.compile(rf"!\[((?:[^\[\]\\]|\\.)*)\]\(\s*(?:<([^<>\n]*)>|({_ADDRESS}))(?:\s+\"[^\"\n]*\")?\s*\)")
ADDRESS_SAFE = ":/?#[]@!$&'*+,;=%~"
"""Characters of an address that need no percent sign in a link; blanks and parentheses do."""


@dataclass(frozen=True, slots=True)
class Image:
    """A picture by its address; `caption` is plain text."""

    url: str
    caption: str = ""

    def link(self) -> str:
        """Markdown: `images_of` of it gives the picture back."""
        caption = re.sub(r"([\[\]\\])", r"\\\1", " ".join(self.caption.split()))
        return f"![{caption}]({quote(self.url, safe=ADDRESS_SAFE)})"

    def entry(self, *, width: str = "", height: str = "") -> dict[str, str]:
        """Its row of an `img_list`."""
        return {
            "url": self.url,
            "sha256": url_hash(self.url),
            "caption": self.caption,
            "width": width,
            "height": height,
        }


def url_hash(url: str) -> str:
    """The `sha256` of an entry: of the address, as hex."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def images_of(text: str) -> list[Image]:
    """The pictures that a text links to in markdown, in its order."""
    found = []
    for match in _LINK.finditer(text):
        caption, pointed, plain = match.groups()
        found.append(Image(pointed or plain or "", re.sub(r"\\(.)", r"\1", caption)))
    return found


# ---- reading


def problem(value: Mapping[str, Any]) -> str:
    """What is wrong with the id and the entries of a record; empty when nothing is."""
    if not is_writable(json.dumps(record_metadata(value), ensure_ascii=False)):
        return "encoding: a lone surrogate in the id or an entry"
    for name in LISTS:
        entries = value.get(name)
        if entries is None:
            continue
        if not isinstance(entries, list):
            return f"record: {name} is not a list"
        for number, entry in enumerate(entries):
            if found := _entry_problem(entry):
                return f"{found}: {name}[{number}]"
    if "img_list" not in value:
        return ""
    known = {entry["url"] for entry in value["img_list"] or []}
    missing = next((image.url for image in images_of(value[CONTENT]) if image.url not in known), None)
    return "" if missing is None else f"image: a link without an entry in img_list: {missing[:200]}"


def _entry_problem(entry: object) -> str:
    if not isinstance(entry, dict):
        return "record: not an object"
    if not isinstance(entry.get("url"), str) or not entry["url"]:
        return "record: no url"
    for name in _TEXTS:
        if not isinstance(entry.get(name, ""), str):
            return f"record: {name} is not a text"
    for name in _SIZES:
        if not isinstance(entry.get(name, ""), str | int | float | None):
            return f"record: {name} is not a size"
    stated = entry.get("sha256", "")
    return "image: sha256 is not that of the url" if stated and stated.lower() != url_hash(entry["url"]) else ""


def record_metadata(value: Mapping[str, Any]) -> dict[str, Any]:
    """What a Document keeps of a record besides its text: `record` (its id), `images`, `videos`."""
    known = {"record": value["id"]} if isinstance(value.get("id"), str) else {}
    return known | {kept: value[name] for name, kept in LISTS.items() if value.get(name) is not None}


def unlinked(text: str, entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries that no link of the text names."""
    linked = {image.url for image in images_of(text)}
    return [entry for entry in entries if entry["url"] not in linked]


def deal_images(pieces: Sequence[str], metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metadata of each piece of a text: the pictures that it links to; those of no piece stay with the first."""
    entries = metadata.get("images")
    if entries is None:
        return [dict(metadata) for _ in pieces]
    linked = [{image.url for image in images_of(piece)} for piece in pieces]
    nowhere = {entry["url"] for entry in entries}.difference(*linked)
    linked[0] |= nowhere
    return [{**metadata, "images": [entry for entry in entries if entry["url"] in urls]} for urls in linked]


def keep_links(text: str, pieces: list[str]) -> list[str]:
    """The pieces of a text, or the whole of it when a cut went through a link."""
    if sum(len(_LINK.findall(piece)) for piece in pieces) == len(_LINK.findall(text)):
        return pieces
    return [text]


# ---- writing


def write_interleaved(path: Path, documents: Iterable[Document], *, quarantine: Quarantine) -> int:
    """Write Documents as WanJuan's records (`.gz`, `.zst` by suffix); returns how many.

    `id` is the record's own where the document came from one, else the document's; a part of a long text adds its
    number. A text that links to a picture without an entry (a stage has changed the address) is quarantined.
    """
    return write_jsonl(path, _records(path, documents, quarantine))


def _records(path: Path, documents: Iterable[Document], quarantine: Quarantine) -> Iterator[dict[str, Any]]:
    for document in documents:
        record = document_record(document)
        if found := problem(record):
            quarantine(BadRecord(str(path), 0, 0, f"{found} ({document.id})", document.text[:80]))
        else:
            yield record


def document_record(document: Document) -> dict[str, Any]:
    """One record, in WanJuan's order of fields."""
    metadata = document.metadata
    name = str(metadata.get("record") or document.id)
    part = f"-{metadata['part']}" if "part" in metadata else ""
    lists = {field: list(metadata[kept]) for field, kept in LISTS.items() if kept in metadata}
    return {"id": name + part, **lists, CONTENT: document.text}
