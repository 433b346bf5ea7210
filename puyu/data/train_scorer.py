"""Labels -> a scorer: cross-fitted, calibrated, validated language by language.

    >>> result = train_scorer(labels, TrainConfig(name="toxic_score"))              # doctest: +SKIP
    >>> save_scorer(Path("toxic_score.scorer"), result.scorer)                      # doctest: +SKIP

Every label is judged by a classifier that has not seen it (cross-fitting over `folds`, equal texts in one fold); from
those margins come the calibration, the agreement with people by language, and the labels that look wrong (confident
learning: Northcutt et al. 2021). The scorer itself is trained on all. A file of human validation labels replaces the
folds as the judge. The same labels give the same file, in whatever order (where a text is labeled twice, the later
label counts) and on however many cores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from puyu.configure import Config
from puyu.data.calibrate import Agreement, Array, Calibration, Kind, agreement, fit
from puyu.data.corpus import languages_of
from puyu.data.hashed import Plan, Shape, Weights, margins, train
from puyu.data.scorers import ALL, Gate, Header, Round, Scorer, weights_hash
from puyu.device import num_cores
from puyu.documents.characters import folded
from puyu.documents.readers import text_problem
from puyu.errors import ConfigError, InputError
from puyu.files import hash_bytes, hash_file, read_jsonl_lines

Flags = NDArray[np.bool_]
CONFIDENT = 0.8
"""How far a probability must be from the label to be a disagreement."""


class TrainConfig(Config):
    """How a scorer is made of labels."""

    name: str = "score"
    """The score's column."""
    positive: tuple[str, ...] = ()
    """Label values that a high score shall mean; not needed for true/false and 1/0."""
    shape: Shape = Shape()
    """The features."""
    plan: Plan = Plan()
    """The training."""
    folds: int = Field(default=4, ge=2)
    """Parts for cross-fitting."""
    calibration: Kind = "platt"
    """platt, or isotonic for some thousand labels and more."""
    gate: Gate = Gate()
    """What must hold in a language before the scorer is used there."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the fields of a row of labels."""

    text: str = "text"
    label: str = "label"
    language: str = "language"


@dataclass(frozen=True, slots=True)
class Labeled:
    """A text with what a person said of it; `guess` is what a scorer had said before, where it did."""

    text: str
    label: str
    language: str = ""
    round: int = 0
    guess: str = ""


@dataclass(slots=True)
class Labels:
    """Labels as they were read, one for each text, and what became of the rows."""

    rows: dict[str, Labeled] = field(default_factory=dict)
    """By their text."""
    sources: dict[str, str] = field(default_factory=dict)
    rounds: dict[int, Counter[str]] = field(default_factory=dict)
    unlabeled: int = 0
    repeated: int = 0
    changed: int = 0

    def add(self, row: Labeled) -> None:
        """The later label of a text counts."""
        counts = self.rounds.setdefault(row.round, Counter())
        counts["labels"] += 1
        counts["guessed"] += bool(row.guess)
        counts["agreed"] += bool(row.guess) and row.guess == row.label
        before = self.rows.pop(row.text, None)
        if before is not None and before.label == row.label:
            self.repeated += 1
        elif before is not None:
            self.changed += 1
            counts["changed"] += 1
        self.rows[row.text] = row


def read_labels(paths: Sequence[Path], *, fields: Fields = Fields()) -> Labels:
    """Rows of JSONL files, later files last; a row with an empty label is counted, one without text is an error."""
    labels = Labels()
    for path in paths:
        for number, value in read_jsonl_lines(path):
            if problem := text_problem(value, fields.text, (fields.label, fields.language, "guess")):
                raise InputError(
                    f"{path}, line {number}: {problem.partition(': ')[2]}", remedy="see --text-field, or mend it"
                )
            if fields.label not in value:
                raise InputError(f"{path}, line {number}: no field {fields.label!r}", remedy="see --label-field")
            if value[fields.label] is None or value[fields.label] == "":
                labels.unlabeled += 1
            else:
                labels.add(_labeled(value, value[fields.text], fields))
        name = path.name if path.name not in labels.sources else path.as_posix()
        labels.sources[name] = hash_file(path)
    return labels


