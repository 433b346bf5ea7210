"""How a model grows: bits per byte of texts that it has not seen, at each checkpoint of a run, against tokens.

    found = [grow(run, texts, device=device) for run in runs]
    write_growth(found, Path("growth.html"))

Checkpoints are a run's exports (`export_every`) and its end. Bits per byte count what a text costs, whatever the
tokenizer, so runs of different data and vocabularies are comparable; two runs are compared at equal tokens, on straight
lines between checkpoints. Each text is cut into rows of the model's context, and every token behind the first is
predicted once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from puyu.chain.charts import Series, line_chart
from puyu.chain.report_parts import Section, figure, figure_grid, masthead, page, render, table
from puyu.chain.run_view import RunView
from puyu.data.packing import Piece, grouped, pack_pieces
from puyu.errors import InputError
from puyu.files import write_text
from puyu.log import Progress
from puyu.model.checkpoint import load_model
from puyu.model.heads import CausalLM
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.corpus import KeptRows
from puyu.train.objectives import token_losses
from puyu.train.stage import check_vocabulary, place

BATCH_TOKENS = 8192
ALL = "all"
"""All texts together, beside their languages."""

Texts = Mapping[str, Sequence[str]]
"""Texts by language."""


@dataclass(frozen=True, slots=True)
class Age:
    """One checkpoint: bits per byte by language, and over all texts."""

    step: int
    tokens: int
    folder: str
    bits: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Growth:
    """A run and its checkpoints, in the order of tokens."""

    name: str
    ages: tuple[Age, ...]

    def at(self, tokens: int, part: str = ALL) -> float | None:
        """Bits per byte after so many tokens, between the checkpoints around; None outside of them."""
        for before, after in zip(self.ages, self.ages[1:], strict=False):
            if before.tokens <= tokens <= after.tokens:
                share = (tokens - before.tokens) / max(after.tokens - before.tokens, 1)
                return before.bits[part] + share * (after.bits[part] - before.bits[part])
        return next((age.bits[part] for age in self.ages if age.tokens == tokens), None)


def read_texts(path: Path) -> Texts:
    """The `text` of each line of a JSONL file, by its `language`; InputError names file and line."""
    found: dict[str, list[str]] = {}
    for row in KeptRows(path, {}):
        found.setdefault(row.language, []).append(row.text)
    if not found:
        raise InputError(f"{path} holds no text", remedy='a line a text: {"text": ..., "language": ...}')
    return found


def checkpoints(run: Path) -> list[tuple[int, int, Path]]:
    """(step, tokens, folder) of a run's exports and of its end; InputError where there is none."""
    view = RunView(run)
    view.refresh()
    tokens = {int(row["step"]): int(row["tokens"]) for row in view.rows if "tokens" in row}
    folders = {int(path.name.removeprefix("step-")): path for path in sorted((run / "exports").glob("step-????????"))}
    if tokens and (run / "config.json").is_file():
        folders[max(tokens)] = run
    if not folders:
        remedy = "set export_every in its config, or wait for its end"
        raise InputError(f"{run} has no checkpoint to look at", remedy=remedy)
    if lost := sorted(set(folders) - set(tokens)):
        raise InputError(f"{run / 'metrics.jsonl'} has no row of step {lost[0]}, but {folders[lost[0]]} is there")
    return [(step, tokens[step], folders[step]) for step in sorted(folders)]


def grow(run: Path, texts: Texts, *, device: torch.device, dtype: str = "auto") -> Growth:
    """Measure each checkpoint of a run."""
    found = checkpoints(run)
    bar = Progress(run.name, len(found), unit="checkpoint")
    ages = []
    for step, tokens, folder in found:
        ages.append(Age(step, tokens, str(folder), bits_per_byte(folder, texts, device=device, dtype=dtype)))
        bar.update(bits=ages[-1].bits[ALL])
    bar.close()
    return Growth("/".join(run.resolve().parts[-2:]), tuple(ages))


def bits_per_byte(folder: Path, texts: Texts, *, device: torch.device, dtype: str = "auto") -> dict[str, float]:
    """Of one checkpoint, by language and over all (sums of bits over sums of UTF-8 bytes)."""
    tokenizer = Tokenizer.load(folder)
    model = place(load_model(folder), dtype=dtype, device=device).eval()
    check_vocabulary(tokenizer, model.config.vocab_size, folder=folder)
    nats = {name: _nats(model, tokenizer, some, device) for name, some in texts.items()}
    size = {name: sum(len(text.encode()) for text in some) for name, some in texts.items()}
    bits = {name: nats[name] / math.log(2) / size[name] for name in texts}
    return bits | {ALL: sum(nats.values()) / math.log(2) / sum(size.values())}


