"""What stays of saved states, and how a run goes on, where something is torn, in the way or not there."""

import os
import shutil
import signal
import threading
from pathlib import Path

import fsspec
import pytest

from puyu.dist import World
from puyu.errors import CheckpointError, ResourceError, RetryError
from puyu.train import cold, folders, saver, state
from puyu.train.cold import ColdTier
from puyu.train.folders import export
from tests.train import toys
from tests.train.crashes import small, write
from tests.train.run_states import interrupted, tear, trainer


def names(out):
    return [folder.path.name for folder in state.saved(out)]


@pytest.fixture
def url():
    yield "memory://saved"
    if (files := fsspec.filesystem("memory")).exists("/saved"):
        files.rm("/saved", recursive=True)


def test_where_all_states_are_torn_nothing_begins_with_half_of_one(tmp_path):
    interrupted(tmp_path, stop=7)
    for step in (3, 6):
        tear(tmp_path, step)
    with pytest.raises(CheckpointError, match=r"none of 2 saved states is whole, .*step-00000003\n  remedy: put back"):
        trainer(tmp_path, seed=5).resume()
    assert names(tmp_path) == ["step-00000006", "step-00000003"]


def test_a_torn_state_is_not_counted_among_those_that_stay(tmp_path):
    interrupted(tmp_path, stop=7)
    tear(tmp_path, 6)
    interrupted(tmp_path, stop=5, checkpoint_every=4, keep=1)
    assert names(tmp_path) == ["step-00000004"]


def test_a_local_state_that_the_uploaded_one_has_replaced_goes(tmp_path, url):
    interrupted(tmp_path, stop=7, cold=url)
    tear(tmp_path, 6)
    assert trainer(tmp_path, cold=url).resume() == 6 and names(tmp_path) == ["step-00000003"]


def test_only_states_up_to_its_own_step_are_removed_for_a_new_one(tmp_path):
    for step in (9, 1, 2, 3):
        write(tmp_path, small(1), step=step, keep=2)
    assert names(tmp_path) == ["step-00000009", "step-00000003", "step-00000002"]


def test_uploaded_states_that_are_newer_or_of_the_same_step_do_not_drive_out_the_new_one(url):
    tier = ColdTier(url, keep=2)
    for name in ("step-00000001-a", "step-00000002-a", "step-00000003-a", "step-00000003-b", "step-00000009-a"):
        for file in ("part-00000.json", "state.json"):
            tier.files.pipe_file(f"{tier.root}/{name}/{file}", b"{}")
    tier.trim("step-00000003-a")
    assert tier.names() == ["step-00000009-a", "step-00000003-b", "step-00000003-a"]


def test_the_folder_may_be_renamed_as_soon_as_the_mark_is_there(tmp_path, url, monkeypatch):
    real = saver.put

    def renamed(path, blocks):
        real(path, blocks)
        if path.name == "part-00000.json":
            path.parent.rename(path.parent.with_name("elsewhere"))

    monkeypatch.setattr(saver, "put", renamed)
    run = trainer(tmp_path, cold=url)
    progress = state.Progress(3, 0, {})
    run.saver.staging.take(run.saver._pieces())
    job = run.saver._new_job(progress, last=True)
    job.part()
    job.upload.run(b"{}")
    assert run.saver.cold.names() == [job.upload.path.rpartition("/")[2]]


def test_old_states_that_cannot_be_removed_are_a_warning(tmp_path, monkeypatch, caplog):
    def busy(path):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(folders, "clear_folder", busy)
    trainer(tmp_path, keep=1).fit()
    assert names(tmp_path) == ["step-00000009", "step-00000006", "step-00000003"]
    assert "step-00000003 was not removed: [Errno 16]" in caplog.text


def test_an_export_that_was_killed_while_it_was_renamed_is_made_again(tmp_path):
    def writes(text):
        def write(folder: Path):
            folder.mkdir(parents=True)
            (folder / "model").write_text(text)

        return write

    for text in ("one", "two"):
        folder = export(tmp_path, 4, writes(text))
        writes("older")(folder.with_name("step-00000004.tmp-old"))
    export(tmp_path, 4, writes("three"))
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000004"]
    assert (folder / "model").read_text() == "three"


# --- a stop, what fails beside, a store that is down ------------------------------------------------------------------


def test_who_asks_for_a_stop_gets_the_state_first_and_the_export_is_made_later(tmp_path):
    run, seen = trainer(tmp_path, checkpoint_every=0, evaluate_every=4, export_every=4), []
    run.on_export = lambda folder: seen.append(("export", run.done)) or folder.mkdir(parents=True)
    run.evaluations = [lambda step, _: seen.append(("evaluation", step)) or {}]
    run.on_step = lambda done, _: os.kill(os.getpid(), signal.SIGTERM) if done == 3 else None
    with pytest.raises(SystemExit):
        run.fit()
    assert seen == [] and names(tmp_path) == ["step-00000004"]
    run = trainer(tmp_path, checkpoint_every=0, evaluate_every=4, export_every=4)
    run.on_export = lambda folder: seen.append(("export", run.done)) or folder.mkdir(parents=True)
    run.evaluations = [lambda step, _: seen.append(("evaluation", step)) or {}]
    run.fit()
    assert seen == [("export", 4), ("evaluation", 8), ("export", 8), ("evaluation", 9)]
    assert len(toys.losses(tmp_path)) == 9


