"""Saving beside the training: a step waits for a copy in memory only; a thread that gives way writes, checks, commits.

Every process writes its own part; the first one waits for the marks of all parts (files, no collective), writes
`state.json` and renames the folder. A state that is due while the one before is still being written is left out, and
said. What fails in the thread is raised in the next step, on every process. Cold tier: `cold.py`.

    saver = Saver(out, settings, layout=layout, identity="")
    saver.save(progress)                 # returns at once
    saver.save(progress, wait=True)      # returns when it is committed
"""

from __future__ import annotations

import math
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from puyu.configure import Config
from puyu.dist import World, barrier, current_world
from puyu.errors import CheckpointError, ConfigError, PuyuError, RetryError
from puyu.files import disk_errors
from puyu.log import logger, say
from puyu.train.beside import Beside
from puyu.train.cold import ColdTier, Upload
from puyu.train.folders import move, remove
from puyu.train.layouts import Layout
from puyu.train.layouts.base import first_of
from puyu.train.parallel import agree
from puyu.train.pieces import Piece
from puyu.train.state import (
    CHUNK,
    FOLDER,
    STATE,
    Folder,
    Progress,
    Row,
    Shelf,
    checked,
    index_text,
    part_name,
    put,
    restore,
    rows_of,
    saved,
    state_text,
    sync_folder,
)

POLL = 0.02
"""Seconds between two looks for the marks of the other parts."""
GRACE = 30.0
"""Seconds that a process which ends early gives to an upload, and one of several to the state that it is writing."""
TURN = 0.5
"""Seconds between two looks at how the others are doing."""
SHARED = 90.0
"""Seconds until a new file must be seen by all: NFS remembers for 60 s that a name was not there."""


class SavingSettings(Config):
    """What is saved, how often, and where."""

    checkpoint_every: int = 200
    """Steps between saved states; 0 saves only at the end and on SIGTERM."""
    checkpoint_wait: float = 0.2
    """Seconds that a step waits for the state before to be written; then the new one is left out."""
    keep: int = Field(default=2, ge=0)
    """Saved states to keep; 0: all."""
    cold: str = ""
    """Where states are uploaded, too: a directory, or a URL such as s3://bucket/run (fsspec). One run each."""
    cold_every: int = 0
    """Steps between uploads; 0: each saved state. The last one is always uploaded."""
    cold_keep: int = Field(default=0, ge=0)
    """Uploaded states to keep; 0: all."""
    cold_wait: float = Field(default=600.0, ge=0)
    """Seconds that the end of a run waits for an upload; then it is given up, and said what is missing."""
    export_every: int = 0
    """Steps between Hugging Face folders, exports/step-N; 0: none."""


class Staging:
    """Host memory for all that this process owns, in the order of its file; kept from save to save."""

    def __init__(self) -> None:
        self.header = b""
        self.rows: list[Row] = []
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fit(self, pieces: list[Piece]) -> list[tuple[Tensor, Tensor]]:
        """The owned tensors with their places; memory is asked for (and touched) only when they have changed."""
        header, self.rows, owned = rows_of(pieces)
        if header != self.header:
            self.header = header
            self._buffer = _host_memory(sum(row.nbytes for row in self.rows), owned)
        places = (self._slot(row).view(row.dtype).view(row.size) for row in self.rows)
        return [(piece.tensor, place) for piece, place in zip(owned, places, strict=True)]

    @torch.no_grad()
    def take(self, pieces: list[Piece]) -> None:
        """Copy the owned pieces."""
        pairs = self.fit(pieces)
        for tensor, place in pairs:
            place.copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor, _ in pairs if tensor.is_cuda}:
            torch.cuda.synchronize(device)

    def _slot(self, row: Row) -> Tensor:
        begin = row.offset - len(self.header)
        return self._buffer[begin : begin + row.nbytes]

    def bytes(self, row: Row) -> memoryview:
        return self._slot(row).numpy().data


def _host_memory(size: int, pieces: list[Piece]) -> Tensor:
    """Touched pages: the first save is as quick as the others. Pinned where the state lies on a GPU."""
    pinned = any(piece.tensor.is_cuda for piece in pieces)
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned).zero_()


