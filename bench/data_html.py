"""data.11: main text of gold pages, ours against trafilatura: F1 of both modes, and pages a second of the fast one.

    PUYU_SHARED_DATA=DIR python bench/data_html.py [--save] [--pairs 9] [--peer-python PATH]

Gold is the article extraction benchmark of Scrapinghub: DIR/html/article_extraction with `html/<id>.html.gz` and
`ground-truth.json.gz` (id -> articleBody). Its pages belong to their sites and are not part of the repository. F1 is
that benchmark's: precision and recall over 4-grams of words for each page, each averaged over the pages, then their
harmonic mean. The peer is called as that benchmark calls it, `extract(html, include_comments=False)`. One process each,
decoded pages in memory; precise mode uses the peer's version.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import harness

WORD = re.compile(r"\w+")
Counts = tuple[int, int, int]


def gold(folder: Path) -> tuple[list[str], list[str]]:
    """The pages, and the text that a person took from each, in the order of their ids."""
    place = folder / "html" / "article_extraction"
    truth = json.loads(gzip.decompress((place / "ground-truth.json.gz").read_bytes()))
    files = sorted((place / "html").glob("*.html.gz"))
    pages = [gzip.decompress(file.read_bytes()).decode("utf-8") for file in files]
    return pages, [truth[file.name.partition(".")[0]]["articleBody"] for file in files]


def shingles(text: str, size: int = 4) -> Counter[tuple[str, ...]]:
    words = WORD.findall(text)
    return Counter(tuple(words[at : at + size]) for at in range(max(1, len(words) - size + 1)) if words)


def counts(wanted: str, found: str) -> Counts:
    """Shingles of both, of the found text alone, of the wanted one alone."""
    ours, theirs = shingles(wanted), shingles(found)
    both = (ours & theirs).total()
    return both, theirs.total() - both, ours.total() - both


def f1(pages: Sequence[Counts]) -> float:
    """Harmonic mean of the mean precision and the mean recall; a page without a prediction has no precision."""
    precision = statistics.mean(both / (both + extra) for both, extra, _ in pages if both + extra)
    recall = statistics.mean(both / (both + lost) for both, _, lost in pages if both + lost)
    return 2 * precision * recall / (precision + recall)


def measured(extract: Callable[[str], str], pages: Sequence[str]) -> float:
    """Pages a second."""
    began = time.perf_counter()
    for page in pages:
        extract(page)
    return len(pages) / (time.perf_counter() - began)


def side(folder: Path, extract: Callable[[str], str], versions: dict[str, str], **more: Callable[[str], str]) -> None:
    """A worker: F1 of each way, then pages a second of the first."""
    import worker

    pages, wanted = gold(folder)
    scores = {
        name: f1([counts(text, way(page)) for text, page in zip(wanted, pages, strict=True)])
        for name, way in {"f1": extract, **more}.items()
    }
    worker.ready(versions=versions, scores=scores, pages=len(pages))
    while worker.told():
        worker.answer(measured(extract, pages))


def fast(folder: Path) -> None:
    from importlib.metadata import version

    from puyu.documents.extract import page

    side(folder, lambda html: page(html).text, {"resiliparse": version("resiliparse")})


def precise(folder: Path) -> None:
    from importlib.metadata import version

    from puyu.documents.extract import page

    side(folder, lambda html: page(html, extract="precise").text, {"trafilatura of ours": version("trafilatura")})


def peer(folder: Path) -> None:
    """trafilatura in its own environment; its other settings are noted."""
    import trafilatura

    def extract(html: str, **options: bool) -> str:
        return trafilatura.extract(html, include_comments=False, **options) or ""

    more = {name: lambda html, name=name: extract(html, **{name: True}) for name in SETTINGS}
    side(folder, extract, {"trafilatura": trafilatura.__version__}, **more)


SETTINGS = ("fast", "favor_precision", "favor_recall")


def compare(arguments: argparse.Namespace) -> None:
    folder = os.environ.get("PUYU_SHARED_DATA", "")
    if not (Path(folder) / "html" / "article_extraction").is_dir():
        raise SystemExit("set PUYU_SHARED_DATA to the folder that has html/article_extraction")
    python = harness.peer_python("trafilatura", arguments.peer_python)
    run = harness.Run("data_html", peer_flags="extract(html, include_comments=False)")
    us = harness.Worker([sys.executable, __file__, "--worker", "fast", folder])
    them = harness.Worker([python, __file__, "--worker", "peer", folder])
    found = harness.alternate(us, them, pairs=arguments.pairs)
    careful = harness.Worker([sys.executable, __file__, "--worker", "precise", folder])
    pace = [careful.measure() for _ in range(3)]
    for worker in (us, them, careful):
        worker.close()
        run.versions |= worker.facts["versions"]
    best = them.facts["scores"]["f1"]
    ours = {"fast": us.facts["scores"]["f1"], "precise": careful.facts["scores"]["f1"]}
    run.notes = {"pages": us.facts["pages"], "f1": ours, "peer_f1": them.facts["scores"], "precise_pages_s": pace}
    counts = [
        harness.Samples("data.11a", [ours["precise"] - best]),
        harness.Samples("data.11b", [ours["fast"] - best]),
    ]
    run.counted("data_html_f1").finish(counts, save=arguments.save)
    run.finish([harness.Samples("data.11c", *found, unit="pages/s")], save=arguments.save)


if __name__ == "__main__":
    harness.comparison(__doc__ or "", {"fast": fast, "precise": precise, "peer": peer}, compare, pairs=9)
