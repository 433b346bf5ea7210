"""Which process hangs? In each, a watchdog thread writes how far its training thread has come, and reads the peers'.

A process that has not moved for `hang_seconds` reads the heartbeats twice. Peers whose file did not change meanwhile
are gone; among those that live, whoever is furthest behind is what the others wait for. It is named with step and span,
dumps its stacks (faulthandler), and all leave with code 75, so that torchrun or Slurm starts them again from the last
state. Files in `train_state/heartbeats` need only the file system that the states are on; they are read only when
something stands still. No clock is compared between machines. Not seen: a process whose C code holds the interpreter's
lock cannot speak for itself; the others find it gone.

    with Heartbeat(out / "train_state", world, config, journal) as heart:
        heart.at("reading data"); heart.begin(step); heart.at("backward")
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from puyu.dist import SUPERVISED, World
from puyu.errors import RetryError
from puyu.log import logger
from puyu.train.health.config import HealthConfig
from puyu.train.health.journal import Journal

PATIENT = frozenset({"start", "save", "evaluate", "callback", "roll back"})
"""Spans that may take ten times as long: what they do is not known here."""
OUTSIDE = ("reading data", "loading a state", "last evaluation", "writing the model")
"""Spans before the first step and after the last, with a limit of their own; one process may work for all in them."""
_LONGER = 10
_SLOWER = 3
"""A span may take so many times the longest one of this process that came to its end."""
_WIDTH = 512
_CONFIRM = 3


@dataclass(frozen=True, slots=True)
class Beat:
    """How far a process has come: spans begun in a step; `count` grows as long as its watchdog lives."""

    rank: int
    count: int
    step: int
    spans: int
    span: str
    still: float
    """Seconds since it moved."""
    host: str
    pid: int

    @property
    def place(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid}) in {self.at}"

    @property
    def at(self) -> str:
        return self.span if self.span in OUTSIDE else f"step {self.step}, {self.span}"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Ranks that are gone, and those furthest behind among the living."""

    gone: tuple[int, ...]
    late: tuple[Beat, ...]
    text: str


def diagnose(before: Mapping[int, Beat], now: Mapping[int, Beat], *, size: int) -> Diagnosis:
    """Who holds the others up, from two readings of the heartbeats of ranks 0 .. size-1."""
    gone = tuple(rank for rank in range(size) if rank not in now or now[rank] == before.get(rank))
    alive = [now[rank] for rank in range(size) if rank not in gone]
    least = min(((beat.step, beat.spans) for beat in alive), default=(0, 0))
    late = tuple(beat for beat in alive if (beat.step, beat.spans) == least)
    if gone:
        last = [now[rank].place if rank in now else f"rank {rank}, which never began" for rank in gone[:8]]
        text = f"gone without a heartbeat: {'; '.join(last)}"
    elif len(late) == size > 1:
        text = f"all {size} processes stand in {late[0].at}: a collective or the network"
    else:
        text = f"hung: {'; '.join(f'{beat.place} for {beat.still:.0f} s' for beat in late[:8])}"
    return Diagnosis(gone, late, text)


