"""What every bench shares: probes of the machine, turns of ours and the peer, bounds, results, the table.

    python bench/harness.py table            the newest result of each bar, as markdown
    python bench/spine_train.py --save       one bench; --save keeps the result

A bench measures; this file alone decides `holds`. With a peer, both sides run in turns in the same minutes, and what
counts is the lower 95 % bound (one-sided, Student's t on the logarithms) of the paired ratios ours / peer; for a bar
with `<=` the upper one. Without a peer it is the median of the samples. Memory-read and matmul probes run before and
after; a run whose probes drift by more than 10 % is void and is not recorded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BARS = ROOT / "bench" / "bars.yaml"
RESULTS = ROOT / "bench" / "results"
sys.path.append(str(ROOT))  # the benches also run from a checkout that is not installed
MAX_DRIFT = 0.10
MIN_PAIRS = 5
PROBE_PATIENCE = 30.0

# one-sided 95 % quantiles of Student's t, degrees of freedom 1..30
_T95 = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812),
    *(1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725),
    *(1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697),
)


# --- bars and bounds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise: a number, how it is compared, and with whom."""

    id: str
    claim: str
    bench: str
    op: str
    goal: float
    unit: str
    peer: str = ""

    def met(self, value: float) -> bool:
        return value >= self.goal if self.op == ">=" else value <= self.goal


def load_bars(path: Path = BARS) -> list[Bar]:
    import yaml

    return [Bar(**row) for row in yaml.safe_load(path.read_text(encoding="utf-8"))["bars"]]


@dataclass(frozen=True, slots=True)
class Samples:
    """What one bar was measured with; `peer` pairs with `ours` by position."""

    id: str
    ours: Sequence[float]
    peer: Sequence[float] = ()
    unit: str = ""


def paired_bound(ours: Sequence[float], peer: Sequence[float], *, upper: bool = False) -> float:
    """The 95 % bound (lower unless `upper`) of the geometric mean of ours / peer."""
    logs = [math.log(a / b) for a, b in zip(ours, peer, strict=True)]
    if len(logs) < 2:
        raise ValueError("a bound needs at least two pairs")
    t = _T95[min(len(logs) - 1, len(_T95)) - 1]
    reach = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(statistics.fmean(logs) + (reach if upper else -reach))


def judge(bar: Bar, samples: Samples) -> dict[str, Any]:
    """The row of one bar. With a peer, `value` is the geometric mean ratio and `bound` decides."""
    row: dict[str, Any] = {"id": bar.id, "value": statistics.median(samples.ours), "unit": bar.unit}
    row |= {"op": bar.op, "goal": bar.goal, "peer": bar.peer or None, "peer_value": None}
    row |= {"samples": list(samples.ours), "peer_samples": list(samples.peer)}
    if not bar.peer:
        return {**row, "holds": bar.met(row["value"])}
    row["ours_value"], row["peer_value"] = row["value"], statistics.median(samples.peer)
    row["sample_unit"] = samples.unit
    row["value"] = math.exp(statistics.fmean(math.log(a / b) for a, b in zip(samples.ours, samples.peer, strict=True)))
    row["bound"] = paired_bound(samples.ours, samples.peer, upper=bar.op == "<=")
    return {**row, "holds": len(samples.ours) >= MIN_PAIRS and bar.met(row["bound"])}


def judged(found: Sequence[Samples]) -> list[dict[str, Any]]:
    """The rows of some bars."""
    bars = {bar.id: bar for bar in load_bars()}
    return [judge(bars[samples.id], samples) for samples in found]


# --- the machine ---------------------------------------------------------------------------------------------------


def probe() -> dict[str, float]:
    """Memory read in GB/s and fp32 matmul in GFLOP/s: the best of many tries.

    On a shared machine the bandwidth falls to two thirds for ten or twenty seconds at a time; only the best over a
    longer time tells the machine's own state from its neighbors'.
    """
    import torch

    block, a = torch.ones(1 << 26), torch.ones(1024, 1024)
    read, product = _best(lambda: block.sum()), _best(lambda: a @ a)
    return {"memory_read_gb_s": 4 * (1 << 26) / read / 1e9, "matmul_gflop_s": 2 * 1024**3 / product / 1e9}