def _labeled(value: Mapping[str, Any], text: str, fields: Fields) -> Labeled:
    number = value.get("round", 0)
    guess = value.get("guess")
    return Labeled(
        text,
        label_name(value[fields.label]),
        str(value.get(fields.language) or ""),
        number if isinstance(number, int) else 0,
        label_name(guess) if guess is not None else "",
    )


def label_name(value: Any) -> str:
    """`1` for true and 1, `0` for false and 0, other values as text."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return str(int(value))
    return {"true": "1", "false": "0"}.get(str(value).lower(), str(value))


@dataclass(frozen=True, slots=True)
class Trained:
    """The scorer, and the labels that look wrong, the most surprising first."""

    scorer: Scorer
    disagreements: list[dict[str, Any]]


def train_scorer(labels: Labels, config: TrainConfig, *, validation: Labels | None = None) -> Trained:
    """Train, calibrate, validate; InputError where labels of both kinds are missing."""
    rows = _with_languages(_in_order(labels))
    positive, negative = _kinds(rows, config.positive)
    flags = np.array([row.label in positive for row in rows])
    folds = np.array([_fold(row.text, config) for row in rows])
    weights, crossed = _cross_fit([row.text for row in rows], flags, folds, config)
    judged, judges = (crossed, _with_flags(rows, flags)) if validation is None else _judged(weights, validation, config)
    languages = np.array([row.language for row, _ in judges])
    truths = np.array([flag for _, flag in judges])
    lines = _calibrations(judged, truths, languages, config)
    found = _agreements(judged, truths, languages, config)
    refused = {name: why for name, row in found.items() if name != ALL and (why := config.gate.refusal(row))}
    odd = _disagreements(rows, flags, folds, crossed, config)
    header = Header(
        name=config.name,
        positive=positive,
        negative=negative,
        **{name: getattr(config, name) for name in ("shape", "plan", "gate")},
        calibrations=lines,
        agreement=found,
        refused=refused,
        validated_by="folds" if validation is None else " ".join(validation.sources),
        rounds=_rounds(labels),
        sources=labels.sources,
        disagreements=len(odd),
        weights=weights_hash(weights),
    )
    return Trained(Scorer(header, weights), odd)


def _in_order(labels: Labels) -> list[Labeled]:
    """By the hash of the text, so that the order of the files does not matter."""
    return sorted(labels.rows.values(), key=lambda row: hash_bytes(row.text.encode()))


def _with_languages(rows: Sequence[Labeled]) -> list[Labeled]:
    found = languages_of([row.text for row in rows], [row.language for row in rows])
    return [replace(row, language=language) for row, language in zip(rows, found, strict=True)]


def _with_flags(rows: Sequence[Labeled], flags: Flags) -> list[tuple[Labeled, bool]]:
    return list(zip(rows, flags.tolist(), strict=True))


def _kinds(rows: Sequence[Labeled], positive: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(values that are positive, all others)."""
    values = sorted({row.label for row in rows})
    positive = tuple(map(label_name, positive)) or (("1",) if set(values) <= {"0", "1"} else ())
    if not positive:
        listed = ", ".join(values[:8])
        raise ConfigError(f"labels are {listed}: which of them is positive?", remedy=f"--positive {values[-1]}")
    negative = tuple(value for value in values if value not in positive)
    if len(negative) == len(values) or not negative:
        kind = "negative" if not negative else "positive"
        raise InputError(f"no {kind} label among {len(rows)}", remedy="both kinds are needed to learn a difference")
    return positive, negative


def _fold(text: str, config: TrainConfig) -> int:
    """Texts that are equal but for case and blanks are in one fold."""
    line = " ".join(folded(text).split())
    return int(hash_bytes(f"{config.plan.seed} {line}".encode())[:12], 16) % config.folds


