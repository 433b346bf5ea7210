"""The sections about what came out: evaluation, quantization, the conversation, lineage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from puyu.chain.charts import Dot, Lane, dot_chart, lane_chart
from puyu.chain.report_parts import StageView, first_file, headline, is_number, of_verb, pick, table
from puyu.lineage import FILE, Lineage, artifact_folder, find_lineage
from puyu.log import duration

# --- evaluation ----------------------------------------------------------------------------------------------------


def evaluation(stages: Sequence[StageView]) -> str:
    """Shares as dots with whiskers; every metric as a table; what became of the samples."""
    summary = first_file(stages, "eval", "summary.json")
    if summary is None:
        return ""
    models, lines = summary["models"], summary["lines"]
    shares = [line for line in lines if line["unit"] == "share"]
    dots = [(_title(line), _dots(line, models)) for line in shares]
    chance = {_title(line): line["chance"] for line in shares if line.get("chance") is not None}
    drawing = dot_chart(dots, models, reference=chance)
    note = "Dots are means, whiskers 95 % intervals (Wilson for shares). A dashed line marks blind guessing. "
    note += "Differences are paired: the same samples, per-sample differences."
    table_ = _results_table(models, lines)
    return f'<figure class="wide">{drawing}</figure><p class="note">{note}</p>{table_}{_statuses(lines, models)}'


def _title(line: Mapping[str, Any]) -> str:
    return f"{line['task'].replace('_', ' ')} · {line['metric'].replace('_', ' ')}"


def _dots(line: Mapping[str, Any], models: Sequence[str]) -> list[Dot]:
    found = ((model, line["results"][model]) for model in models if model in line["results"])
    return [Dot(model, r["value"], r["low"], r["high"], f"n = {r['n']}") for model, r in found]


def _results_table(models: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    last = " − ".join(reversed(models[-2:])) if len(models) > 1 else ""
    head = ["task", "n", *models, last]
    return table(head, [_result_row(line, models) for line in lines])


def _result_row(line: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    counts = [result["n"] for result in line["results"].values()]
    name = f"{escape(_title(line))}<small>{escape(_unit(line))}</small>"
    return [name, f"{max(counts, default=0):,}", *(_result(line, model) for model in models), _last_step(line, models)]


def _unit(line: Mapping[str, Any]) -> str:
    return "" if line["unit"] == "share" else f"{line['unit']}, {line['better']} is better"


def _result(line: Mapping[str, Any], model: str) -> str:
    found = line["results"].get(model)
    if found is None:
        return "–"
    low, high = _value(line, found["low"]), _value(line, found["high"])
    return f"<b>{_value(line, found['value'])}</b><small>{low} – {high}</small>"


def _value(line: Mapping[str, Any], value: float) -> str:
    return f"{100 * value:.1f} %" if line["unit"] == "share" else f"{value:.3f}"


def _last_step(line: Mapping[str, Any], models: Sequence[str]) -> str:
    """The last model minus the one before it, colored when its interval leaves out zero."""
    for pair in line["differences"]:
        if [pair["a"], pair["b"]] == list(models[-2:]):
            clear = pair["low"] > 0 or pair["high"] < 0
            good = (pair["value"] > 0) == (line["better"] == "higher")
            css = ("good" if good else "bad") if clear else "unclear"
            scale, unit = (100, " points") if line["unit"] == "share" else (1, "")
            digits = ".1f" if line["unit"] == "share" else ".3f"
            low, high = scale * pair["low"], scale * pair["high"]
            value = f"{scale * pair['value']:+{digits}}{unit}"
            cell = f'<b class="{css}">{value}</b><small>{low:+{digits}} … {high:+{digits}}</small>'
            return cell.replace("-", "−")
    return "–"


def _statuses(lines: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    """How every sample ended, by task and model."""
    tasks = {line["task"]: line["counts"] for line in lines}
    names = list(dict.fromkeys(s for counts in tasks.values() for found in counts.values() for s in found))
    rows = [
        [f"{escape(task)} · {escape(model)}", *(f"{counts[model].get(name, 0):,}" for name in names)]
        for task, counts in tasks.items()
        for model in models
        if model in counts
    ]
    head = ["task · model", *(name.replace("_", " ") for name in names)]
    return f"<details><summary>How every sample ended</summary>{table(head, rows)}</details>"


# --- quantization --------------------------------------------------------------------------------------------------


def quantization(stages: Sequence[StageView]) -> str:
    """Size, perplexity and speed: the model before, then each variant."""
    views = of_verb(stages, "quantize")
    if not views:
        return ""
    rows = [_variant("before", views[0], "before"), *(_variant(view.name, view, "after") for view in views)]
    if all(cell == "–" for row in rows for cell in row[1:]):
        return "".join(f'<p class="note"><b>{escape(view.name)}</b> {headline(view.numbers)}</p>' for view in views)
    return table(["weights", "size", "perplexity", "decode, tokens/s"], rows)


def _variant(name: str, view: StageView, when: str) -> list[str]:
    size = pick(view.numbers, f"size_{when}", f"{when}.size", f"bytes_{when}", f"{when}.bytes", f"{when}.size_bytes")
    perplexity = pick(view.numbers, f"{when}.perplexity", f"perplexity_{when}")
    speed = pick(view.numbers, f"{when}.decode_tokens_per_s", f"decode_tokens_per_s_{when}", f"{when}.tokens_per_s")
    first = (
        size if when == "before" else pick(view.numbers, "size_before", "before.size", "bytes_before", "before.bytes")
    )
    share = f"<small>{size / first:.0%}</small>" if size and first and when == "after" else ""
    return [
        f"<b>{escape(name)}</b>",
        f"{size / 2**20:.2f} MiB{share}" if size is not None else "–",
        f"{perplexity:.2f}" if perplexity is not None else "–",
        f"{speed:,.0f}" if speed is not None else "–",
    ]


# --- conversation --------------------------------------------------------------------------------------------------


def conversation(stages: Sequence[StageView]) -> str:
    """The transcript as it was, tool calls shown, and the base model's raw text."""
    transcript = first_file(stages, "talk", "transcript.json") or []
    base = first_file(stages, "talk", "base.json") or []
    chats = "".join(_chat(item) for item in transcript)
    raw = "".join(f"<blockquote><b>{escape(item['prompt'])}</b>{escape(item['text'])}</blockquote>" for item in base)
    lead = '<p class="note">Before fine-tuning, the base model only continues text. As it is (sampled):</p>'
    return (f'<div class="chats">{chats}</div>' if chats else "") + (lead + raw if raw else "")


