"""Which samples of a task stand in the data that a model was trained on: clean, contaminated, or not known.

    reports = [load_contamination(path) for path in files_of(Path("runs/mine/ppo"))]         # by its lineage
    split(Path("gsm8k.jsonl"), ["1", "2"], reports)                    # {"1": "clean", "2": "contaminated"}

The reports are those of `puyu data contamination`, one beside each corpus; a task's file is known by its content and a
sample by its id. A sample is contaminated when one report says so, and clean when all reports that were found have
checked it. It measures nothing itself, and a model without a report has no subsets at all. Subsets beside the whole,
as in OpenCompass and GPT-3 (Brown et al. 2020, appendix C).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from puyu.documents.contamination import FILE, Contamination
from puyu.errors import InputError
from puyu.lineage import Node, ancestors, find_lineage

Subset = Literal["clean", "contaminated", "unknown"]
SUBSETS: tuple[Subset, ...] = ("clean", "contaminated", "unknown")


def files_of(checkpoint: Path) -> list[Path]:
    """The reports beside all that the checkpoint was made of, sorted; a hub name or somebody's folder has none."""
    return sorted({node.path / FILE for node in _made_of(checkpoint) if (node.path / FILE).is_file()})


def corpora_without(checkpoint: Path) -> list[Path]:
    """The data stages that the checkpoint was made of and that have no report beside them, sorted."""
    data = {node.path for node in _made_of(checkpoint) if node.lineage is not None and node.lineage.stage == "data"}
    return sorted(path for path in data if not (path / FILE).is_file())


def _made_of(checkpoint: Path) -> Iterator[Node]:
    if checkpoint.is_dir() and find_lineage(checkpoint) is not None:
        yield from _nodes(ancestors(checkpoint))


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for _, parent in node.parents:
        yield from _nodes(parent)


def split(file: Path, ids: Sequence[str], reports: Sequence[Contamination]) -> dict[str, Subset]:
    """Id -> its subset; nothing where there is no report. Of a file that a report does not know, nothing is clean."""
    if not reports:
        return {}
    known = [report.verdicts(file) for report in reports]
    contaminated = {id for verdicts in known if verdicts is not None for id in verdicts.shares}
    unchecked = {id for verdicts in known if verdicts is not None for id in verdicts.unchecked}
    rest: Subset = "unknown" if None in known else "clean"
    return {
        id: "contaminated" if id in contaminated else "unknown" if id in unchecked else rest for id in map(str, ids)
    }


def check_it_fits(report: Contamination, files: Sequence[Path], *, path: Path) -> None:
    """InputError for a report that was given and knows none of the files."""
    if any(report.verdicts(file) is not None for file in files):
        return
    names = ", ".join(found.name for found in report.evaluations.values()) or "no file at all"
    remedy = f"puyu data contamination CORPUS --against {' '.join(map(str, files))}"
    raise InputError(f"{path} is about {names}, and about none of the tasks' files as they are now", remedy=remedy)


def counts_of(subsets: Mapping[str, Subset]) -> dict[str, int]:
    """How many samples each subset has."""
    return {name: sum(found == name for found in subsets.values()) for name in SUBSETS}
