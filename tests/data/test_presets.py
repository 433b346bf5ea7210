"""Presets: each rule fires on a text made for it, with value and threshold; variants, overrides, C4's changed texts."""

import json
import re
from pathlib import Path

import pytest

from puyu.configure import build
from puyu.data.clean import run
from puyu.data.plan import DataConfig, map_stages, stage_names
from puyu.data.presets import C4Tfds, PresetConfig, PresetFilter
from puyu.data.why import why
from puyu.documents.document import make_document
from puyu.errors import ConfigError
from puyu.files import read_jsonl, write_jsonl
from tests.data.test_filters import GOOD_EN, GOOD_ZH

LINES = [
    "The river runs through the green valley and out to the sea.",
    "Old people of the village sit on the bridge in the evening.",
    "They talk about harvest, weather and those that have left.",
    "Nobody can say with certainty who built that bridge of stone.",
    "A traveller came from beyond the hills to ask for the mill.",
    "He was told to be home before the fog rises from the water.",
]
GOOD = "\n".join(LINES)
WORDS = [
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"),
    *("india", "juliet", "kilo", "lima", "mike", "november", "oscar", "papa"),
]


def phrases(n, times, filler, kinds=1):
    """Different n-grams that stand several times, among words that stand once."""
    rest = iter(f"{a}{b}" for a in WORDS for b in WORDS)
    grams = [[f"{'xyz'[kind]}{word}" for word in WORDS[:n]] for kind in range(kinds)] * times
    return " ".join(" ".join([*gram, *(next(rest) for _ in range(filler))]) for gram in grams)


BROKEN = {
    "gopher_quality.words_min": "The end of that.",
    "gopher_quality.words_max": "of the end " * 33_334,
    "gopher_quality.mean_word_min": "of a b to " * 20,
    "gopher_quality.mean_word_max": "the and incomprehensibilities incomprehensibilities " * 30,
    "gopher_quality.hashes_max": GOOD.replace("the", "#the") + " #" * 9,
    "gopher_quality.ellipses_max": GOOD.replace(" ", "... "),
    "gopher_quality.bullet_lines_max": "\n".join("- " + line for line in LINES),
    "gopher_quality.ellipsis_lines_max": GOOD.replace(".", "..."),
    "gopher_quality.alpha_words_min": GOOD + " 12" * 20,
    "gopher_quality.stop_words_min": "lorum verda kuna melo tosi " * 15,
    "gopher_repetition.chars_min": "",
    "gopher_repetition.dup_paragraphs_max": f"{GOOD}\n\nMenu.\n\nMenu.\n\nMenu.",
    "gopher_repetition.dup_paragraph_chars_max": f"{GOOD}\n\n{GOOD}\n\nOne.\n\nTwo.\n\nThree.",
    "gopher_repetition.dup_lines_max": GOOD + "\nMenu." * 5,
    "gopher_repetition.dup_line_chars_max": f"{GOOD}\n{' '.join(LINES)}\n{' '.join(LINES)}",
    "gopher_repetition.top_2gram_max": phrases(2, 9, 3),
    "gopher_repetition.top_3gram_max": phrases(3, 9, 7),
    "gopher_repetition.top_4gram_max": phrases(4, 9, 9),
    "gopher_repetition.dup_5gram_max": phrases(5, 2, 4, kinds=3),
    "gopher_repetition.dup_10gram_max": phrases(10, 2, 17),
    "c4_paper.lorem_ipsum_max": GOOD + "\nHere is Lorem Ipsum.",
    "c4_paper.curly_brackets_max": GOOD + "\nHere is a { bracket.",
    "c4_paper.sentences_min": "\n".join(LINES[:4]),
    "c4_tfds.lorem_ipsum_max": GOOD + "\nHere is some more Lorem Ipsum.",
    "c4_tfds.curly_brackets_max": GOOD + "\nHere is some { bracket.",
    "c4_tfds.sentences_min": "\n".join(LINES[:2]),
    "fineweb_datatrove.lines_min": " \n ",
    "fineweb_datatrove.ended_lines_min": GOOD.replace(".", ""),
    "fineweb_datatrove.short_lines_max": GOOD + "\nIt is here." + "".join(f"\nSo is {word}." for word in WORDS),
    "fineweb_datatrove.dup_line_chars_max": f"{GOOD}\n{LINES[0]}\n{LINES[0]}",
    "fineweb_datatrove.line_breaks_max": GOOD + "\n" * 60,
    "fineweb_paper.ended_lines_min": GOOD.replace(".", ""),
    "fineweb_paper.short_lines_max": GOOD + "\nIt is here." + "".join(f"\nSo is {word}." for word in WORDS),
    "fineweb_paper.dup_line_chars_max": f"{GOOD}\n{LINES[0]}\n{LINES[0]}",
    "internlm2.mean_line_min": "\n".join(["Menu", *"abcdefghijkl"]),
    "internlm2.dup_lines_max": GOOD + "\nMenu of all." * 5,
    "internlm2.char_runs_max": GOOD + "=" * 400,
    "internlm2.bullet_lines_max": "\n".join("* " + line for line in LINES),
    "internlm2.odd_chars_max": GOOD + "\ufffd" * 9,
    "internlm2.punctuation_max": GOOD + " ;,:." * 80,
    "internlm2.ended_lines_min": GOOD.replace(".", ""),
    "zh.chars_min": "你好，世界。",
}
DOCS = (Path(__file__).parents[2] / "docs" / "data-rules.md").read_text(encoding="utf-8")


