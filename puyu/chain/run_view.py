"""A training run as its folder tells it, while it runs or later: rows of metrics, events, samples, what was planned.

It reads files and nothing else: metrics.jsonl (torn lines are counted), run.json, samples.jsonl, and in train_state/
health.jsonl, saved states and result.json. Needs no torch.

    run = RunView(Path("runs/nano/pretrain")); run.refresh(); run.value("loss")
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, BinaryIO

from puyu.chain.charts import Band
from puyu.chain.report_parts import is_number
from puyu.errors import InputError
from puyu.files import read_json

_RECENT = 50
"""Steps over which rates and shares are taken."""


class Rows:
    """The objects of a JSONL file that grows, or is written anew where a run went back. Its last line may be torn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: list[dict[str, Any]] = []
        self.names: dict[str, None] = {}
        """Keys of all objects, in order of first sight."""
        self.torn = 0
        self._at, self._file = 0, (0, 0)

    def refresh(self) -> None:
        """Read what is new."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as stream:
            self._reset(stream)
            lines = stream.read().split(b"\n")
        self._at += sum(len(line) + 1 for line in lines[:-1])
        for line in lines[:-1]:
            self._take(line)

    def _reset(self, stream: BinaryIO) -> None:
        """Go to where reading ended, or to the beginning of another or a shorter file."""
        found = self.path.stat()
        same = (found.st_dev, found.st_ino)
        if same != self._file or found.st_size < self._at:
            self.values.clear()
            self.names.clear()
            self._at, self._file, self.torn = 0, same, 0
        stream.seek(self._at)

    def _take(self, line: bytes) -> None:
        try:
            value = json.loads(line or b"null")
        except ValueError:
            self.torn += 1
            return
        if isinstance(value, dict) and is_number(value.get("step")):
            self.values.append(value)
            self.names |= dict.fromkeys(value)
        else:
            self.torn += bool(line.strip())


class RunView:
    """One run. `refresh` reads what is new; everything else looks at what was read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.parent if folder.name == "metrics.jsonl" else folder
        if not (self.folder / "metrics.jsonl").is_file():
            found = sorted(path.parent for path in self.folder.glob("*/metrics.jsonl")) if folder.is_dir() else []
            nearest = f"did you mean {', '.join(map(str, found[:4]))}?" if found else "give the --out of a training run"
            what = "has no metrics.jsonl, no training has begun there" if folder.exists() else "does not exist"
            raise InputError(f"{folder} {what}", remedy=nearest)
        self._files = [Rows(self.folder / name) for name in ("metrics.jsonl", "train_state/health.jsonl")]
        self._files.append(Rows(self.folder / "samples.jsonl"))
        self.about: dict[str, Any] = {}

    def refresh(self) -> None:
        """Read what is new."""
        for file in self._files:
            file.refresh()
        path = self.folder / "run.json"
        self.about = read_json(path) if path.is_file() else {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row a step, oldest first."""
        return self._files[0].values

    @property
    def torn(self) -> int:
        """Lines of metrics.jsonl that could not be read."""
        return self._files[0].torn

    @property
    def events(self) -> list[dict[str, Any]]:
        """What health noted: `step`, `event`, `text`."""
        return self._files[1].values

    @property
    def samples(self) -> list[dict[str, Any]]:
        """`step`, `prompt`, `text`."""
        return self._files[2].values

    @property
    def name(self) -> str:
        return str(self.about.get("name") or self.folder.name)

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def steps(self) -> int:
        """How many there will be; 0: unknown."""
        return int(self.about.get("steps") or 0)

    def value(self, name: str) -> float | None:
        """The newest number of that name."""
        return next((float(row[name]) for row in reversed(self.rows) if is_number(row.get(name))), None)

    def values(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of every row that has it."""
        return [(float(row["step"]), float(row[name])) for row in self.rows if is_number(row.get(name))]

    def parts(self, kind: str) -> list[str]:
        """The NAMEs of kind/NAME, in order of first sight."""
        return [name.partition("/")[2] for name in self._files[0].names if name.startswith(f"{kind}/")]

    def mean(self, name: str) -> float | None:
        """Over the last steps."""
        found = [row[name] for row in self.rows[-_RECENT:] if is_number(row.get(name))]
        return sum(found) / len(found) if found else None

    def share(self, span: str) -> float | None:
        """Of the time of the last steps, how much went into a span."""
        recent = [row for row in self.rows[-_RECENT:] if is_number(row.get("seconds"))]
        total = sum(row["seconds"] for row in recent)
        return sum(row.get(f"time/{span}", 0.0) for row in recent) / total if total else None

    @property
    def seconds_left(self) -> float | None:
        """By what steps have taken lately, with evaluations and saving."""
        recent = [row for row in self.rows[-_RECENT:] if is_number(row.get("seconds"))]
        if not recent or not self.steps:
            return None
        spans = ("seconds", "time/evaluate", "time/save")
        each = sum(row.get(name, 0.0) for row in recent for name in spans) / len(recent)
        return each * max(self.steps - self.step, 0)

    @property
    def phases(self) -> list[Band]:
        """Named stretches of steps; none where there is only one."""
        found = self.about.get("phases") or []
        bands = [Band(row["name"], float(row["first"]) - 1, float(row["last"])) for row in found]
        return bands if len(bands) > 1 else []

    @property
    def status(self) -> str:
        """`finished`, `running`, or for how long nothing was written."""
        if (self.folder / "train_state" / "result.json").is_file() or 0 < self.steps <= self.step:
            return "finished"
        silent = time.time() - (self.folder / "metrics.jsonl").stat().st_mtime
        usual = (self.mean("seconds") or 0) + max(self.value(f"time/{name}") or 0 for name in ("evaluate", "save"))
        return "running" if silent < max(30, 5 * usual) else f"silent for {_ago(silent)}"

    @property
    def saved(self) -> str:
        """The newest saved state."""
        folders = sorted((self.folder / "train_state").glob("step-????????"))
        if not folders:
            return "the finished model" if (self.folder / "model.safetensors").is_file() else "none"
        ago = _ago(max(time.time() - folders[-1].stat().st_mtime, 0))
        return f"step {int(folders[-1].name[5:]):,}, {ago} ago"


def _ago(seconds: float) -> str:
    for size, word in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {word}"
    return f"{seconds:.0f} s"