class Heartbeat:
    """The watchdog of one process. `tick` is one look; the thread calls it, a test may, too."""

    def __init__(self, folder: Path, world: World, config: HealthConfig, journal: Journal) -> None:
        self.folder, self.world, self.config, self.journal = folder, world, config, journal
        self.clock: Callable[[], float] = time.monotonic
        self.leave: Callable[[int], Any] = os._exit
        self._me = (socket.gethostname(), os.getpid())
        self._position = (0, 0, "start", self.clock())
        self._count, self._start, self._seen_at = 0, 0, 0
        self._seen: dict[int, Beat] = {}
        self._longest = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, step: int) -> None:
        """The training thread begins a step (from 1)."""
        self._start = self._start or step
        self._move(step, 0, "begin")

    def at(self, span: str) -> None:
        """The training thread begins a span of its step."""
        step, spans, _, _ = self._position
        self._move(step, spans + 1, span)

    def _move(self, step: int, spans: int, span: str) -> None:
        _, _, ended, since = self._position
        now = self.clock()
        if ended not in PATIENT and ended not in OUTSIDE:
            self._longest = max(self._longest, now - since)
        self._position = (step, spans, span, now)

    def beat(self) -> Beat:
        """Where this process stands now."""
        step, spans, span, since = self._position
        return Beat(self.world.rank, self._count, step, spans, span, round(self.clock() - since, 1), *self._me)

    def tick(self) -> None:
        """Write the own heartbeat; after a long standstill find out why, and leave."""
        self._count += 1
        mine = self.beat()
        if self.world.size > 1:
            self._write(mine)
        if mine.still < self._limit(mine):
            self._seen_at = 0
        elif not self._seen_at:
            self._seen_at, self._seen = self._count, self._read()
        elif self._count >= self._seen_at + _CONFIRM:
            self._judge(mine)

    def _limit(self, beat: Beat) -> float:
        if beat.span in OUTSIDE:
            return self.config.phase_seconds or math.inf
        slow = beat.span in PATIENT or beat.step == self._start  # the first step compiles, and warms up
        usual, most = self.config.hang_seconds, self.config.hang_seconds * _LONGER
        return most if slow else min(max(usual, _SLOWER * self._longest), most)

    def _judge(self, mine: Beat) -> None:
        now = {**self._read(), mine.rank: mine}
        found = diagnose(self._seen, now, size=self.world.size)
        self._seen_at = 0  # looked at anew next time: who saves now may die of it
        alive = [beat for rank, beat in now.items() if rank not in found.gone]
        if mine.span in OUTSIDE and any(beat.still < self._limit(beat) for beat in alive):
            return  # it may read or write for all
        patient = (beat for beat in found.late if beat.span in PATIENT or beat.span in OUTSIDE)
        if not found.gone and any(beat.still < self._limit(beat) for beat in patient):
            return  # somebody saves or evaluates: that may take longer
        speaker = min(set(now) - set(found.gone), default=mine.rank)
        if any(beat.rank == mine.rank for beat in found.late) and not found.gone:
            self._dump()
        if mine.rank == speaker:
            late = [beat.rank for beat in found.late] if not found.gone else []
            self.journal.note("hang", found.text, step=mine.step, gone=list(found.gone), late=late)
        if self.world.size > 1 or SUPERVISED in os.environ:
            logger.error("rank %d leaves with code %d: %s", mine.rank, RetryError.exit_code, found.text)
            sys.stderr.flush()
            self.leave(RetryError.exit_code)

    def _dump(self) -> None:
        """The stacks of all threads of this process, for whoever looks for the cause."""
        try:
            with open(self.folder / f"hang-rank-{self.world.rank:05d}.txt", "w", encoding="utf-8") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
        except OSError as error:
            logger.warning("cannot write the stacks: %s", error)

    def _path(self, rank: int) -> Path:
        return self.folder / "heartbeats" / f"rank-{rank:05d}.json"

    def _write(self, beat: Beat) -> None:
        """One write of one block, so that no reader sees half of it."""
        try:
            self._path(beat.rank).parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path(beat.rank), os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(handle, json.dumps(asdict(beat)).ljust(_WIDTH).encode(), 0)
            os.close(handle)
        except OSError as error:
            logger.warning("cannot write the heartbeat: %s", error)

    def _read(self) -> dict[int, Beat]:
        found = {}
        for rank in range(self.world.size):
            try:
                found[rank] = Beat(**json.loads(self._path(rank).read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue  # never written: said in the diagnosis
        return found

    def __enter__(self) -> Self:
        if self.config.hang_seconds:
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        interval = min(10.0, self.config.hang_seconds / 20)
        while not self._stop.wait(interval):
            self.tick()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
            self._path(self.world.rank).unlink(missing_ok=True)
