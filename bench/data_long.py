"""data.12: documents that were joined from two, told from whole ones by the n-gram model's splice score (AUC).

    python bench/data_long.py [--save] [--data FOLDER] [--rounds 5] [--documents 100]

Whole documents are excerpts of 32 to 64 KiB of one book; joined ones have the same sizes, the head of one book and the
tail of another of the same kind, at a random place at least 4 KiB from either end. The model is trained on other books
(English) or on the third novel and on documentation and dialogues (Chinese has three novels: each pair has its own
model). A sample of data.12 is the smaller AUC of English and Chinese in one round; each round draws other excerpts.

`--data` (or PUYU_SHARED_DATA) is a folder with pretrain/en_novels/*.txt.zst and pretrain/zh_novels/*.txt.zst, the first
named Author_Title_Year; without it the few novels of samples/ are used, and English is modeled by encyclopedia,
speeches and documentation alone. Harder and other kinds of damage, the plain difference P(S2|S1) - P(S2) and the speed
of one process stand in the notes.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np

from puyu.data import ngram_native
from puyu.data.ngram import NgramModel, train
from puyu.data.splice import SpliceConfig, gains, splices
from puyu.documents.document import normalize
from puyu.files import open_bytes, read_jsonl

SAMPLES = harness.ROOT / "samples" / "corpus"
SMALLEST, LARGEST, EDGE = 32 * 1024, 64 * 1024, 4 * 1024


@dataclass(frozen=True)
class Corpus:
    """Texts of one kind to cut from, by author, and the model that judges them."""

    language: str
    texts: Sequence[str]
    authors: Sequence[str]
    model: NgramModel
    width: int
    """Bytes of a character, about."""


def read(path: Path) -> str:
    with open_bytes(path) as stream:
        return normalize(stream.read().decode("utf-8", "replace"))


def rows(name: str) -> list[str]:
    return [normalize(row["text"]) for row in read_jsonl(SAMPLES / name)]


def speeches() -> list[str]:
    with zipfile.ZipFile(SAMPLES / "state_union.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
        return [normalize(archive.read(name).decode("utf-8", "replace")) for name in names]


def english(data: Path | None) -> list[Corpus]:
    """Novels: forty for the model, the others to cut from."""
    if data is None:
        paths = sorted((SAMPLES / "novels_en").glob("*.txt*"))
        model = train([*rows("wiki_en.jsonl.gz"), *rows("docs_en.jsonl.gz"), *speeches()])
    else:
        paths = sorted((data / "pretrain" / "en_novels").glob("*.txt.zst"))
        random.Random(1).shuffle(paths)
        model = train([read(path) for path in paths[:40]])
        paths = paths[40:]
    return [Corpus("en", [read(path) for path in paths], [path.name.partition("_")[0] for path in paths], model, 1)]


def chinese(data: Path | None) -> list[Corpus]:
    """Three novels: each pair is judged by a model of the third."""
    folder = SAMPLES / "novels_zh" if data is None else data / "pretrain" / "zh_novels"
    novels = [read(path) for path in sorted(folder.glob("*.txt*"))]
    others = [*rows("docs_zh.jsonl.gz"), *rows("oasst_zh.jsonl.gz")]
    pairs = [[novel for novel in novels if novel is not third] for third in novels]
    models = [train([third, *others]) for third in novels]
    return [Corpus("zh", pair, ["", "-"], model, 3) for pair, model in zip(pairs, models, strict=True)]


# ---- documents


def size(rng: random.Random, corpus: Corpus) -> int:
    return rng.randrange(SMALLEST, LARGEST) // corpus.width


def excerpt(rng: random.Random, text: str, length: int) -> str:
    start = rng.randrange(max(len(text) - length, 0) + 1)
    return text[start : start + length]


def whole(rng: random.Random, corpus: Corpus) -> str:
    return excerpt(rng, rng.choice(corpus.texts), size(rng, corpus))


def joined(rng: random.Random, corpus: Corpus) -> str:
    """The head of one work, the tail of another."""
    a, b = rng.sample(range(len(corpus.texts)), 2)
    return two(rng, corpus, a, b)


def two(rng: random.Random, corpus: Corpus, a: int, b: int) -> str:
    length, edge = size(rng, corpus), EDGE // corpus.width
    at = rng.randrange(edge, length - edge)
    return excerpt(rng, corpus.texts[a], at) + "\n" + excerpt(rng, corpus.texts[b], length - at)


def same_author(rng: random.Random, corpus: Corpus) -> str | None:
    """Two works of one author."""
    pairs = [
        (a, b)
        for a, author in enumerate(corpus.authors)
        for b, other in enumerate(corpus.authors)
        if a != b and author == other
    ]
    return two(rng, corpus, *rng.choice(pairs)) if pairs else None


def one_work(rng: random.Random, corpus: Corpus) -> str:
    """Two places of one work: hardly damage, and the hardest to see."""
    a = rng.randrange(len(corpus.texts))
    return two(rng, corpus, a, a)


def inserted(rng: random.Random, corpus: Corpus) -> str:
    """A quarter of another work in the middle of one."""
    a, b = rng.sample(range(len(corpus.texts)), 2)
    length = size(rng, corpus)
    host = excerpt(rng, corpus.texts[a], 3 * length // 4)
    at = rng.randrange(len(host) // 4, 3 * len(host) // 4)
    return host[:at] + "\n" + excerpt(rng, corpus.texts[b], length // 4) + "\n" + host[at:]


def interleaved(rng: random.Random, corpus: Corpus) -> str:
    """Two works in turns of 6 to 10 KiB, as columns that were read across."""
    a, b = rng.sample(range(len(corpus.texts)), 2)
    length = size(rng, corpus)
    left = [excerpt(rng, corpus.texts[place], length // 2) for place in (a, b)]
    parts = []
    while any(left):
        step = rng.randrange(6 * 1024, 10 * 1024) // corpus.width
        parts.append(left[0][:step])
        left = [left[1], left[0][step:]]
    return "\n".join(parts)


# ---- measuring


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a damaged document scores higher than a whole one."""
    high, low = np.array(positive)[:, None], np.array(negative)[None]
    return float((high > low).mean() + (high == low).mean() / 2)


