"""`puyu compare full lora qlora --model DIR --data FILE --out DIR`: how large is the gap between methods?

puyu compare full lora qlora --model runs/nano/sft --data chats.jsonl --out runs/compare
puyu compare lora dora --model DIR --data FILE --set tune.rank=8 --out runs/ranks

Each method is `puyu sft` in a process and a folder of its own, on the same data, with the same conversations held out
(`heldout`, a tenth unless it is given) and its own rate unless one is given. Left: compare.json, report.html.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, get_args

from puyu.cli.options import Options, parse
from puyu.errors import ConfigError, TrainingError
from puyu.log import duration, say

_USAGE = "usage: puyu compare METHOD METHOD ... --model HUB_OR_DIR --data FILE --out DIR [--set key=value ...]"


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.help:
        print(f"{_USAGE}\n\nmethods: {', '.join(_methods())}; all other flags are those of `puyu sft`")
        return 0
    _refuse(options)
    rows = [_run(method, options) for method in options.positional]
    assert options.out is not None
    from puyu.chain.run_report import write_run_report
    from puyu.chain.run_view import RunView
    from puyu.files import write_json

    write_json(options.out / "compare.json", {"methods": rows})
    page = write_run_report([RunView(options.out / row["method"]) for row in rows], options.out / "report.html")
    print("\n".join(table(rows)))
    say(f"curves: {page}")
    return 0


def _methods() -> tuple[str, ...]:
    from puyu.train.tune import Method

    return get_args(Method)


def _refuse(options: Options) -> None:
    if len(options.positional) < 2:
        raise ConfigError(f"puyu compare needs two methods or more, got {options.positional}", remedy=_USAGE)
    if unknown := [word for word in options.positional if word not in _methods()]:
        raise ConfigError(f"no such method: {unknown[0]}", remedy=f"one of {', '.join(_methods())}")
    if len(set(options.positional)) < len(options.positional):
        raise ConfigError("a method is named twice")
    if options.out is None:
        raise ConfigError("puyu compare needs --out DIR", remedy=_USAGE)
    if any(name in ("method", "tune.method") for name, _ in options.fields):
        raise ConfigError("--method: the methods are the words behind compare", remedy=_USAGE)


def _run(method: str, options: Options) -> dict[str, Any]:
    """Train with one method; its numbers."""
    from puyu.files import read_jsonl

    assert options.out is not None
    out = options.out / method
    say(f"--- {method}")
    words = [f"--{name}={value}" for name, value in options.fields]
    words += [f"--set={text}" for text in options.overrides]
    words += ["--method", method, "--out", str(out)]
    said = {name for name, _ in options.fields} | {text.partition("=")[0] for text in options.overrides}
    if not said & {"heldout", "validation"}:
        words += ["--heldout", "0.1"]
    done = subprocess.run([sys.executable, "-m", "puyu", "sft", *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise TrainingError(f"{method} failed (exit code {done.returncode})", remedy="mend what it says above")
    numbers = json.loads(done.stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in out.glob("*.safetensors*"))
    memory = max((row["memory_gib"] for row in read_jsonl(out / "metrics.jsonl") if "memory_gib" in row), default=0.0)
    kept = {name: numbers[name] for name in ("trained_parameters", "loss_last", "tokens_per_s", "seconds")}
    return {"method": method, "val_loss": numbers.get("val_loss"), "memory_gib": memory, "bytes": size, **kept}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as a person reads them; gaps are to the first method."""
    head = ("method", "trained", "held-out loss", "gap", "tokens/s", "memory", "on disk", "time")
    cells = [head]
    for row in rows:
        loss, first = row["val_loss"], rows[0]["val_loss"]
        gap = "" if loss is None or row is rows[0] else f"{loss - first:+.4f}"
        cells.append(
            (
                row["method"],
                f"{row['trained_parameters'] / 1e6:,.2f} M",
                "-" if loss is None else f"{loss:.4f}",
                gap,
                f"{row['tokens_per_s']:,.0f}",
                f"{row['memory_gib']:.2f} GiB",
                f"{row['bytes'] / 2**20:,.1f} MiB",
                duration(row["seconds"]),
            )
        )
    wide = [max(len(line[at]) for line in cells) for at in range(len(head))]
    return ["  ".join(f"{text:>{width}}" for text, width in zip(line, wide, strict=True)) for line in cells]
