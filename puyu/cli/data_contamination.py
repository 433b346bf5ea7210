"""`puyu data contamination`: which evaluation items stand in a corpus, and what a model's losses say.

puyu data contamination runs/mine/data --against gsm8k_test.jsonl mmlu.jsonl
puyu data contamination --url http://127.0.0.1:8000 --train A.jsonl --test B.jsonl --reference C.jsonl --out leak.json
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puyu.errors import ConfigError
from puyu.files import BadRecord, write_json, write_jsonl
from puyu.log import say

if TYPE_CHECKING:
    from puyu.data.contamination import Method


def main(arguments: Sequence[str]) -> int:
    """The verb with its own name first."""
    from puyu.data.contamination import FIELDS, FORMAT, Index, check, read_items
    from puyu.data.corpus import documents

    given = _options().parse_args(list(arguments[1:]))
    if (given.corpus is None) == (given.url == "") or bool(given.corpus) != bool(given.against):
        raise ConfigError("give CORPUS with --against, or --url with --train, --test and --reference", remedy=_BOTH)
    fields = tuple(given.fields or FIELDS)
    if given.corpus is None:
        report: dict[str, Any] = {"format": FORMAT, "method": {}, "evaluations": []}
        report["losses"] = _losses(given, fields)
        write_json(_out(given), report)
        return 0
    bad: list[BadRecord] = []
    index = Index([read_items(path, fields=fields) for path in given.against], _method(given))
    found = check(lambda: documents([given.corpus], quarantine=bad.append), index)
    report = {**found.report, "corpus": given.corpus.as_posix(), "unreadable": len(bad)}
    write_json(_out(given), report)
    _say(report, _out(given))
    if given.clean:
        kept = write_jsonl(given.clean, _left(given.corpus, found.documents, mark=given.mark))
        say(f"{given.clean}: {kept} documents, {'marked' if given.mark else 'the others left out'}")
    return 0


_BOTH = "run it twice for both: n-grams look at the corpus, losses at a model"


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="puyu data contamination", description="Which evaluation items stand in a corpus."
    )
    options.add_argument("corpus", type=Path, nargs="?", metavar="CORPUS", help="JSONL, or a folder of puyu data")
    options.add_argument("--against", nargs="+", type=Path, default=[], help="JSONL files of evaluation items")
    options.add_argument("--out", type=Path, help="[CORPUS/contamination.json for a folder]")
    options.add_argument("--method", default="default", help="default, gpt3, llama2 or palm [default: any 13-gram]")
    options.add_argument("-n", type=int, help="units of an n-gram, instead of the method's")
    options.add_argument("--fields", nargs="+", help="fields of an item that are looked for [the usual ones]")
    options.add_argument("--clean", type=Path, help="write the corpus without contaminated documents")
    options.add_argument("--mark", action="store_true", help="with --clean: all documents, contaminated ones marked")
    options.add_argument("--url", default="", help="a server whose model's losses are compared")
    options.add_argument("--model", default="", help="its model [the first one]")
    for name, text in (("train", "the train part"), ("test", "the test part"), ("reference", "new items like them")):
        options.add_argument(f"--{name}", type=Path, help=f"JSONL: {text} (losses)")
    return options


def _out(given: argparse.Namespace) -> Path:
    from puyu.documents.contamination import FILE

    if given.out:
        return Path(given.out)
    if given.corpus is None or not given.corpus.is_dir():
        raise ConfigError("--out is needed where CORPUS is no folder", remedy="for example --out contamination.json")
    return Path(given.corpus) / FILE


def _method(given: argparse.Namespace) -> Method:
    from puyu.data.contamination import preset

    method = preset(given.method)
    if given.n is None:
        return method
    if given.n < 2:
        raise ConfigError(f"-n {given.n} is no length of an n-gram", remedy="2 and more; 13 is usual")
    return method.model_copy(update={"n": given.n, "shortest": min(method.shortest, given.n), "adaptive": False})


def _say(report: Mapping[str, Any], out: Path) -> None:
    for part in report["evaluations"]:
        short = f", {part['too_short']} too short to check" if part["too_short"] else ""
        counts = f"{part['contaminated']} of {part['items']} items contaminated, {part['touched']} touched"
        say(f"  {part['name']}: {counts}{short}")
        for row in sorted(part["rows"], key=lambda row: -row["covered"])[:3]:
            say(f"    {row['id']}: {row['covered']:.0%} in {row['document'][:16]}: {row['span'][:60]!r}")
    bad = f"; {report['unreadable']} rows could not be read" if report["unreadable"] else ""
    say(f"{out}: {report['documents_contaminated']} of {report['documents']} documents{bad}")


def _left(corpus: Path, found: Mapping[str, list[dict[str, Any]]], *, mark: bool) -> Iterator[dict[str, Any]]:
    from puyu.data.corpus import rows

    for row, document in rows([corpus], quarantine=lambda record: None):
        if document.id not in found:
            yield row
        elif mark:
            yield {**row, "contamination": found[document.id]}


def _losses(given: argparse.Namespace, fields: Sequence[str]) -> dict[str, Any]:
    from puyu.client import Client
    from puyu.data.contamination import read_items
    from puyu.data.leaks import loss_gaps

    names = ("train", "test", "reference")
    if any(getattr(given, name) is None for name in names):
        raise ConfigError("the losses need --train, --test and --reference", remedy=_BOTH)
    texts = {name: list(read_items(getattr(given, name), fields=fields).items.values()) for name in names}
    found = asyncio.run(loss_gaps(Client(given.url, model=given.model).score, **texts))
    for name in names:
        loss = getattr(found, name)
        say(f"  {name:<10} {loss.nats:.4f} +- {loss.stderr:.4f} nats per token, {loss.texts} texts")
    result = found.to_json()
    say(f"  delta 1 (test - reference) {result['delta1']:+.4f} +- {result['delta1_stderr']:.4f}")
    say(f"  delta 2 (test - train)     {result['delta2']:+.4f} +- {result['delta2_stderr']:.4f}")
    return result
