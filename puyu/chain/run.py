"""The whole chain as one command: recipe -> stages -> report.

    $ puyu chain recipes/nano.yaml

Runs each stage through `runner`, prints a table of stages with times and key numbers, the transcript of the
talk stage, and the path of the report.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puyu.chain.recipe import Recipe
from puyu.chain.runner import Result, run_stage
from puyu.errors import ResourceError
from puyu.files import existing_parent, read_json
from puyu.log import duration, say

_MIN_FREE_MIB = 200


def run_chain(recipe: Recipe, *, until: str = "") -> list[Result]:
    """Run every stage (or up to `until`), write the report, print what a person wants to see."""
    check_disk(recipe.out)
    began = time.monotonic()
    results: list[Result] = []
    steps = recipe.steps if not until else recipe.steps[: recipe.steps.index(recipe.step(until)) + 1]
    for number, step in enumerate(steps, 1):
        say(f"[{number}/{len(steps)}] {step.name}: {step.stage.help}")
        result = run_stage(step.name, step.stage, step.config, step.out)
        say(f"      {_outcome(result)}")
        results.append(result)
    report = write_chain_report(recipe, results)
    for line in summary_lines(recipe, results, time.monotonic() - began):
        print(line)
    print(f"\nreport: {report}")
    return results


def _outcome(result: Result) -> str:
    if result.status == "kept":
        return f"nothing to do (made in {duration(result.seconds)})"
    word = "finished after a resume" if result.status == "resumed" else "done"
    return f"{word} in {duration(result.seconds)}"


def check_disk(out: Path) -> None:
    """Refuse to start when the disk cannot hold a small run."""
    folder = existing_parent(out)
    free = shutil.disk_usage(folder).free // 2**20
    if free < _MIN_FREE_MIB:
        raise ResourceError(f"only {free} MiB free on {folder}", remedy=f"free at least {_MIN_FREE_MIB} MiB")


def write_chain_report(recipe: Recipe, results: Sequence[Result]) -> Path:
    """Write report.html from what the stages left on disk (unchanged work gives an unchanged report)."""
    from puyu.chain.report import StageView, write_report

    views = [StageView(r.name, r.verb, r.out, r.seconds, r.numbers) for r in results]
    return write_report(recipe.out, views, recipe.out / "report.html", title=recipe.name)


def summary_lines(recipe: Recipe, results: Sequence[Result], seconds: float) -> list[str]:
    """The table of stages, the transcript, and one line of what was done."""
    lines = ["", *table_lines(results)]
    for result in results:
        transcript = result.out / "transcript.json"
        if transcript.is_file():
            lines += ["", *transcript_lines(read_json(transcript))]
    made = [result for result in results if result.status != "kept"]
    if made:
        lines += ["", f"{len(made)} of {len(results)} stages ran in {duration(seconds)}"]
    else:
        lines += ["", f"nothing to do: all {len(results)} stages are up to date ({duration(seconds)})"]
    return lines


def table_lines(results: Sequence[Result]) -> list[str]:
    """stage | time | key numbers, aligned."""
    width = max((len(result.name) for result in results), default=5)
    rows = [f"{'stage':<{width}}  {'time':>12}  key numbers", "-" * (width + 60)]
    for result in results:
        rows.append(f"{result.name:<{width}}  {duration(result.seconds):>12}  {headline(result.numbers)}")
    total = sum(result.seconds for result in results)
    return [*rows, "-" * (width + 60), f"{'total':<{width}}  {duration(total):>12}"]


def headline(numbers: Mapping[str, Any], limit: int = 6) -> str:
    """The stage's own `headline` when it gives one, else its first plain numbers."""
    chosen = numbers.get("headline")
    if isinstance(chosen, str):
        return chosen
    plain = {k: v for k, v in numbers.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return ", ".join(f"{key} {_short(value)}" for key, value in list(plain.items())[:limit])


def _short(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"


def transcript_lines(transcript: Sequence[Mapping[str, Any]]) -> list[str]:
    """A conversation as a person reads it, tool calls shown."""
    lines = []
    for item in transcript:
        lines.append(f"--- {item.get('title', '')}")
        for message in item.get("messages", ()):
            lines += _message_lines(message)
    return lines


def _message_lines(message: Mapping[str, Any]) -> list[str]:
    lines = []
    if message.get("content"):
        lines.append(f"{message['role']:>10}: {message['content']}")
    for call in message.get("tool_calls") or ():
        function = call["function"]
        lines.append(f"{message['role']:>10}: [calls {function['name']} {function['arguments']}]")
    return lines
