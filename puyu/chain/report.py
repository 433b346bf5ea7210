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

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from puyu.chain import report_making as making
from puyu.chain import report_results as results
from puyu.chain.charts import short
from puyu.chain.report_parts import Section, StageView, first_file, headline, masthead, of_verb, page, pick, render
from puyu.errors import InputError, PuyuError
from puyu.files import write_text
from puyu.lineage import Lineage, find_lineage
from puyu.log import duration

__all__ = ["StageView", "write_report"]


def write_report(run_dir: Path, stages: Sequence[StageView], out: Path, *, title: str = "") -> Path:
    """Write the page to `out` and return it."""
    name = title or run_dir.name
    sections = [
        Section("stages", "Stages", lambda: _stage_table(stages), "No stage has run."),
        Section("data", "From raw files to clean documents", lambda: making.data(stages), _absent("data/ledger.json")),
        Section("tokenizer", "Tokenizer", lambda: making.tokenizer(stages), _absent("tokenizer/report.json")),
        Section("training", "Training", lambda: making.training(stages), _absent("pretrain/metrics.jsonl")),
        Section("speed", "Training speed", lambda: making.speed(stages), _absent("pretrain/metrics.jsonl")),
        Section("alignment", "Alignment with PPO", lambda: making.alignment(stages), _absent("ppo/metrics.jsonl")),
        Section("evaluation", "Evaluation", lambda: results.evaluation(stages), _absent("eval/summary.json")),
        Section("quantization", "Quantization", lambda: results.quantization(stages), "No quantize stage has run."),
        Section("conversation", "Conversation", lambda: results.conversation(stages), _absent("talk/transcript.json")),
        Section("lineage", "Lineage", lambda: results.lineage(stages), _absent("lineage.json")),
    ]
    body = _header(name, stages) + "".join(render(section) for section in sections)
    write_text(out, page(name, sections, body))
    return out


def _absent(name: str) -> str:
    return f"{name} is not there: the stage that writes it has not finished."


# --- header and stages ---------------------------------------------------------------------------------------------


def _header(name: str, stages: Sequence[StageView]) -> str:
    found = _receipts(stages)
    facts = [
        ("machine", _last(found, "machine")),
        ("code", _last(found, "code")),
        ("finished", _last(found, "finished")),
    ]
    lead = "A language model, from raw documents to an agent that answers: what each stage did, measured in this run."
    return masthead(name, lead, [f"{label} {value}" for label, value in facts if value], list(_tiles(stages)))


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
