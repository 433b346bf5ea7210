"""Which documents go as duplicates: the keys of all segments in one place, the stages one after the other.

`gather` writes the keys of every document that is still there into flat columns, together with the indexes of earlier
runs; `decide` asks the group stages and says for each row what became of it. Rows of earlier runs stand behind the own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from puyu.configure import dump
from puyu.data.columns import Columns, ColumnWriter, stage_columns
from puyu.data.dedup import DedupConfig
from puyu.data.emit import Decision, Stretch
from puyu.data.segments import Clock
from puyu.data.substring import Cuts
from puyu.documents.stages import Copies, Drop, best_first, first_equal, plain
from puyu.errors import ConfigError
from puyu.files import write_jsonl

INDEX = "index"
_ROWS = 100_000
Rows = NDArray[np.int64]


def gather(tables: Iterable[pa.Table], config: DedupConfig, folder: Path) -> tuple[Columns, int]:
    """(columns of all rows, how many of them are this run's)."""
    with ColumnWriter(folder, durable=False) as writer:  # made anew by every run
        for table in tables:
            if table.num_columns:
                writer.append(table)
        own = writer.rows
        for earlier in config.against:
            index = Columns.open(earlier / INDEX)
            _check_index(index, config, earlier)
            for start in range(0, index.rows, _ROWS):
                writer.append(index.table(np.arange(start, min(start + _ROWS, index.rows)), list(index)))
    return Columns.open(folder), own


def _check_index(index: Columns, config: DedupConfig, folder: Path) -> None:
    if index.about.get("keys") != _keys_of(config):
        raise ConfigError(
            f"dedup.against: the index of {folder} was made with other keys of duplicates",
            remedy="give this run the same dedup.exact, url, paragraphs and near, or make the index again",
        )


def _keys_of(config: DedupConfig) -> dict[str, object]:
    """What keys depend on; thresholds may differ."""
    near = None if config.near is None else {**dump(config.near), "threshold": None}
    units = None if config.substrings is None else config.substrings.units
    return {"stages": [stage.name for stage in config.keyed()], "near": near, "units": units}


@dataclass(frozen=True)
class Verdicts:
    """Stage by row (0: none, else 1 + its number), the row that stays instead, and how alike they are."""

    stages: tuple[str, ...]
    rules: tuple[tuple[str, float], ...]
    stage: NDArray[np.uint8]
    of: Rows
    value: NDArray[np.float64]
    ids: NDArray[np.uint64]
    cuts: Cuts

    def of_rows(self, start: int, stop: int) -> dict[int, Decision]:
        """Decisions on rows [start, stop), by their place from `start` on."""
        gone = np.flatnonzero(self.stage[start:stop])
        return {int(place): self.decision(start + int(place)) for place in gone}

    def cuts_of(self, start: int, stop: int) -> dict[int, list[Stretch]]:
        """Stretches to cut out of rows [start, stop), by their place from `start` on."""
        found: dict[int, list[Stretch]] = {}
        for at in range(*np.searchsorted(self.cuts.rows, (start, stop)).tolist()):
            stays = id_text(self.ids[int(self.cuts.of[at])])
            stretch = int(self.cuts.begins[at]), int(self.cuts.ends[at]), stays
            found.setdefault(int(self.cuts.rows[at]) - start, []).append(stretch)
        return found

    def decision(self, row: int) -> Decision:
        number = int(self.stage[row]) - 1
        rule, threshold = self.rules[number]
        drop = Drop(rule, float(self.value[row]), threshold, id_text(self.ids[int(self.of[row])]))
        return Decision(self.stages[number], drop.to_json())


def id_text(pair: NDArray[np.uint64]) -> str:
    """Two numbers as the id that they are."""
    return f"{int(pair[0]):016x}{int(pair[1]):016x}"


def decide(columns: Columns, own: int, config: DedupConfig, clock: Clock) -> Verdicts:
    """Identical rows first, then each stage on what is left."""
    stages = config.stages()
    rows = columns.rows
    ids = np.stack([plain(columns, "id_high"), plain(columns, "id_low")], axis=1) if rows else np.empty((0, 2), "u8")
    found = Verdicts(
        ("identical", *(stage.name for stage in stages)),
        (("identical", 1.0), *((stage.rule, stage.threshold) for stage in stages)),
        np.zeros(rows, dtype=np.uint8),
        np.zeros(rows, dtype=np.int64),
        np.zeros(rows),
        ids,
        Cuts.none(),
    )
    if not rows:
        return found
    with clock.of("identical"):
        older = np.zeros(rows, dtype=np.int64)
        older[own:] = 1 if config.against_keeps == "older" else -1
        _mark(found, 0, _identical(ids, older))
        before = [older, plain(columns, "date")] if config.prefer == "newest" else [older]
        order = best_first(ids, plain(columns, "quality"), plain(columns, "size"), *before)
    for number, stage in enumerate(stages, 1):
        with clock.of(stage.name):
            _mark(found, number, stage.decide(stage_columns(columns, stage.name), order[found.stage[order] == 0]))
    if (cutter := config.cutter()) is not None:
        with clock.of(cutter.name):
            cuts = cutter.cuts(stage_columns(columns, cutter.name), order[found.stage[order] == 0])
            return replace(found, cuts=cuts.by_row())
    return found


def _mark(found: Verdicts, number: int, copies: Copies) -> None:
    found.stage[copies.rows] = number + 1
    found.of[copies.rows], found.value[copies.rows] = copies.of, copies.values


def _identical(ids: NDArray[np.uint64], older: Rows) -> Copies:
    """Equal text of one source has one id: that of the run that is preferred stays, then the first."""
    first = first_equal(ids[:, 0], ids[:, 1], prefer=-older)
    gone = np.flatnonzero(first != np.arange(len(first)))
    return Copies(gone, first[gone], np.ones(len(gone)))


def write_index(columns: Columns, kept: Rows, config: DedupConfig, folder: Path) -> None:
    """The keys of what is kept, for later runs."""
    with ColumnWriter(folder, about={"keys": _keys_of(config)}) as writer:
        for start in range(0, len(kept), _ROWS):
            writer.append(columns.table(kept[start : start + _ROWS], list(columns)))


def write_superseded(verdicts: Verdicts, own: int, path: Path) -> int:
    """Documents of earlier runs that a newer copy takes the place of; returns how many."""
    gone = np.flatnonzero(verdicts.stage[own:]) + own
    rows = ({"id": id_text(verdicts.ids[row]), **verdicts.decision(int(row)).drop} for row in gone)
    return write_jsonl(path, rows)
