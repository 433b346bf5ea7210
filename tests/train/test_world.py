"""Processes that join and leave a group."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are looked at by their names in /proc")
def test_no_process_ends_before_gloo_has_freed_its_tensors():
    """Else its thread finds no interpreter, and ends the process: "terminate called without an active exception"."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "tests.train.run_leaving"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
