"""What the sections of the report share: reading artifacts tolerantly, and small pieces of HTML (all text escaped)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from puyu.chain.charts import Point, plain
from puyu.errors import PuyuError
from puyu.files import read_json, read_jsonl


@dataclass(frozen=True, slots=True)
class StageView:
    """A stage as the report sees it: its name in the recipe, its verb, its folder, its time, its key numbers."""

    name: str
    verb: str
    out: Path
    seconds: float
    numbers: Mapping[str, Any]


def of_verb(stages: Sequence[StageView], *verbs: str) -> list[StageView]:
    return [stage for stage in stages if stage.verb in verbs]


def first_file(stages: Sequence[StageView], verb: str, name: str) -> Any:
    """The JSON of a file in the first stage of a verb that has it, or None."""
    return next((read_json(s.out / name) for s in of_verb(stages, verb) if (s.out / name).is_file()), None)


def metrics_rows(stage: StageView) -> list[dict[str, Any]]:
    path = stage.out / "metrics.jsonl"
    if not path.is_file():
        return []
    torn: list[Any] = []
    return [row for row in read_jsonl(path, quarantine=torn.append) if isinstance(row, dict)]


def points(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Point]:
    """(step, value) of the first key that any row has."""
    key = next((key for key in keys if any(is_number(row.get(key)) for row in rows)), None)
    if key is None:
        return []
    return [(float(row.get("step", i)), float(row[key])) for i, row in enumerate(rows) if is_number(row.get(key))]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def pick(numbers: Mapping[str, Any], *paths: str) -> float | None:
    """The first of several dotted paths that holds a number."""
    for path in paths:
        value: Any = numbers
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if is_number(value):
            return float(value)
    return None


# --- pieces of HTML ------------------------------------------------------------------------------------------------


def missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def count_text(value: float) -> str:
    return f"{value:,.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of escaped cells: the first column is text, the others are numbers."""
    top = "".join(f"<th{_num(i)}>{escape(text)}</th>" for i, text in enumerate(head))
    lines = ("".join(f"<td{_num(i)}>{cell}</td>" for i, cell in enumerate(row)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _num(column: int) -> str:
    return ' class="num"' if column else ""


def figure(title: str, drawing: str, note: str = "") -> str:
    if not drawing:
        return ""
    caption = f"<small>{escape(note)}</small>" if note else ""
    return f"<figure><figcaption>{escape(title)}{caption}</figcaption>{drawing}</figure>"


def figure_grid(figures: Sequence[str]) -> str:
    shown = "".join(figures)
    return f'<div class="figures">{shown}</div>' if shown else ""


def headline(numbers: Mapping[str, Any], limit: int = 5) -> str:
    """The stage's own headline, else its first plain numbers."""
    if isinstance(numbers.get("headline"), str):
        return escape(numbers["headline"])
    chosen = [(key, value) for key, value in numbers.items() if is_number(value)][:limit]
    return " ".join(fact(key.replace("_", " "), plain(value)) for key, value in chosen)


def fact(label: str, value: str) -> str:
    """A label and its number, kept on one line."""
    return f'<span class="fact">{escape(label)} <b>{escape(value)}</b></span>'


def bar(label: str, share: float, number: str, why: str) -> str:
    """A horizontal bar with its label, its number (HTML) and a line below (HTML)."""
    drawn = f'<div class="bar"><i style="width:{share:.1%}"></i></div>'
    head = f'<span class="name">{escape(label)}</span>{drawn}<span class="num">{number}</span>'
    return f'<div class="step">{head}<div class="why">{why}</div></div>'


# --- the page -----------------------------------------------------------------------------------------------------

STYLE = Path(__file__).with_name("report_style.css")

WAVE = (
    '<svg class="wave" viewBox="0 0 28 18" aria-hidden="true"><path d="M1,5 q6.5,-6 13,0 t13,0"/>'
    '<path d="M1,10 q6.5,-6 13,0 t13,0"/><path d="M1,15 q6.5,-6 13,0 t13,0"/></svg>'
)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. `build` gives its HTML, or "" when there is nothing to show."""

    id: str
    title: str
    build: Callable[[], str]
    missing: str


def masthead(name: str, lead: str, facts: Sequence[str], tiles: Sequence[tuple[str, str]]) -> str:
    """The top of a page; tiles are (what, number)."""
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in tiles
    )
    return (
        f'<header>\n<p class="brand">{WAVE} Puyu 浦语</p>\n<h1>{escape(name)}</h1>\n'
        f'<p class="lead">{escape(lead)}</p>\n'
        f'<p class="facts">{escape(" · ".join(facts))}</p>\n<div class="tiles">{shown}</div>\n</header>\n'
    )


def page(name: str, sections: Sequence[Section], body: str) -> str:
    links = "".join(f'<a href="#{s.id}">{escape(s.title)}</a>' for s in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(name)} · Puyu</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f'<main>\n{body}</main>\n<nav aria-label="Sections">{links}</nav>\n</body>\n</html>\n'
    )


def render(section: Section) -> str:
    """A section; artifacts that are missing or of another shape give a sentence, not a crash."""
    try:
        inner = section.build() or missing(section.missing)
    except (PuyuError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        inner = missing(f"This part cannot be shown: {type(error).__name__}: {error}")
    return f'<section id="{section.id}">\n<h2>{escape(section.title)}</h2>\n{inner}\n</section>\n'
