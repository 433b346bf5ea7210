"""The far end of a comparison: a process that measures once each time it is told to. Standard library only.

A worker script prints one line of JSON when it is ready (`versions` and whatever the bench wants to know), then for
each line `go` on standard input one line `{"value": ...}`, until the input ends. What libraries print goes to
standard error, so that it cannot be taken for an answer.

    worker.ready(versions={"torch": torch.__version__})
    while worker.told():
        worker.answer(measure())
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

_ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)


def ready(**facts: Any) -> None:
    """Say that the warm-up is over."""
    print(json.dumps(facts), file=_ANSWERS, flush=True)


def told() -> bool:
    """Wait for the next turn; False when there is none."""
    return sys.stdin.readline().strip() == "go"


def answer(value: float) -> None:
    """Hand over one sample."""
    print(json.dumps({"value": value}), file=_ANSWERS, flush=True)
