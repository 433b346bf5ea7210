"""`puyu data train-scorer | score | annotate`: linear scorers from labels, and the loop that makes the labels.

puyu data train-scorer LABELS.jsonl ... --out MODEL --name toxic_score
puyu data score FILE --with MODEL --out SCORED.jsonl
puyu data annotate CORPUS --with MODEL -n 50 --out round1.jsonl
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puyu.cli.options import help_lines
from puyu.errors import ConfigError
from puyu.files import BadRecord
from puyu.log import say

if TYPE_CHECKING:
    from puyu.data.scorers import Header, Scorer


def main(arguments: Sequence[str]) -> int:
    """The verb with its own name first."""
    verb = {"train-scorer": _train, "score": _score, "annotate": _annotate}[arguments[0]]
    return verb(arguments[1:])


# ---- train


def _train(arguments: Sequence[str]) -> int:
    from puyu.configure import apply_overrides, build, parse_overrides
    from puyu.data.annotate import disagreements_path
    from puyu.data.scorers import save_scorer
    from puyu.data.train_scorer import Fields, TrainConfig, read_labels, train_scorer
    from puyu.files import write_jsonl

    given = _train_options("\n".join(help_lines(TrainConfig))).parse_args(list(arguments))
    values: dict[str, Any] = {"name": given.name or given.out.name.partition(".")[0]}
    values |= {"positive": given.positive} if given.positive else {}
    config = build(TrainConfig, apply_overrides(values, parse_overrides(given.set)), where="puyu data train-scorer")
    fields = Fields(given.text_field, given.label_field, given.language_field)
    labels = read_labels(given.labels, fields=fields)
    validation = read_labels(given.validation, fields=fields) if given.validation else None
    trained = train_scorer(labels, config, validation=validation)
    save_scorer(given.out, trained.scorer)
    write_jsonl(disagreements_path(given.out), trained.disagreements)
    notes = f"{labels.unlabeled} without a label, {labels.repeated} repeated, {labels.changed} changed"
    say(f"{len(labels.rows)} labels ({notes})")
    print("\n".join(report_lines(trained.scorer.header)))
    say(f"{given.out}: {config.name}; {len(trained.disagreements)} labels to look at again beside it")
    return 0


def _train_options(fields: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="puyu data train-scorer",
        description="A linear scorer from labels, calibrated and validated by language.",
        epilog=f"fields for --set:\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("labels", nargs="+", type=Path, help="JSONL; a later label of a text replaces an earlier one")
    options.add_argument("--out", type=Path, required=True, help="the scorer, one file")
    options.add_argument("--name", help="the score's column [name of --out]")
    options.add_argument("--positive", nargs="+", metavar="LABEL", help="labels that a high score means [1, true]")
    options.add_argument("--validation", nargs="+", type=Path, help="human labels that judge the scorer")
    options.add_argument("--text-field", default="text", help="[text]")
    options.add_argument("--label-field", default="label", help="[label]")
    options.add_argument("--language-field", default="language", help="[language; detected where it is missing]")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="plan.epochs=8, gate.auc=0.9")
    return options


def report_lines(header: Header) -> list[str]:
    """The validation as a table, a line a language."""
    lines = [f"  {'language':<10}{'labels':>8}{'positive':>9}{'AUC':>7}{'agree':>7}{'F1':>7}{'ECE':>7}  used"]
    for name, row in sorted(header.agreement.items()):
        why = header.refused.get(name)
        used = "" if name == "*" else "yes" if why is None else f"no: {why}"
        numbers = "".join(f"{value:>7.3f}" for value in (row.auc, row.agreement, row.f1, row.ece))
        lines.append(
            f"  {'all' if name == '*' else name:<10}{row.labels:>8}{row.positives:>9}{numbers}  {used}".rstrip()
        )
    for item in header.rounds:
        if item.guessed:
            lines.append(f"  round {item.round}: people confirmed {item.agreed} of {item.guessed} guesses")
    return lines


# ---- score


def _score(arguments: Sequence[str]) -> int:
    from puyu.data.scorers import load_scorer
    from puyu.files import write_jsonl

    options = argparse.ArgumentParser(prog="puyu data score", description="Adds scores to the rows of a corpus.")
    options.add_argument("corpus", type=Path, metavar="FILE", help="JSONL, or a folder that puyu data wrote")
    options.add_argument("--with", dest="models", nargs="+", type=Path, required=True, metavar="MODEL")
    options.add_argument("--out", type=Path, required=True, help="JSONL (.gz, .zst): the rows with `scores`")
    options.add_argument("--text-field", default="text", help="[text]")
    given = options.parse_args(list(arguments))
    bad: list[BadRecord] = []
    scorers = [load_scorer(path) for path in given.models]
    if len({scorer.header.name for scorer in scorers}) < len(scorers):
        raise ConfigError("two scorers have the same name", remedy="train one of them with another --name")
    counts: Counter[str] = Counter()
    written = write_jsonl(given.out, _scored_rows(given.corpus, scorers, given.text_field, bad, counts))
    say(f"{given.out}: {written} rows, {len(bad)} could not be read")
    for name, count in sorted(counts.items()):
        say(f"  {name}: {count}")
    _say_bad(bad)
    return 0


def _scored_rows(
    corpus: Path, scorers: Sequence[Scorer], text_field: str, bad: list[BadRecord], counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    from puyu.data.corpus import in_batches, languages_of, rows

    for batch in in_batches(rows([corpus], quarantine=bad.append, text_field=text_field)):
        texts = [document.text for _, document in batch]
        languages = languages_of(texts, [document.language for _, document in batch])
        columns = {scorer.header.name: scorer.score(texts, languages).tolist() for scorer in scorers}
        for at, (row, _) in enumerate(batch):
            scores = dict(row["scores"]) if isinstance(row.get("scores"), dict) else {}
            for name, column in columns.items():
                missing = math.isnan(column[at])
                scores |= {f"{name}_unvalidated": 1.0} if missing else {name: round(column[at], 4)}
                counts[f"{name}, {languages[at]}: {'not validated' if missing else 'scored'}"] += 1
            yield {**row, "language": languages[at], "scores": scores}


def _say_bad(bad: Sequence[BadRecord]) -> None:
    for record in bad[:5]:
        say(f"  {record.path}, line {record.line}: {record.reason}")
    if len(bad) > 5:
        say(f"  and {len(bad) - 5} more")


# ---- annotate


def _annotate(arguments: Sequence[str]) -> int:
    from puyu.data.annotate import AnnotateConfig, annotate, recheck
    from puyu.data.corpus import documents
    from puyu.data.scorers import load_scorer
    from puyu.data.train_scorer import read_labels
    from puyu.files import write_jsonl

    given = _annotate_options().parse_args(list(arguments))
    if given.out.exists():
        raise ConfigError(f"{given.out} is there already, perhaps with labels", remedy="choose another --out")
    config = AnnotateConfig(rows=given.rows, uncertain=given.uncertain, recheck=given.recheck, seed=given.seed)
    scorer = load_scorer(given.model)
    bad: list[BadRecord] = []
    known = read_labels(given.labels).rows if given.labels else {}
    found = annotate(documents([given.corpus], quarantine=bad.append), scorer, config, known=known)
    rows = [*found, *recheck(given.model, scorer, config)]
    write_jsonl(given.out, rows)
    counts = Counter(row["why"] for row in rows)
    listed = ", ".join(f"{count} {why}" for why, count in sorted(counts.items()))
    say(f"{given.out}: {len(rows)} rows of round {rows[0]['round']} to label ({listed}); {len(bad)} could not be read")
    _say_bad(bad)
    return 0


def _annotate_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="puyu data annotate", description="What a person should label next.")
    options.add_argument("corpus", type=Path, metavar="CORPUS", help="JSONL, or a folder that puyu data wrote")
    options.add_argument("--with", dest="model", type=Path, required=True, metavar="MODEL")
    options.add_argument("-n", dest="rows", type=int, default=50, help="rows to label [50]")
    options.add_argument("--out", type=Path, required=True, help="JSONL with empty `label`s")
    options.add_argument("--labels", nargs="+", type=Path, help="labels of earlier rounds, not to be asked again")
    options.add_argument("--uncertain", type=float, default=0.0, help="share of uncertain predictions [0]")
    options.add_argument("--recheck", type=int, default=10, help="earlier labels that the scorer contradicts [10]")
    options.add_argument("--seed", type=int, default=0)
    return options
