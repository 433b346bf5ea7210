"""Sources of documents of which nothing but their lengths is known."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """Documents of which nothing but their lengths is known."""

    lengths: list[int]

    @property
    def num_docs(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def length(self, index: int) -> int:
        return self.lengths[index]
