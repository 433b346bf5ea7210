"""The file that says which evaluation items stand in a corpus: `contamination.json`, beside the data stage's output.

    found = load_contamination(Path("runs/mine/data"))
    found.verdicts(Path("samples/eval/mc.jsonl")).shares    # {"17": 1.0, "29": 0.62}: share of the item that is there

`puyu data contamination` writes it; who evaluates reads it. An evaluation set is known by the content of its file, and
its items by the ids that the evaluation gives them (`id`, or the number of the line). It measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puyu.errors import InputError
from puyu.files import hash_file, read_object

FILE = "contamination.json"
FORMAT = "puyu contamination 1"


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What was found of one evaluation file; whatever is in neither is clean."""

    name: str
    shares: Mapping[str, float]
    """Id -> share that stands in the corpus, of the contaminated items."""
    unchecked: frozenset[str]
    """Ids of the items that are too short to be looked for."""


@dataclass(frozen=True, slots=True)
class Contamination:
    """What the file says."""

    method: Mapping[str, Any]
    evaluations: Mapping[str, Verdicts]
    """By the content hash of the evaluation file."""
    losses: Mapping[str, Any] | None = None

    def verdicts(self, file: Path) -> Verdicts | None:
        """What was found of the file as it is now; None when that was not checked."""
        return self.evaluations.get(hash_file(file))


def item_id(row: Mapping[str, Any], line: int) -> str:
    """The id of an evaluation item: its own, or the number of its line where it has none or null."""
    return str(line if row.get("id") is None else row["id"])


def load_contamination(path: Path) -> Contamination:
    """Read the file, or the one in a folder; InputError when it is none."""
    place = path / FILE if path.is_dir() else path
    value = read_object(place)
    if value.get("format") != FORMAT:
        raise InputError(f"{place} is no report of contamination", remedy="make one: puyu data contamination")
    try:
        evaluations = {part["hash"]: _verdicts(part) for part in value["evaluations"]}
        return Contamination(value["method"], evaluations, value["losses"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{place} is torn: {error!r}", remedy="make it again: puyu data contamination") from error


def _verdicts(part: Mapping[str, Any]) -> Verdicts:
    shares = {row["id"]: row["covered"] for row in part["rows"] if row["contaminated"]}
    return Verdicts(part["name"], shares, frozenset(part["too_short_ids"]))
