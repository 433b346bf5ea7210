"""Export: every form reads back as the same documents; filters; what is refused."""

import json

import pytest

from puyu.cli.main import main
from puyu.data.export import FORMS, export
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