def _best(function: Callable[[], object]) -> float:
    """The shortest call, in seconds, once `PROBE_PATIENCE` has passed without one shorter by 3 %."""
    function()
    best = _timed(function)
    until = time.perf_counter() + PROBE_PATIENCE
    while time.perf_counter() < until:
        if (found := _timed(function)) < 0.97 * best:
            until = time.perf_counter() + PROBE_PATIENCE
        best = min(best, found)
    return best


def _timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def drift(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The largest relative change of any probe; 0 without probes."""
    return max((abs(after[name] / value - 1) for name, value in before.items()), default=0.0)


def machine() -> str:
    """Processor, cores and memory, without names that identify the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model or platform.processor() or platform.machine()}, {cores()} cores, {memory:.0f} GiB"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts(bench: str, versions: Mapping[str, str], *, card: str = "") -> dict[str, Any]:
    """What a result says of its making."""
    return {
        "bench": bench,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "machine": f"{card}; {machine()}" if card else machine(),
        "load": list(os.getloadavg()),
        "versions": {"python": platform.python_version(), **versions},
        "command": command(sys.argv),
    }


def command(words: Sequence[str]) -> str:
    """What was typed; files that lie elsewhere on the machine are PATH."""
    rest = ("PATH" if Path(word).is_absolute() else word for word in words[1:])
    return " ".join(["python", f"bench/{Path(words[0]).name}", *rest])


def commit() -> str:
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "puyu", "bench", ":!bench/results"], capture_output=True, text=True
    )
    return found.stdout.strip() + ("+changes" if changed.stdout.strip() else "") if found.returncode == 0 else ""


# --- peers and turns -----------------------------------------------------------------------------------------------


