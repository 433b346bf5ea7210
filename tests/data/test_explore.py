"""What the explorer shows: bins that add up, samples from the right side, and a page that no document can script."""

import re
import shlex
from dataclasses import asdict
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.chain.explore import write_page
from puyu.chain.explore_charts import histogram
from puyu.chain.explore_words import score_title, words_of
from puyu.data.clean import DataConfig, run
from puyu.data.explore import COUNTS, Histogram, bin_edges, explore
from puyu.data.filters import Policies, bounds
from puyu.errors import InputError
from tests.conftest import ROOT, puyu
from tests.data.looked import HOSTILE, make, rows_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("looked"))


@pytest.fixture(scope="module")
def facts(data):
    return explore(data, samples=3)


class Page(HTMLParser):
    """Elements, attributes and text, as a browser would see them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.open, self.text, self.ids = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "path", "rect", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


# ---- facts


def test_every_judged_document_is_in_every_histogram_of_its_language(data, facts):
    rows = [row for name in ("kept", "dropped") for row in rows_of(data, name) if "chars" in row["scores"]]
    rows = [row for row in rows if row["source"] != "gold"]
    assert len(facts.histograms) > 30
    for h in facts.histograms:
        mine = [row for row in rows if row["language"] == h.language]
        rules = (f"{h.score}_min", f"{h.score}_max")
        assert sum(h.passed) + sum(h.here) + sum(h.elsewhere) == len(mine)
        assert sum(h.here) == sum(row.get("rule") in rules for row in mine)
        assert sum(h.passed) == sum(row.get("stage") != "rules" for row in mine)


def test_colors_change_at_the_threshold(facts):
    """What a score dropped lies outside its bounds, what passed lies inside, bin by bin."""
    for h in facts.histograms:
        low, high = h.minimum, h.maximum
        for i, (left, right) in enumerate(zip(h.edges, h.edges[1:], strict=False)):
            inside = (low is None or left >= low) and (high is None or right <= np.nextafter(high, np.inf))
            last = i == len(h.passed) - 1
            assert not h.here[i] or not inside or (last and low is None), (h, i)
            assert not h.passed[i] or inside or i == 0, (h, i)


def test_borders_hold_the_nearest_of_both_sides(data, facts):
    rows = {row["id"]: row for name in ("dropped", "kept") for row in rows_of(data, name)}
    assert facts.borders[0].count == max(border.count for border in facts.borders)
    assert any(border.passing and border.failing for border in facts.borders)
    for border in facts.borders:
        score = border.rule.rpartition("_")[0]
        for sample in border.failing:
            assert sample.rule == border.rule and sample.stage == "rules" and sample.language == border.language
        for sample in border.passing:
            value = rows[sample.id]["scores"][score]
            assert sample.stage != "rules" and sample.value == value and sample.threshold == border.threshold
            assert value >= border.threshold if border.is_minimum else value <= border.threshold
        dropped = [r for r in rows.values() if r.get("rule") == border.rule and r["language"] == border.language]
        assert border.count == len(dropped)
        distance = sorted(abs(r["value"] - border.threshold) for r in dropped)[: len(border.failing)]
        assert [abs(s.value - border.threshold) for s in border.failing] == distance


def test_samples_of_each_rule_and_domain(data, facts):
    dropped = rows_of(data, "dropped")
    assert {(d.stage, d.rule): d.count for d in facts.dropped} == {
        (row["stage"], row["rule"]): sum((r["stage"], r["rule"]) == (row["stage"], row["rule"]) for r in dropped)
        for row in dropped
    }
    for group in facts.dropped:
        assert len(group.samples) == min(group.count, 3) and {s.rule for s in group.samples} == {group.rule}
    copies = next(group for group in facts.dropped if group.stage == "near")
    assert all(sample.copy_of and sample.original for sample in copies.samples)
    assert {s.domain for s in facts.kept} == {row["domain"] for row in rows_of(data, "kept")}
    assert explore(data, samples=3) == facts


def test_what_a_rule_counted_is_marked(facts):
    border = next(b for b in facts.borders if b.rule == "dup_10gram_max" and b.language == "en")
    assert border.passing and all(len(sample.excerpt[1].split()) == 10 for sample in border.passing)
    short = next(b for b in facts.borders if b.rule == "chars_min")
    assert not any(sample.excerpt[1] for sample in short.failing), "a length has no place"


@settings(max_examples=200)
@given(st.data())
def test_bins_hold_their_bounds(data):
    rule = data.draw(st.sampled_from([r for p in ("en", "zh", "code") for r in bounds(Policies().of(p))]))
    minimum, maximum = (rule[3], None) if rule[2] else (None, rule[3])
    if data.draw(st.booleans()):
        minimum, maximum = data.draw(st.sampled_from([(3.0, 10.0), (50.0, 100_000.0), (0.1, 0.1001), (2.0, 2.0)]))
    values = np.array(data.draw(st.lists(st.floats(0, 1e6), min_size=1, max_size=30)))
    edges = bin_edges(values, minimum, maximum, is_count=rule[1] in COUNTS)
    assert (np.diff(edges) > 0).all() and 2 <= len(edges) <= 50
    assert minimum is None or minimum == maximum or minimum in edges
    if maximum is not None:
        assert np.nextafter(maximum, np.inf) in edges and edges[0] <= maximum < edges[-1]


# ---- the page


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_no_document_can_script_the_page(data, tmp_path, lang):
    text = write_page(data, tmp_path / "page.html", lang=lang).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open, "every element is closed"
    assert not {"script", "img", "iframe", "object", "embed", "link", "form", "a-x"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset", "data")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert HOSTILE in "".join(page.text), "it is shown, as text"
    assert unescape(text).count("alert('x')") == "".join(page.text).count("alert('x')")
    assert len(page.ids) == len(set(page.ids)) == 7
    assert f'<html lang="{words_of(lang).lang}">' in text and words_of(lang).borderline in "".join(page.text)


def test_same_bytes_again(data, tmp_path):
    first = write_page(data, tmp_path / "a.html").read_bytes()
    assert write_page(data, tmp_path / "b.html").read_bytes() == first


def test_every_label_is_translated_and_every_score_named():
    english, chinese = (asdict(words_of(lang)) for lang in ("en", "zh"))
    assert [name for name in english if english[name] == chinese[name]] == []
    for language in ("en", "zh", "code"):
        policy = Policies().of(language)
        for _, score, _, _ in bounds(policy):
            for lang in ("en", "zh"):
                title = score_title(score, policy, words_of(lang))
                assert title and "such" not in title and not title.endswith((",", ".")), (score, lang)


def test_a_tower_is_cut_and_says_how_tall_it_is():
    h = Histogram("en", "dup_lines", None, 0.3, (0.0, 0.1, 0.3, 0.5), (9000, 4, 0), (0, 0, 3), (0, 0, 0))
    drawn = histogram(h)
    assert ">9,000</text>" in drawn and 'class="cut"' in drawn and "≤ 0.3" in drawn
    heights = [float(n) for n in re.findall(r"v-([\d.]+)", drawn)]
    assert max(heights) <= 160 and min(heights) >= 1


def test_a_corpus_of_which_nothing_is_kept_has_a_page(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "Much too short to be kept, the two of them."}\n')
    config = DataConfig(sources=[{"name": "a", "path": str(tmp_path / "a.jsonl"), "kind": "jsonl", "language": "en"}])
    with pytest.raises(InputError, match="no document was kept"):
        run(config, out=tmp_path / "data")
    text = write_page(tmp_path / "data", tmp_path / "page.html").read_text(encoding="utf-8")
    assert "There is nothing to show." in text and not Page(text).open


def test_a_folder_without_documents_has_a_page(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "torn')
    config = DataConfig(sources=[{"name": "a", "path": str(tmp_path / "a.jsonl"), "kind": "jsonl"}])
    with pytest.raises(InputError, match="no document was kept"):
        run(config, out=tmp_path / "data")
    assert "json" in write_page(tmp_path / "data", tmp_path / "page.html").read_text(encoding="utf-8")


def commands():
    text = (ROOT / "docs" / "data-explore.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("puyu ")]


def test_every_command_of_the_page_about_it_works(data, tmp_path):
    (tmp_path / "mine.yaml").write_text("words: {chars_min: 100}\n")
    assert len(commands()) >= 6
    for command in commands():
        words = shlex.split(command.partition(" > ")[0].replace("runs/nano/data", str(data)))[1:]
        done = puyu(*words, cwd=tmp_path)
        assert done.stdout.strip() or "kB" in done.stderr
    assert (tmp_path / "explore.html").is_file()
