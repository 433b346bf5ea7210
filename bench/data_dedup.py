"""data.5 and 6: MinHash signatures in MB/s of a core; recall and precision on planted near copies.

    python bench/data_dedup.py [--save]

data.5: 128 hashes of 5-grams of the seeded corpus, one thread, ten samples. data.6: English and Chinese pages of it,
each with a copy of which a known share of words or characters is replaced; similarity is the exact Jaccard similarity
of the sets of 5-grams, told without hashes. Recall counts pairs of 0.8 and more of which one goes; precision counts, of
all that goes, what has 0.7 and more in common with the document that it names.
"""

from __future__ import annotations

import argparse
import random
import time

import corpus
import harness

from puyu.data.dedup import NearConfig, NearDedup, drops_among
from puyu.data.measure import UNIT
from puyu.documents.characters import folded
from puyu.documents.document import Document, make_document

PAIRS = 3000


def pages(seed: int, count: int) -> list[str]:
    maker = corpus.Maker(seed, corpus.pools())
    return [maker._good() for _ in range(count)]


def units_of(text: str) -> list[str]:
    return UNIT.findall(folded(text))


def edited(rng: random.Random, text: str, share: float) -> str:
    """The text with a share of its units replaced by others of it."""
    units = units_of(text)
    glue = " " if sum(map(len, units)) > 2 * len(units) else ""
    for place in rng.sample(range(len(units)), int(share * len(units))):
        units[place] = rng.choice(units) + ("x" if glue else "")
    return glue.join(units)


def jaccard(a: str, b: str) -> float:
    sets = [{tuple(units[i : i + 5]) for i in range(max(len(units) - 4, 1))} for units in map(units_of, (a, b))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def planted(seed: int) -> tuple[list[Document], list[tuple[Document, Document, float]]]:
    """(all documents, pairs with their similarity)."""
    rng = random.Random(seed)
    pairs = []
    for text in dict.fromkeys(pages(seed, PAIRS)):
        other = edited(rng, text, rng.uniform(0.0, 0.09))
        a, b = (make_document(each, source="s") for each in (text, other))
        pairs.append((a, b, jaccard(text, other)))
    return list({d.id: d for a, b, _ in pairs for d in (a, b)}.values()), pairs


def quality(seed: int) -> tuple[float, float]:
    """(recall at 0.8, precision at 0.7)."""
    documents, pairs = planted(seed)
    drops = drops_among(NearDedup(NearConfig()), documents, [{}] * len(documents))
    alike = [(a, b) for a, b, value in pairs if value >= 0.8]
    found = sum(a.id in drops or b.id in drops for a, b in alike)
    texts = {document.id: document.text for document in documents}
    true = sum(jaccard(texts[id], texts[drop.of]) >= 0.7 for id, drop in drops.items())
    print(f"seed {seed}: {len(alike)} pairs of 0.8 and more, {found} found; {len(drops)} go, {true} rightly")
    return found / len(alike), true / len(drops)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    given = parser.parse_args()
    run = harness.Run("data_dedup")
    near, texts = NearDedup(NearConfig()), pages(5, 6000)
    size = sum(len(text.encode()) for text in texts) / 1e6
    near.minhashes(texts[:100])
    rates = []
    for _ in range(10):
        began = time.perf_counter()
        for start in range(0, len(texts), 512):
            near.minhashes(texts[start : start + 512])
        rates.append(size / (time.perf_counter() - began))
    found = [quality(seed) for seed in range(5)]
    run.finish(
        [
            harness.Samples("data.5", rates),
            harness.Samples("data.6a", [recall for recall, _ in found]),
            harness.Samples("data.6b", [precision for _, precision in found]),
        ],
        save=given.save,
    )


if __name__ == "__main__":
    main()