def peer_python(name: str, given: Path | None = None) -> Path:
    """The interpreter of a peer's own environment, made from bench/peers/NAME.txt unless it is there already."""
    if given is not None:
        return given
    folder, wanted = ROOT / ".venv-peers" / name, ROOT / "bench" / "peers" / f"{name}.txt"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != wanted.read_text():
        print(f"making {folder} from {wanted.name}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True, symlinks=os.name == "posix")
        lines = [line for line in wanted.read_text().splitlines() if line and not line.startswith(("#", "-"))]
        for step in (lines[:1], ["-r", str(wanted)]):  # the exact pin of torch first, so that nothing else chooses it
            subprocess.run([python, "-m", "pip", "install", "-q", *step], check=True, stdout=sys.stderr)
        stamp.write_text(wanted.read_text())
    return python


class Worker:
    """A process that speaks the protocol of worker.py. `facts` is what it said when it was ready."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        # how threads wait is left to each side: OpenMP's default looks for about a millisecond before it sleeps, so an
        # idle side does not disturb the other, and a side that waits often is not slowed by going to sleep each time
        quiet = {"TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(cores()), "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=pipe, stdout=pipe, text=True, env=environment
        )
        self.facts = self._line()

    def measure(self) -> float:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._line()["value"])

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"worker ended with code {self.process.wait()}: {self.process.args}")
        value: dict[str, Any] = json.loads(line)
        return value

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


def alternate(ours: Worker, peer: Worker, *, pairs: int) -> tuple[list[float], list[float]]:
    """Measure in turns, changing who goes first; both have warmed up before they said that they are ready."""
    found: dict[Worker, list[float]] = {ours: [], peer: []}
    for index in range(pairs):
        for worker in (ours, peer) if index % 2 == 0 else (peer, ours):
            found[worker].append(worker.measure())
        print(f"  pair {index + 1}/{pairs}: {found[ours][-1]:.5g} against {found[peer][-1]:.5g}", file=sys.stderr)
    return found[ours], found[peer]


def comparison(
    doc: str,
    sides: Mapping[str, Callable[[Path], None]],
    compare: Callable[[argparse.Namespace], None],
    *,
    pairs: int,
    only: Sequence[str] = (),
) -> None:
    """The command line of a bench with a peer: itself, and in its workers one of its sides. `only`: bars that can be
    measured alone."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=pairs, help="samples of each side")
    parser.add_argument("--peer-python", type=Path, help="interpreter with the peer; default: made in .venv-peers")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    if only:
        parser.add_argument("--only", choices=only, default="", help="measure one of them")
    arguments = parser.parse_args()
    if arguments.worker:
        sides[arguments.worker[0]](Path(arguments.worker[1]))
    else:
        compare(arguments)


# --- results -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run of a bench: probes at both ends, facts, samples; `finish` prints the JSON line and records it.

    A bench that counts and does not time is made with `before={}` and goes without probes.
    """

    bench: str
    versions: dict[str, str] = field(default_factory=dict)
    peer_flags: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=probe)
    load: tuple[float, float, float] = field(default_factory=os.getloadavg)

    def counted(self, bench: str) -> Run:
        """The part of this run that counts and does not time, under a name of its own: no probe makes it void."""
        return replace(self, bench=bench, before={})

    def finish(self, found: Sequence[Samples], *, save: bool) -> dict[str, Any]:
        """Probe again, judge, print; a void run is never kept."""
        result = self.result(found, after=probe() if self.before else {})
        path = RESULTS / f"{result['date'][:10]}-{self.bench}.json"
        if result["void"]:
            print(f"void: {result['void']}; run again on a quiet machine", file=sys.stderr)
        elif save:
            RESULTS.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result), flush=True)
        return result

    def result(self, found: Sequence[Samples], *, after: Mapping[str, float]) -> dict[str, Any]:
        """All that is known of the run; a void one holds nothing."""
        rows = judged(found)
        changed = drift(self.before, after)
        void = f"probes drifted by {changed:.0%}" if changed > MAX_DRIFT else ""
        return {
            **facts(self.bench, self.versions),
            "load": list(self.load),
            "peer_flags": self.peer_flags,
            "probes": {"before": self.before, "after": dict(after)},
            "void": void,
            "notes": self.notes,
            "bars": [row | {"holds": False} for row in rows] if void else rows,
        }


def newest(folder: Path = RESULTS) -> dict[str, tuple[str, dict[str, Any]]]:
    """Bar id -> (date, row) of its newest recorded run."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in [] if result.get("void") else result["bars"]:
            if row["id"] not in found or found[row["id"]][0] < result["date"]:
                found[row["id"]] = (result["date"], row)
    return found


def table(bars: Sequence[Bar] | None = None, folder: Path = RESULTS) -> str:
    """Every bar with its newest result, as markdown."""
    results = newest(folder)
    lines = ["| bar | what | goal | result | peer | holds | date |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for bar in load_bars() if bars is None else bars:
        cells = [bar.id, bar.claim, f"{bar.op} {bar.goal:g} {bar.unit}", *_cells(bar, results.get(bar.id))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(bar: Bar, found: tuple[str, dict[str, Any]] | None) -> list[str]:
    if found is None:
        return ["no result", bar.peer or "–", "not held", "–"]
    date, row = found
    result, peer = f"{row['value']:.3g} {row['unit']}", "–"
    if bar.peer:
        end = "at least" if bar.op == ">=" else "at most"
        result += f" ({end} {row['bound']:.3g}): {row['ours_value']:,.4g} {row['sample_unit']}"
        peer = f"{bar.peer}: {row['peer_value']:,.4g} {row['sample_unit']}"
    # goals may have moved since the run: today's goal counts
    held = bar.met(row["bound"] if bar.peer else row["value"]) and row["holds"]
    return [result, peer, "yes" if held else "not held", date[:10]]


def main(arguments: Sequence[str]) -> int:
    if list(arguments) == ["table"]:
        print(table())
        return 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
