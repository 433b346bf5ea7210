"""Corpora on disk: which files, which rows, and what becomes of the others."""

import gzip
import json

import pytest

from puyu.data.corpus import corpus_files, documents, in_batches, languages_of, rows
from puyu.documents.document import document_id
from puyu.errors import InputError


def test_a_folder_is_its_kept_rows_or_else_all_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "sub/a.jsonl.gz", "notes.txt"):
        (tmp_path / name).write_text("")
    assert [path.name for path in corpus_files(tmp_path)] == ["b.jsonl", "a.jsonl.gz"]
    (tmp_path / "kept.jsonl").write_text("")
    assert [path.name for path in corpus_files(tmp_path)] == ["kept.jsonl"]
    for nothing in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="no JSONL file"):
            corpus_files(nothing)


def test_every_row_is_a_document_or_is_named(tmp_path):
    good = {"id": 7, "text": "a", "domain": "web", "language": "en", "metadata": {"url": "u"}}
    lines = [good, {"text": "b", "url": "https://x.org/"}, {"text": 3}, [1], {"text": "\ud800"}]
    content = "\n".join(json.dumps(line) for line in lines) + "\n{torn"
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as stream:
        stream.write(content)
    bad = []
    found = list(rows([tmp_path / "c.jsonl.gz"], quarantine=bad.append))
    assert [row for row, _ in found] == lines[:2]
    first, second = (document for _, document in found)
    assert (first.id, first.domain, first.language, first.metadata) == ("7", "web", "en", {"url": "u"})
    assert second.id == document_id("b", "c.jsonl.gz") and second.metadata == {"url": "https://x.org/"}
    assert [(record.line, record.reason.partition(":")[0]) for record in bad[:3]] == [
        (3, "record"),
        (4, "record"),
        (5, "encoding"),
    ]
    assert len(bad) == 4 and bad[3].line == 6
    assert [d.text for d in documents([tmp_path / "c.jsonl.gz"] * 2, quarantine=lambda record: None)] == ["a", "b"] * 2


def test_only_missing_languages_are_detected():
    texts = ["今天天气很好，我们去公园散步吧。", "今天天气很好"]
    assert languages_of(texts, ["", "en"]) == ["zh", "en"]


def test_batches_hold_all():
    assert list(in_batches(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
