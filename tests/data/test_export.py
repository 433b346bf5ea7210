"""Export: every form reads back as the same documents; filters; what is refused."""

import json

import pytest

from puyu.cli.main import main
from puyu.data.export import FORMS, export, export_wanjuan
from puyu.documents.interleaved import url_hash
from puyu.documents.readers import SourceConfig, read
from puyu.errors import ConfigError, InputError
from puyu.files import read_jsonl, write_jsonl

ROWS = [
    {
        "id": f"{i:032x}",
        "source": "web" if i % 2 else "wiki",
        "domain": "web",
        "language": "zh" if i % 3 else "en",
        "text": f"text {i} 中文\nsecond line",
        "scores": {"chars": float(i)} if i else {},
        "metadata": {"url": f"http://x/{i}"} if i % 2 else {},
    }
    for i in range(2500)
]


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "data" / "kept.jsonl", ROWS)
    return tmp_path / "data"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_back(folder, tmp_path, form):
    target = tmp_path / f"out{form}"
    assert export(folder, target) == len(ROWS)
    if form == ".txt":
        assert target.read_text().split("\n\n")[:-1] == [row["text"] for row in ROWS]
        return
    kind = "parquet" if form == ".parquet" else "jsonl"
    found = read(SourceConfig(name="s", path=str(target), kind=kind), pytest.fail)
    assert [document.text for document in found] == [row["text"] for row in ROWS]
    if kind == "jsonl":
        assert list(read_jsonl(target)) == ROWS


def test_parquet_holds_scores_and_metadata(folder, tmp_path):
    from pyarrow import parquet

    export(folder, tmp_path / "a.parquet")
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [dict(row["scores"]) for row in rows] == [row["scores"] for row in ROWS]
    assert [json.loads(row["metadata"]) for row in rows] == [row["metadata"] for row in ROWS]
    export(folder, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_some_of_them_on_the_command_line(folder, tmp_path, capsys):
    command = ["data", "export", str(folder), str(tmp_path / "zh.jsonl"), "--language", "zh", "--source", "web"]
    assert main(command) == 0
    wanted = [row for row in ROWS if row["language"] == "zh" and row["source"] == "web"]
    assert list(read_jsonl(tmp_path / "zh.jsonl")) == wanted
    assert f"{len(wanted)} documents" in capsys.readouterr().err


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="no form that is known"):
        export(folder, tmp_path / "a.csv")
    with pytest.raises(InputError, match="no document of"):
        export(folder, tmp_path / "a.jsonl", language="fr")
    assert not (tmp_path / "a.jsonl").exists()


URL = "https://a.org/cat.jpg"
ENTRY = {"url": URL, "sha256": url_hash(URL), "caption": "", "width": "8", "height": "8"}


def wanjuan_row(id: str, text: str, language: str = "en", **metadata):
    named = {"id": id, "source": "s", "domain": "web", "language": language, "text": text}
    return {**named, "scores": {}, "metadata": metadata}


def test_wanjuan_on_the_command_line(tmp_path, capsys):
    """A corpus as WanJuan's records, which read back as the same documents; what cannot be a record is named."""
    rows = [
        wanjuan_row("1", "A cat. ![](https://a.org/cat.jpg)", images=[ENTRY], record="cat"),
        wanjuan_row("2", "Only text.", "zh"),
        wanjuan_row("3", "![](https://b.org/none.jpg)", images=[ENTRY]),
    ]
    folder, target = tmp_path / "data", tmp_path / "out.jsonl.zst"
    write_jsonl(folder / "kept.jsonl", rows)
    assert main(["data", "export", str(folder), str(target), "--form", "wanjuan"]) == 0
    said = capsys.readouterr().err
    assert (
        "2 documents, 1 left out" in said and "a link without an entry in img_list: https://b.org/none.jpg (3)" in said
    )
    assert list(read_jsonl(target)) == [
        {"id": "cat", "img_list": [ENTRY], "content": rows[0]["text"]},
        {"id": "2", "content": "Only text."},
    ]
    found = read(SourceConfig(name="s", path=str(target), kind="wanjuan"), pytest.fail)
    assert [document.text for document in found] == [row["text"] for row in rows[:2]]
    assert export_wanjuan(folder, tmp_path / "zh.jsonl", quarantine=pytest.fail, language="zh") == 1


def test_what_cannot_be_wanjuan(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no form that is known.*\n.*\.jsonl\.zst"):
        export_wanjuan(folder, tmp_path / "a.parquet", quarantine=pytest.fail)
    with pytest.raises(InputError, match="no document of"):
        export_wanjuan(folder, tmp_path / "a.jsonl", quarantine=pytest.fail, language="fr")
    assert not (tmp_path / "a.jsonl").exists()