@dataclass
class Job:
    """One state on its way from the staging memory to its folder."""

    folder: Path
    attempt: str
    progress: Progress
    identity: str
    staging: Staging
    world: World
    keep: int
    upload: Upload | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    text: bytes = b""

    @property
    def temporary(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.tmp-{self.attempt}")

    def run(self) -> bool:
        """Everything, in the thread; False when it was cancelled."""
        try:
            self.part()
            self.commit()
        except PuyuError:
            if not self.cancelled.is_set():
                self.empty()
                raise
        if self.cancelled.is_set():
            self.drop()
            return False
        return True

    def part(self) -> None:
        """Write this process's part, then its index: the mark that the part is whole."""
        name, staging = part_name(self.world.rank), self.staging
        checksums: list[list[int]] = []
        with _named(self.folder):
            self.temporary.mkdir(parents=True, exist_ok=True)
            put(self.temporary / f"{name}.safetensors", self._blocks(checksums))
            index = index_text(f"{name}.safetensors", staging.header, staging.rows, checksums)
            if self.upload:  # before the mark: after it the folder may get its name at any moment
                self.upload.open(self.temporary / f"{name}.safetensors", index)
            put(self.temporary / f"{name}.json", [index])

    def _blocks(self, checksums: list[list[int]]) -> Iterator[bytes | memoryview]:
        """The bytes of the file; the checksums of each row are added as it is passed on."""
        yield self.staging.header
        for row in self.staging.rows:
            data = self.staging.bytes(row)
            sums: list[int] = []
            for at in range(0, len(data), CHUNK):
                if self.cancelled.is_set():
                    raise CheckpointError(f"{self.folder} was given up")
                block = data[at : at + CHUNK]
                sums += checked(block)
                yield block
            checksums.append(sums)

    def commit(self) -> None:
        """On the first process: wait for all marks, write state.json, rename; drop what is beyond `keep`."""
        if not self.world.is_main:
            return
        names = [f"{part_name(rank)}.json" for rank in range(self.world.size)]
        with _named(self.folder):
            while not all((self.temporary / name).exists() for name in names):
                if self.cancelled.wait(POLL):
                    raise CheckpointError(f"{self.folder} was given up: a part of it is missing")
            indexes = {name: (self.temporary / name).read_bytes() for name in names}
            self.text = state_text(self.progress, identity=self.identity, indexes=indexes)
            put(self.temporary / STATE, [self.text])
            sync_folder(self.temporary)
            move(self.temporary, self.folder)
            older = [old.path for old in saved(self.folder.parents[1]) if old.path.name <= self.folder.name]
            for path in older[self.keep :] if self.keep else ():
                remove(path)

    def empty(self) -> None:
        """Remove what this process has written. The folder stays: another process may be about to write there."""
        with suppress(OSError):
            for path in self.temporary.glob(f"{part_name(self.world.rank)}.*"):
                path.unlink(missing_ok=True)

    def drop(self) -> None:
        """Remove what all have given up; also a folder that a slow process has made again."""
        if self.world.is_main:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        self.empty()
        with suppress(OSError):
            self.temporary.rmdir()


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """ResourceError for a full or read-only disk, CheckpointError for any other failure."""
    try:
        with disk_errors(folder):
            yield
    except OSError as error:
        remedy = "see that all processes reach this folder, then run the same command again"
        raise CheckpointError(f"{folder} could not be written: {error}", remedy=remedy) from error


class Saver:
    """States of one run: saved to `out`/train_state and the cold tier, restored from both. Every process has one."""

    def __init__(self, out: Path, settings: SavingSettings, *, layout: Layout, identity: str) -> None:
        self.out, self.settings, self.layout, self.identity = out, settings, layout, identity
        self.world, self.staging = current_world(), Staging()
        self.cold = ColdTier(settings.cold, keep=settings.cold_keep) if settings.cold else None
        self.on_error: Callable[[BaseException], None] = _raise
        """What to do where a state was not saved, on every process; the states before are good. ResourceError: the disk
        is full, or may not be written."""
        self._hot, self._uploads = Beside(), Beside()
        self._job: Job | None = None
        self._upload: Upload | None = None
        self.committed = -1
        """The step of the last state that `wait` has seen committed on every process."""
        self._run, self._count, self._uploaded = "", 0, 0

    def prepare(self) -> None:
        """Remove what a killed run left half-written; ask for the staging memory. ConfigError: `out` is not shared."""
        self._check_shared()
        if self.world.is_main:
            for leftover in (self.out / FOLDER).glob("step-*.tmp-*"):
                remove(leftover)
            if self.cold:
                _warned(self.cold.sweep)
        if self.settings.checkpoint_every:
            self.staging.fit(self._pieces())

    def _check_shared(self) -> None:
        """Whether every process sees what the first one writes."""
        if self.world.size == 1:
            return
        path, name, until = self.out, "", time.monotonic() + SHARED
        if self.world.is_main:
            name = f".shared-{secrets.token_hex(4)}"
            path.mkdir(parents=True, exist_ok=True)
            put(path / name, [b""])
        path /= first_of(name)
        while not path.exists() and time.monotonic() < until:
            time.sleep(POLL)
        blind = agree([float(not path.exists())], self.layout.device)[0]
        if self.world.is_main:
            path.unlink()
        if blind:
            text = f"{self.out}: {blind:.0f} of {self.world.size} processes do not see what the first one writes there"
            raise ConfigError(text, remedy="choose an --out on a file system that all machines share")

    def _pieces(self) -> list[Piece]:
        return [*self.layout.trained(), *self.layout.moments()]

    # --- saving ---

    def save(self, progress: Progress, *, wait: bool = False, last: bool = False) -> bool:
        """Save in the background, or (`wait`) now; False when it is left out, since the one before is on its way.

        The `last` one of a run is uploaded in any case.
        """
        busy, failed = self._look(self._hot, None if wait else self.settings.checkpoint_wait)
        if failed:
            self._lost()
        elif busy:
            if self.world.is_main:
                say(f"  the state of step {progress.step} is left out: the one before is still being written")
            return False
        self._hot.end()
        self._job = job = self._new_job(progress, last=last)
        self.staging.take(self._pieces())
        if wait:
            self._now(job, last=last)
        else:
            self._hot.start(lambda: self._beside(job), job.cancelled)
        return True

    def _look(self, beside: Beside, seconds: float | None, *, most: float = math.inf) -> tuple[bool, bool]:
        """Whether it is still busy on a process, and whether it has failed on one, after that time (None: until one of
        both is certain, or `most` seconds are over). No process waits alone: what it waits for may be the part of one
        that has failed."""
        until = time.monotonic() + most
        while True:
            idle = beside.idle(min(TURN, most) if seconds is None else seconds)
            flags = [not idle, beside.failed, seconds is not None or time.monotonic() >= until]
            busy, failed, over = agree([float(flag) for flag in flags], self.layout.device)
            if failed or not busy or over:
                return busy > 0, failed > 0

    def _lost(self) -> None:
        """A state was not saved: what there is of it goes, on every process."""
        self.on_error(self._end() or _elsewhere())

    def _end(self, seconds: float | None = 0.0) -> BaseException | None:
        """End the work on a state; why it failed here."""
        error = self._hot.end(seconds)
        if error and self._job:
            self._job.drop()
        return error

    def _new_job(self, progress: Progress, *, last: bool) -> Job:
        self._run = self._run or first_of(secrets.token_hex(4) if self.world.is_main else "")
        self._count += 1
        folder, attempt = self.out / FOLDER / f"step-{progress.step:08d}", f"{self._run}-{self._count}"
        job = Job(folder, attempt, progress, self.identity, self.staging, self.world, self.settings.keep)
        due = last or progress.step - self._uploaded >= max(self.settings.cold_every, 1)
        if self.cold and due and self._room(last):
            self._uploaded = progress.step
            job.upload = self.cold.upload(f"{folder.name}-{attempt}", self.world)
        return job

    def _room(self, last: bool) -> bool:
        """Whether the upload before is done, or given up, on every process."""
        wait = self.settings.cold_wait
        busy, failed = self._look(self._uploads, None if last else self.settings.checkpoint_wait, most=wait)
        if busy and not failed and last:
            if not self._uploads.idle():
                logger.warning("cold tier: given up after %g s (cold_wait): %s", wait, self._upload)
        elif busy and not failed:
            if self.world.is_main:
                say("  the upload before is not done: this state stays local")
            return False
        if error := self._uploads.end():
            logger.warning("cold tier: %s", error)
        return True

    def _beside(self, job: Job) -> None:
        if job.run():
            self._send(job)

    def _send(self, job: Job) -> None:
        if upload := job.upload:
            self._upload = upload
            self._uploads.start(lambda: upload.run(job.text), upload.cancelled)

    def _now(self, job: Job, *, last: bool) -> None:
        """In this thread; a failure anywhere is raised on every process. The `last` upload is awaited."""
        for act in (job.part, job.commit):
            error = _failure_of(act)
            if agree([float(error is not None)], self.layout.device)[0]:
                job.drop()
                self.on_error(error or _elsewhere())
                return
        self.committed = job.progress.step
        self._send(job)
        if last and job.upload:
            self._room(last)

    # --- what went wrong ---

    def flags(self) -> dict[str, float]:
        """What the processes tell each other in each step."""
        return {"save_failed": float(self._hot.failed), "upload_failed": float(self._uploads.failed)}

    def settle(self, sums: dict[str, float]) -> None:
        """Take the summed flags out, and act on them: `on_error` for a save, a warning for an upload."""
        if sums.pop("upload_failed"):
            error = self._uploads.end() or _elsewhere()
            if self.world.is_main:
                logger.warning("cold tier: %s", error)
        if sums.pop("save_failed"):
            self._lost()

    def close(self) -> None:
        """Let what is being written be finished; alone for as long as it takes, an upload only for `GRACE`."""
        self._ended(None if self.world.size == 1 else GRACE)

    def _ended(self, seconds: float | None) -> None:
        """End all work beside the training; what failed is a warning."""
        if error := self._end(seconds):
            logger.warning("a state was not saved: %s", error)
        if error := self._uploads.end(GRACE):
            logger.warning("cold tier: %s", error)

    # --- going on ---

    def restore(self, *, before: int | None = None) -> tuple[Progress, Shelf] | None:
        """Fill the layout from the newest good state of both tiers; with `before` (a roll-back), from one of an earlier
        step than that. Local states that are newer are removed, and uploaded ones after a roll-back. RetryError: no
        local state is good, and what was uploaded cannot be read."""
        self._ended(GRACE)
        names, problem = self._names()
        shelves = [self._shelf(*name.split()) for name in names if before is None or step_of(name) < before]
        found = restore(shelves, layout=self.layout, identity=self.identity)
        if problem and not found:
            text = f"no local state is good, and {self.settings.cold} cannot be read: {problem}"
            raise RetryError(text, remedy="see that the store is there, then run the same command again")
        if found:
            self._went_back(found[0].step, found[1], names, rolled=before is not None)
        barrier()
        return found

    def _went_back(self, step: int, shelf: Shelf, names: list[str], *, rolled: bool) -> None:
        """Forget the states that are newer than the one that was loaded."""
        uploaded = [name.split()[0] for name in names if name.endswith(" cold")]
        self._uploaded = max((at for name in uploaded if (at := step_of(name)) <= step), default=0)
        if not self.world.is_main:
            return
        for state in saved(self.out):
            at = step_of(state.path.name)
            if at > step or (at == step and state != shelf):
                remove(state.path)
        if (cold := self.cold) and rolled:
            _warned(lambda: cold.drop([name for name in uploaded if step_of(name) > step]))

    def _names(self) -> tuple[list[str], str]:
        """The states of both tiers, newest first, local ones before uploaded ones, and why the cold tier could not be
        looked into; the first process looks, for all."""
        names, problem = [], ""
        if self.world.is_main:
            names = [f"{state.path.name} hot" for state in saved(self.out)]
            try:
                names += [f"{name} cold" for name in (self.cold.names() if self.cold else ())]
            except OSError as error:
                problem = " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning("cold tier: it cannot be read, only local states are used: %s", problem)
        problem, *names = first_of("\n".join([f"-{problem}", *names]) if self.world.is_main else "").split("\n")
        names.sort(key=lambda name: (step_of(name), name.endswith(" hot")), reverse=True)
        return names, problem[1:]

    def _shelf(self, name: str, tier: str) -> Shelf:
        if tier == "hot":
            return Folder(self.out / FOLDER / name)
        assert self.cold is not None
        return self.cold.shelf(name)


def _raise(error: BaseException) -> None:
    raise error


def _warned(act: Callable[[], None]) -> None:
    """Do something in the cold tier that can wait."""
    try:
        act()
    except OSError as error:
        logger.warning("cold tier: %s", error)


def _elsewhere() -> CheckpointError:
    return CheckpointError("another process could not write its part of a state", remedy="see what it says")


def step_of(name: str) -> int:
    """The step in the name of a state."""
    return int(name.split("-")[1].split()[0])


def _failure_of(act: Callable[[], None]) -> PuyuError | None:
    try:
        act()
    except PuyuError as error:
        return error
    return None