def _cross_fit(texts: Sequence[str], flags: Flags, folds: NDArray[Any], config: TrainConfig) -> tuple[Weights, Array]:
    """Weights from all texts, and for each text the margin of a classifier that was trained without its fold."""
    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        whole = pool.submit(train, texts, flags.tolist(), shape=config.shape, plan=config.plan)
        parts = pool.map(partial(_one_fold, texts, flags, folds, config), range(config.folds))
        crossed = np.zeros(len(texts))
        for fold, part in enumerate(parts):
            crossed[folds == fold] = part
        return whole.result(), crossed


def _one_fold(texts: Sequence[str], flags: Flags, folds: NDArray[Any], config: TrainConfig, fold: int) -> Array:
    """Margins of the texts of one fold; 0 when there is nothing to learn from outside it."""
    inside, outside = np.flatnonzero(folds == fold).tolist(), np.flatnonzero(folds != fold).tolist()
    if not inside or not outside:
        return np.zeros(len(inside))
    weights = train([texts[at] for at in outside], flags[outside].tolist(), shape=config.shape, plan=config.plan)
    return margins([texts[at] for at in inside], weights, shape=config.shape)


def _judged(weights: Weights, validation: Labels, config: TrainConfig) -> tuple[Array, list[tuple[Labeled, bool]]]:
    """The scorer's own margins of the validation labels."""
    rows = _with_languages(_in_order(validation))
    positive, _ = _kinds(rows, config.positive)
    return margins([row.text for row in rows], weights, shape=config.shape), [
        (row, row.label in positive) for row in rows
    ]


def _calibrations(judged: Array, truths: Flags, languages: NDArray[Any], config: TrainConfig) -> dict[str, Calibration]:
    """One for all, and one for each language that has labels enough."""
    lines = {ALL: fit(judged, truths, kind=config.calibration)}
    for language, count in sorted(Counter(languages.tolist()).items()):
        inside = languages == language
        few = min(int(truths[inside].sum()), int((~truths[inside]).sum()))
        if count >= config.gate.labels and few >= config.gate.each:
            lines[language] = fit(judged[inside], truths[inside], kind=config.calibration)
    return lines


def _agreements(judged: Array, truths: Flags, languages: NDArray[Any], config: TrainConfig) -> dict[str, Agreement]:
    """Of each language and of all, by probabilities whose calibration did not see them."""
    names = [ALL, *sorted(set(languages.tolist()))]
    parts = {name: np.full(len(judged), True) if name == ALL else languages == name for name in names}
    return {
        name: agreement(_halved(judged[inside], truths[inside], config.calibration), truths[inside])
        for name, inside in parts.items()
    }


def _halved(judged: Array, truths: Flags, kind: Kind) -> Array:
    """Each half calibrated by the other. Rows come in the order of hashes, so that every other one is a fair half."""
    found, half = np.empty(len(judged)), np.arange(len(judged)) % 2 == 0
    for part in (half, ~half):
        other = ~part if truths[~part].any() and not truths[~part].all() else np.full(len(judged), True)
        found[part] = fit(judged[other], truths[other], kind=kind).of(judged[part])
    return found


def _disagreements(
    rows: Sequence[Labeled], flags: Flags, folds: NDArray[Any], crossed: Array, config: TrainConfig
) -> list[dict[str, Any]]:
    """Labels that a classifier trained without them contradicts with confidence."""
    probabilities = fit(crossed, flags, kind=config.calibration).of(crossed)
    distances = np.abs(probabilities - flags)
    order = sorted(np.flatnonzero(distances >= CONFIDENT).tolist(), key=lambda at: (-distances[at], rows[at].text))
    return [
        {
            "text": rows[at].text,
            "language": rows[at].language,
            "was": rows[at].label,
            "score": round(float(probabilities[at]), 4),
            "round": rows[at].round,
        }
        for at in order
    ]


def _rounds(labels: Labels) -> tuple[Round, ...]:
    return tuple(Round(round=number, **counts) for number, counts in sorted(labels.rounds.items()))
