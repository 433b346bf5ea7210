"""Saved states: any layout from any other, a crash at any byte, the thread that writes, both tiers, two processes."""

import json
import random
import shutil
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from puyu.errors import CheckpointError, ConfigError, DependencyError, ResourceError
from puyu.files import read_jsonl
from puyu.model.checkpoint import load_model
from puyu.train import beside, cold, replicas, saver, state
from puyu.train.pieces import Piece
from puyu.train.settings import RunSettings
from puyu.train.state import FOLDER
from tests.train import toys
from tests.train.crashes import Disk, Held, crashes, loaded, replay, small, write, wrong_files
from tests.train.run_states import interrupted, trainer

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_crash_at_any_operation_leaves_the_state_before_or_the_new_one(tmp_path, processes, power):
    rng = random.Random(0)
    found = list(crashes(tmp_path, lambda size: rng.sample(range(size), 2), processes=processes, power=power))
    assert set(found) == {1, 2} and found == sorted(found)


def test_a_crash_while_a_state_replaces_itself_leaves_it_or_none(tmp_path):
    found = list(crashes(tmp_path, lambda size: [size // 2], again=True))
    assert found.count(None) == 1 and set(found) == {1, None}  # between two renames


def test_a_save_that_does_not_sync_is_found_out(tmp_path):
    write(tmp_path / "run", small(1))
    shutil.copytree(tmp_path / "run", tmp_path / "crashed")
    with Disk(tmp_path / "run") as disk:
        write(tmp_path / "run", small(2), step=2)
    replay([op for op in disk.ops if op[0] != "fsync"], tmp_path / "run", tmp_path / "crashed", power=True)
    assert loaded(tmp_path / "crashed") == 1 and loaded(tmp_path / "run") == 2


def test_no_cut_and_no_wrong_byte_loads(tmp_path):
    folder = write(tmp_path, small(1))
    rng = random.Random(0)
    steps = [
        (name, loaded(tmp_path))
        for name in wrong_files(folder, lambda n: rng.sample(range(n), 40), lambda _: [rng.randrange(8)])
    ]
    assert loaded(tmp_path) == 1
    assert [name for name, step in steps if step and name != "state.json"] == ["part-00000.safetensors"]  # one more
    assert sum(step == 1 for _, step in steps) < 20  # white space in state.json


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
    run.saver.on_error = saver._raise
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


def test_a_store_is_asked_for_no_empty_range(tmp_path, url, monkeypatch):
    """Stores answer `bytes=0--1` with an error, or with the whole file."""
    interrupted(tmp_path, stop=7, cold=url)
    shutil.rmtree(tmp_path / FOLDER)
    run, asked = trainer(tmp_path, cold=url), []
    read = type(run.saver.cold.files).cat_file

    def counting(files, path, start=None, end=None):
        asked.append((start, end))
        return read(files, path, start=start, end=end)

    monkeypatch.setattr(type(run.saver.cold.files), "cat_file", counting)
    assert run.resume() == 6
    ranges = [span for span in asked if span != (None, None)]
    assert ranges and all(start < end for start, end in ranges)


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


@pytest.mark.parametrize("waits", ["part", "others"])
def test_a_last_upload_that_hangs_is_given_up_and_said(tmp_path, url, monkeypatch, caplog, waits):
    never = threading.Event()
    real = cold.Upload.run

    def hang(self, text):
        if "step-00000009" not in self.path:
            return real(self, text)
        if waits == "others":
            self._sent = self._size
        never.wait()

    monkeypatch.setattr(cold.Upload, "run", hang)
    monkeypatch.setattr(beside, "GRACE", 0.05)
    trainer(tmp_path, cold=url, cold_wait=0.05).fit()
    never.set()
    assert cold_steps(url) == [6, 3] and len(toys.losses(tmp_path)) == 9
    (text,) = [line for line in caplog.messages if "given up after 0.05 s (cold_wait)" in line]
    assert "step-00000009" in text and "it is not whole" in text
    assert ("0 of " in text, "parts of others are awaited" in text) == (waits == "part", waits == "others")


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

    names = {"checkpoint_every", "checkpoint_wait", "keep", "cold", "cold_every", "cold_keep", "cold_wait"}
    names |= {"export_every"}
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
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
    assert [row["wrong"][:2] for row in two[1]] == [[3, 1], [3, 1]]


def test_states_that_are_torn_for_either_process_stop_both(two):
    assert [row["wrong"][2] for row in two[1]] == ["none of 2 saved states is whole"] * 2


def test_no_process_waits_for_the_part_of_one_that_has_failed(two):
    names = [f"step-0000000{step}" for step in (4, 3, 2)]
    assert [row["late"] for row in two[1]] == [[["CheckpointError"], names], [["ResourceError"], names]]


def test_a_flipped_bit_of_a_replica_is_named_and_healed(two):
    out, found = two
    name = "trunk.layers.0.attention.out.weight"
    assert toys.losses(out / "flipped" / "twice") == toys.losses(out / "flipped" / "clean")
    rows = list(read_jsonl(out / "flipped" / "twice" / FOLDER / "health.jsonl"))
    odd = [row for row in rows if row["event"] == "replicas differ"]
    assert [(row["step"], row["ranks"], row["parameters"][0]) for row in odd] == [(6, [0, 1], name), (8, [0, 1], name)]
    assert [(row["event"], row["step"]) for row in rows if row not in odd] == [("roll back", 3), ("roll back", 6)]
    text = f"replicas differ: ranks 0, 1 in {name}"
    for row in found:
        kind, message = row["flipped"]["always"]
        assert kind == "TrainingError" and text in message and message.endswith("after 2 returns to step 3")
        kind, message = row["flipped"]["early"]
        assert kind == "RetryError" and text in message and message.endswith("no state was saved")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_flip_of_one_bit_changes_the_checksum(dtype):
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    raw, before = weight.view(-1).view(torch.uint8), replicas.checksum(weight)
    for at in range(len(raw)):
        for bit in range(8):
            raw[at] ^= 1 << bit
            assert replicas.checksum(weight) != before
            raw[at] ^= 1 << bit
    assert replicas.checksum(weight) == before


def test_who_stands_against_a_majority_is_named():
    norm, head = ("trunk.norm.weight", "0"), ("head.weight", "8")
    tables = [{norm: 5}, {norm: 5, head: 1}, {norm: 4, head: 1}, {norm: 5, head: 2}]
    found = replicas.judge(tables)
    assert found.ranks == (2, 3) and found.parameters == ("trunk.norm.weight", "head.weight")
    assert replicas.judge([{norm: 5}, {}, {norm: 4}]).ranks == (0, 2)


def test_folders_that_are_not_one_are_found_out(two):
    assert all("1 of 2 processes do not see what the first one writes" in row["apart"] for row in two[1])


def test_a_store_that_the_first_process_cannot_reach_is_the_same_for_all(two):
    assert [row["no store"] for row in two[1]] == [[3, "RetryError"]] * 2
