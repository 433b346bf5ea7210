"""What the interpreter cannot tell: every kernel compiles for Hopper, in registers, within its shared memory."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    assert platform.system() == "Linux"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.kernels.compile_worker"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: row["spills"] for name, row in found.items() if row["spills"] > 256} == {}
    assert all(row["shared"] <= 227 * 1024 for row in found.values()), "what a processor of that generation has"
    wanted = {"decode", "prefill", *(name for name in found if name.endswith((" x 16", " x 64")))}
    assert {name for name, row in found.items() if row["tensor_cores"]} == wanted
