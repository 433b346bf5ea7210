"""Crashes of a save: its file operations recorded and replayed up to any byte; what a small state may load as.

Used by test_state.py in part and by bench/train_checkpoint.py in full.
"""

import os
import shutil
from pathlib import Path

import torch

from puyu.dist import World
from puyu.train import state
from puyu.train.pieces import Piece
from puyu.train.saver import Job, Staging
from puyu.train.state import FOLDER, Progress


class Held:
    """A layout of tensors and nothing else."""

    def __init__(self, held):
        self.held = held

    def trained(self):
        return iter(self.held[:-1])

    def moments(self):
        return iter(self.held[-1:])


def write(out, held, *, step=1, source=None, keep=2):
    """One state as so many processes write it."""
    jobs = []
    for rank, pieces in enumerate(held):
        staging = Staging()
        staging.take(pieces)
        progress, folder = Progress(step, 10 * step, source or {"at": step}), out / FOLDER / f"step-{step:08d}"
        jobs.append(Job(folder, "x", progress, "me", staging, World(rank, len(held)), keep))
        jobs[-1].part()
    jobs[0].commit()
    return jobs[0].folder


class Disk:
    """Records the file operations below `root` of what runs inside."""

    def __init__(self, root):
        self.root, self.ops, self._files, self._real = str(root), [], {}, {}

    def __enter__(self):
        for name in ("open", "write", "fsync", "rename", "replace", "mkdir"):
            self._real[name] = getattr(os, name)
            setattr(os, name, self._seen(name, self._real[name]))
        return self

    def __exit__(self, *_):
        for name, real in self._real.items():
            setattr(os, name, real)

    def _seen(self, name, real):
        def call(first, *rest, **options):
            result = real(first, *rest, **options)
            if name == "write" and first in self._files:
                self.ops.append(("write", self._files[first], bytes(rest[0])[:result]))
            elif name == "fsync" and first in self._files:
                self.ops.append(("fsync", self._files[first]))
            elif str(first).startswith(self.root):
                self._named(name, str(first), rest, result)
            return result

        return call

    def _named(self, name, path, rest, result):
        if name == "open":
            self._files[result] = path
            if rest[0] & os.O_CREAT:
                self.ops.append(("create", path))
        elif name in ("rename", "replace"):
            self.ops.append(("rename", path, str(rest[0])))
        elif name == "mkdir":
            self.ops.append(("mkdir", path))


def replay(ops, root, target, *, power=False):
    """Do those operations in `target`, a copy of `root` from before; `power`: what was not synced is lost, though its
    name is there."""
    files = {}  # path: [bytes, how many of them are on the disk]
    for op, path, *rest in ops:
        place = target / Path(path).relative_to(root)
        if op == "mkdir":
            place.mkdir(parents=True, exist_ok=True)
        elif op == "create":
            files[place] = [b"", 0]
        elif op == "write":
            files[place][0] += rest[0]
        elif op == "fsync" and place in files:
            files[place][1] = len(files[place][0])
        elif op == "rename":
            to = target / Path(rest[0]).relative_to(root)
            if place in files:
                files[to] = files.pop(place)
            else:
                place.rename(to)
                inside = [file for file in files if file.is_relative_to(place)]
                files |= {to / file.relative_to(place): files.pop(file) for file in inside}
    for place, (data, synced) in files.items():
        place.write_bytes(data[:synced] if power else data)


def prefixes(ops, sizes):
    """The operations up to any of them, and inside of each write up to the `sizes` of it."""
    for number, op in enumerate(ops):
        yield ops[:number]
        if op[0] == "write":
            for size in sizes(len(op[2])):
                yield [*ops[:number], (op[0], op[1], op[2][:size])]
    yield ops


def small(seed, processes=1):
    """The pieces of each process of a tiny run; their values tell the step."""
    generator = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(4, 3, generator=generator) for name in ("w", "exp_avg/w")}
    rows = [range(4)[rank::processes] for rank in range(processes)]
    return [
        [Piece(name, (4, 3), (row, 0), tensor[row : row + 1].clone()) for name, tensor in whole.items() for row in mine]
        if processes > 1
        else [Piece(name, (4, 3), (0, 0), tensor) for name, tensor in whole.items()]
        for mine in rows
    ]


def loaded(out):
    """The step that loads, or None; an AssertionError where its values are not those of the step."""
    pieces = small(9)[0]
    for piece in pieces:
        piece.tensor.fill_(7)
    found = state.restore(state.saved(out), layout=Held(pieces), identity="me")
    if found is None:
        assert all(bool((piece.tensor == 7).all()) for piece in pieces), "something torn was copied"
        return None
    progress = found[0]
    assert progress.source == {"at": progress.step} and progress.tokens == 10 * progress.step
    for piece, wanted in zip(pieces, small(progress.step)[0], strict=True):
        assert torch.equal(piece.tensor, wanted.tensor), "wrong values were loaded"
    return progress.step


def wrong_files(folder, offsets, bits):
    """Damage each file of a state in turn: cut at the `offsets` of its size, one of its `bits` flipped there, one byte
    more, gone. Yields while the damage is there."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for at in offsets(len(data)):
            flipped = (data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :] for bit in bits(at))
            for wrong in (data[:at], *flipped):
                path.write_bytes(wrong)
                yield path.name
        path.write_bytes(data + b" ")
        yield path.name
        path.unlink()
        yield path.name
        path.write_bytes(data)


def crashes(tmp, sizes, *, processes=1, again=False, power=False):
    """What loads after a crash anywhere in a save: of step 2 after step 1, or (`again`) of step 1 over itself."""
    root, step = tmp / "run", 1 if again else 2
    write(root, small(1, processes), step=1)
    shutil.copytree(root, tmp / "before")
    with Disk(root) as disk:
        write(root, small(step, processes), step=step)
    for ops in prefixes(disk.ops, sizes):
        target = tmp / "crashed"
        shutil.copytree(tmp / "before", target)
        replay(ops, root, target, power=power)
        yield loaded(target)
        shutil.rmtree(target)