def _chat(item: Mapping[str, Any]) -> str:
    turns = "".join(_turn(message) for message in item.get("messages", ()))
    checkpoint = f"<small>{escape(str(item['checkpoint']))}</small>" if item.get("checkpoint") else ""
    return f'<article class="chat"><h3>{escape(str(item.get("title", "")))}{checkpoint}</h3>{turns}</article>'


def _turn(message: Mapping[str, Any]) -> str:
    role = str(message.get("role", ""))
    css = role if role in ("system", "user", "assistant", "tool") else "tool"
    text, calls = _text(message.get("content")), message.get("tool_calls") or ()
    label = f"{message.get('name') or 'tool'} → " if css == "tool" else ""
    bubble = f'<div class="turn {css}">{escape(str(label))}{escape(text)}</div>' if text or not calls else ""
    return bubble + "".join(f'<div class="turn call">{_call(call)}</div>' for call in calls)


def _text(content: Any) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(str(part.get("text", f"[{part.get('type', 'part')}]")) for part in content)


def _call(call: Mapping[str, Any]) -> str:
    """name(arguments); a single argument without its name, as a person would write it."""
    function = call.get("function", call)
    arguments = str(function.get("arguments", ""))
    try:
        values = json.loads(arguments)
    except json.JSONDecodeError:
        values = None  # what the model wrote is no JSON: shown as it is
    if isinstance(values, dict):
        arguments = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
    return f"<b>{escape(str(function.get('name', '')))}</b>({escape(arguments)})"


# --- lineage -------------------------------------------------------------------------------------------------------


def lineage(stages: Sequence[StageView]) -> str:
    """Which artifact was made from which, from the receipts alone."""
    receipts = {stage.name: found for stage in stages if (found := find_lineage(stage.out)) is not None}
    folders = {stage.out.resolve(): stage.name for stage in stages if stage.name in receipts}
    nodes = [_lane(name, receipt, folders) for name, receipt in receipts.items()]
    absent = [stage.name for stage in stages if stage.name not in receipts]
    note = f'<p class="note">Without a {FILE}: {escape(", ".join(absent))}.</p>' if absent else ""
    rows = [[f"<b>{escape(name)}</b>", *_receipt_cells(receipt)] for name, receipt in receipts.items()]
    details = table(["artifact", "stage key", "code", "finished", "time"], rows)
    drawing = lane_chart(nodes)
    if not drawing:
        return note
    more = f"<details><summary>Keys and code versions</summary>{details}</details>"
    return f'<figure class="wide">{drawing}</figure>{note}{more}'


def _lane(name: str, receipt: Lineage, folders: Mapping[Path, str]) -> Lane:
    paths = [artifact_folder(Path(item.path)).resolve() for item in receipt.inputs]
    parents = list(dict.fromkeys(found for path in paths if (found := _owner(path, folders)) and found != name))
    raw = sum(_owner(path, folders) is None for path in paths)
    files = f"{raw} file{'s' if raw != 1 else ''} or folder{'s' if raw != 1 else ''} of raw input" if raw else ""
    sources = ", ".join(filter(None, [*parents, files]))
    label = name if name == receipt.stage else f"{name} ({receipt.stage})"
    return Lane(name, label, f"from {sources}" if sources else "from nothing but its config", tuple(parents))


def _owner(path: Path, folders: Mapping[Path, str]) -> str | None:
    """The stage whose folder a path is, or lies in."""
    return next((folders[place] for place in (path, *path.parents) if place in folders), None)


def _receipt_cells(receipt: Lineage) -> Iterator[str]:
    yield f"<code>{escape(receipt.key[:12])}</code>"
    yield escape(receipt.code)
    yield escape(receipt.finished)
    yield duration(receipt.seconds) if is_number(receipt.seconds) else "–"
