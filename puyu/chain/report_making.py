"""The sections about making the model: data funnel, tokenizer, loss curves, speed, PPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from puyu.chain.charts import Band, Series, line_chart, short
from puyu.chain.report_parts import (
    StageView,
    bar,
    count_text,
    fact,
    figure,
    figure_grid,
    first_file,
    headline,
    is_number,
    metrics_rows,
    of_verb,
    pick,
    points,
    table,
)
from puyu.lineage import find_lineage

_LOSS = ("loss", "train_loss")
_VALIDATION = ("val_loss", "valid_loss", "eval_loss", "heldout_loss")
_SPEED = ("tokens_per_s", "tokens_per_second", "tok_per_s", "tokens_s")
_ACCURACY = ("accuracy", "pair_accuracy", "train_accuracy")
_VALID_ACCURACY = ("val_accuracy", "heldout_accuracy", "eval_accuracy")
_REWARD = ("reward", "reward_mean", "mean_reward", "reward_total")
_SCORE = ("score", "reward_model", "rm_score")
_VERIFIED = ("verified", "verifier", "check", "verifiable", "score_verified", "reward_verified")
_KL = ("kl", "kl_ref", "kl_reference", "kl_mean", "mean_kl")
_LENGTH = ("length", "answer_tokens", "mean_length")
_CLIPPED = ("clip_fraction", "clipped", "clip_frac")


# --- data and tokenizer --------------------------------------------------------------------------------------------


def data(stages: Sequence[StageView]) -> str:
    ledger = first_file(stages, "data", "ledger.json")
    if ledger is None:
        return ""
    total = ledger["total"]
    read, left = total["read"], total["read"] - sum(total["quarantined"].values())
    bars = [_funnel_bar("read", read, read, {}), _funnel_bar("readable", left, read, total["quarantined"])]
    for stage in ledger["stages"]:
        taken = total["dropped"].get(stage, {})
        left -= sum(taken.values())
        bars.append(_funnel_bar(f"after {stage}", left, read, taken))
    dropped = sum(sum(rules.values()) for rules in total["dropped"].values())
    bad = sum(total["quarantined"].values())
    agrees = "adds up" if read == total["kept"] + dropped + bad else "does NOT add up"
    note = f"{read:,} read = {total['kept']:,} kept + {dropped:,} dropped + {bad:,} quarantined: the ledger {agrees}."
    masked = ", ".join(f"{count:,} × {kind}" for kind, count in ledger.get("masked", {}).items())
    extra = f" Masked in kept documents: {escape(masked)}." if masked else ""
    return f'<div class="funnel">{"".join(bars)}</div><p class="note">{note}{extra}</p>{_sources(ledger)}'


def _funnel_bar(label: str, left: int, read: int, taken: Mapping[str, int]) -> str:
    share = left / read if read else 0.0
    found = sorted(taken.items(), key=lambda row: (-row[1], row[0]))
    reasons = [fact(rule, f"−{count:,}") for rule, count in found[:6]]
    if rest := sum(count for _, count in found[6:]):
        reasons.append(fact(f"{len(found) - 6} more", f"−{rest:,}"))
    return bar(label, share, f"{left:,} <small>{share:.1%}</small>", " ".join(reasons))


def _sources(ledger: Mapping[str, Any]) -> str:
    rows = [[escape(name), count_text(row["read"]), count_text(row["kept"]), count_text(row["kept_characters"])]
            for name, row in ledger.get("sources", {}).items()]  # fmt: skip
    if not rows:
        return ""
    return (
        f"<details><summary>By source</summary>{table(['source', 'read', 'kept', 'characters kept'], rows)}</details>"
    )


def tokenizer(stages: Sequence[StageView]) -> str:
    report = first_file(stages, "tokenizer", "report.json")
    if report is None:
        return ""
    groups = report.get("compression", {})
    most = max((row["bytes_per_token"] for row in groups.values()), default=1.0)
    bars = "".join(
        bar(
            name,
            row["bytes_per_token"] / most,
            f"{row['bytes_per_token']:.2f} <small>bytes/token</small>",
            fact("characters per token", f"{row['chars_per_token']:.2f}"),
        )
        for name, row in groups.items()
    )
    lead = f"Byte-level BPE with {report['vocab_size']:,} entries. More bytes per token means shorter sequences."
    return f'<p class="note">{lead}</p><div class="funnel">{bars}</div>'


# --- training ------------------------------------------------------------------------------------------------------


def training(stages: Sequence[StageView]) -> str:
    figures = []
    for stage in of_verb(stages, "pretrain", "sft", "reward"):
        rows = metrics_rows(stage)
        figures.append(figure(f"{stage.name}: loss", _loss_chart(stage, rows), _loss_note(rows)))
        lines = [Series("training pairs", points(rows, _ACCURACY), smooth=True)]
        lines.append(Series("held-out pairs", points(rows, _VALID_ACCURACY)))
        figures.append(
            figure(f"{stage.name}: pairs ranked right", line_chart(lines, x="step", y="share"), _held_out(stage))
        )
    return figure_grid(figures) + _heldout(stages)


def _heldout(stages: Sequence[StageView]) -> str:
    """One line a stage: bits per byte by language, or pairs ranked right by domain."""
    lines = []
    for stage in stages:
        found = stage.numbers.get("heldout")
        rows = found.items() if isinstance(found, Mapping) else ()
        facts = [fact(str(name), value) for name, row in rows if (value := _heldout_value(row))]
        if facts:
            lines.append(f'<p class="note">{escape(stage.name)}, held out: {" ".join(facts)}</p>')
    return "".join(lines)


def _heldout_value(row: Any) -> str:
    if not isinstance(row, Mapping):
        return ""
    if (bits := pick(row, "bits_per_byte")) is not None:
        return f"{bits:.3f} bits/byte"
    if (share := pick(row, "accuracy")) is not None:
        error, pairs = pick(row, "stderr"), pick(row, "pairs")
        return f"{share:.1%}" + (f" ± {error:.1%}" if error else "") + (f" of {pairs:,.0f} pairs" if pairs else "")
    return ""


def _loss_chart(stage: StageView, rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [Series("training", points(rows, _LOSS), smooth=True), Series("held out", points(rows, _VALIDATION))]
    return line_chart(lines, x="step", y="loss", bands=_phases(rows) or _planned_phases(stage))


def _phases(rows: Sequence[Mapping[str, Any]]) -> list[Band]:
    """Stretches of one `phase` value; none when there is only one."""
    bands: list[Band] = []
    for row in rows:
        if "phase" not in row or not is_number(row.get("step")):
            continue
        name, step = str(row["phase"]), float(row["step"])
        name = f"phase {name}" if name.isdigit() else name
        if bands and bands[-1].name == name:
            bands[-1] = Band(name, bands[-1].start, step)
        else:
            bands.append(Band(name, bands[-1].end if bands else step, step))
    return bands if len(bands) > 1 else []


def _planned_phases(stage: StageView) -> list[Band]:
    """The phases of the stage's config (in its receipt), by their steps and context."""
    receipt = find_lineage(stage.out)
    phases = receipt.config.get("phases") if receipt else None
    bands: list[Band] = []
    for phase in phases if isinstance(phases, list) else ():
        start = bands[-1].end if bands else 1.0
        name = f"context {phase['seq_len']}" if "seq_len" in phase else f"phase {len(bands) + 1}"
        bands.append(Band(name, start, start + float(phase["steps"]) - (0 if bands else 1)))
    return bands if len(bands) > 1 else []


