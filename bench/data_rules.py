"""data.3 and 4: Gopher's, C4's and FineWeb's rules, our presets against datatrove's filters, speed and decisions.

    python bench/data_rules.py [--save] [--megabytes 20] [--pairs 5] [--peer-python PATH]

One process each. data.3: a sample is megabytes of raw text a second through repetition, quality, C4 and FineWeb, in
this order; both sides hold the documents in memory, neither writes. datatrove stops at a document's first rule, ours
computes the scores of all. data.4: every filter by itself and all four in a row, over the corpus and over pages made of
odd pieces (citations, scripts, bullets, line ends of all kinds): the share of equal decisions to keep or drop, the
smallest of the five. Equal reasons, and equal texts behind C4, are in the notes. datatrove is given our word splitter
(runs of non-blanks) and our ends of sentences; with its own, of NLTK, it would be slower.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

ORDER = ("gopher-repetition", "gopher-quality", "c4-paper", "fineweb-datatrove")
ALL = "all four"
REASONS = {
    "gopher_short_doc": "words_min", "gopher_long_doc": "words_max", "gopher_below_avg_threshold": "mean_word_min",
    "gopher_above_avg_threshold": "mean_word_max", "gopher_too_many_hashes": "hashes_max",
    "gopher_too_many_ellipsis": "ellipses_max", "gopher_too_many_bullets": "bullet_lines_max",
    "gopher_too_many_end_ellipsis": "ellipsis_lines_max", "gopher_below_alpha_threshold": "alpha_words_min",
    "gopher_enough_stop_words": "stop_words_min", "dup_para_frac": "dup_paragraphs_max",
    "dup_para_char_frac": "dup_paragraph_chars_max", "dup_line_frac": "dup_lines_max",
    "dup_line_char_frac": "dup_line_chars_max", "lorem_ipsum": "lorem_ipsum_max", "curly_bracket": "curly_brackets_max",
    "too_few_sentences": "sentences_min", "line_punct_ratio": "ended_lines_min", "short_line_ratio": "short_lines_max",
    "char_dup_ratio": "dup_line_chars_max", "list_ratio": "line_breaks_max",
    **{f"top_{n}_gram": f"top_{n}gram_max" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"dup_{n}gram_max" for n in range(5, 11)},
}  # fmt: skip
PIECES = (
    *("The old man walked to the river and sat down. ", "Nobody that day had seen it! ", "What have they said? "),
    *("She said \"no.\" ", "It was late... ", "and so on… ", "of the ", "a ", "b ", "ab ", "- first\n", "• second\n"),
    *("\n", "\n\n", "\r\n", "\x85", "\u2028", "    ", "[12] ", "[edit]", "[citation needed] ", "#tag ", "# # "),
    *("Please enable JavaScript to go on.\n", "We use cookies on this page today.\n", "12 3 "),
    *("terms of u\u017fe ", "use coo\u212aies. ", "Read our Privacy Policy. ", "javascr[1]ipt. "),
    *("lorem ipsum ", "{", "x" * 1001 + " ", "今天天气很好，我们去公园。", "\u3000", "; , : ! ", "'Tis. ", "don't. "),
)  # fmt: skip


# --- the two sides -------------------------------------------------------------------------------------------------


def read_task(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What to do, and the texts."""
    task: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return task, json.loads((path.parent / "texts.json").read_text(encoding="utf-8"))


def ours(path: Path) -> None:
    """The worker of our side."""
    import worker

    from puyu.data.presets import PresetConfig, PresetFilter
    from puyu.documents.document import make_document
    from puyu.documents.stages import Verdict
    from puyu.documents.texts import load

    assert load() is not None, "run: python -m puyu.documents.texts"
    task, texts = read_task(path)
    documents = [make_document(text, source="bench", language="en") for text in texts]

    def verdicts(names: Sequence[str], count: int) -> Iterator[Verdict]:
        stage = PresetFilter(PresetConfig.model_validate(list(names)))
        for start in range(0, count, 512):
            batch = documents[start : min(start + 512, count)]
            yield from stage(batch, [{}] * len(batch))

    decisions: dict[str, list[list[str]]] = {}
    for label, names in task["sets"].items():
        found = verdicts(names, len(documents))
        decisions[label] = [["" if v.drop else v.document.text, v.drop.rule if v.drop else ""] for v in found]
    (path.parent / "ours.json").write_text(json.dumps(decisions), encoding="utf-8")
    worker.ready(versions={})
    while worker.told():
        began = time.perf_counter()
        kept = sum(verdict.drop is None for verdict in verdicts(ORDER, task["timed"]))
        seconds = time.perf_counter() - began
        assert kept == task["timed"] - sum(bool(reason) for _, reason in decisions[ALL][: task["timed"]])
        worker.answer(task["megabytes"] / seconds)


