"""`puyu bench serve` against our own server: lengths, counts, every workload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from puyu.cli.bench import main
from tests.serve.conftest import NAME


def test_against_our_own_server(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.svg")]
    load = ["--workload", "random", "--prompt", "8-24", "--output", "4-12", "--requests", "9", "--concurrency", "3"]
    assert main(["serve", "--url", f"{url}/v1", *load, *files]) == 0
    assert "9 completed, 0 refused, 0 failed" in capsys.readouterr().out
    value = json.loads((tmp_path / "run.json").read_text())
    assert value["server"] == {"model": NAME, "context": 1024, "exact_lengths": True}
    for row in value["requests"]:
        assert row["status"] == "ok" and row["output_tokens"] == row["asked_output"] and row["has_usage"]
        assert row["prompt_tokens"] == row["asked_prompt"], "lengths of prompts are those of the server"
    assert (tmp_path / "run.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("kind", ["sharegpt", "prefix", "conversations"])
def test_every_workload_in_chat(
    kind: str,
    url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [{"messages": [{"role": "user", "content": f"Count to {n}"}, {"role": "assistant", "content": "one two"}]}
             for n in range(3)]  # fmt: skip
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    more = {"prefix": ["--prompt", "9", "--output", "5", "--prefix-tokens", "30"], "conversations": [str(path)]}
    command = ["serve", "--url", url, "--chat", "true", "--requests", "4", "--context", "200", "--workload", kind]
    assert main([*command, *more.get(kind, [])]) == 0
    assert "4 completed, 0 refused, 0 failed" in capsys.readouterr().out
