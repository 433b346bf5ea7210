"""Block lists: domains with their subdomains, whole words, characters of Chinese; the library against its twin."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.configure import build
from puyu.data import safety
from puyu.data.clean import DataConfig, run
from puyu.data.safety import DomainFilter, SafetyConfig, WordFilter, count_entries, host_of
from puyu.documents.document import make_document
from puyu.errors import InputError
from tests.data.test_clean import essay, rows_of

ENTRIES = ("bad", "Bad word", "ill", "坏词", "très laid", "ばか", "x")


def page(url):
    return make_document("text", source="s", metadata={"url": url} if url else {})


@pytest.mark.parametrize("packed", [False, True])
def test_domains_and_their_subdomains(tmp_path, packed):
    lines = "# a list\nbad.example\n0.0.0.0 ads.example.net\n||tracker.example^\n*.wild.example\n\nBIG.example # big\n"
    path = tmp_path / ("list.gz" if packed else "list.txt")
    path.write_bytes(gzip.compress(lines.encode()) if packed else lines.encode())
    stage = DomainFilter([path])
    urls = {
        "https://bad.example/x": "bad.example", "http://www.Bad.Example:80/": "bad.example",
        "//a.b.wild.example": "wild.example", "ads.example.net/page": "ads.example.net",
        "http://tracker.example./": "tracker.example", "http://big.example": "big.example",
        "https://notbad.example/": None, "https://example.net/": None, "http://[broken/": None, "": None,
    }  # fmt: skip
    for url, expected in urls.items():
        drop = stage([page(url)], [{}])[0].drop
        assert (drop.threshold if drop else None) == expected, url
        assert drop is None or (drop.rule == "blocked_domain" and drop.value == host_of(url))


def test_a_missing_or_broken_list_is_named(tmp_path):
    with pytest.raises(InputError, match="no such list"):
        DomainFilter([tmp_path / "none.txt"])
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="not a list"):
        DomainFilter([tmp_path / "bad.gz"])


def test_words_count_whole_and_once():
    text = "A BAD word, badly ill; bad-tempered. 这是坏词，坏词！ Très laid? très laid. xx x"
    assert count_entries([text, "", "nothing"], ENTRIES).tolist() == [[6, 9], [0, 0], [0, 0]]


@given(st.lists(st.sampled_from([*ENTRIES, "BAD", " ", "", "é", "人", "ー", "1", "illness", "😀", "-"]), max_size=12))
def test_the_library_counts_what_its_twin_counts(parts):
    text = "".join(parts)
    assert count_entries([text, text[::-1]], ENTRIES).tolist() == [
        list(safety._count(text, ENTRIES)),
        list(safety._count(text[::-1], ENTRIES)),
    ]


def test_each_language_has_its_list():
    stage = WordFilter(SafetyConfig())
    languages = [path.stem for path in safety._LISTS.glob("*.txt")]
    assert len(languages) == 28 and all(stage.entries(name) for name in languages if name.isalpha())
    assert stage.entries("xx") == () == stage.entries("") == stage.entries("../en")
    for language in ("en", "zh"):
        entries = stage.entries(language)
        text = "，".join(entries[5:9]) if language == "zh" else " ".join(entries[5:9])
        document = make_document(f"{text} ok", source="s", language=language)
        verdict = stage([document], [{}])[0]
        assert verdict.drop is not None and verdict.drop.rule == "listed_words" and verdict.drop.threshold == 2
        other = make_document(document.text, source="s", language="code")
        assert stage([other], [{}])[0].drop is None


def test_the_data_stage_with_lists(tmp_path):
    rows = [{"text": essay(i), "url": f"https://site{i}.example/"} for i in range(4)]
    rows.append({"text": essay(9) + " zorgle blarf", "url": "https://x.example"})
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "domains.txt").write_text("site2.example\n")
    (tmp_path / "mine.txt").write_text("zorgle\nblarf\n")
    lists = {
        "domains": [str(tmp_path / "domains.txt")],
        "more_words": {"en": str(tmp_path / "mine.txt")},
        "words_max": 1,
    }
    source = {"name": "web", "path": str(tmp_path / "web.jsonl"), "kind": "jsonl"}
    config = build(DataConfig, {"sources": [source], "safety": lists})
    numbers = run(config, out=tmp_path / "out")
    assert numbers["dropped_by_rule"] == {"blocked_domain": 1, "listed_words": 1}
    assert [row["scores"]["listed_words"] for row in rows_of(tmp_path / "out", "kept")] == [0.0] * 3
    names = dict(config.inputs())
    assert names["safety.more_words.en"] == tmp_path / "mine.txt"
    (tmp_path / "domains.txt").write_text("site1.example\nsite2.example\n")
    assert run(config, out=tmp_path / "out")["dropped_by_rule"]["blocked_domain"] == 2