def _nats(model: CausalLM, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device) -> float:
    pieces = _pieces(tokenizer, texts, model.config.max_positions)
    groups = grouped(pieces, lambda piece: len(piece.ids), most=BATCH_TOKENS)
    return sum(_loss(model, group, device) for group in groups)


def _pieces(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> Iterator[Piece]:
    """`<s>` text `</s>` in rows of the context; the last token of a row has the next row's first as target."""
    begin, end = ([] if id is None else [id] for id in (tokenizer.bos_id, tokenizer.eos_id))
    for ids in tokenizer.encode_arrays(list(texts)):
        whole = [*begin, *ids.tolist(), *end]
        for start in range(0, len(whole), context):
            stop = start + context
            yield Piece(whole[start:stop], next_id=whole[stop] if stop < len(whole) else None)


def _loss(model: CausalLM, group: Sequence[Piece], device: torch.device) -> float:
    return float(token_losses(model, pack_pieces(group).to(device)).double().sum())


# --- what a person sees --------------------------------------------------------------------------------------------


def growth_table(found: Sequence[Growth]) -> str:
    """Checkpoints by run; with two runs what they differ by at equal tokens."""
    parts = list(found[0].ages[0].bits)
    lines = []
    for growth in found:
        lines += ["", growth.name, f"  {'step':>8}  {'tokens':>15}  " + "  ".join(f"{part:>8}" for part in parts)]
        for age in growth.ages:
            cells = "  ".join(f"{age.bits[part]:8.4f}" for part in parts)
            lines.append(f"  {age.step:>8,}  {age.tokens:>15,}  {cells}")
    if len(found) > 1:
        lines += ["", f"bits per byte at equal tokens: {found[0].name}, the other, difference"]
        for tokens, first, second in at_equal_tokens(found[0], found[1]):
            lines.append(f"  {tokens:>15,}  {first:8.4f}  {second:8.4f}  {second - first:+8.4f}")
    return "\n".join(lines[1:])


def at_equal_tokens(one: Growth, other: Growth) -> list[tuple[int, float, float]]:
    """(tokens, bits of one, bits of the other) at each checkpoint's tokens that lie inside both runs."""
    rows = []
    for tokens in sorted({age.tokens for growth in (one, other) for age in growth.ages}):
        first, second = one.at(tokens), other.at(tokens)
        if first is not None and second is not None:
            rows.append((tokens, first, second))
    return rows


def growth_json(found: Sequence[Growth]) -> list[dict[str, Any]]:
    """The numbers, for programs."""
    names = ("step", "tokens", "folder", "bits")
    return [{"run": g.name, "checkpoints": [{n: getattr(a, n) for n in names} for a in g.ages]} for g in found]


def write_growth(found: Sequence[Growth], out: Path) -> Path:
    """One page that opens from disk: a curve for each language, and the numbers."""
    parts = list(found[0].ages[0].bits)
    sections = [
        Section("curves", "Bits per byte", lambda: figure_grid([_figure(found, part) for part in parts]), "Nothing."),
        Section("numbers", "Numbers", lambda: _numbers(found, parts), "Nothing."),
    ]
    tiles = [(f"bits per byte, {growth.name}", f"{growth.ages[-1].bits[ALL]:.4f}") for growth in found]
    head = masthead("Growth", "What texts cost that the model has not seen, at each checkpoint.", [], tiles)
    write_text(out, page("Growth", sections, head + "".join(render(section) for section in sections)))
    return out


def _figure(found: Sequence[Growth], part: str) -> str:
    lines = [Series(g.name, [(float(age.tokens), age.bits[part]) for age in g.ages]) for g in found]
    return figure("All texts" if part == ALL else part, line_chart(lines, x="tokens", y="bits/byte"))


def _numbers(found: Sequence[Growth], parts: Sequence[str]) -> str:
    rows = [
        [growth.name, f"{age.step:,}", f"{age.tokens:,}", *(f"{age.bits[part]:.4f}" for part in parts)]
        for growth in found
        for age in growth.ages
    ]
    return table(["run", "step", "tokens", *parts], rows)
