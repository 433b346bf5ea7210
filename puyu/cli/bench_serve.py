"""`puyu bench serve --url URL`: load on any OpenAI-compatible server, and what it answers, as a table, JSON, SVG.

The client is light and needs no torch, but on a machine that it shares with the server it still takes some of it;
the report says how much.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from puyu.cli.options import Options, all_overrides, help_lines, parse
from puyu.configure import build
from puyu.errors import ConfigError
from puyu.files import write_text
from puyu.load.report import describe, table, to_json
from puyu.load.run import LoadConfig, Result, Row, send, session_with
from puyu.log import Progress, say

USAGE = """usage: puyu bench serve --url URL [--key value ...] [--json FILE] [--plot FILE.svg]

Load on an OpenAI-compatible server, ours or any other: how fast it answers, and how steadily.

  puyu bench serve --url http://127.0.0.1:8000 --requests 200 --rate 4
  puyu bench serve --workload random --prompt 64-512 --output 128 --concurrency 16
  puyu bench serve --workload conversations FILE.jsonl --seconds 60 --rate 2 --slo-ttft-ms 500
"""


def main(argv: Sequence[str]) -> int:
    """The verb; exit code 1 when no request was completed."""
    options = parse(argv)
    if options.help:
        print(USAGE)
        print("\n".join(help_lines(LoadConfig)))
        print(f"  --{'json':<24} file for all numbers, with a row for each request\n  --{'plot':<24} SVG of the run")
        return 0
    files = {name: _file(options, name) for name in ("json", "plot")}
    config = read_config(options)
    say(f"{config.url}: {describe(config)}")
    result = asyncio.run(_watched(config))
    print("\n".join(table(result, config)))
    if files["json"]:
        write_text(files["json"], json.dumps(to_json(result, config), ensure_ascii=False, allow_nan=False) + "\n")
    if files["plot"]:
        from puyu.cli.load_plot import drawing

        write_text(files["plot"], drawing(result, config))
    return 0 if any(row.is_ok for row in result.rows) else 1


def read_config(options: Options) -> LoadConfig:
    """The load that a command line asks for."""
    values = dict(all_overrides(options))
    if options.positional and values.get("workload") != "conversations":
        raise ConfigError(
            f"{options.positional[0]!r} is not understood", remedy="a file belongs to --workload conversations FILE"
        )
    if len(options.positional) > 1:
        raise ConfigError(f"file: one can be used, not {len(options.positional)}: {' '.join(options.positional)}")
    values |= {"file": options.positional[0]} if options.positional else {}
    for name in ("prompt", "output", "api_key", "model"):  # YAML reads some of them as numbers
        if name in values:
            values[name] = str(values[name])
    return build(LoadConfig, values, where="puyu bench serve")


def _file(options: Options, name: str) -> Path | None:
    """Take a file's name out of the options; what cannot be written later is said now."""
    given = [value for key, value in options.fields if key == name]
    options.fields = [(key, value) for key, value in options.fields if key != name]
    if not given:
        return None
    path = Path(given[-1])
    if path.is_dir():
        raise ConfigError(f"{name}: {path} is a folder", remedy="name a file")
    return path


async def _watched(config: LoadConfig) -> Result:
    """The run, with its progress where the number of requests is known."""
    async with session_with(config) as session:
        progress = Progress("requests", config.wanted, unit="req") if config.wanted else None

        def told(row: Row) -> None:
            if progress is not None:
                progress.update(status=row.status)

        result = await send(session, told=told)
        if progress is not None:
            progress.close()
        return result
