"""The GPU bench of fine-tuning, at toy sizes on a CPU, and how its bars are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_finetune

    monkeypatch.setattr(gpu_finetune.torch.cuda, "is_available", lambda: False)
    return gpu_finetune


def test_all_parts_run_at_toy_sizes(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--dry"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not found["measured"] and found["bars"] == []
    assert not found["check"]["failed"] and len(found["check"]["paths"]) == 5
    assert found["seven"]["tokens_per_s"] > 0 and found["twenty"]["loss_first"] > 0
    assert found["context"]["24 GB"] >= 16 and found["peer"]["tokens_per_s"] > 0


def test_without_a_gpu_it_says_so(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    assert json.loads(capsys.readouterr().out)["why"] == "torch sees no GPU"


def test_bars_are_those_of_what_was_run(bench: Any) -> None:
    seven, peer = {"peak_gb": 6.5, "tokens_per_s": 900.0}, {"tokens_per_s": 500.0}
    found = {row["id"]: (row["value"], row["holds"]) for row in bench.judged({"seven": seven, "peer": peer})}
    assert found == {"tune.14": (6.5, True), "tune.16": (1.8, False)}
    assert bench.judged({"check": {}, "seven": {}, "peer": {"why": "none"}}) == []
