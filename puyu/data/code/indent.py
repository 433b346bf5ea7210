"""Code without the accidents of its layout, so that copies are found whatever an editor made of the blanks.

    >>> one, two, tabs = "if a:\\n  b\\n", "if a:\\n    b  \\n\\n", "if a:\\n\\tb\\n"
    >>> len({dedup_text(one), dedup_text(two), dedup_text(tabs)})
    1

The depth of a line is told by the indents before it, as Python's own tokenizer does, so that 2 blanks, 4 blanks and
tabs give one text, and a changed structure another. Blank lines, trailing blanks and kinds of line ends do not count.
`Reindented(ExactDedup())` and `Reindented(NearDedup(config))` are the usual group stages over such texts: duplicates of
whole files, since finer pieces would tear their context (InternLM2, 2024, section 3.1.2). It decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from puyu.documents.document import Document
from puyu.documents.stages import Column, Copies, GroupStage, Ragged

_MARK = "»"
_TAB = 8


def dedup_text(text: str) -> str:
    """Each line that is not blank, after as many marks as it is deep; words are divided by one blank."""
    widths = [0]
    lines = []
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        width = _width(line)
        while widths[-1] > width:
            widths.pop()
        if width > widths[-1]:
            widths.append(width)
        depth = len(widths) - 1
        lines.append(" ".join([_MARK * depth, *words] if depth else words))
    return "\n".join(lines)


def _width(line: str) -> int:
    return len(line[: len(line) - len(line.lstrip())].expandtabs(_TAB))


class Reindented:
    """A group stage that sees texts without the accidents of their layout."""

    def __init__(self, stage: GroupStage) -> None:
        self.name, self.rule, self.threshold, self._stage = stage.name, stage.rule, stage.threshold, stage

    def keys(self, documents: Sequence[Document]) -> Mapping[str, Column | Ragged]:
        return self._stage.keys([replace(each, text=dedup_text(each.text)) for each in documents])

    def decide(self, columns: Mapping[str, Column | Ragged], order: NDArray[np.int64]) -> Copies:
        return self._stage.decide(columns, order)
