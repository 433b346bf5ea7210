"""The GPU bench of pretraining, at toy sizes on a CPU, and how its bars are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_pretrain

    monkeypatch.setattr(gpu_pretrain.torch.cuda, "is_available", lambda: False)
    return gpu_pretrain


def test_all_parts_run_at_toy_sizes(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--dry"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not result["measured"] and not result["check"]["failed"] and len(result["check"]["paths"]) == 6
    assert result["small"]["best"] in result["small"] and result["seven"]["full"]["tokens_per_s"] > 0
    assert result["float8"]["dtype"]["loss_first"] == pytest.approx(
        result["float8"]["float8-emulated"]["loss_first"], rel=0.01
    )
    assert result["long"]["32k, half short"]["documents"] > result["long"]["32k"]["documents"]


def test_without_a_gpu_it_says_so(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "bench": "gpu_pretrain", "measured": False, "why": "torch sees no GPU",
    }  # fmt: skip


def test_bars_are_those_of_the_fastest_way(bench: Any) -> None:
    result = {
        "small": {"best": "b", "a": {"mfu": 0.4}, "b": {"mfu": 0.56}},
        "seven": {"best": "a", "a": {"tokens_per_s": 0.0, "error": "out of memory"}},
        "float8": {"gain": 1.2},
        "long": {"lost, 32k, half short": 0.3},
    }
    found = {row["id"]: (row["value"], row["holds"]) for row in bench.judged(result)}
    assert found == {"train.13": (0.56, True), "train.15": (1.2, False), "train.16": (0.3, True)}
    assert bench.judged({"check": {}}) == []
