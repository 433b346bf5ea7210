"""report.html: the whole run on one page that opens from disk, with no script and no request.

    write_report(Path("runs/nano"), stages, Path("runs/nano/report.html"), title="nano")

It reads what the stages left in their folders and knows nothing of how they were made. A file or a number that is
missing gives a sentence that says so; every text is escaped; the same run gives the same bytes. Stages are found by
verb, so a recipe may name them as it likes. What it looks for, in the folder of each verb:

    data       ledger.json      {"stages", "total": {"read", "kept", "dropped": {stage: {rule: n}}, "quarantined"}}
    tokenizer  report.json      {"vocab_size", "compression": {group: {"bytes_per_token", "chars_per_token"}}}
    pretrain, sft, reward, ppo  metrics.jsonl, one row a step: "step", "loss", "val_loss"?, "phase"?,
                                "tokens_per_s"; reward also "accuracy"; ppo "reward", "score"?, "check"?, "kl",
                                "clipped"?, "length"?; in numbers "heldout" (by group) as the stages give it
    quantize   numbers          "bits", "size_before", "size_after" (bytes), "before"/"after": {"perplexity",
                                "decode_tokens_per_s"}
    eval       summary.json     as puyu.eval.compare.to_json writes it
    talk       transcript.json  [{"title", "messages", "checkpoint"?}]; base.json [{"prompt", "text"}]
    all        lineage.json     as puyu.lineage writes it

Other spellings that are understood stand at the head of report_making.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from puyu.chain import report_making as making
from puyu.chain import report_results as results
from puyu.chain.charts import short
from puyu.chain.report_parts import StageView, first_file, headline, missing, of_verb, pick
from puyu.errors import InputError, PuyuError
from puyu.files import write_text
from puyu.lineage import Lineage, find_lineage
from puyu.log import duration

__all__ = ["StageView", "write_report"]

STYLE = Path(__file__).with_name("report_style.css")


@dataclass(frozen=True, slots=True)
class _Section:
    """A part of the page. `build` gives its HTML, or "" when there is nothing to show."""

    id: str
    title: str
    build: Callable[[], str]
    missing: str


def write_report(run_dir: Path, stages: Sequence[StageView], out: Path, *, title: str = "") -> Path:
    """Write the page to `out` and return it."""
    name = title or run_dir.name
    sections = [
        _Section("stages", "Stages", lambda: _stage_table(stages), "No stage has run."),
        _Section("data", "From raw files to clean documents", lambda: making.data(stages), _absent("data/ledger.json")),
        _Section("tokenizer", "Tokenizer", lambda: making.tokenizer(stages), _absent("tokenizer/report.json")),
        _Section("training", "Training", lambda: making.training(stages), _absent("pretrain/metrics.jsonl")),
        _Section("speed", "Training speed", lambda: making.speed(stages), _absent("pretrain/metrics.jsonl")),
        _Section("alignment", "Alignment with PPO", lambda: making.alignment(stages), _absent("ppo/metrics.jsonl")),
        _Section("evaluation", "Evaluation", lambda: results.evaluation(stages), _absent("eval/summary.json")),
        _Section("quantization", "Quantization", lambda: results.quantization(stages), "No quantize stage has run."),
        _Section("conversation", "Conversation", lambda: results.conversation(stages), _absent("talk/transcript.json")),
        _Section("lineage", "Lineage", lambda: results.lineage(stages), _absent("lineage.json")),
    ]
    body = _header(name, stages) + "".join(_render(section) for section in sections)
    write_text(out, _page(name, sections, body))
    return out


def _absent(name: str) -> str:
    return f"{name} is not there: the stage that writes it has not finished."


def _page(name: str, sections: Sequence[_Section], body: str) -> str:
    links = "".join(f'<a href="#{s.id}">{escape(s.title)}</a>' for s in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(name)} · Puyu</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f'<main>\n{body}</main>\n<nav aria-label="Sections">{links}</nav>\n</body>\n</html>\n'
    )


def _render(section: _Section) -> str:
    """A section; artifacts that are missing or of another shape give a sentence, not a crash."""
    try:
        inner = section.build() or missing(section.missing)
    except (PuyuError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        inner = missing(f"This part cannot be shown: {type(error).__name__}: {error}")
    return f'<section id="{section.id}">\n<h2>{escape(section.title)}</h2>\n{inner}\n</section>\n'


# --- header and stages ---------------------------------------------------------------------------------------------


def _header(name: str, stages: Sequence[StageView]) -> str:
    found = _receipts(stages)
    facts = [
        ("machine", _last(found, "machine")),
        ("code", _last(found, "code")),
        ("finished", _last(found, "finished")),
    ]
    shown = " · ".join(f"{label} {escape(value)}" for label, value in facts if value)
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in _tiles(stages)
    )
    return (
        f'<header>\n<p class="brand">{_WAVE} Puyu 浦语</p>\n<h1>{escape(name)}</h1>\n'
        '<p class="lead">A language model, from raw documents to an agent that answers: what each stage did, '
        f'measured in this run.</p>\n<p class="facts">{shown}</p>\n<div class="tiles">{tiles}</div>\n</header>\n'
    )


_WAVE = (
    '<svg class="wave" viewBox="0 0 28 18" aria-hidden="true"><path d="M1,5 q6.5,-6 13,0 t13,0"/>'
    '<path d="M1,10 q6.5,-6 13,0 t13,0"/><path d="M1,15 q6.5,-6 13,0 t13,0"/></svg>'
)


def _receipts(stages: Sequence[StageView]) -> list[Lineage]:
    found = []
    for stage in stages:
        try:
            receipt = find_lineage(stage.out)
        except InputError:
            continue  # a torn receipt: the lineage section names the stage as one without a receipt
        if receipt is not None:
            found.append(receipt)
    return found


def _last(receipts: Sequence[Lineage], field: str) -> str:
    dated = sorted(receipts, key=lambda receipt: receipt.finished)
    return str(getattr(dated[-1], field)) if dated else ""


def _tiles(stages: Sequence[StageView]) -> Iterator[tuple[str, str]]:
    """The few numbers that a reader wants first; those that are missing stay away."""
    yield "total time", duration(sum(stage.seconds for stage in stages))
    for stage in of_verb(stages, "pretrain")[:1]:
        if size := pick(stage.numbers, "parameters", "num_parameters", "params"):
            yield "parameters", short(size)
        if tokens := pick(stage.numbers, "tokens", "train_tokens", "num_tokens"):
            yield "tokens seen", short(tokens)
    try:
        summary = first_file(stages, "eval", "summary.json") or {}
        yield from _result_tiles(summary)
    except (PuyuError, LookupError, TypeError, AttributeError):
        return  # the evaluation section says what is wrong with this file


def _result_tiles(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for line in summary.get("lines", ()):
        wanted = {"persona": "persona questions right", "arithmetic_tools": "arithmetic right, with the calculator"}
        model = summary["models"][-1]
        if line["task"] in wanted and line["metric"] == "acc" and model in line["results"]:
            yield f"{wanted[line['task']]} ({model})", f"{line['results'][model]['value']:.0%}"


def _stage_table(stages: Sequence[StageView]) -> str:
    if not stages:
        return ""
    longest = max(stage.seconds for stage in stages) or 1.0
    rows = "".join(_stage_row(stage, longest) for stage in stages)
    total = duration(sum(stage.seconds for stage in stages))
    return (
        '<table class="stages"><thead><tr><th>stage</th><th class="num">time</th><th>key numbers</th></tr></thead>'
        f'<tbody>{rows}</tbody><tfoot><tr><td>total</td><td class="num">{total}</td><td></td></tr></tfoot></table>'
    )


def _stage_row(stage: StageView, longest: float) -> str:
    verb = f' <span class="muted">{escape(stage.verb)}</span>' if stage.verb != stage.name else ""
    bar = f'<div class="thin"><i style="width:{stage.seconds / longest:.1%}"></i></div>'
    return (
        f'<tr><td><b>{escape(stage.name)}</b>{verb}</td><td class="num">{duration(stage.seconds)}{bar}</td>'
        f"<td>{headline(stage.numbers)}</td></tr>"
    )
