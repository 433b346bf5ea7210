"""data.18: how full the rows of soft packing are, on lengths like those of texts; every token in exactly one row.

    python bench/data_packing.py [--save] [--rows 300] [--documents 2000]

Lengths: of the seeded corpus's pages (bench/corpus.py), of the articles, pages and answers in samples/ (both: UTF-8
bytes / 4), and lognormal ones (below). Of each, at least `--documents` documents and about `--rows` rows' worth are
packed into rows of each length; data.18 is the smallest fill of all, counted as long as there is more to draw. Then the
rest is packed, and the bench ends with an error unless each token of each document has stood in exactly one row. The
notes have each fill (also to the very last row), microseconds a row, and the share of the documents that fit a row but
are cut: hard packing cuts them, soft packing never.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator

import corpus
import harness

from puyu.data.mix import Mixture
from puyu.data.rows import Packing, Rows
from puyu.files import read_jsonl
from tests.data.lengths import Lengths

ROWS = (256, 1024, 2048, 4096, 8192, 32_768)
LOGNORMAL = {"short answers": (4.5, 1.0), "web pages": (6.2, 1.1), "all sizes": (7.0, 1.6), "long": (9.0, 1.2)}
"""Mean and standard deviation of the logarithm of tokens; medians of 90, 490, 1,100 and 8,100."""
SAMPLES = ("wiki_en.jsonl.gz", "docs_en.jsonl.gz", "docs_zh.jsonl.gz", "oasst_zh.jsonl.gz")


def tokens(text: str) -> int:
    return len(text.encode("utf-8")) // 4 + 1


def pages(found: corpus.Pools, seed: int) -> Iterator[int]:
    maker = corpus.Maker(seed, found)
    while True:
        yield tokens(maker.record(0)["text"])


def sampled(lengths: list[int], seed: int) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        yield rng.choice(lengths)


def lognormal(mean: float, spread: float, seed: int) -> Iterator[int]:
    rng = random.Random(seed)
    while True:
        yield min(max(int(rng.lognormvariate(mean, spread)), 8), 1_000_000)


def streams() -> dict[str, Iterator[int]]:
    """Endless lengths, by where they are from."""
    texts = [tokens(row["text"]) for name in SAMPLES for row in read_jsonl(corpus.SAMPLES / name)]
    drawn = {name: lognormal(*shape, seed=1) for name, shape in LOGNORMAL.items()}
    return {"seeded corpus": pages(corpus.pools(), 1), "samples": sampled(texts, 1), **drawn}


def documents(lengths: Iterator[int], *, count: int, total: int) -> Lengths:
    """At least so many documents and so many tokens."""
    found: list[int] = []
    while total > 0 or len(found) < count:
        found.append(next(lengths))
        total -= found[-1]
    return Lengths(found)


def packed(source: Lengths, packing: Packing, seq_len: int) -> dict[str, float]:
    """Fill, time and cuts of one epoch; SystemExit where a token is missing or stands in two rows."""
    mixture = Mixture({"": source}, {"": 1}, seed=1, epochs={"": 1})
    rows = Rows({"": source}, mixture, packing=packing)
    ends, cut, count, fill = [0] * source.num_docs, set(), 0, 0.0
    began = time.perf_counter()
    while row := rows.next_row(seq_len):
        count += 1
        fill = rows.fill if mixture.can_draw else fill
        for stretch in row:
            if ends[stretch.doc] != stretch.begin:
                raise SystemExit(f"token {stretch.begin} of document {stretch.doc} is not in exactly one row")
            ends[stretch.doc] = stretch.end
            if stretch.end - stretch.begin < source.lengths[stretch.doc] <= seq_len:
                cut.add(stretch.doc)
    seconds = time.perf_counter() - began
    if ends != source.lengths:
        raise SystemExit("a document is not whole")
    fitting = sum(length <= seq_len for length in source.lengths)
    return {
        "fill": round(fill, 5),
        "fill to the last row": round(rows.fill, 5),
        "us a row": round(seconds / count * 1e6, 1),
        "cut though they fit": round(len(cut) / max(fitting, 1), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=300, help="rows of each length, at least about")
    parser.add_argument("--documents", type=int, default=2000, help="documents of each kind, at least")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    run = harness.Run("data_packing", before={})
    worst: dict[int, float] = {}
    for name, lengths in streams().items():
        for seq_len in ROWS:
            source = documents(lengths, count=arguments.documents, total=arguments.rows * seq_len)
            found = {packing: packed(source, packing, seq_len) for packing in ("hard", "soft", "document")}
            run.notes[f"{name}, {seq_len}"] = {"documents": source.num_docs, **found}
            worst[seq_len] = min(worst.get(seq_len, 1.0), found["soft"]["fill"])
    run.notes["tokens"] = "each in exactly one row"
    run.finish([harness.Samples("data.18", [min(worst.values())])], save=arguments.save)


if __name__ == "__main__":
    main()
