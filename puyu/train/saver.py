"""Saving beside the training: a step waits for a copy in memory only; a thread that gives way writes, checks, commits.

Every process writes its own part; the first one waits for the marks of all parts (files, no collective), writes
`state.json` and renames the folder. A state that is due while the one before is still being written is left out, and
said. What fails in the thread is raised in the next step, on every process. Cold tier: `cold.py`.

    saver = Saver(out, settings, layout=layout, identity="")
    saver.save(progress)                 # returns at once
    saver.save(progress, wait=True)      # returns when it is committed
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from puyu.configure import Config
from puyu.dist import World, barrier, current_world
from puyu.errors import CheckpointError, PuyuError
from puyu.files import clear_folder, disk_errors
from puyu.log import logger, say
from puyu.train.cold import ColdTier, Upload
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
"""Seconds that one of several processes which ends early gives to the state that it is writing."""


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
    export_every: int = 0
    """Steps between Hugging Face folders, exports/step-N; 0: none."""


class Staging:
    """Host memory for all that this process owns, in the order of its file; kept from save to save."""

    def __init__(self) -> None:
        self.header = b""
        self.rows: list[Row] = []
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fit(self, pieces: list[Piece]) -> list[Tensor]:
        """Places for the owned pieces; memory is asked for (and touched) only when they have changed."""
        header, self.rows, owned = rows_of(pieces)
        if header != self.header:
            self.header = header
            self._buffer = _host_memory(sum(row.nbytes for row in self.rows), owned)
        return [self._slot(row).view(row.dtype).view(row.size) for row in self.rows]

    @torch.no_grad()
    def take(self, pieces: list[Piece]) -> None:
        """Copy the owned pieces."""
        places = self.fit(pieces)
        owned = rows_of(pieces)[2]
        for place, piece in zip(places, owned, strict=True):
            place.copy_(piece.tensor, non_blocking=True)
        if any(piece.tensor.is_cuda for piece in owned):
            torch.cuda.synchronize(owned[0].tensor.device)

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
            self.drop()
            if not self.cancelled.is_set():
                raise
        return not self.cancelled.is_set()

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
            _move(self.temporary, self.folder)
            older = [old.path for old in saved(self.folder.parents[1]) if old.path.name <= self.folder.name]
            for path in older[self.keep :] if self.keep else ():
                remove(path)

    def drop(self) -> None:
        """Remove what a failed save has written."""
        mine = self.temporary.glob(f"{part_name(self.world.rank)}.*")
        for path in mine if not self.world.is_main else ():
            path.unlink(missing_ok=True)
        if self.world.is_main:
            shutil.rmtree(self.temporary, ignore_errors=True)


def _move(temporary: Path, folder: Path) -> None:
    """Rename; a folder of that name (an older, torn or rolled back state of the same step) makes room first."""
    aside = folder.with_name(f"{temporary.name}-old")
    if folder.exists():
        clear_folder(aside)  # of a move that was killed
        os.rename(folder, aside)
    os.rename(temporary, folder)
    sync_folder(folder.parent)
    remove(aside)


def remove(folder: Path) -> None:
    """Remove what is no longer needed; what does not go (NFS keeps files that are open) is a warning."""
    try:
        clear_folder(folder)
    except OSError as error:
        logger.warning("%s was not removed: %s", folder, error)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """ResourceError for a full or read-only disk, CheckpointError for any other failure."""
    try:
        with disk_errors(folder):
            yield
    except OSError as error:
        remedy = "see that all processes reach this folder, then run the same command again"
        raise CheckpointError(f"{folder} could not be written: {error}", remedy=remedy) from error


def give_way() -> None:
    """Let the calling thread run only where the training leaves a processor idle (Linux; elsewhere nothing)."""
    if hasattr(os, "sched_setscheduler"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class Beside:
    """One piece of work at a time beside the training; what it raised stays until it is taken."""

    def __init__(self) -> None:
        self._future: Future[None] | None = None
        self._cancelled = threading.Event()

    def start(self, work: Callable[[], None], cancelled: threading.Event) -> None:
        assert self.idle(), "one at a time"
        pool = ThreadPoolExecutor(1, initializer=give_way)
        self._future, self._cancelled = pool.submit(work), cancelled
        pool.shutdown(wait=False)

    def idle(self, seconds: float | None = 0.0) -> bool:
        """Whether nothing is being done, after at most that time (None: however long it takes)."""
        return self._future is None or not wait([self._future], seconds).not_done

    @property
    def failed(self) -> bool:
        return self._future is not None and self._future.done() and self._future.exception() is not None

    def end(self, seconds: float | None = 0.0) -> BaseException | None:
        """Give it that time, then cancel it; returns what it raised, once."""
        if not self.idle(seconds):
            self._cancelled.set()
        future, self._future = self._future, None
        return future.exception() if future else None


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
        self.committed = -1
        """The step of the last state that `wait` has seen committed on every process."""
        self._run, self._count, self._uploaded = "", 0, 0

    def prepare(self) -> None:
        """Remove what a killed run left half-written; ask for the staging memory."""
        if self.world.is_main:
            for leftover in (self.out / FOLDER).glob("step-*.tmp-*"):
                remove(leftover)
            if self.cold:
                self.cold.sweep()
        if self.settings.checkpoint_every:
            self.staging.fit(self._pieces())

    def _pieces(self) -> list[Piece]:
        return [*self.layout.pieces(), *self.layout.moments()]

    # --- saving ---

    def save(self, progress: Progress, *, wait: bool = False, last: bool = False) -> bool:
        """Save in the background, or (`wait`) now; False when it is left out, since the one before is on its way.

        The `last` one of a run is uploaded in any case.
        """
        idle = self._hot.idle(None if wait else self.settings.checkpoint_wait)
        busy, failed = agree([float(not idle), float(self._hot.failed)], self.layout.device)
        if failed:
            self.on_error(self._hot.end() or _elsewhere())
        elif busy:
            if self.world.is_main:
                say(f"  the state of step {progress.step} is left out: the one before is still being written")
            return False
        self._hot.end()
        job = self._job(progress, last=last, upload=last or not wait)
        self.staging.take(self._pieces())
        if wait:
            self._now(job)
        else:
            self._hot.start(lambda: self._beside(job), job.cancelled)
        return True

    def _job(self, progress: Progress, *, last: bool, upload: bool) -> Job:
        self._run = self._run or first_of(secrets.token_hex(4) if self.world.is_main else "")
        self._count += 1
        folder, attempt = self.out / FOLDER / f"step-{progress.step:08d}", f"{self._run}-{self._count}"
        job = Job(folder, attempt, progress, self.identity, self.staging, self.world, self.settings.keep)
        due = last or progress.step - self._uploaded >= max(self.settings.cold_every, 1)
        if self.cold and upload and due and self._room(last):
            self._uploaded = progress.step
            job.upload = self.cold.upload(f"{folder.name}-{attempt}", self.world)
        return job

    def _room(self, last: bool) -> bool:
        """Whether the upload before is done, on every process."""
        idle = self._uploads.idle(None if last else self.settings.checkpoint_wait)
        busy = agree([float(not idle)], self.layout.device)[0] > 0
        if busy and self.world.is_main:
            say("  the upload before is not done: this state stays local")
        if not busy and (error := self._uploads.end()):
            logger.warning("cold tier: %s", error)
        return not busy

    def _beside(self, job: Job) -> None:
        if job.run() and (upload := job.upload):
            self._uploads.start(lambda: upload.run(job.text), upload.cancelled)

    def _now(self, job: Job) -> None:
        """In this thread; a failure anywhere is raised on every process."""
        for act in (job.part, job.commit):
            error = _failure_of(act)
            if agree([float(error is not None)], self.layout.device)[0]:
                job.drop()
                self.on_error(error or _elsewhere())
                return
        self.committed = job.progress.step
        if upload := job.upload:
            error = _failure_of(lambda: upload.run(job.text, wait=False))
            failed = agree([float(error is not None)], self.layout.device)[0] > 0
            if self.world.is_main and not failed:
                error = _failure_of(lambda: upload.commit(job.text))
            if error:
                logger.warning("cold tier: %s", error)

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
            self.on_error(self._hot.end() or _elsewhere())

    def close(self) -> None:
        """Let what is being written be finished; alone for as long as it takes."""
        for beside in (self._hot, self._uploads):
            if error := beside.end(None if self.world.size == 1 else GRACE):
                logger.warning("a state was not saved: %s", error)

    # --- going on ---

    def restore(self, *, before: int | None = None) -> tuple[Progress, Shelf] | None:
        """Fill the layout from the newest good state of both tiers; with `before` (a roll-back), from one of an earlier
        step than that. Local states that are newer are removed, and uploaded ones after a roll-back."""
        for beside in (self._hot, self._uploads):
            if error := beside.end(GRACE):
                logger.warning("a state was not saved: %s", error)
        found = restore(self._shelves(before), layout=self.layout, identity=self.identity)
        if found and self.world.is_main:
            progress, shelf = found
            for state in saved(self.out):
                step = step_of(state.path.name)
                if step > progress.step or (step == progress.step and state != shelf):
                    remove(state.path)
            if self.cold and before is not None:
                self.cold.drop([name for name in self.cold.names() if step_of(name) > progress.step])
        barrier()
        return found

    def _shelves(self, before: int | None) -> list[Shelf]:
        """Both tiers, newest first, local ones before uploaded ones; the first process looks, for all."""
        names: list[str] = []
        if self.world.is_main:
            local = [f"{state.path.name} hot" for state in saved(self.out)]
            names = local + [f"{name} cold" for name in (self.cold.names() if self.cold else ())]
        found = first_of("\n".join(["-", *names]) if self.world.is_main else "").split("\n")[1:]
        early = [name for name in found if before is None or step_of(name) < before]
        early.sort(key=lambda name: (step_of(name), name.endswith(" hot")), reverse=True)
        return [self._shelf(*name.split()) for name in early]

    def _shelf(self, name: str, tier: str) -> Shelf:
        if tier == "hot":
            return Folder(self.out / FOLDER / name)
        assert self.cold is not None
        return self.cold.shelf(name)


def _raise(error: BaseException) -> None:
    raise error


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


def export(out: Path, step: int, write: Callable[[Path], None]) -> Path:
    """`exports/step-N` as `write` makes it, renamed when it is whole. Every process must call it; the first renames."""
    folder = out / "exports" / f"step-{step:08d}"
    temporary = folder.with_name(f"{folder.name}.tmp")
    main = current_world().is_main
    if main:
        clear_folder(temporary)
    write(temporary)
    if main:
        with disk_errors(folder):
            for path in (path for path in temporary.rglob("*") if path.is_file()):
                with open(path, "rb") as stream:
                    os.fsync(stream.fileno())
            _move(temporary, folder)
    return folder
