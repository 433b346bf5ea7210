"""The rooms of data and tokenizer with the network taken away: recipes, looks, models, forms."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ISOLATED = [*(["unshare", "--net"] if shutil.which("unshare") else []), sys.executable, "-m", "puyu"]


def can_unshare() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "--net", "true"]).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="taking the network away needs Linux's unshare and the right to use it")
def test_everything_works_without_a_network(tmp_path):
    out = tmp_path / "web"
    for command in (
        ["data", "recipes/data_web.yaml", "--out", out],
        ["data", "stats", out],
        ["data", "what-if", out, "--set", "words.chars_min=100"],
        ["data", "explore", out, "--out", tmp_path / "page.html"],
        ["data", "export", out, tmp_path / "web.parquet"],
        ["data", "train-ngram", out / "kept.jsonl", "--out", tmp_path / "en.ngram", "--language", "en"],
        ["data", "check", "samples/world/sft.jsonl.gz"],
        ["data", "code", "samples/corpus/code", "--out", tmp_path / "code.jsonl"],
        ["tokenizer", "--data", out, "--vocab_size", "600", "--out", tmp_path / "tokenizer"],
        ["tokenizer", "fertility", out / "kept.jsonl", "--with", tmp_path / "tokenizer"],
    ):
        done = subprocess.run([*ISOLATED, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    assert (out / "ledger.json").is_file() and (out / "index" / "columns.json").is_file()
