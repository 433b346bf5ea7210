"""explore.html: one page about a cleaned corpus that opens from disk, with no script and no request.

    write_page(Path("runs/nano/data"), Path("explore.html"), lang="en")

The funnel, retention by domain, language and source, a histogram of every judged score with its thresholds, and samples
of kept, dropped and borderline documents. Texts of documents are hostile: each is escaped, and the page forbids itself
scripts, frames and requests. The same folder gives the same bytes. The facts come from `puyu.data.explore`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from puyu.chain.charts import short
from puyu.chain.explore_charts import histogram, parted_bar
from puyu.chain.explore_words import LANGUAGES, Words, score_title, words_of
from puyu.chain.report_parts import bar, fact, figure, figure_grid, missing, table
from puyu.data.explore import Border, Dropped, Facts, Histogram, Sample, explore
from puyu.data.filters import Policies
from puyu.data.stats import Retention, Stats
from puyu.files import write_text

__all__ = ["LANGUAGES", "write_page"]

STYLES = tuple(Path(__file__).with_name(name) for name in ("report_style.css", "explore_style.css"))
_ROWS = 12
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(data: Path, out: Path, *, lang: str = "en", samples: int = 4) -> Path:
    """Write the page about the folder `data` to `out` and return it; `samples` documents of each sort."""
    facts, words = explore(data, samples=samples), words_of(lang)
    sections = [
        ("funnel", words.funnel, _funnel(facts.stats, words)),
        ("retention", words.retention, _retention(facts.stats, words)),
        ("histograms", words.histograms, _histograms(facts, words)),
        ("borderline", words.borderline, _borders(facts.borders, words)),
        ("dropped", words.dropped_section, _dropped(facts.dropped, words)),
        ("kept", words.kept_section, _kept(facts.kept, words)),
        ("quarantine", words.quarantine, _quarantine(facts.stats, words)),
    ]
    body = "".join(
        f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{inner or missing(words.nothing)}\n</section>\n'
        for name, title, inner in sections
    )
    title = "/".join(data.resolve().parts[-2:])
    links = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text, _ in sections)
    nav = f'<nav aria-label="{escape(words.sections)}">{links}</nav>'
    write_text(out, _page(title, _header(title, facts.stats, words) + body, nav, words))
    return out


def _page(title: str, body: str, nav: str, words: Words) -> str:
    style = "".join(path.read_text(encoding="utf-8") for path in STYLES)
    return (
        f'<!doctype html>\n<html lang="{words.lang}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} · Puyu</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<main>\n{body}</main>\n{nav}\n</body>\n</html>\n"
    )


def _header(title: str, stats: Stats, words: Words) -> str:
    read, kept = stats.funnel[0][1], stats.funnel[-1][1]
    characters = sum(group.kept.characters for group in stats.by_domain)
    copies = sum(amount.documents for name, amount in stats.duplicates.items())
    bad = sum(sum(reasons.values()) for reasons in stats.quarantined.values())
    share = f" <small>{kept / read:.1%}</small>" if read else ""
    tiles = [(words.read, f"{read:,}"), (words.kept, f"{kept:,}{share}"), (words.kept_characters, short(characters))]
    tiles += [(words.duplicates, f"{copies:,}"), (words.quarantined, f"{bad:,}")]
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{escape(label)}</span></div>' for label, value in tiles)
    return (
        f'<header>\n<p class="brand">Puyu 浦语</p>\n<h1>{escape(title)}</h1>\n'
        f'<p class="lead">{escape(words.lead)}</p>\n<div class="tiles">{shown}</div>\n</header>\n'
    )


# --- funnel and retention ------------------------------------------------------------------------------------------


def _funnel(stats: Stats, words: Words) -> str:
    read, kept = stats.funnel[0][1], stats.funnel[-1][1]
    bad = sum(sum(reasons.values()) for reasons in stats.quarantined.values())
    bars = [_step(label, left, read, _reasons(stats, label), words) for label, left in stats.funnel]
    note = words.funnel_note.format(
        read=f"{read:,}", kept=f"{kept:,}", dropped=f"{read - kept - bad:,}", quarantined=f"{bad:,}"
    )
    if stats.curated:
        note += " " + words.curated.format(count=f"{stats.curated:,}")
    return f'<div class="funnel">{"".join(bars)}</div><p class="note">{escape(note)}</p>'


def _step(label: str, left: int, read: int, reasons: Sequence[tuple[str, int]], words: Words) -> str:
    share = left / read if read else 0.0
    shown = " ".join(fact(reason, f"−{count:,}") for reason, count in reasons[:6])
    if rest := sum(count for _, count in reasons[6:]):
        shown += " " + fact(f"+{len(reasons) - 6}", f"−{rest:,}")
    return bar(_step_name(label, words), share, f"{left:,} <small>{share:.1%}</small>", shown)


def _step_name(label: str, words: Words) -> str:
    stage = label.removeprefix("after ")
    if stage != label:
        return words.after.format(stage=stage)
    return {"read": words.step_read, "readable": words.step_readable}.get(label, label)


def _reasons(stats: Stats, label: str) -> list[tuple[str, int]]:
    """What a step of the funnel lost, by rule or reason, most first."""
    found: dict[str, int] = {}
    if label == "readable":
        pairs = [pair for reasons in stats.quarantined.values() for pair in reasons.items()]
    else:
        pairs = [(row.rule, row.dropped.documents) for row in stats.rules if f"after {row.stage}" == label]
    for name, count in pairs:
        found[name] = found.get(name, 0) + count
    return sorted(found.items(), key=lambda row: (-row[1], row[0]))


def _retention(stats: Stats, words: Words) -> str:
    stages = [stage for stage in stats.stages if any(stage in group.dropped for group in stats.by_source)]
    classes = {stage: f"d{min(number, 4)}" for number, stage in enumerate(stages)}
    legend = [("kept", words.kept), *((classes[stage], f"− {stage}") for stage in stages)]
    parts = [_legend(legend)]
    for title, groups in (
        (words.by_domain, stats.by_domain),
        (words.by_language, stats.by_language),
        (words.by_source, stats.by_source),
    ):
        rows = "".join(_group(group, classes, words) for group in groups[:_ROWS])
        if rest := groups[_ROWS:]:
            count = sum(group.read.documents for group in rest)
            rows += f'<p class="note">{escape(words.more.format(count=len(rest), documents=f"{count:,}"))}</p>'
        parts.append(f"<h3>{escape(title)}</h3>{rows or missing(words.nothing)}")
    return "".join(parts)


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    shown = "".join(f'<span><i class="dot {name}"></i>{escape(text)}</span>' for name, text in entries)
    return f'<div class="legend">{shown}</div>'


def _group(group: Retention, classes: dict[str, str], words: Words) -> str:
    read, kept = group.read, group.kept
    parts = [("kept", kept.documents), *((classes[name], row.documents) for name, row in group.dropped.items())]
    share = kept.documents / read.documents if read.documents else 0.0
    counts = words.of.format(kept=f"{kept.documents:,}", read=f"{read.documents:,}")
    sizes = words.characters.format(kept=short(kept.characters), read=short(read.characters))
    return (
        f'<div class="step"><span class="name" dir="auto">{escape(group.name or words.none)}</span>'
        f'{parted_bar(parts, read.documents)}<span class="num">{share:.1%}</span>'
        f'<div class="why"><small>{escape(counts)} · {escape(sizes)}</small></div></div>'
    )


# --- histograms ----------------------------------------------------------------------------------------------------


def _histograms(facts: Facts, words: Words) -> str:
    if not facts.histograms:
        return ""
    entries = [("passed", words.passed), ("here", words.here), ("elsewhere", words.elsewhere)]
    parts = [f'<p class="note">{escape(words.histograms_note)}</p>{_legend(entries)}']
    for language in dict.fromkeys(h.language for h in facts.histograms):
        mine = [h for h in facts.histograms if h.language == language]
        parts.append(f"<h3>{escape(language or words.unnamed)}</h3>")
        parts.append(figure_grid([_figure(h, words) for h in mine if sum(h.here)]))
        if quiet := [h for h in mine if not sum(h.here)]:
            text = words.quiet.format(count=len(quiet), language=language or words.unnamed)
            grid = figure_grid([_figure(h, words) for h in quiet])
            parts.append(f"<details><summary>{escape(text)}</summary>{grid}</details>")
    if facts.left_out[0]:
        text = words.left_out.format(languages=facts.left_out[0], documents=f"{facts.left_out[1]:,}")
        parts.append(f'<p class="note">{escape(text)}</p>')
    return "".join(parts)


def _figure(h: Histogram, words: Words) -> str:
    dropped, everything = sum(h.here), sum(h.passed) + sum(h.here) + sum(h.elsewhere)
    note = words.dropped_of.format(dropped=f"{dropped:,}", all=f"{everything:,}")
    title = score_title(h.score, Policies().of(h.language), words)
    drawn = f'<p class="about">{escape(title)}</p>{histogram(h)}'
    return figure(h.score, drawn, note)


# --- samples -------------------------------------------------------------------------------------------------------


def _borders(borders: Sequence[Border], words: Words) -> str:
    if not borders:
        return ""
    parts = [f'<p class="note">{escape(words.borderline_note)}</p>']
    for number, border in enumerate(borders):
        sign = "≥" if border.is_minimum else "≤"
        head = f"<code>{escape(border.rule)}</code> {escape(border.language)} {sign} {border.threshold:,g}"
        head += f" <small>−{border.count:,}</small>"
        sides = (
            f'<div class="side {name}"><h4>{escape(title)}</h4>{_cards(samples, words)}</div>'
            for name, title, samples in (
                ("passes", words.passes, border.passing),
                ("fails", words.fails, border.failing),
            )
        )
        opened = " open" if number == 0 else ""
        parts.append(f'<details{opened}><summary>{head}</summary><div class="sides">{"".join(sides)}</div></details>')
    return "".join(parts)


def _dropped(groups: Sequence[Dropped], words: Words) -> str:
    if not groups:
        return ""
    parts = [f'<p class="note">{escape(words.dropped_note)}</p>']
    for number, group in enumerate(groups):
        count = escape(words.documents.format(count=f"{group.count:,}"))
        head = f"<code>{escape(group.rule)}</code> {escape(group.stage)} <small>{count}</small>"
        opened = " open" if number == 0 else ""
        parts.append(f"<details{opened}><summary>{head}</summary>{_cards(group.samples, words)}</details>")
    return "".join(parts)


def _kept(samples: Sequence[Sample], words: Words) -> str:
    if not samples:
        return ""
    parts = [f'<p class="note">{escape(words.kept_note)}</p>']
    for number, domain in enumerate(dict.fromkeys(sample.domain for sample in samples)):
        mine = [sample for sample in samples if sample.domain == domain]
        opened = " open" if number == 0 else ""
        summary = f"<summary>{escape(domain or words.none)}</summary>"
        parts.append(f"<details{opened}>{summary}{_cards(mine, words)}</details>")
    return "".join(parts)


def _cards(samples: Sequence[Sample], words: Words) -> str:
    if not samples:
        return missing(words.nothing)
    return f'<div class="cards">{"".join(_card(sample, words) for sample in samples)}</div>'


def _card(sample: Sample, words: Words) -> str:
    """Every part of a sample comes from outside."""
    before, marked, after = (escape(part) for part in sample.excerpt)
    text = f"{before}<mark>{marked}</mark>{after}" if marked else before
    cut = "" if sample.is_whole else " …"
    facts = [escape(part) for part in (sample.source, sample.language) if part]
    if sample.rule and sample.value != "":
        shown = words.value.format(value=_plain(sample.value), threshold=_plain(sample.threshold))
        facts.insert(0, f"<b>{escape(shown)}</b>")
    place = f'<span class="place" dir="auto">{escape(sample.place)}</span>' if sample.place else ""
    original = ""
    if sample.copy_of:
        head = escape(words.copy_of.format(id=sample.copy_of[:12]))
        original = f'<p class="id">{head}</p><div class="text" dir="auto">{escape(sample.original)} …</div>'
    return (
        f'<article class="card"><p class="id">{" · ".join(facts)} {place}</p>'
        f'<div class="text" dir="auto">{text}{cut}</div>{original}'
        f'<p class="id"><code>{escape(sample.id)}</code></p></article>'
    )


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quarantine(stats: Stats, words: Words) -> str:
    rows = [[escape(f"{source}: {reason}"), f"{count:,}"]
            for source, reasons in stats.quarantined.items() for reason, count in sorted(reasons.items())]  # fmt: skip
    if not rows:
        return ""
    head = f"{words.source}: {words.reason}"
    return f'<p class="note">{escape(words.quarantine_note)}</p>{table([head, words.records], rows)}'
