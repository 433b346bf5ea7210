"""`puyu data self-instruct`: an instruction set grows from seeds, with any model behind a server as the writer.

puyu data self-instruct SEEDS.jsonl --out NEW.jsonl --url http://127.0.0.1:8000 --count 100
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puyu.cli.options import help_lines
from puyu.files import hash_file, hash_json, write_json, write_jsonl
from puyu.log import say


def main(arguments: Sequence[str]) -> int:
    """The verb with its own name first."""
    from puyu.client import Client
    from puyu.configure import apply_overrides, build, dump, parse_overrides
    from puyu.data.self_instruct import Journal, SelfInstructConfig, grow, read_seeds
    from puyu.data.self_instruct_prompts import VERSION

    given = _options("\n".join(help_lines(SelfInstructConfig))).parse_args(list(arguments[1:]))
    flags = {"count": given.count, "language": given.language}
    values: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    config = build(
        SelfInstructConfig, apply_overrides(values, parse_overrides(given.set)), where="puyu data self-instruct"
    )
    seeds = read_seeds(given.seeds)
    key = os.environ.get(given.key_env, "") if given.key_env else ""
    with Client(given.url, model=given.model, api_key=key) as client:
        name = given.model or client.models()[0]
        # `count` is left out: a larger one goes on with the same journal
        identity = hash_json([VERSION, dump(config.model_copy(update={"count": 1})), hash_file(given.seeds), name])
        journal = Journal(_beside(given.out, "journal.jsonl"), identity=identity)
        grown = asyncio.run(grow(seeds, client, config, journal=journal, name=name))
    write_jsonl(given.out, grown.records)
    write_jsonl(_beside(given.out, "rejected.jsonl"), grown.rejected)
    write_json(_beside(given.out, "report.json"), {**grown.report, "model": name, "config": dump(config)})
    report = grown.report
    say(f"{given.out}: {report['records']} records of {report['candidates']} candidates in {report['rounds']} rounds")
    for reason, count in report["rejected"].items():
        say(f"  {reason.replace('_', ' ')}: {count}")
    if report["ended"] == "patience":
        say(f"ended before {config.count}: {config.patience} rounds brought nothing; give more seeds, or another model")
    return 0


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


def _options(fields: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="puyu data self-instruct",
        description="Grows an instruction set from seeds; run it again to go on.",
        epilog=f"fields for --set:\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("seeds", type=Path, metavar="SEEDS", help="JSONL of instruction, input, output")
    options.add_argument("--out", type=Path, required=True, help="JSONL (alpaca form, with provenance)")
    options.add_argument("--url", default="http://127.0.0.1:8000", help="the writer's server [http://127.0.0.1:8000]")
    options.add_argument("--model", default="", help="its model [the first one]")
    options.add_argument("--key-env", default="", metavar="NAME", help="environment variable with the server's key")
    options.add_argument("--count", type=int, help="records to write [100]")
    options.add_argument("--language", choices=("en", "zh"), help="of the prompts [en]")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="similarity=0.6, chat=false")
    return options
