"""Linear scorers: training time of 50,000 labels, scoring and overlap speed, agreement on real labeled sets.

    python bench/data_scorers.py [--save] [--quick] [--labels 50000] [--data FOLDER]

Texts are made here, seeded: half English, half Chinese, about 1 KB each, with words that lean to one label. Speeds are
of one thread, in MB of UTF-8 a second; training is the whole of `puyu data train-scorer`, cross-fitting and validation
included. With --data (or PUYU_SHARED_DATA) scorers are also trained on the labeled sets below it (COLD, hate speech,
SMS spam, film reviews) and judged on texts that they have not seen. There is no bar for it: the numbers are in `notes`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import os
import random
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np

from puyu.data.calibrate import agreement
from puyu.data.contamination import Evaluation, Index, Method
from puyu.data.hashed import Shape, margins
from puyu.data.train_scorer import Labeled, Labels, TrainConfig, train_scorer
from puyu.documents import texts as native
from puyu.documents.document import make_document

REPEATS = 5
HAN = [chr(point) for point in range(0x4E00, 0x4E00 + 3000)]


def word(draw: random.Random) -> str:
    """A made-up word, common ones more often."""
    rank = int(draw.paretovariate(0.9)) % 30_000
    return "".join("bcdfghklmnprstvw"[rank // 16**at % 16] + "aeiou"[rank // 5**at % 5] for at in range(1 + rank % 4))


def made(count: int) -> list[Labeled]:
    """Texts with labels: each tenth word or so leans to the label."""
    draw, rows = random.Random(20240326), []
    for number in range(count):
        label = number % 2
        if number % 4 < 2:
            words = [f"{word(draw)}{'x' if label and draw.random() < 0.03 else ''}" for _ in range(180)]
            rows.append(Labeled(" ".join(words), str(label), "en"))
        else:
            shift = 40 * label
            points = [
                (int(draw.paretovariate(0.8)) + (shift if draw.random() < 0.05 else 0)) % 3000 for _ in range(350)
            ]
            rows.append(Labeled("".join(HAN[point] for point in points), str(label), "zh"))
    return rows


def labels_of(rows: list[Labeled]) -> Labels:
    labels = Labels()
    for row in rows:
        labels.add(row)
    return labels


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def speeds(rows: list[Labeled]) -> dict[str, list[float]]:
    """MB/s of scoring and of looking for overlap."""
    texts = [row.text for row in rows[:8000]]
    size = sum(len(text.encode()) for text in texts) / 1e6
    shape = Shape()
    weights = np.random.default_rng(0).normal(size=(1 << shape.bits) + 1).astype(np.float32)
    items = {str(at): row.text[:400] for at, row in enumerate(rows[-2000:])}
    index = Index([Evaluation("made", "", items)], Method())
    documents = [make_document(text, source="made") for text in texts]
    return {
        "score_mb_s": [size / seconds(lambda: margins(texts, weights, shape=shape)) for _ in range(REPEATS)],
        "overlap_mb_s": [size / seconds(lambda: list(index.matches(documents))) for _ in range(REPEATS)],
    }


# ---- real labels


def table(path: Path, **columns: str) -> Iterator[tuple[str, str]]:
    with gzip.open(path) as stream:
        for row in csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig")):
            yield row[columns["text"]], row[columns["label"]]


def real_sets(folder: Path) -> Iterator[tuple[str, list[tuple[str, bool]], list[tuple[str, bool]]]]:
    """(name, train, test): the set's own split where it has one, else each fifth text is for testing."""
    cold = folder / "safety" / "cold_zh"
    train, test = (
        [
            (text, label == "1")
            for name in names
            for text, label in table(cold / f"{name}.csv.gz", text="TEXT", label="label")
        ]
        for names in (("train", "dev"), ("test",))
    )
    yield "COLD (zh, offensive; human test labels)", train, test
    hate = folder / "safety" / "hate_speech_en" / "labeled_data.csv.gz"
    yield (
        "hate speech (en)",
        *fifths([(text, label != "2") for text, label in table(hate, text="tweet", label="class")]),
    )
    with gzip.open(folder / "safety" / "sms_spam" / "SMSSpamCollection.tsv.gz", "rt", encoding="utf-8") as stream:
        lines = [line.rstrip("\r\n").split("\t", 1) for line in stream]
    yield "SMS spam (en)", *fifths([(text, label == "spam") for label, text in lines])
    with zipfile.ZipFile(folder / "pretrain" / "nltk" / "movie_reviews.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
        yield "film reviews (en)", *fifths([(archive.read(n).decode("utf-8", "replace"), "/pos/" in n) for n in names])


def fifths(rows: list[tuple[str, bool]]) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Shuffled, seeded; equal texts stay on one side."""
    unique = sorted(dict(rows).items())
    random.Random(0).shuffle(unique)
    return unique[len(unique) // 5 :], unique[: len(unique) // 5]


def judged(train: list[tuple[str, bool]], test: list[tuple[str, bool]], language: str) -> dict[str, Any]:
    rows = [Labeled(text, str(int(flag)), language) for text, flag in train]
    began = time.perf_counter()
    scorer = train_scorer(labels_of(rows), TrainConfig()).scorer
    spent = time.perf_counter() - began
    found = scorer.score([text for text, _ in test], [language] * len(test), validated=False)
    row = agreement(found, np.array([flag for _, flag in test]))
    own = scorer.header.agreement[language]
    numbers = {"labels": len(train), "seconds": round(spent, 2), "used": language in scorer.header.languages}
    numbers |= {"folds": {"auc": own.auc, "agreement": own.agreement, "ece": own.ece}}
    return numbers | {"test": {k: getattr(row, k) for k in ("labels", "auc", "agreement", "f1", "kappa", "ece")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--labels", type=int, default=50_000, help="labels to train on")
    parser.add_argument("--data", type=Path, default=os.environ.get("PUYU_SHARED_DATA"), help="folder of labeled sets")
    parser.add_argument("--quick", action="store_true", help="without probes of the machine")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    if native.load() is None:
        raise SystemExit("the native library is not built: python -m puyu.documents.texts")
    run = harness.Run("data_scorers", **({"before": {}} if arguments.quick else {}))
    rows = made(arguments.labels)
    size = sum(len(row.text.encode()) for row in rows) / 1e6
    run.notes = {"labels": len(rows), "mb": round(size, 1), **speeds(rows)}
    run.notes["train_seconds"] = [seconds(lambda: train_scorer(labels_of(rows), TrainConfig()))]
    print(f"  {len(rows)} labels, {size:.0f} MB: {run.notes['train_seconds'][0]:.1f} s", file=sys.stderr)
    if arguments.data:
        run.notes["sets"] = {}
        for name, train, test in real_sets(Path(arguments.data)):
            run.notes["sets"][name] = judged(train, test, "zh" if "(zh" in name else "en")
            print(f"  {name}: {run.notes['sets'][name]}", file=sys.stderr)
    run.finish([], save=arguments.save)


if __name__ == "__main__":
    main()