def test_a_stop_that_is_asked_for_in_an_evaluation_waits_for_no_other_step(tmp_path):
    run = trainer(tmp_path, checkpoint_every=0, evaluate_every=4)
    run.evaluations = [lambda step, _: os.kill(os.getpid(), signal.SIGTERM) or {"extra": 1.0}]
    with pytest.raises(SystemExit):
        run.fit()
    assert names(tmp_path) == ["step-00000004"]


def test_a_state_of_a_stop_is_uploaded_too(tmp_path, url):
    run = trainer(tmp_path, checkpoint_every=0, cold=url)
    run.on_step = lambda done, _: os.kill(os.getpid(), signal.SIGTERM) if done == 3 else None
    with pytest.raises(SystemExit):
        run.fit()
    assert [name[:13] for name in run.saver.cold.names()] == ["step-00000004"]


def test_an_upload_that_hangs_keeps_no_run_from_ending(tmp_path, url, monkeypatch, caplog):
    never = threading.Event()
    monkeypatch.setattr(cold.Upload, "run", lambda *_: never.wait())
    monkeypatch.setattr("puyu.train.beside.GRACE", 0.05)
    monkeypatch.setattr(saver, "GRACE", 0.05)
    interrupted(tmp_path, stop=4, cold=url)
    never.set()
    assert "cold tier: it does not end" in caplog.text and names(tmp_path) == ["step-00000003"]


def test_after_a_roll_back_the_next_upload_is_counted_from_the_last_that_is_left(tmp_path, url):
    run = trainer(tmp_path, cold=url, cold_every=6, steps=9, keep=0)
    run.fit()
    assert run.saver.restore(before=8) and run.saver._uploaded == 6
    assert run.saver.restore(before=5) and run.saver._uploaded == 0 and not run.saver.cold.names()


class DownError(Exception):
    """As botocore's: no OSError."""


def down(*_, **__):
    raise DownError("could not connect to the endpoint")


def test_where_the_store_is_down_the_local_states_are_used(tmp_path, url, monkeypatch, caplog):
    interrupted(tmp_path, stop=7, cold=url)
    run = trainer(tmp_path, seed=5, cold=url)
    monkeypatch.setattr(type(run.saver.cold.files), "ls", down)
    run.fit()
    assert "only local states are used: OSError: DownError: could not connect" in caplog.text
    assert run.saver.restore(before=9)[0].step == 6
    shutil.rmtree(tmp_path / "train_state")
    with pytest.raises(RetryError, match="no local state is good, and memory://saved cannot be read"):
        trainer(tmp_path, cold=url).resume()


def test_a_store_that_breaks_off_while_it_is_read_makes_no_other_error(tmp_path, url, monkeypatch):
    interrupted(tmp_path, stop=7, cold=url)
    shutil.rmtree(tmp_path / "train_state")
    run = trainer(tmp_path, cold=url)
    monkeypatch.setattr(type(run.saver.cold.files), "cat_file", down)
    with pytest.raises(CheckpointError, match="none of 2 saved states is whole"):
        run.resume()


def test_a_slow_process_does_not_leave_the_folder_of_a_state_that_the_first_gave_up(tmp_path, monkeypatch):
    write(tmp_path, small(1, 2), step=1)
    staging = saver.Staging()
    staging.take(small(1, 2)[1])
    folder = tmp_path / "train_state" / "step-00000002"
    first, slow = (saver.Job(folder, "x", state.Progress(2, 0, {}), "", staging, World(rank, 2), 0) for rank in (0, 1))
    first.drop()
    slow.part()
    slow.drop()  # what every process does when it hears of it
    assert not slow.temporary.exists()
    real = saver.put
    monkeypatch.setattr(saver, "put", lambda *args: slow.cancelled.set() if args[0].suffix == ".json" else real(*args))
    assert not slow.run() and not slow.temporary.exists()


def test_a_process_that_cannot_write_takes_no_folder_from_one_that_is_about_to(tmp_path, monkeypatch):
    staging = saver.Staging()
    staging.take(small(1, 2)[1])
    folder, progress = tmp_path / "train_state" / "step-00000002", state.Progress(2, 0, {})
    first, full = (saver.Job(folder, "x", progress, "", staging, World(rank, 2), 0) for rank in (0, 1))
    first.temporary.mkdir(parents=True)
    real = saver.put

    def no_room(path, blocks):
        real(path, blocks)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "put", no_room)
    with pytest.raises(ResourceError, match="disk full"):
        full.run()
    assert list(first.temporary.iterdir()) == []
    full.drop()
    assert not first.temporary.exists()
