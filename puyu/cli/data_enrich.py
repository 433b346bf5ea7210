"""`puyu data enrich | gaps`: look-alikes of good examples, and what a corpus lacks.

puyu data enrich --seeds GOOD.jsonl --corpus DIR --out FOUND.jsonl
puyu data gaps CORPUS --seeds GOOD.jsonl --add MORE.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puyu.cli.options import help_lines
from puyu.errors import ConfigError, InputError
from puyu.files import BadRecord, write_json, write_jsonl
from puyu.log import say


def main(arguments: Sequence[str]) -> int:
    """The verb with its own name first."""
    verb = {"enrich": _enrich, "gaps": _gaps}[arguments[0]]
    return verb(arguments[1:])


def _enrich(arguments: Sequence[str]) -> int:
    from puyu.configure import apply_overrides, build, parse_overrides
    from puyu.data.corpus import documents, rows
    from puyu.data.enrich import EnrichConfig, HashedTfIdf, by_classifier, by_embedding

    given = _enrich_options("\n".join(help_lines(EnrichConfig))).parse_args(list(arguments))
    values: dict[str, Any] = {"most": given.most} if given.most else {}
    config = build(EnrichConfig, apply_overrides(values, parse_overrides(given.set)), where="puyu data enrich")
    bad: list[BadRecord] = []
    seeds = [document.text for document in documents([given.seeds], quarantine=bad.append)]

    def corpus() -> Any:
        return documents([given.corpus], quarantine=lambda record: None)

    for _ in documents([given.corpus], quarantine=bad.append):
        pass  # what cannot be read is counted once
    if given.by == "classifier":
        found = by_classifier(seeds, corpus, config)
    else:
        embedder = _client(given) if given.url else HashedTfIdf.fitted(document.text for document in corpus())
        found = by_embedding(seeds, corpus, config, embedder=embedder)
    order = {pick.id: pick for pick in found.picks}
    best = {d.id: row for row, d in rows([given.corpus], quarantine=lambda record: None) if d.id in order}
    write_jsonl(given.out, ({**best[id], "id": id, "enrich": _mark(pick)} for id, pick in order.items()))
    report = {**found.report, "unreadable": len(bad)}
    write_json(given.out.with_name(f"{given.out.name}.report.json"), report)
    say(f"{given.out}: {len(found.picks)} documents like {len(seeds)} seeds; {len(bad)} rows could not be read")
    for item in found.report["rounds"]:
        say("  " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in item.items()))
    return 0


def _mark(pick: Any) -> dict[str, Any]:
    return {"score": pick.score, "round": pick.round}


def _client(given: argparse.Namespace) -> Any:
    from puyu.client import Client

    return Client(given.url, model=given.model)


def _enrich_options(fields: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="puyu data enrich",
        description="Documents of a corpus that are like good examples.",
        epilog=f"fields for --set:\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--seeds", type=Path, required=True, help="JSONL with `text`, or a folder")
    options.add_argument("--corpus", type=Path, required=True, help="JSONL, or a folder that puyu data wrote")
    options.add_argument("--out", type=Path, required=True, help="JSONL of what was found; OUT.report.json beside it")
    options.add_argument("--most", type=int, help="documents to take, at most [1000]")
    options.add_argument("--by", choices=("classifier", "embedding"), default="classifier", help="[classifier]")
    options.add_argument("--url", default="", help="a server with /v1/embeddings [hashed tf-idf, offline]")
    options.add_argument("--model", default="", help="its model [the first one]")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="similarity=0.3, rounds=1")
    return options


def _gaps(arguments: Sequence[str]) -> int:
    from puyu.configure import load_yaml
    from puyu.data.corpus import documents
    from puyu.data.gaps import gaps, lines_of, profile

    options = argparse.ArgumentParser(prog="puyu data gaps", description="What a corpus lacks against a target.")
    options.add_argument("corpus", type=Path, metavar="CORPUS", help="JSONL, or a folder that puyu data wrote")
    options.add_argument("--seeds", type=Path, help="JSONL: documents as they should be")
    options.add_argument("--target", type=Path, help="or YAML: {language: {zh: 0.5, en: 0.5}, domain: {...}}")
    options.add_argument("--add", nargs="+", type=Path, default=[], help="sources to add in thought, one by one")
    options.add_argument("--out", type=Path, help="the report as JSON")
    given = options.parse_args(list(arguments))
    if (given.seeds is None) == (given.target is None):
        raise ConfigError("puyu data gaps needs --seeds or --target, one of them")
    bad: list[BadRecord] = []

    def profile_of(path: Path) -> Any:
        try:
            return profile(documents([path], quarantine=bad.append))
        except InputError as error:
            raise InputError(f"{path}: {error.message}", remedy=error.remedy) from error

    target = profile_of(given.seeds) if given.seeds else load_yaml(given.target)
    added = {path.as_posix(): profile_of(path) for path in given.add}
    report = {**gaps(target, profile_of(given.corpus), added=added), "unreadable": len(bad)}
    if given.out:
        write_json(given.out, report)
    print("\n".join(lines_of(report)))
    if bad:
        say(f"{len(bad)} rows could not be read; the first: {bad[0].path}, line {bad[0].line}: {bad[0].reason}")
    return 0