def _loss_note(rows: Sequence[Mapping[str, Any]]) -> str:
    found = points(rows, _LOSS)
    return f"{found[0][1]:.3g} → {found[-1][1]:.3g}, {len(found):,} steps" if found else ""


def _held_out(stage: StageView) -> str:
    value = pick(stage.numbers, "heldout.all.accuracy", "heldout_accuracy", "val_accuracy", "accuracy")
    return f"held-out accuracy {value:.1%}" if value is not None else ""


def speed(stages: Sequence[StageView]) -> str:
    figures = []
    for stage in of_verb(stages, "pretrain", "sft", "reward"):
        found = points(metrics_rows(stage), _SPEED)
        ordered = sorted(value for _, value in found)
        note = f"median {short(ordered[len(ordered) // 2])} tokens/s" if ordered else ""
        drawing = line_chart([Series("tokens/s", found, smooth=True)], x="step", y="tokens/s", zero=True)
        figures.append(figure(stage.name, drawing, note))
    return figure_grid(figures)


def alignment(stages: Sequence[StageView]) -> str:
    parts = []
    for stage in of_verb(stages, "ppo"):
        rows = metrics_rows(stage)
        names = (("reward", _REWARD), ("reward model", _SCORE), ("verifiable checks", _VERIFIED))
        rewards = [Series(name, points(rows, keys), smooth=True) for name, keys in names]
        charts = [
            figure("Reward", line_chart(rewards, x="PPO step", y="mean reward"), "mean over the rollouts of a step"),
            figure("Distance to the reference", _one(rows, _KL, "KL, nats/answer"), "KL(policy ‖ SFT model)"),
            figure("Clipped share of the ratio", _one(rows, _CLIPPED, "share")),
            figure("Length of answers", _one(rows, _LENGTH, "tokens")),
        ]
        parts += [figure_grid(charts), _ppo_numbers(stage)]
    return "".join(parts)


def _one(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], unit: str) -> str:
    return line_chart([Series(unit, points(rows, keys), smooth=True)], x="PPO step", y=unit, zero=True)


def _ppo_numbers(stage: StageView) -> str:
    """The paired differences on held-out prompts as a table; the stage's own numbers where there are none."""
    heldout = stage.numbers.get("heldout")
    found = heldout if isinstance(heldout, Mapping) else {}
    rows = [cells for kind in ("sampled", "greedy") if (cells := _difference_cells(kind, found.get(kind)))]
    if not rows:
        return f'<p class="note">{headline(stage.numbers)}</p>'
    prompts = pick(found, "prompts")
    over = f"{prompts:,.0f} held-out prompts" if prompts else "held-out prompts"
    lead = f"Reward on {over}, before and after, with the 95 % interval of the paired difference."
    head = ["answers", "before", "after", "difference", "interval", "checks met before", "after"]
    return f'<p class="note">{lead}</p>{table(head, rows)}'


def _difference_cells(kind: str, row: Any) -> list[str]:
    if not isinstance(row, Mapping) or pick(row, "difference", "value") is None:
        return []
    value, low, high = pick(row, "difference", "value"), pick(row, "low"), pick(row, "high")
    before, after = pick(row, "total_before", "before"), pick(row, "total_after", "after")
    checks = [pick(row, "check_before"), pick(row, "check_after")]
    clear = "good" if (low or 0.0) > 0 else "bad" if (high or 0.0) < 0 else "unclear"
    signed = [_signed(number) for number in (value, low, high)]
    return [
        escape(kind),
        *("–" if number is None else f"{number:.3f}" for number in (before, after)),
        f'<b class="{clear}">{signed[0]}</b>',
        f"{signed[1]} … {signed[2]}",
        *("–" if share is None else f"{share:.1%}" for share in checks),
    ]


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")
