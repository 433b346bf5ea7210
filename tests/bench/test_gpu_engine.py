"""The GPU bench itself, on a CPU: it says that there is no GPU, and its code runs in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "bench/gpu_engine.py", *arguments]
    own = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_it_runs() -> None:
    if find_spec("triton") is None:
        assert run() == {"bench": "gpu_engine", "measured": False, "why": "torch sees no GPU"}
        return
    result = run("--tiny", "--parts", "context", TRITON_INTERPRET="1")
    assert not result["measured"] and result["versions"]["torch"] == torch.__version__
    assert result["context"]["tokens"] == 20 and result["context"]["decode_tokens_s"] > 0


def test_bars_are_judged_by_the_worst_of_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu_engine

    shares = {"bf16 after 128": 0.8, "bf16 after 4096": 0.7, "w4 after 128": 0.66, "w4 after 4096": 0.64}
    decoded: dict[str, Any] = {name: {"share": share} for name, share in shares.items()}
    result = {
        "decode": {"copy_gb_s": 4000.0, **decoded},
        "context": {"tokens": 200_000, "fits": 900_000},
        "memory": {"peak_gb": 9.5},
    }
    found = {row["id"]: (row["value"], row["holds"]) for row in gpu_engine.judged(result)}
    assert found == {
        "engine.14": (0.7, False),
        "engine.15": (0.64, True),
        "engine.16": (200_000.0, True),
        "engine.17": (9.5, True),
    }
    assert gpu_engine.judged({"check": {}}) == []
