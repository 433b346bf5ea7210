"""Saved states: any layout from any other, a crash at any byte, the thread that writes, both tiers, two processes."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puyu.dist import World
from puyu.errors import CheckpointError, ConfigError, DependencyError, ResourceError
from puyu.model.checkpoint import load_model
from puyu.train import cold, saver, state
from puyu.train.pieces import Piece
from puyu.train.saver import Job, Staging
from puyu.train.settings import RunSettings
from puyu.train.state import FOLDER, Progress
from tests.train import toys
from tests.train.run_states import interrupted, trainer

ROOT = Path(__file__).resolve().parents[2]


class Held:
    """A layout of tensors and nothing else."""

    def __init__(self, held):
        self.held = held

    def pieces(self):
        return iter(self.held[:-1])

    def moments(self):
        return iter(self.held[-1:])


def whole_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    floats = {"a": torch.randn(7, 5, generator=generator), "b": torch.randn(11, generator=generator).bfloat16()}
    cube = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    return floats | {"cube": cube, "codes/a": torch.arange(5, dtype=torch.uint8), "step/a": torch.tensor(3.0 + seed)}


def cuts(size, parts, rng):
    edges = sorted(rng.randint(0, size) for _ in range(parts - 1))
    return list(zip([0, *edges], [*edges, size], strict=True))


def spread(tensors, world, rng, *, copies=1):
    """Pieces of each process: every tensor cut along a random dimension (or two), `copies` hold each rectangle."""
    held = [[] for _ in range(world)]
    for name, tensor in tensors.items():
        grids = [cuts(size, rng.randint(1, 3), rng) for size in tensor.shape]
        for number, box in enumerate(product(*grids)):
            owner = (number + rng.randrange(world)) % world
            window = tuple(slice(a, b) for a, b in box)
            for copy in range(copies):
                start = tuple(a for a, _ in box)
                piece = Piece(name, tuple(tensor.shape), start, tensor[window].clone(), owner=copy == 0)
                held[(owner + copy) % world].append(piece)
    return held


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


def read(out, held):
    """What the newest good state fills these pieces with."""
    for piece in held:
        piece.tensor.zero_()
    return state.restore(state.saved(out), layout=Held(held), identity="me")


@pytest.mark.parametrize("seed", range(6))
def test_any_layout_reads_what_any_other_wrote(tmp_path, seed):
    rng, tensors = random.Random(seed), whole_tensors(seed)
    write(tmp_path, spread(tensors, rng.randint(1, 4), rng, copies=rng.randint(1, 2)))
    for held in spread(tensors, rng.randint(1, 4), rng, copies=2):
        found, _ = read(tmp_path, held)
        assert (found.step, found.tokens, found.source) == (1, 10, {"at": 1})
        for piece in held:
            assert torch.equal(piece.tensor, tensors[piece.name][piece.window]), piece


def test_only_the_chunks_that_are_needed_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "CHUNK", 64)
    monkeypatch.setattr(saver, "CHUNK", 64)
    tensor = torch.arange(400.0).view(100, 4)
    folder = write(tmp_path, [[Piece("a", (100, 4), (0, 0), tensor)]])
    part = folder / "part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    first = Piece("a", (100, 4), (10, 1), torch.zeros(20, 2))
    read(tmp_path, [first])
    assert torch.equal(first.tensor, tensor[10:30, 1:3])
    assert read(tmp_path, [Piece("a", (100, 4), (96, 0), torch.zeros(4, 4))]) is None


def test_a_part_is_a_safetensors_file(tmp_path):
    tensors = whole_tensors()
    rng = random.Random(1)
    folder = write(tmp_path, spread(tensors, 2, rng))
    for part in folder.glob("*.safetensors"):
        for key, value in load_file(part).items():
            name, _, at = key.partition("@")
            start = [int(a) for a in at.split(",")] if at else [0] * value.ndim
            window = tuple(slice(a, a + n) for a, n in zip(start, value.shape, strict=True))
            assert torch.equal(tensors[name][window], value)


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        (Piece("c", (5,), (0,), torch.zeros(5)), "does not hold all of c"),
        (Piece("a", (5, 7), (0, 0), torch.zeros(5, 7)), r"a is \(7, 5\) F32, not \(5, 7\) F32"),
        (Piece("a", (7, 5), (0, 0), torch.zeros(7, 5).double()), r"a is \(7, 5\) F32, not \(7, 5\) F64"),
    ],
)
def test_a_state_of_another_model_is_named(tmp_path, piece, words):
    write(tmp_path, spread(whole_tensors(), 2, random.Random(0)))
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path, [piece])


# --- a crash at any byte, a wrong byte anywhere -----------------------------------------------------------------------


class Disk:
    """The file operations of what runs inside, in their order; `replay` makes what a disk holds after some of them."""

    def __init__(self, monkeypatch, root):
        self.root, self.ops, self.names = root, [], {}
        for name in ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._seen(name, getattr(os, name)))

    def _seen(self, name, real):
        def call(first, *rest, **options):
            result = real(first, *rest, **options)
            if name == "open" and str(first).startswith(str(self.root)):
                self.names[result] = str(first)
                if rest[0] & os.O_CREAT:
                    self.ops.append(("create", str(first)))
            elif name == "write" and first in self.names:
                self.ops.append(("write", self.names[first], bytes(rest[0])[:result]))
            elif name == "fsync" and first in self.names:
                self.ops.append(("fsync", self.names[first]))
            elif name in ("rename", "replace"):
                self.ops.append(("rename", str(first), str(rest[0])))
            elif name == "mkdir":
                self.ops.append(("mkdir", str(first)))
            return result

        return call


def replayed(ops, root, target, *, power=False):
    """The folder after those operations; `power`: what was not synced is lost, though its name is there."""
    files, folders = {}, []
    for op, path, *rest in ops:
        if op == "mkdir":
            folders.append(path)
        elif op == "create":
            files[path] = [b"", 0]
        elif op == "write":
            files[path][0] += rest[0]
        elif op == "fsync" and path in files:
            files[path][1] = len(files[path][0])
        elif op == "rename":
            moved = {p: v for p, v in files.items() if p == path or p.startswith(path + "/")}
            files = {p: v for p, v in files.items() if p not in moved}
            files |= {rest[0] + p[len(path) :]: v for p, v in moved.items()}
            folders = [rest[0] + p[len(path) :] if (p + "/").startswith(path + "/") else p for p in folders]
    for path in folders:
        (target / Path(path).relative_to(root)).mkdir(parents=True, exist_ok=True)
    for path, (data, synced) in files.items():
        place = target / Path(path).relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data[:synced] if power else data)


def split_writes(ops, rng, count):
    """Prefixes of the operations, some of which end inside a write."""
    for number, op in enumerate(ops):
        yield ops[:number]
        if op[0] == "write":
            for size in sorted(rng.sample(range(len(op[2])), min(count, len(op[2])))):
                yield [*ops[:number], (op[0], op[1], op[2][:size])]
    yield ops


def small(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        Piece("w", (4, 3), (0, 0), torch.randn(4, 3, generator=generator)),
        Piece("exp_avg/w", (4, 3), (0, 0), torch.randn(4, 3, generator=generator)),
    ]


def loaded(out):
    """(step, all values) of what loads, or None; the mark of a wrong state is a step whose values are not its own."""
    pieces = small(9)
    for piece in pieces:
        piece.tensor.fill_(7)
    found = state.restore(state.saved(out), layout=Held(pieces), identity="me")
    if found is None:
        assert all(bool((piece.tensor == 7).all()) for piece in pieces), "something torn was copied"
        return None
    progress = found[0]
    assert progress.source == {"at": progress.step} and progress.tokens == 10 * progress.step
    for piece, wanted in zip(pieces, small(progress.step), strict=True):
        assert torch.equal(piece.tensor, wanted.tensor)
    return progress.step


@pytest.mark.parametrize("power", [False, True])
def test_a_crash_at_any_operation_leaves_the_state_before_or_the_new_one(tmp_path, monkeypatch, power):
    root = tmp_path / "run"
    write(root, [small(1)], step=1, keep=1)
    before = [path for path in root.rglob("*") if path.is_file()]
    with monkeypatch.context() as patched:
        disk = Disk(patched, root)
        write(root, [small(2)], step=2, keep=0)
    found = []
    for number, ops in enumerate(split_writes(disk.ops, random.Random(0), 3)):
        target = tmp_path / f"crash-{number}"
        shutil.copytree(root, target, ignore=lambda folder, names: [n for n in names if n == "step-00000002"])
        replayed(ops, root, target, power=power)
        found.append(loaded(target))
    assert before and set(found) == {1, 2} and found == sorted(found)


def test_no_cut_and_no_wrong_byte_loads(tmp_path):
    root = tmp_path / "run"
    folder = write(root, [small(1)])
    rng = random.Random(0)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for at in rng.sample(range(len(data)), 60):
            for wrong in (data[:at], data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]):
                path.write_bytes(wrong)
                assert loaded(root) in (None, 1)
                if path.name == "part-00000.safetensors" and at >= len(data) - 2 * 48:
                    assert loaded(root) is None
        path.unlink()
        assert loaded(root) is None
        path.write_bytes(data)
    assert loaded(root) == 1


# --- the thread -------------------------------------------------------------------------------------------------------


def weights_of(run):
    return [parameter.detach().clone() for parameter in run.model.parameters()]


def test_a_step_goes_on_while_the_state_is_written_and_the_next_due_is_left_out(tmp_path, monkeypatch, capsys):
    release, real = threading.Event(), saver.put

    def held_up(path, blocks):
        assert release.wait(60)
        real(path, blocks)

    monkeypatch.setattr(saver, "put", held_up)
    run = trainer(tmp_path, checkpoint_wait=0, keep=0, steps=12)
    seen = {}

    def hook(done, _):
        if done in (3, 9):
            seen[done] = weights_of(run)
        if done == 8:  # the states of 3 (on its way) and 6 (left out)
            assert not state.saved(tmp_path)
            release.set()
            run.saver._hot.idle(None)

    run.on_step = hook
    run.fit()
    assert "the state of step 6 is left out" in capsys.readouterr().err
    assert [int(folder.path.name[-2:]) for folder in state.saved(tmp_path)] == [12, 9, 3]
    again = trainer(tmp_path, seed=5)
    again.saver.restore(before=4)  # what was staged in step 3, though the training went on
    assert all(torch.equal(a, b) for a, b in zip(weights_of(again), seen[3], strict=True))
    assert [folder.path.name for folder in state.saved(tmp_path)] == ["step-00000003"]


def test_what_fails_in_the_thread_is_raised_in_the_next_step(tmp_path, monkeypatch):
    real = saver.put

    def full(path, blocks):
        if "step-00000006" in str(path) and path.suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        real(path, blocks)

    monkeypatch.setattr(saver, "put", full)
    run, done = trainer(tmp_path / "stops"), []
    run.on_step = lambda step, _: done.append(step) or (step == 7 and run.saver._hot.idle(None))
    with pytest.raises(ResourceError, match=r"disk full while writing .*step-00000006(.|\n)*remedy"):
        run.fit()
    assert done[-1] in (6, 7)  # the thread may fail before the seventh step looks, or wait for it
    assert [path.name for path in (tmp_path / "stops" / FOLDER).iterdir()] == ["step-00000003"]
    run, errors = trainer(tmp_path / "goes"), []
    run.saver.on_error = errors.append
    run.fit()
    assert [type(error) for error in errors] == [ResourceError]
    assert [f.path.name for f in state.saved(tmp_path / "goes")] == ["step-00000009", "step-00000003"]


def test_an_error_that_nobody_expected_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "index_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, steps=100).fit()


def test_something_else_is_kept_with_the_state(tmp_path):
    class Counter:
        value = 0

        def state(self):
            return self.value

        def load(self, value):
            self.value = value

    run = trainer(tmp_path, steps=3)
    run.keeps["counter"] = Counter()
    run.keeps["counter"].value = {"5": [5.0]}
    run.fit()
    again = trainer(tmp_path, steps=3)
    again.keeps["counter"] = Counter()
    assert again.resume() == 3 and again.keeps["counter"].value == {"5": [5.0]}


# --- exports and the cold tier ----------------------------------------------------------------------------------------


def test_exports_are_folders_of_the_weights_of_their_step(tmp_path):
    from puyu.train.stage import save

    run, seen = trainer(tmp_path, export_every=4), {}
    run.on_step = lambda done, _: seen.update({done: weights_of(run)})
    run.on_export = lambda folder: save(run, folder)
    run.fit()
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["step-00000004", "step-00000008"]
    model = load_model(tmp_path / "exports" / "step-00000004", dtype=torch.float64)
    assert all(torch.equal(a, b.float().double()) for a, b in zip(model.parameters(), seen[4], strict=True))


@pytest.fixture
def url(request):
    fsspec = pytest.importorskip("fsspec")
    yield "memory://states"
    fsspec.filesystem("memory").rm("/states", recursive=True)


def cold_steps(url):
    return [int(name.split("-")[1]) for name in cold.ColdTier(url, keep=0).names()]


def test_the_cold_tier_serves_where_the_local_one_is_gone(tmp_path, url):
    trainer(tmp_path / "whole").fit()
    interrupted(tmp_path / "run", stop=7, cold=url)
    assert cold_steps(url) == [6, 3]
    shutil.rmtree(tmp_path / "run" / FOLDER)
    again = trainer(tmp_path / "run", seed=5, cold=url)
    again.fit()
    assert toys.losses(tmp_path / "run") == toys.losses(tmp_path / "whole")
    assert cold_steps(url) == [9, 6, 3]


def test_a_torn_local_state_is_mended_by_the_uploaded_one(tmp_path, url, caplog):
    interrupted(tmp_path, stop=7, cold=url)
    part = tmp_path / FOLDER / "step-00000006" / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert trainer(tmp_path, seed=5, cold=url).resume() == 6
    assert "step-00000006 is torn" in caplog.text


def test_cold_every_and_cold_keep(tmp_path, url):
    trainer(tmp_path, cold=url, cold_every=4, cold_keep=2, steps=14).fit()
    assert cold_steps(url) == [14, 12]


def test_an_upload_that_was_not_finished_is_never_read(tmp_path, url):
    import fsspec

    interrupted(tmp_path, stop=7, cold=url)
    files = fsspec.filesystem("memory")
    newest = cold.ColdTier(url, keep=0).names()[0]
    files.rm_file(f"/states/{newest}/state.json")
    shutil.rmtree(tmp_path / FOLDER)
    run = trainer(tmp_path, cold=url)
    assert run.resume() == 3
    run.saver.prepare()
    assert all(newest not in path for path in files.ls("/states", detail=False))


def test_a_failed_upload_is_a_warning_and_the_next_is_tried(tmp_path, url, monkeypatch, caplog):
    real = cold.Upload.run

    def offline(self, text, **how):
        if "step-00000003" in self.path:
            raise CheckpointError("the store is not there")
        real(self, text, **how)

    monkeypatch.setattr(cold.Upload, "run", offline)
    trainer(tmp_path, cold=url).fit()
    assert cold_steps(url) == [9, 6] and "cold tier: the store is not there" in caplog.text


def test_a_store_that_needs_a_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DependencyError, match=r"cold: s3://bucket/run needs s3fs\n  remedy: pip install s3fs"):
        trainer(tmp_path, cold="s3://bucket/run")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DependencyError, match="remedy: pip install fsspec"):
        trainer(tmp_path, cold="file:///archive")
    with pytest.raises((ConfigError, DependencyError)):
        trainer(tmp_path, cold="nothing://x")


def test_how_states_are_saved_is_no_part_of_the_run(tmp_path):
    from puyu.train.settings import FREE

    names = {"checkpoint_every", "checkpoint_wait", "keep", "cold", "cold_every", "cold_keep", "export_every"}
    assert names <= FREE & set(RunSettings.model_fields)


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes made, and what they found."""
    out = tmp_path_factory.mktemp("two")
    trainer(out / "whole").fit()
    interrupted(out / "back", stop=5)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "tests.train.run_states", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out, [json.loads((out / f"found-{rank}.json").read_text()) for rank in range(2)]


def test_saved_by_two_and_resumed_by_one_and_back(two):
    out, _ = two
    assert len(list((out / "there" / FOLDER / "step-00000003").glob("*.safetensors"))) == 2
    trainer(out / "there", seed=5).fit()
    for name in ("there", "back"):
        assert toys.losses(out / name) == pytest.approx(toys.losses(out / "whole"), abs=1e-10)
        assert len(toys.losses(out / name)) == 9


def test_a_process_that_cannot_write_stops_all_or_none(two):
    out, found = two
    assert found[0]["stops"][0] == "CheckpointError" and "another process" in found[0]["stops"][1]
    assert found[1]["stops"][0] == "ResourceError" and "disk full" in found[1]["stops"][1]
    assert [row["goes"] for row in found] == ["CheckpointError", "ResourceError"]
    for name, names in {"stops": ["step-00000003"], "goes": ["step-00000003", "step-00000009"]}.items():
        assert sorted(path.name for path in (out / "full" / name / FOLDER).iterdir()) == names


def test_a_state_that_is_torn_for_one_process_is_passed_over_by_all(two):
    assert [row["wrong"] for row in two[1]] == [3, 3]
