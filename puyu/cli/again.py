"""Start a command again when it was killed or asks for it: `puyu pretrain ... --auto-resume 10`.

Code 75 (a lost or hung process, a full disk) and death by a signal are tried again; a stop that somebody asked for, and
errors that another start would meet again, are not. Under torchrun or Slurm that is their work (deploy/pretrain*).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

from puyu.dist import SUPERVISED
from puyu.errors import RetryError
from puyu.log import say

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def again(command: Sequence[str], *, tries: int, pause: float = 1.0) -> int:
    """Run the command, and again up to `tries` times; returns its last exit code (128 + n after signal n)."""
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if child and child.poll() is None:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        for left in range(tries, -1, -1):
            child = subprocess.Popen(command, env={**os.environ, SUPERVISED: "1"})
            for number in asked:  # while it was being started
                child.send_signal(number)
            code = child.wait()
            if asked or not left or not (code < 0 or code == RetryError.exit_code):
                break
            say(f"  ended with code {code}: beginning again from the last saved state ({left} more times)")
            time.sleep(pause)
            if asked:
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
