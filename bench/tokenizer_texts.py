"""Bilingual texts for the benches of the tokenizer: the samples, and any amount of text with their statistics.

English is a chain of words, Chinese one of characters, each drawn by what followed it in the samples; now and then two
words are written as one, so that new words never end, as in real text. The same seed gives the same bytes.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from puyu.files import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "samples" / "corpus"
CHAINS, STEPS = 2048, 600
JOINED = 0.02  # share of words that are written together with the next one


def sample_texts(language: str) -> list[str]:
    """The documents of the samples in one language, `en` or `zh`."""
    names = {"en": ("wiki_en", "docs_en"), "zh": ("docs_zh",)}[language]
    texts = [row["text"] for name in names for row in read_jsonl(CORPUS / f"{name}.jsonl.gz")]
    for path in sorted((CORPUS / f"novels_{language}").glob("*.txt.gz")):
        novel = unpacked(path)
        texts += [novel[start : start + 4000] for start in range(0, len(novel), 4000)]
    return texts


def unpacked(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8")


class Chain:
    """What follows what: all successors of each unit in a row, drawn with equal chances."""

    def __init__(self, units: Sequence[str]) -> None:
        self.names, places = np.unique(np.array(units, dtype=object), return_inverse=True)
        order = np.argsort(places[:-1], kind="stable")
        self.next = places[1:][order]
        self.starts = np.searchsorted(places[:-1][order], np.arange(len(self.names) + 1))
        self.first = int(places[0])

    def documents(self, rng: np.random.Generator) -> Iterator[str]:
        """Documents of STEPS units, without end."""
        while True:
            state = rng.integers(0, len(self.names), CHAINS)
            rows = np.empty((STEPS, CHAINS), dtype=np.int64)
            for step in range(STEPS):
                count = self.starts[state + 1] - self.starts[state]
                chosen = self.starts[state] + (rng.random(CHAINS) * count).astype(np.int64)
                state = np.where(count > 0, self.next[np.minimum(chosen, len(self.next) - 1)], self.first)
                rows[step] = state
            for units in rows.T:
                yield "".join(self.names[units])


def english() -> Chain:
    return Chain(re.findall(r"\s?[^\s]+|\n+", "\n".join(sample_texts("en"))))


def chinese() -> Chain:
    return Chain(list("\n".join(sample_texts("zh"))))


def joined(text: str, rng: np.random.Generator) -> str:
    """Some blanks between words left out."""
    words = text.split(" ")
    gaps = np.where(rng.random(len(words)) < JOINED, "", " ").tolist()
    return "".join(part for pair in zip(words, gaps, strict=True) for part in pair)


def write(path: Path, size: int, *, seed: int = 0) -> None:
    """JSONL of documents in turns, half of the bytes in each language, at least `size` bytes of text."""
    rng = np.random.default_rng(seed)
    en, zh = english().documents(rng), chinese().documents(rng)
    written = {"en": 0, "zh": 0}
    with open(path, "w", encoding="utf-8") as stream:
        while sum(written.values()) < size:
            language = "en" if written["en"] <= written["zh"] else "zh"
            text = joined(next(en), rng) if language == "en" else next(zh)
            written[language] += len(text.encode("utf-8"))
            stream.write(json.dumps({"text": text, "language": language}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(float(sys.argv[2])))
