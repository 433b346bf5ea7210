"""Files as texts that can be read again and again, for training a model in passes.

    texts = TextFiles((Path("runs/nano/data/kept.jsonl"),), language="en")
    model = train(texts, sources=texts.sources())

`.jsonl` (also `.gz`, `.zst`) gives the field `text` of each row; everything else is one text a file. A row that cannot
be read raises InputError: a corpus that `puyu data` wrote has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puyu.errors import InputError
from puyu.files import hash_file, open_bytes, read_jsonl_lines


@dataclass(frozen=True, slots=True)
class TextFiles:
    """The texts of some files; with a language, only the rows that have it."""

    paths: tuple[Path, ...]
    field: str = "text"
    language: str = ""

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            yield from self._rows(path) if ".jsonl" in path.suffixes[-2:] else [_whole(path)]

    def sources(self) -> list[dict[str, Any]]:
        """Name, size and content hash of each file, in the order of hashes: an order of contents."""
        rows = [{"name": path.name, "bytes": path.stat().st_size, "hash": hash_file(path)} for path in self.paths]
        return sorted(rows, key=lambda row: (row["hash"], row["name"]))

    def _rows(self, path: Path) -> Iterator[str]:
        for number, row in read_jsonl_lines(path):
            text = row.get(self.field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise InputError(f"{path}, line {number} has no text in {self.field!r}", remedy="name it: --text-field")
            if not self.language or row.get("language") == self.language:
                yield text


def _whole(path: Path) -> str:
    with open_bytes(path) as stream:
        data = stream.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}", remedy="clean it with puyu data first") from error
