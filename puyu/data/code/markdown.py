"""A file of a repository -> markdown: a heading with its path, and its content.

    >>> print(to_markdown("a.py", "x = 1\\n", "python"))
    ## a.py
    <BLANKLINE>
    ```python
    x = 1
    ```

InternLM2 (2024, section 3.1.2) turns all code data into markdown, which costs few tokens and joins code with prose.
A fence is longer than any run of backticks in the code, so that nothing in a file ends its block. Notebooks become
their text cells and code blocks, with the text of their outputs; markdown stays as it is, under its heading. Broken
HTML and XML are mended lightly: control characters and byte marks go, a cut last tag goes, an open comment is closed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from puyu.documents.programming import BY_NAME

_TICKS = re.compile("`{3,}")
_CUT_TAG = re.compile(r"<[!/?A-Za-z][^<>]*\Z")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff]")
_ANGLES = ("html", "xml", "qt-translation")
_PROSE = ("markdown", "text")
_OUTPUT = 2000
"""Characters of one output of a notebook that are kept."""


def to_markdown(path: str, text: str, language: str) -> str:
    """The file under its heading, without a line end."""
    return section(path, *content(text, language))


def section(path: str, body: str, language: str, *, part: int = 1, parts: int = 1) -> str:
    """A heading, and under it prose as it is, or a block of code."""
    head = heading(path, part=part, parts=parts)
    return f"{head}\n\n{body.strip()}".rstrip() if language in _PROSE else f"{head}\n\n{code_block(body, language)}"


def content(text: str, language: str) -> tuple[str, str]:
    """(what comes under the heading, its language): the cells of a notebook are markdown."""
    if language == "notebook" and (cells := notebook_cells(text)) is not None:
        return "\n\n".join(cells), "markdown"
    return (mended(text) if language in _ANGLES else text), language


def heading(path: str, *, part: int = 1, parts: int = 1) -> str:
    """The line above a file, or above one of its parts."""
    return f"## {path}" if parts == 1 else f"## {path} (part {part} of {parts})"


def code_block(text: str, language: str) -> str:
    """A fenced block; the text is between the fences as it is, with one line end at its end."""
    longest = max((len(found.group()) for found in _TICKS.finditer(text)), default=2)
    fence = "`" * (longest + 1)
    row = BY_NAME.get(language)
    name = (row.fence or row.name) if row else ""
    body = text if text.endswith("\n") or not text else text + "\n"
    return f"{fence}{name}\n{body}{fence}"


def mended(text: str) -> str:
    """Markup without what only a torn copy has."""
    text = _CONTROL.sub("", text)
    if text.rfind("<!--") > text.rfind("-->"):
        return text.rstrip() + " -->\n"
    return _CUT_TAG.sub("", text)


def notebook_cells(text: str) -> list[str] | None:
    """The cells of a Jupyter notebook (format 3 and 4) as markdown; None when it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    cells = value.get("cells")
    if cells is None:
        sheets = value.get("worksheets")
        cells = [cell for sheet in sheets for cell in _list(sheet, "cells")] if isinstance(sheets, list) else None
    if not isinstance(cells, list):
        return None
    language = _notebook_language(value)
    return [block for cell in cells if isinstance(cell, dict) for block in _cell(cell, language)]


def _list(value: Any, key: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, list) else []


def _notebook_language(value: dict[str, Any]) -> str:
    metadata = value.get("metadata")
    for key, name in (("kernelspec", "language"), ("language_info", "name")):
        found = metadata.get(key) if isinstance(metadata, dict) else None
        if isinstance(found, dict) and isinstance(found.get(name), str):
            return str(found[name]).lower()
    return "python"


def _cell(cell: dict[str, Any], language: str) -> Iterator[str]:
    source = _joined(cell.get("source", cell.get("input", ""))).strip("\n")
    if not source.strip():
        return
    if cell.get("cell_type") != "code":
        yield source.strip()
        return
    yield code_block(source, language)
    printed = "".join(_output(output) for output in _list(cell, "outputs")).strip("\n")
    if printed.strip():
        yield code_block(printed if len(printed) <= _OUTPUT else printed[:_OUTPUT] + "\n...", "text")


def _output(output: Any) -> str:
    if not isinstance(output, dict) or output.get("output_type") in ("error", "pyerr"):
        return ""
    data = output.get("data")
    plain = data.get("text/plain") if isinstance(data, dict) else None
    return _joined(output.get("text", plain)) + "\n"


def _joined(value: Any) -> str:
    if isinstance(value, list):
        return "".join(part for part in value if isinstance(part, str))
    return value if isinstance(value, str) else ""
