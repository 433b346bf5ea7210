"""What happened to a run: one line an event in `train_state/health.jsonl`, and one for the person at the terminal.

Rows of metrics.jsonl are of the steps that count; a roll-back removes the rows behind it. This file forgets nothing.
A journal that cannot be written (a full disk) is said, and stops no run.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from puyu.log import logger, say


class Journal:
    """Appends events. Rank 0 notes what all know; any process may note what it alone has seen."""

    def __init__(self, folder: Path, *, name: str = "train") -> None:
        self.path, self.name = folder / "health.jsonl", name

    def note(self, event: str, text: str, *, step: int, **facts: Any) -> None:
        """Write and say one event; `facts` are JSON values."""
        say(f"  {self.name}: step {step}: {text}")
        row = {"time": round(time.time(), 3), "step": step, "event": event, "text": text, **facts}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            logger.warning("cannot write %s: %s", self.path, error)
