"""Is this run still sound? What goes wrong is found, named, mended where that is possible, and written down.

watch       numbers alone: losses and norms -> update, skip, roll back, stop
heartbeat   a process that hangs or has died
pace        a process that is slower than the others
journal     train_state/health.jsonl: every event of a run
rows        metrics.jsonl on a disk that may be full
stop        SIGTERM and SIGUSR1; errors after which the same command may be tried again
"""

from __future__ import annotations

from puyu.train.health.config import HealthConfig
from puyu.train.health.heartbeat import Heartbeat
from puyu.train.health.journal import Journal
from puyu.train.health.pace import Pace, probe
from puyu.train.health.rows import Rows, summarize
from puyu.train.health.stop import StopSignal
from puyu.train.health.watch import Verdict, Watch

__all__ = [
    "HealthConfig",
    "Heartbeat",
    "Journal",
    "Pace",
    "Rows",
    "StopSignal",
    "Verdict",
    "Watch",
    "probe",
    "summarize",
]
