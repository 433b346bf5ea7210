"""Run one stage so that a kill costs little: skip finished work, go on with partial work, redo changed work.

A stage's key is its resolved config, the keys of its inputs and its version. `stage.json` marks work in
progress under a key, `lineage.json` (written last) marks finished work. Same key and finished: nothing to do.
Same key and in progress: the stage goes on in its folder. Another key: the folder is cleared first.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puyu.chain.stages import Stage, write_page
from puyu.configure import Config, dump
from puyu.documents.contamination import FILE as CONTAMINATION
from puyu.errors import ConfigError, InputError, PuyuError, ResourceError
from puyu.files import clear_folder, disk_errors, hash_file, hash_json, read_json, write_json
from puyu.lineage import (
    FILE,
    Input,
    Lineage,
    code_version,
    find_lineage,
    input_of,
    machine,
    now,
    without_paths,
    write_lineage,
)

MARK = "stage.json"
_NOT_OUTPUTS = {FILE, MARK, CONTAMINATION, "metrics.jsonl", "run.json", "samples.jsonl", "report.html", "server.log"}
"""A report of contamination is put beside the corpus later: it changes neither the stage nor what was made of it."""
_NOT_OUTPUT_FOLDERS = {"train_state", "exports", "tensorboard", "wandb", "profile"}


@dataclass(frozen=True, slots=True)
class Result:
    """What happened to a stage. `seconds` is the time of the run that made the artifact."""

    name: str
    verb: str
    out: Path
    status: Literal["made", "resumed", "kept"]
    seconds: float
    numbers: Mapping[str, Any]


def stage_key(stage: Stage, config: Config) -> tuple[str, tuple[Input, ...]]:
    """The key of this work and the inputs it covers; InputError names an input that is missing."""
    groups: dict[str, list[Path]] = {}
    for name, path in config.inputs():
        if not path.exists():
            remedy = "run the stage that makes it first, or check the path (relative to the working directory)"
            raise InputError(f"puyu {stage.verb}: {name}: no such file or folder: {path}", remedy=remedy)
        groups.setdefault(name, []).append(path)
    inputs = tuple(_input(name, paths) for name, paths in groups.items())
    keys = {item.path: item.key for item in inputs}
    values = {name: value for name, value in dump(config).items() if name not in config.free}
    covered = [[item.name, item.key] for item in inputs]
    return hash_json([stage.verb, stage.version, without_paths(values, keys), covered]), inputs


def _input(name: str, paths: list[Path]) -> Input:
    """One input; the files of one source are one input, under the folder that holds them all."""
    if len(paths) == 1:
        return input_of(name, paths[0])
    folder = Path(os.path.commonpath(paths))
    return Input(name, str(folder), hash_json([[p.relative_to(folder).as_posix(), hash_file(p)] for p in paths]))


def run_stage(name: str, stage: Stage, config: Config, out: Path) -> Result:
    """Bring one stage's folder up to date."""
    _check_apart(config, out)
    key, inputs = stage_key(stage, config)
    if int(os.environ.get("RANK", "0")) > 0:
        return Result(name, stage.verb, out, "made", 0.0, stage.run(config, out))
    with locked(out):
        if (done := find_finished(out, key)) is not None:
            return Result(name, stage.verb, out, "kept", done.seconds, done.numbers)
        status = prepare_folder(out, key, stage.verb)
        began = time.monotonic()
        try:
            numbers = stage.run(config, out)
        except MemoryError as error:
            raise ResourceError(f"{name}: out of memory", remedy="use a smaller batch or model") from error
        seconds = time.monotonic() - began
        _finish(stage, config, key=key, inputs=inputs, numbers=numbers, seconds=seconds, out=out)
        if stage.trains:
            write_page(out)
    return Result(name, stage.verb, out, status, seconds, numbers)


def _check_apart(config: Config, out: Path) -> None:
    """ConfigError where making `out` would clear an input, or change one that is known by its content."""
    place = out.resolve()
    for name, path in config.inputs():
        at = path.resolve()
        inside = place.is_relative_to(at) and not find_lineage(at)
        if inside or at.is_relative_to(place):
            which = f"lies in {path} ({name}), and would change it" if inside else f"holds {path} ({name})"
            raise ConfigError(f"{out} {which}", remedy="choose another --out")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a stage's folder for this process; ResourceError when another one works there. A kill frees it."""
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.parent / f".{out.name}.lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "wait for it, or stop it and run again"
            raise ResourceError(f"another puyu process is working on {out}", remedy=remedy) from error
        yield


def _finish(
    stage: Stage,
    config: Config,
    *,
    key: str,
    inputs: tuple[Input, ...],
    numbers: Mapping[str, Any],
    seconds: float,
    out: Path,
) -> None:
    """Write the receipt; from here on the artifact is complete."""
    lineage = Lineage(
        stage=stage.verb,
        key=key,
        version=stage.version,
        config=dump(config),
        inputs=inputs,
        numbers=numbers,
        outputs=output_hashes(out),
        seconds=round(seconds, 3),
        finished=now(),
        code=code_version(),
        machine=machine(),
    )
    write_lineage(out, lineage)
    (out / MARK).unlink(missing_ok=True)


def find_finished(out: Path, key: str) -> Lineage | None:
    """The receipt when the folder holds this very work, complete and unchanged; else None."""
    try:
        found = find_lineage(out)
    except PuyuError:
        return None  # a torn receipt: the stage is not finished and is done again
    if found is None or found.key != key:
        return None
    return found if output_hashes(out) == dict(found.outputs) else None


def output_hashes(out: Path) -> dict[str, str]:
    """Relative name -> content hash of every output file (progress files and training state left out)."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    names = {path.relative_to(out): path for path in files}
    return {
        name.as_posix(): hash_file(path)
        for name, path in names.items()
        if name.name not in _NOT_OUTPUTS and name.parts[0] not in _NOT_OUTPUT_FOLDERS
    }


def prepare_folder(out: Path, key: str, verb: str) -> Literal["made", "resumed"]:
    """Keep partial work of the same key, clear anything else that a stage made; refuse a stranger's folder."""
    mark = out / MARK
    if mark.is_file() and _marked_key(mark) == key and not (out / FILE).is_file():
        return "resumed"
    if out.is_dir() and any(out.iterdir()):
        if not (mark.is_file() or (out / FILE).is_file()):
            raise InputError(f"{out} holds files that no stage made", remedy="choose another --out, or empty it")
        clear_folder(out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"verb": verb, "key": key})
    return "made"


def _marked_key(mark: Path) -> str:
    try:
        value = read_json(mark)
    except InputError:
        return ""  # torn mark: the work under it cannot be trusted
    return str(value.get("key", "")) if isinstance(value, dict) else ""
