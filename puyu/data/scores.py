"""The folder that the data stage wrote, as columns: labels and scores of every document, without a text.

    >>> table = open_scores(Path("runs/nano/data"))                                     # doctest: +SKIP
    >>> table.labels("language").names, table.score("chars").mean()                     # doctest: +SKIP

A column is read when it is asked for, so that a question about two scores reads two. Scores are stored as float32 and
come back as the float64 they were judged as: they are multiples of 1e-4, so that every share and mean below 1024 and
every count below 2**24 is exact. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from puyu.configure import build
from puyu.data.filters import Policies, group_of
from puyu.errors import InputError
from puyu.files import read_object

WORDS = ("source", "domain", "language", "stage", "rule")
"""Columns with few different values."""
_REMEDY = "name the folder that `puyu data CONFIG.yaml --out DIR` wrote"


@dataclass(frozen=True, slots=True)
class Labels:
    """A column with few different values: `names[codes[i]]` is that of document i."""

    codes: NDArray[np.int64]
    names: tuple[str, ...]

    def of(self, names: Iterable[str]) -> NDArray[np.bool_]:
        """Documents whose label is one of these -> [documents]."""
        wanted = set(names)
        return np.array([name in wanted for name in self.names] or [False], dtype=bool)[self.codes]


@dataclass(frozen=True, slots=True)
class Amount:
    """So many documents of so many characters."""

    documents: int
    characters: int


@dataclass(frozen=True)
class ScoreTable:
    """`scores.parquet` and what `ledger.json` says of it."""

    path: Path
    ledger: dict[str, Any]
    file: parquet.ParquetFile

    @property
    def size(self) -> int:
        """Documents: all that were read, less what was quarantined."""
        return int(self.file.metadata.num_rows)

    @cached_property
    def policies(self) -> Policies:
        """The thresholds that the documents were judged by."""
        return build(Policies, self.ledger["config"]["policies"], where=f"{self.path / 'ledger.json'}: config.policies")

    def labels(self, *names: str) -> list[Labels]:
        """Columns of `WORDS`."""
        if self.size == 0:
            return [Labels(np.empty(0, dtype=np.int64), ()) for _ in names]
        table = self._read(names)
        return [_labels(table[name]) for name in names]

    def groups(self, domains: Collection[str]) -> Labels:
        """Languages, and apart from them those of the domains that have thresholds of their own (`group_of`)."""
        language, domain = self.labels("language", "domain")
        own = np.array([name in domains for name in domain.names] or [False])[domain.codes]
        codes = np.where(own, 1 + domain.codes, 0) * max(len(language.names), 1) + language.codes
        there, codes = np.unique(codes, return_inverse=True)
        pairs = [divmod(int(code), max(len(language.names), 1)) for code in there]
        names = [group_of(language.names[at], domain.names[own - 1] if own else "") for own, at in pairs]
        return Labels(codes.reshape(-1), tuple(names))

    def characters(self) -> NDArray[np.int64]:
        """Length of each text before masking -> [documents]."""
        if self.size == 0:
            return np.empty(0, dtype=np.int64)
        return np.asarray(self._read(["characters"])["characters"].to_numpy(), dtype=np.int64)

    def curated(self) -> NDArray[np.bool_]:
        """Whether the source of a document is measured but not judged -> [documents]."""
        if self.size == 0:
            return np.empty(0, dtype=bool)
        return np.asarray(self._read(["curated"])["curated"].to_numpy(zero_copy_only=False), dtype=bool)

    def scores(self, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Score columns as they are stored, NaN where a document has none -> [documents] each.

        A score that no document of the folder has is no column of the file: all NaN.
        """
        there = [name for name in names if name in self.names]
        table = self._read(there)
        nothing = np.full(self.size, np.nan, dtype=np.float32)
        return {name: np.asarray(table[name].to_numpy()) if name in there else nothing for name in names}

    def score(self, name: str) -> NDArray[np.float64]:
        """One score column, exact -> [documents]."""
        return exact(self.scores([name])[name])

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Ids of some documents."""
        return self._ids.take(pa.array(rows, pa.int64())).to_pylist() if len(rows) else []

    @cached_property
    def _ids(self) -> pa.ChunkedArray:
        return self._read(["id"])["id"]

    @cached_property
    def names(self) -> frozenset[str]:
        """Columns of the file."""
        return frozenset(self.file.schema_arrow.names)

    def reached_rules(self, stage: Labels) -> NDArray[np.bool_]:
        """Documents that were measured and judged, or would have been if their source were not curated."""
        stages = self.ledger["stages"]
        return ~stage.of(stages[: stages.index("rules")])

    @property
    def copy_stages(self) -> list[str]:
        """The stages that look for copies: they come last."""
        stages = self.ledger["stages"]
        return list(stages[stages.index("identical") :])

    def _read(self, names: Iterable[str]) -> pa.Table:
        try:
            return self.file.read(columns=list(names))
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self.path / 'scores.parquet'} is damaged: {error}", remedy="run the data stage again"
            ) from error


def open_scores(path: Path) -> ScoreTable:
    """The columns of a folder; InputError where it was not written by the data stage or by an earlier version."""
    if not (path / "ledger.json").is_file():
        raise InputError(f"{path} has no ledger.json", remedy=_REMEDY)
    ledger, file = read_object(path / "ledger.json"), path / "scores.parquet"
    if "config" not in ledger or not file.is_file():
        raise InputError(f"{path} has no score columns: an earlier version wrote it", remedy="run the data stage again")
    try:
        # A folder without a document has no column of labels.
        labels = [name for name in WORDS if name in parquet.read_schema(file).names]
        opened = parquet.ParquetFile(file, read_dictionary=labels, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is no Parquet file: {error}", remedy="run the data stage again") from error
    return ScoreTable(path, ledger, opened)


def exact(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The multiples of 1e-4 that were stored as float32."""
    return np.rint(values.astype(np.float64) * 1e4) / 1e4


def amount(mask: NDArray[np.bool_], characters: NDArray[np.int64]) -> Amount:
    """The documents of a mask."""
    return Amount(int(np.count_nonzero(mask)), int(characters[mask].sum()))


def amounts(
    codes: NDArray[np.int64], characters: NDArray[np.int64], *, groups: int, mask: NDArray[np.bool_] | None = None
) -> list[Amount]:
    """The documents of each group, of those in the mask."""
    if mask is not None:
        codes, characters = codes[mask], characters[mask]
    documents = np.bincount(codes, minlength=groups)
    # Float64 is exact up to 2**53 characters.
    total = np.bincount(codes, weights=characters, minlength=groups)
    return [Amount(int(count), int(size)) for count, size in zip(documents, total, strict=True)]


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with the first column on the left and numbers on the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return [
        "  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]


def share(part: float, whole: float) -> str:
    """`12.3%`, or a dash where there is no whole."""
    return f"{part / whole:.1%}" if whole else "-"


def _labels(column: pa.ChunkedArray) -> Labels:
    joined = column.unify_dictionaries().combine_chunks()
    codes = joined.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return Labels(codes, tuple(joined.dictionary.to_pylist()))
