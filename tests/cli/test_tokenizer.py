"""`puyu tokenizer` and what stands beside it: every line that docs/tokenizer.md shows, run as a user runs it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from puyu.cli.main import main
from puyu.files import write_jsonl
from puyu.tokenizer.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.tokenizer.conftest import CORPUS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    rows = [{"text": f"{text} {n}", "language": "zh" if "我" in text else "en"} for n, text in enumerate(CORPUS * 20)]
    write_jsonl(folder / "texts.jsonl", rows)
    (folder / "my.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    return folder


def commands() -> list[str]:
    text = (ROOT / "docs/tokenizer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.startswith("puyu ")]


def run(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(place)
    return main(shlex.split(line)[1:])


def test_every_line_of_the_page_works(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = commands()
    assert len(found) >= 7
    for line in found:
        assert run(line, place, monkeypatch) == 0, (line, capsys.readouterr().err)
    first, again = Tokenizer.load(place / "runs/tok"), Tokenizer.load(place / "runs/again")
    assert [first.encode(text) for text in CORPUS] == [again.encode(text) for text in CORPUS]
    extended = Tokenizer.load(place / "runs/longer")
    assert extended.vocab_size % 128 == 0
    report = json.loads((place / "runs/longer/report.json").read_text(encoding="utf-8"))
    assert report["kept_ranks"] == 300 and set(report["compression"]) == {"zh"}
    out = capsys.readouterr().out
    assert "zh: " in out and "tokens_per_word" in out and "against_first" in out


def test_what_cannot_be_exported_says_why(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (place / "runs/tok").is_dir():
        assert run("puyu tokenizer --data texts.jsonl --vocab-size 400 --out runs/tok", place, monkeypatch) == 0
    assert run("puyu tokenizer export runs/tok x.model --to sentencepiece", place, monkeypatch) == 3
    assert "what it cannot express" in capsys.readouterr().err and not (place / "x.model").exists()
    assert run("puyu tokenizer export runs/tok x.json --to json", place, monkeypatch) == 0
    assert run("puyu tokenizer import x.json --out runs/from-json", place, monkeypatch) == 0
    assert Tokenizer.load(place / "runs/from-json").fingerprint == Tokenizer.load(place / "runs/tok").fingerprint
    assert run("puyu tokenizer export runs/tok x.tiktoken", place, monkeypatch) == 0
    (place / "x.tiktoken.json").unlink()
    assert run("puyu tokenizer import x.tiktoken --out runs/none", place, monkeypatch) == 2
    assert "does not say where text is cut" in capsys.readouterr().err
    line = "puyu tokenizer import x.tiktoken --pattern cl100k --special '<s>=1' --out runs/some"
    assert run(line, place, monkeypatch) == 0 and Tokenizer.load(place / "runs/some").token_id("<s>") == 1
    assert run("puyu tokenizer import none.tiktoken --out runs/none", place, monkeypatch) == 3
    write_jsonl(place / "bad.jsonl", [{"txt": 1}])
    assert run("puyu tokenizer fertility bad.jsonl --with runs/tok", place, monkeypatch) == 3
    assert "bad.jsonl, line 1: the field 'text'" in capsys.readouterr().err


def test_help_names_what_stands_beside_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "--help"]) == 0
    out = capsys.readouterr().out
    assert "fertility FILES --with DIR" in out and "pad_to_multiple" in out
