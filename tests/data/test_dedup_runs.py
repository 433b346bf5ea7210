"""Duplicates across runs: the older stays, or the newer; the newest by date; an index that does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from puyu.configure import build
from puyu.data import clean
from puyu.data.clean import DataConfig, run
from puyu.errors import ConfigError
from puyu.files import read_jsonl
from tests.data.test_clean import essay, rows_of


def dump_of(path: Path, texts: list[str], dates: list[str] | None = None) -> Path:
    rows = [{"text": text, **({"date": dates[i]} if dates else {})} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(path: Path, **dedup: object) -> DataConfig:
    return build(DataConfig, {"sources": [{"name": "web", "path": str(path), "kind": "jsonl"}], "dedup": dedup})


def texts_of(out: Path) -> set[str]:
    return {row["text"][:40] for row in rows_of(out, "kept")}


@pytest.fixture
def two_dumps(tmp_path):
    old = dump_of(tmp_path / "old.jsonl", [essay(i) for i in range(8)])
    new = dump_of(tmp_path / "new.jsonl", [essay(0), essay(1).upper(), essay(2) + " One more remark.", essay(20)])
    run(config_of(old, index=True), out=tmp_path / "old")
    return tmp_path, new


def test_what_an_earlier_run_kept_is_a_copy(two_dumps):
    folder, new = two_dumps
    numbers = run(config_of(new, index=True, against=[folder / "old"]), out=folder / "new")
    assert numbers["kept"] == 1 and numbers["dropped_by_rule"] == {
        "identical": 1,
        "exact_duplicate": 1,
        "near_duplicate": 1,
    }
    kept_before = {row["id"] for row in rows_of(folder / "old", "kept")}
    assert {row["of"] for row in rows_of(folder / "new", "dropped")} <= kept_before
    third = dump_of(folder / "third.jsonl", [essay(20), essay(3), essay(30)])
    numbers = run(config_of(third, against=[folder / "old", folder / "new"]), out=folder / "third")
    assert numbers["kept"] == 1 and numbers["dropped"] == 2
    assert not (folder / "third" / "index").exists()


def test_the_newer_takes_the_place_of_the_older(two_dumps):
    folder, new = two_dumps
    numbers = run(config_of(new, against=[folder / "old"], against_keeps="newer"), out=folder / "new")
    assert numbers["kept"] == 4
    gone = list(read_jsonl(folder / "new" / "superseded.jsonl"))
    assert [row["rule"] for row in gone] == ["identical", "exact_duplicate", "near_duplicate"]
    old = {row["id"]: row["text"] for row in rows_of(folder / "old", "kept")}
    assert {old[row["id"]] for row in gone} == {essay(0), essay(1), essay(2)}


def test_the_newest_stays_whatever_its_length(tmp_path):
    texts = [essay(1), essay(1) + " A last remark about it.", essay(1) + " One more remark."]
    dates = ["2024-05-01", "2023-01-01T00:00:00Z", "2024-05-01T10:00:00Z"]
    path = dump_of(tmp_path / "web.jsonl", texts, dates)
    run(config_of(path, prefer="newest"), out=tmp_path / "newest")
    assert [row["text"] for row in rows_of(tmp_path / "newest", "kept")] == [texts[2]]


def test_an_index_with_other_keys_is_refused(two_dumps):
    folder, new = two_dumps
    with pytest.raises(ConfigError, match="other keys of duplicates"):
        run(config_of(new, against=[folder / "old"], near={"seed": 7}), out=folder / "new")


def test_index_and_decisions_do_not_depend_on_the_cut(two_dumps, monkeypatch):
    folder, new = two_dumps
    asked = config_of(new, index=True, against=[folder / "old"])
    run(asked, out=folder / "a")
    monkeypatch.setattr("puyu.documents.raw.BLOCK_RECORDS", 1)
    run(asked, out=folder / "b")
    for path in sorted((folder / "a").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (folder / "b" / path.relative_to(folder / "a")).read_bytes(), path.name


def test_an_index_that_changes_between_a_kill_and_the_next_run(two_dumps, monkeypatch):
    """What was written under the old index is not used again: the result is that of a run with the new one alone."""
    folder, new = two_dumps
    asked = config_of(new, against=[folder / "old"])

    def killed(*unused: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clean, "write_files", killed)
        with pytest.raises(KeyboardInterrupt):
            run(asked, out=folder / "resumed")
    before = set((folder / "resumed" / "work").glob("parts-*/*"))
    assert before and not (folder / "resumed" / "kept.jsonl").exists()
    other = dump_of(folder / "other.jsonl", [essay(1), essay(20)])
    run(config_of(other, index=True), out=folder / "old")
    run(asked, out=folder / "resumed")
    numbers = run(asked, out=folder / "fresh")
    assert numbers["kept"] == 2 and texts_of(folder / "resumed") == {essay(0)[:40], essay(2)[:40]}
    for name in ("kept.jsonl", "dropped.jsonl", "ids.bin", "scores.parquet", "ledger.json"):
        assert (folder / "resumed" / name).read_bytes() == (folder / "fresh" / name).read_bytes(), name


def test_parts_of_the_same_index_are_used_again(two_dumps, monkeypatch):
    folder, new = two_dumps
    asked, written = config_of(new, against=[folder / "old"]), clean.write_files
    names: list[set[Path]] = []

    def watched(out: Path, *rest: Any) -> None:
        names.append(set((out / "work").glob("parts-*")))
        if len(names) == 1:
            raise KeyboardInterrupt
        written(out, *rest)

    monkeypatch.setattr(clean, "write_files", watched)
    with pytest.raises(KeyboardInterrupt):
        run(asked, out=folder / "resumed")
    run(asked, out=folder / "resumed")
    assert names[0] == names[1] and len(names[0]) == 1
