"""The shipped corpus: what was planted in it is found, and what was kept is prose without the chrome of its pages."""

from pathlib import Path

import pytest

from puyu.configure import build
from puyu.data.clean import DataConfig, run
from puyu.files import read_jsonl

CORPUS = Path(__file__).parents[2] / "samples" / "corpus"


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    sources = [
        {"name": "pages", "path": str(CORPUS / "html"), "kind": "html"},
        {"name": "crawl", "path": str(CORPUS / "crawl.jsonl.gz"), "kind": "html", "text_field": "html"},
    ]
    numbers = run(build(DataConfig, {"sources": sources}), out=out)
    rows = {name: list(read_jsonl(out / f"{name}.jsonl")) for name in ("kept", "dropped", "quarantined")}
    return numbers, rows


def test_what_was_planted_is_found(cleaned):
    numbers, rows = cleaned
    reasons = sorted((row["source"], row["reason"].partition(":")[0]) for row in rows["quarantined"])
    assert reasons == [("crawl", "encoding"), ("crawl", "json"), ("crawl", "record"), ("pages", "encoding")]
    dropped = {row["metadata"].get("path", ""): row["rule"] for row in rows["dropped"]}
    assert dropped["fra-udhr.html"] == dropped["jpn-udhr.html"] == "language"
    assert dropped["zh-keywords.html"] == "sentence_marks_min"
    assert {"en-cheap-gpu.html", "en-sitemap.html", "en-template.html"} <= set(dropped)
    assert list(dropped.values()).count("near_duplicate") == 2
    assert numbers["dropped_by_rule"]["identical"] == 2
    assert {"email", "phone", "id_number", "card", "ip"} <= set(numbers["masked"])


def test_kept_pages_have_their_text_and_not_their_chrome(cleaned):
    _, rows = cleaned
    assert len(rows["kept"]) > 40
    chrome = (
        "cookie policy",
        "Subscribe now!",
        "All rights reserved",
        "window.dataLayer",
        "扫码关注",
        "版权所有",
        "沙发",
    )
    for row in rows["kept"]:
        assert not [words for words in chrome if words in row["text"]], row["metadata"]
        assert "\ufffd" not in row["text"]
    chinese = [row for row in rows["kept"] if row["language"] == "zh"]
    assert len(chinese) > 12 and all(row["metadata"]["path"].startswith("zh-") for row in chinese)


def test_every_part_has_a_license():
    table = (CORPUS.parent / "README.md").read_text(encoding="utf-8")
    for part in CORPUS.iterdir():
        assert part.name in table, f"samples/README.md has no row for {part.name}"
    assert all((package / "LICENSE").is_file() for package in (CORPUS / "code").iterdir())
