"""`--auto-resume`: what is begun again, what is not, and signals that pass through."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puyu.cli.again import again
from puyu.cli.options import parse
from puyu.errors import ConfigError

CHILD = """
import os, signal, sys
from pathlib import Path
log = Path(sys.argv[1])
with open(log, "a") as stream:
    stream.write(os.environ["PUYU_AUTO_RESUME"])
code = int(sys.argv[2:][min(len(log.read_text()), len(sys.argv) - 2) - 1])
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@pytest.mark.parametrize(
    ("codes", "tries", "result", "starts"),
    [
        ([75, -9, 0], 5, 0, 3),
        ([0], 5, 0, 1),
        ([2, 0], 5, 2, 1),
        ([7, 0], 5, 7, 1),
        ([1, 0], 5, 1, 1),
        ([143, 0], 5, 143, 1),
        ([75], 2, 75, 3),
        ([-11], 1, 139, 2),
    ],
)
def test_killed_and_75_are_begun_again_and_nothing_else(tmp_path, codes, tries, result, starts):
    log = tmp_path / "log"
    command = [sys.executable, "-S", "-c", CHILD, str(log), *map(str, codes)]
    assert again(command, tries=tries, pause=0.0) == result
    assert log.read_text() == "1" * starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_that_was_asked_for_passes_through_and_ends_it(tmp_path, number):
    os.mkfifo(tmp_path / "ready")
    child = f"import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}]); "
    child += f"open({str(tmp_path / 'ready')!r}, 'w').close(); signal.sigwait([{int(number)}]); sys.exit(75)"
    code = f"import sys; from puyu.cli.again import again; sys.exit(again([sys.executable, '-c', {child!r}], tries=3))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2])
    (tmp_path / "ready").read_text()  # until the child has opened it
    os.kill(process.pid, number)
    assert process.wait(timeout=60) == 75


def test_a_stop_in_the_pause_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    log = tmp_path / "log"
    assert again([sys.executable, "-S", "-c", CHILD, str(log), "75", "0"], tries=3) == 75
    assert log.read_text() == "1"


def test_a_stop_while_the_command_is_being_started_reaches_it(monkeypatch):
    start = subprocess.Popen

    def stopped_meanwhile(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", stopped_meanwhile)
    assert again([sys.executable, "-S", "-c", "import time; time.sleep(600)"], tries=3) == 143


def test_the_flag_is_a_number():
    assert parse(["my.yaml", "--auto-resume", "3"]).auto_resume == 3
    with pytest.raises(ConfigError, match="--auto-resume takes a number"):
        parse(["--auto-resume", "often"])
