"""Shared by all tests: one finished run of the micro recipe, made as a user makes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The first example may load a model, and a shared machine may pause: no deadline. The same examples in every run;
# PUYU_EXPLORE=1 looks for others.
settings.register_profile("puyu", deadline=None, derandomize=not os.environ.get("PUYU_EXPLORE"))
settings.load_profile("puyu")

ROOT = Path(__file__).resolve().parent.parent


def puyu(*arguments, check=True, cwd=ROOT, stdin=None, timeout=300):
    """Run the command as a user does; returns the finished process."""
    done = subprocess.run(
        [sys.executable, "-m", "puyu", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        input=stdin,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory):
    """(folder, finished process) of `puyu chain recipes/micro.yaml`."""
    out = tmp_path_factory.mktemp("chain") / "micro"
    return out, puyu("chain", "recipes/micro.yaml", "--out", out)
