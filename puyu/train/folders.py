"""Folders that get their name when they are whole: moved into place, removed, and the exports of a run.

export(out, step, write)      # exports/step-N as `write` makes it
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from puyu.dist import current_world
from puyu.files import clear_folder, disk_errors
from puyu.log import logger
from puyu.train.state import sync_folder


def move(temporary: Path, folder: Path) -> None:
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


def export_folder(out: Path, step: int) -> Path:
    return out / "exports" / f"step-{step:08d}"


def export(out: Path, step: int, write: Callable[[Path], None]) -> Path:
    """`exports/step-N` as `write` makes it, renamed when it is whole. Every process must call it; the first renames."""
    folder = export_folder(out, step)
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
            move(temporary, folder)
    return folder