def peer(path: Path) -> None:
    """The worker of datatrove, in its own environment."""
    from importlib.metadata import version

    import datatrove.utils.word_tokenizers as tokenizers
    import worker
    from datatrove.data import Document
    from datatrove.pipeline.filters.c4_filters import C4QualityFilter
    from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter
    from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
    from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter

    task, texts = read_task(path)
    pattern = re.compile(task["sentence"])

    class Splitter:
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            ends = [match.end() for match in pattern.finditer(text)]
            if text[ends[-1] if ends else 0 :].strip():
                ends.append(len(text))
            return list(zip([0, *ends[:-1]], ends, strict=True))

    splitter = Splitter()
    tokenizers.load_word_tokenizer = lambda language: splitter
    filters = dict(
        zip(ORDER, (GopherRepetitionFilter, GopherQualityFilter, C4QualityFilter, FineWebQualityFilter), strict=True)
    )

    def decide(names: Sequence[str], text: str) -> list[str]:
        document = Document(text=text, id="")
        for name in names:
            found = steps[name].filter(document)
            if found is not True:
                return ["", f"{name.replace('-', '_')}.{found[1]}"]
        return [document.text, ""]

    steps = {name: make() for name, make in filters.items()}
    decisions = {label: [decide(names, text) for text in texts] for label, names in task["sets"].items()}
    (path.parent / "peer.json").write_text(json.dumps(decisions), encoding="utf-8")
    worker.ready(versions={"datatrove": version("datatrove")})
    while worker.told():
        documents: Any = iter([Document(text=text, id="") for text in texts[: task["timed"]]])
        for name in ORDER:
            documents = filters[name]().run(documents)
        began = time.perf_counter()
        for _ in documents:
            pass
        worker.answer(task["megabytes"] / (time.perf_counter() - began))


# --- the comparison ------------------------------------------------------------------------------------------------


def save_inputs(folder: Path, megabytes: int, odd: int) -> Path:
    """The corpus, behind it pages of odd pieces, and the task."""
    import corpus

    from puyu.data.published import SENTENCE
    from puyu.files import read_jsonl

    corpus.make(folder / "corpus", megabytes=megabytes, files=1)
    texts = [row["text"] for row in read_jsonl(folder / "corpus" / "part-0.jsonl.zst")]
    rng = random.Random(5)
    pages = ["".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 80))) for _ in range(odd)]
    sets = {**{name: [name] for name in ORDER}, ALL: list(ORDER)}
    size = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    task = {"sets": sets, "timed": len(texts), "megabytes": size, "sentence": SENTENCE.pattern}
    (folder / "texts.json").write_text(json.dumps(texts + pages), encoding="utf-8")
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    return folder / "task.json"


def ours_called(reason: str) -> str:
    """A reason of datatrove under our name."""
    preset, _, name = reason.partition(".")
    if name == "empty":
        return f"{preset}.{'chars' if preset == 'gopher_repetition' else 'lines'}_min"
    return f"{preset}.{REASONS[name]}" if name else reason


def agreement(folder: Path, timed: int) -> dict[str, dict[str, float]]:
    """Per cent of equal decisions, reasons and texts of each set, over the corpus, the odd pages and both."""
    mine, theirs = (json.loads((folder / f"{side}.json").read_text(encoding="utf-8")) for side in ("ours", "peer"))
    found = {}
    for label in mine:
        pairs = list(zip(mine[label], theirs[label], strict=True))
        row: dict[str, float] = {
            "kept": sum(not a[1] for a, _ in pairs),
            "different reasons": len({a[1] for a, _ in pairs}),
        }
        for place, part in (("both", pairs), ("corpus", pairs[:timed]), ("odd pages", pairs[timed:])):
            row[f"decisions, {place}"] = _per_cent([bool(a[1]) == bool(b[1]) for a, b in part])
            row[f"reasons, {place}"] = _per_cent([a[1] == ours_called(b[1]) for a, b in part])
            row[f"texts, {place}"] = _per_cent([a[0] == b[0] for a, b in part])
        found[label] = row
    return found


def _per_cent(equal: Sequence[bool]) -> float:
    return 100 * sum(equal) / max(len(equal), 1)


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Both sides in turns, over the same documents."""
    task = save_inputs(folder, arguments.megabytes, arguments.odd)
    run = harness.Run("data_rules", peer_flags="words: str.split; sentences: end marks; one process")
    left = harness.Worker([sys.executable, __file__, "--worker", "ours", task])
    right = harness.Worker(
        [harness.peer_python("datatrove", arguments.peer_python), __file__, "--worker", "peer", task]
    )
    run.versions = right.facts["versions"]
    rates = harness.alternate(left, right, pairs=arguments.pairs)
    left.close()
    right.close()
    timed = json.loads(task.read_text(encoding="utf-8"))["timed"]
    shares: Mapping[str, Mapping[str, float]] = agreement(folder, timed)
    run.notes = {"documents": timed, "odd_pages": arguments.odd, "equal_per_cent": shares}
    worst = min(row["decisions, both"] for row in shares.values())
    run.counted("data_rules_equal").finish([harness.Samples("data.4", [worst])], save=arguments.save)
    run.finish([harness.Samples("data.3", *rates, unit="MB/s")], save=arguments.save)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=20, help="size of the corpus")
    parser.add_argument("--odd", type=int, default=20_000, help="pages of odd pieces besides, for data.4")
    parser.add_argument("--pairs", type=int, default=5, help="samples of each side")
    parser.add_argument("--peer-python", type=Path, help="interpreter with datatrove; default: made in .venv-peers")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        {"ours": ours, "peer": peer}[arguments.worker[0]](Path(arguments.worker[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, Path(folder))


if __name__ == "__main__":
    main()
