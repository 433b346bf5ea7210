"""`puyu convert`: what a user types, and what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puyu.cli.main import main
from tests.model.forms import differing, model_folder, stored


def test_there_and_back(tmp_path: Path, capsys: Any) -> None:
    native, shards, back = model_folder(tmp_path / "a"), str(tmp_path / "shards"), str(tmp_path / "back")
    assert main(["convert", str(native), shards, "--to", "internevo", "--tp", "2", "--pp", "3", "--interleaved"]) == 0
    said = capsys.readouterr().out
    assert "internevo" in said and "in 6 files" in said
    assert main(["convert", shards, back, "--to", "internlm2", "--allow-pickle"]) == 0
    assert "in 1 files" in capsys.readouterr().out
    assert not differing(stored(native), stored(Path(back)))


def test_what_cannot_be_done_is_one_line_and_a_code(tmp_path: Path, capsys: Any) -> None:
    native = model_folder(tmp_path / "a", tie_embeddings=True)
    assert main(["convert", str(native), str(tmp_path / "b"), "--to", "internevo"]) == 4
    said = capsys.readouterr().err
    assert "cannot express tied embeddings" in said and "internlm2, internlm, llama, the same with --untie" in said
    assert main(["convert", str(native), str(tmp_path / "b"), "--to", "internevo", "--untie", "--tp", "0"]) == 2
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "b"), "--to", "llama"]) == 4