def judge(config, text, language="en", **options):
    stage = PresetFilter(PresetConfig.model_validate(config), **options)
    return stage([make_document(text, source="test", language=language)], [{}])[0]


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_fires(rule):
    preset, _, field = rule.partition(".")
    language = "zh" if preset == "zh" else "en"
    verdict = judge([preset.replace("_", "-")], BROKEN[rule], language)
    assert verdict.drop is not None and verdict.drop.rule == rule
    assert verdict.drop.value == verdict.scores[rule[:-4]]
    threshold = getattr(getattr(PresetConfig(use=()), preset), field)
    assert verdict.drop.threshold == threshold
    off = {"use": [preset.replace("_", "-")], preset: {field: None}}
    again = judge(off, BROKEN[rule], language).drop
    assert again is None or again.rule != rule


@pytest.mark.parametrize("n", [6, 7, 8, 9])
def test_longer_ngrams_fire_where_shorter_ones_are_switched_off(n):
    off = {f"dup_{k}gram_max": None for k in range(5, n)}
    verdict = judge({"use": ["gopher-repetition"], "gopher_repetition": off}, phrases(n, 2, 3, kinds=3))
    assert verdict.drop is not None and verdict.drop.rule == f"gopher_repetition.dup_{n}gram_max"


def test_good_texts_pass_all_presets():
    names = ["gopher-repetition", "gopher-quality", "c4-tfds", "c4-paper", "fineweb-datatrove", "fineweb-paper"]
    verdict = judge([*names, "internlm2", "zh"], GOOD)
    assert verdict.drop is None and verdict.document.text == GOOD
    assert {name.partition(".")[0] for name in verdict.scores} == {
        name.replace("-", "_") for name in (*names, "internlm2")
    }
    assert judge(["zh"], GOOD_ZH, "zh").drop is None
    assert judge(["internlm2"], GOOD_EN).drop is None


def test_what_equals_a_threshold_passes_in_the_code_and_goes_in_the_paper():
    half = {"short_lines_max": 0.5, "short_line": 10}
    text = "A short.\nA line that is long enough."
    assert judge({"use": ["fineweb-datatrove"], "fineweb_datatrove": half}, text).drop is None
    drop = judge({"use": ["fineweb-paper"], "fineweb_paper": half}, text).drop
    assert drop is not None and (drop.rule, drop.value) == ("fineweb_paper.short_lines_max", 0.5)


def test_c4_changes_the_text_and_keeps_the_id():
    page = f"Home\nAbout us\n{GOOD}\nRead our privacy policy here."
    verdict = judge(["c4-paper"], page)
    assert verdict.document.text == GOOD and verdict.drop is None
    assert verdict.document.id == make_document(page, source="test").id
    assert verdict.scores["c4_paper.lines_removed"] == 3 and verdict.scores["c4_paper.lines"] == 9
    assert judge(["c4-paper"], page, enforce=False).document.text == page


def test_presets_see_what_those_before_them_left():
    page = "\n".join(["Home page of us"] * 9 + [GOOD])
    alone, behind = (judge(names, page) for names in (["fineweb-datatrove"], ["c4-paper", "fineweb-datatrove"]))
    assert alone.drop is not None and behind.drop is None
    dropped = judge({"use": ["c4-paper", "gopher-quality"], "gopher_quality": {"words_min": 500}}, page)
    assert dropped.drop is not None and dropped.document.text == page
    both = judge(["gopher-quality", "c4-paper"], "The end of that.")
    assert both.drop is not None and both.drop.rule == "gopher_quality.words_min"
    assert both.scores["c4_paper.sentences"] == 1  # measured all the same