def values(corpus: Corpus, texts: Sequence[str]) -> list[float]:
    return [found.splice.value for found in splices(texts, corpus.model)]


def inserts(corpus: Corpus, texts: Sequence[str]) -> list[float]:
    return [found.insert.value for found in splices(texts, corpus.model)]


def mixtures(corpus: Corpus, texts: Sequence[str]) -> list[float]:
    return [found.mixed.value for found in splices(texts, corpus.model)]


def plain(corpus: Corpus, texts: Sequence[str]) -> list[float]:
    """The report's difference as it stands: how much harder the worst segment is after its neighbor than alone."""
    config = SpliceConfig(reach=1)
    return [-float(np.nanmin(table[1:, 0])) for table, _ in gains(texts, corpus.model, config)]


KINDS = {
    "same author": (same_author, values),
    "one work": (one_work, values),
    "inserted, by insert": (inserted, inserts),
    "interleaved, by mixed": (interleaved, mixtures),
}
"""Other damage: the documents, and the score that is meant for it."""


def drawn(corpora: Sequence[Corpus], make: object, *, seed: str, count: int) -> list[list[str]]:
    """`count` documents over all corpora of a language."""
    rng, found = random.Random(seed), [[] for _ in corpora]
    for number in range(count):
        text = make(rng, corpora[number % len(corpora)])  # type: ignore[operator]
        if text is not None:
            found[number % len(corpora)].append(text)
    return found


def scored(corpora: Sequence[Corpus], texts: Sequence[Sequence[str]], score: object) -> list[float]:
    return [value for corpus, part in zip(corpora, texts, strict=True) for value in score(corpus, part)]  # type: ignore[operator]


def speed(corpora: Sequence[Corpus], texts: Sequence[Sequence[str]]) -> float:
    began = time.perf_counter()
    scored(corpora, texts, values)
    size = sum(len(text.encode("utf-8")) for part in texts for text in part)
    return size / (time.perf_counter() - began) / 1e6


def language(corpora: Sequence[Corpus], *, rounds: int, count: int) -> tuple[list[float], dict[str, object]]:
    """(AUC of each round, notes)."""
    found, plains, speeds = [], [], []
    kinds: dict[str, list[float]] = {name: [] for name in KINDS}
    for number in range(rounds):
        texts = [drawn(corpora, make, seed=f"{number} {make.__name__}", count=count) for make in (whole, joined)]
        speeds.append(speed(corpora, texts[0]))
        negative, positive = (scored(corpora, part, values) for part in texts)
        found.append(auc(positive, negative))
        plains.append(auc(*(scored(corpora, part, plain) for part in reversed(texts))))
        for name, (make, score) in KINDS.items():
            bad = scored(corpora, drawn(corpora, make, seed=f"{number} {name}", count=count), score)
            kinds[name] += [auc(bad, scored(corpora, texts[0], score))] if bad else []
    notes = {
        "auc": [round(value, 4) for value in found],
        "plain difference": round(statistics.median(plains), 4),
        **{name: round(statistics.median(rows), 4) if rows else None for name, rows in kinds.items()},
        "splice of whole documents, quantiles 0.5 0.95 0.99": np.quantile(negative, [0.5, 0.95, 0.99])
        .round(3)
        .tolist(),
        "MB/s": round(statistics.median(speeds), 1),
        "units of the models": [corpus.model.header["units"] for corpus in corpora],
    }
    return found, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("PUYU_SHARED_DATA"), help="folder with novels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=100, help="of each kind, in a round")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    ngram_native.build()
    run = harness.Run("data_long", before={})
    samples = []
    for corpora in (english(arguments.data), chinese(arguments.data)):
        found, notes = language(corpora, rounds=arguments.rounds, count=arguments.documents)
        run.notes[corpora[0].language] = notes
        samples.append(found)
    run.notes["novels"] = "samples/" if arguments.data is None else "given"
    worst = [min(row) for row in zip(*samples, strict=True)]
    run.finish([harness.Samples("data.12", worst)], save=arguments.save)


if __name__ == "__main__":
    main()
