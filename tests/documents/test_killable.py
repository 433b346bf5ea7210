"""Functions that hang, crash and eat memory, for real: one answer is lost, the next one comes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from puyu.documents.killable import Failed, Killable, Limits
from puyu.documents.readers import SourceConfig, read
from puyu.errors import DependencyError, PuyuError
from puyu.files import BadRecord
from tests.conftest import ROOT
from tests.documents.test_books import pdf

LIMITS = Limits(seconds=20, memory_mib=256)
_KEPT: list[bytearray] = []


def behave(how: str) -> str:
    """What the argument says."""
    if how == "loop":
        while True:
            pass
    if how == "sleep":
        time.sleep(1000)
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "eat":
        _KEPT.append(bytearray(2**30))
    if how == "leak":
        _KEPT.append(bytearray(100 * 2**20))
    if how == "bug":
        raise IndexError("no such page")
    if how == "refuse":
        raise DependencyError("it is not there")
    if how == "print":
        print("to nobody", flush=True)
    return f"{how} {len(_KEPT)}"


def missing() -> None:
    raise DependencyError("nothing to prepare")


def twice(text: str) -> str:
    return text * 2


def process_of(text: str) -> int:
    return os.getpid()


@pytest.fixture(scope="module")
def function():
    made = Killable(behave, LIMITS, passes=(PuyuError,))
    yield made
    made.close()


def failure(function: Killable[str, str], how: str, seconds: float | None = None) -> Failed:
    with pytest.raises(Failed) as caught:
        function(how, seconds=seconds)
    return caught.value


@pytest.mark.parametrize("how", ["loop", "sleep"])
def test_what_hangs_is_ended(function, how):
    assert failure(function, how, 0.3).reason == "timeout"
    assert function("next") == "next 0"


@pytest.mark.parametrize(
    ("how", "detail"), [("exit", "exit code 3"), ("segfault", "SIGSEGV"), ("bug", "IndexError: no such page")]
)
def test_what_crashes_costs_one_answer(function, how, detail):
    found = failure(function, how)
    assert (found.reason, found.detail) == ("crashed", detail)
    assert str(found) == f"crashed: {detail}"
    assert function("next") == "next 0"


def test_what_eats_memory_costs_one_answer(function):
    assert failure(function, "eat").reason == "memory"
    assert function("next") == "next 0"


def test_an_answer_does_not_depend_on_what_the_child_did_before(function):
    """100 MiB stay behind each time; the limit of 256 is the page's, not that of its predecessors."""
    assert [function("leak")[:4] for _ in range(5)] == ["leak"] * 5


def test_errors_of_the_function_pass(function):
    with pytest.raises(DependencyError, match="it is not there"):
        function("refuse")
    assert function("print").startswith("print")


def test_what_cannot_be_prepared_is_said_at_the_first_call():
    unprepared = Killable(twice, LIMITS, prepare=missing, passes=(PuyuError,))
    with pytest.raises(DependencyError, match="nothing to prepare"):
        unprepared("a")


def test_large_arguments_and_answers_and_many_threads():
    with_child = Killable(twice, LIMITS)
    text = "浦" * 2_000_000
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(with_child(text))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [text * 2] * 4
    with_child.close()


def test_one_child_serves_until_it_dies():
    function = Killable(process_of, LIMITS)
    first = function("")
    assert function("") == first
    os.kill(first, signal.SIGKILL)
    while not _ended(first):
        time.sleep(0.01)
    assert function("") != first
    function.close()


def _ended(pid: int) -> bool:
    """Whether a process is gone or only waits for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


PARENT = """
import sys, threading
from puyu.documents.killable import Killable, Limits
from tests.documents.test_killable import behave, process_of
function = Killable(behave, Limits(seconds=600))
function("x")
print(function._child._process.pid, flush=True)
if sys.argv[1] == "busy":
    function("loop")
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("state", ["idle", "busy"])
def test_a_child_does_not_outlive_its_parent(state):
    command = [sys.executable, "-c", PARENT, state]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, env=os.environ | {"PYTHONPATH": str(ROOT)}) as up:
        assert up.stdout
        child = int(up.stdout.readline())
        assert not _ended(child)
        if state == "busy":
            time.sleep(0.2)
        up.kill()
        up.wait()
        deadline = time.monotonic() + 20
        while not _ended(child) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _ended(child)


@pytest.mark.parametrize(
    ("limits", "reasons"),
    [({"page_seconds": 1e-9}, {"timeout"}), ({"page_memory_mib": 1}, {"memory", "crashed"}), ({}, set())],
)
def test_a_pdf_over_its_limits_is_quarantined(tmp_path, monkeypatch, limits, reasons):
    """PDFium in its child: a limit that nothing keeps costs each file, and no more than the files."""
    monkeypatch.setattr("puyu.documents.pdf._SECONDS_PER_MIB", 0.0)
    for name in "ab":
        (tmp_path / f"{name}.pdf").write_bytes(pdf("One page. " * 20_000 if limits else "One page."))
    (tmp_path / "c.txt").write_text("A text.")
    bad: list[BadRecord] = []
    documents = list(read(SourceConfig(name="papers", path=str(tmp_path), kind="files", **limits), bad.append))
    assert [document.text for document in documents] == ([] if limits else ["One page."] * 2) + ["A text."]
    assert len(bad) == (2 if limits else 0)
    assert {row.reason.partition(":")[0] for row in bad} <= reasons