def test_a_preset_is_silent_on_other_languages():
    assert not judge(["gopher-quality", "zh"], "Trop court.", "fr").scores
    every = {"use": ["gopher-quality"], "gopher_quality": {"languages": []}}
    assert judge(every, "Trop court.", "fr").drop is not None
    assert judge(every, "x = 1", "code").drop is None
    chinese = {"use": ["gopher-repetition"], "gopher_repetition": {"languages": ["zh"]}}
    drop = judge(chinese, "今天天气很好，" * 9, "zh").drop
    assert drop is not None and drop.rule == "gopher_repetition.top_2gram_max"


def test_verdicts_do_not_depend_on_the_batch():
    config = PresetConfig.model_validate(["gopher-repetition", "c4-paper", "internlm2", "zh"])
    stage = PresetFilter(config)
    texts = [*BROKEN.values(), GOOD, GOOD_ZH]
    documents = [make_document(text, source="t", language="zh" if text == GOOD_ZH else "en") for text in texts]
    together = stage(documents, [{}] * len(documents))
    assert together == [stage([document], [{}])[0] for document in documents]
    assert not any(value != value for verdict in together for value in verdict.scores.values())


def test_one_threshold_of_a_variant_moves_and_the_others_stay():
    config = build(PresetConfig, {"use": ["c4-tfds"], "c4_tfds": {"sentences_min": 1}})
    assert config.c4_tfds == C4Tfds(sentences_min=1) and config.c4_tfds.line_words == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [({"use": ["gopher"]}, "gopher-quality"), ({"use": ["zh", "zh"]}, "named twice"), ({"use": [], "c4": {}}, "c4")],
)
def test_wrong_configs_say_what_is_wrong(given, message):
    with pytest.raises(ConfigError, match=message):
        build(PresetConfig, given)


def test_the_runner_takes_presets(tmp_path):
    page = f"Home\n{GOOD}\n{GOOD_EN}"
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in (page, GOOD_EN, "The end of that. " * 20)])
    source = {"name": "web", "path": str(tmp_path / "a.jsonl"), "kind": "jsonl", "language": "en"}
    config = DataConfig.model_validate({"sources": [source], "presets": ["gopher-repetition", "c4-paper"]})
    assert [stage.name for stage in map_stages(config, config.sources[0])] == ["language", "presets", "rules"]
    assert stage_names(config)[:4] == ("language", "presets", "rules", "identical")
    numbers = run(config, out=tmp_path / "out")
    assert numbers["kept"] == 2
    assert numbers["dropped_by_rule"] == {"gopher_repetition.top_2gram_max": 1}
    kept = {row["id"]: row for row in read_jsonl(tmp_path / "out" / "kept.jsonl")}
    cleaned = kept[make_document(page, source="web").id]
    assert "Home" not in cleaned["text"] and cleaned["scores"]["c4_paper.lines_removed"] == 1
    dropped = next(read_jsonl(tmp_path / "out" / "dropped.jsonl"))
    assert dropped["stage"] == "presets"
    assert "characters" in why(tmp_path / "out", dropped["id"])
    assert json.loads((tmp_path / "out" / "ledger.json").read_text())["config"]["presets"]["use"]


def test_presets_alone_leave_the_other_rules_silent():
    source = {"name": "a", "path": "a"}
    for alone in (True, False):
        config = DataConfig.model_validate({"sources": [source], "presets": {"use": ["zh"], "alone": alone}})
        rules = map_stages(config, config.sources[0])[-1]
        verdict = rules([make_document("Short.", source="a", language="en")], [{}])[0]
        assert (verdict.drop is None) == alone


def test_the_docs_have_every_threshold():
    for name in PresetConfig.model_fields:
        if name in ("use", "alone"):
            continue
        preset = getattr(PresetConfig(use=()), name)
        part = DOCS.split(f"## `{name.replace('_', '-')}`")[1].split("\n## ")[0]
        rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", part, re.MULTILINE))
        fields = {field: getattr(preset, field) for field in type(preset).model_fields if field != "languages"}
        assert rows == {field: written(value) for field, value in fields.items()}, name


def written(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "off" if value is None else f"`{value}`" if isinstance(value, str) else f"{value:,.12g}".replace(",", " ")
