"""What stays of saved states, and how a run goes on, where something is torn, in the way or not there."""

from pathlib import Path

import pytest

from puyu.errors import CheckpointError
from puyu.train import saver, state
from puyu.train.cold import ColdTier
from puyu.train.saver import export
from tests.train.crashes import small, write
from tests.train.run_states import interrupted, tear, trainer


def names(out):
    return [folder.path.name for folder in state.saved(out)]


@pytest.fixture
def url():
    fsspec = pytest.importorskip("fsspec")
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
    job = run.saver._job(progress, last=True, upload=True)
    job.part()
    job.upload.run(b"{}")
    assert run.saver.cold.names() == [job.upload.path.rpartition("/")[2]]


def test_old_states_that_cannot_be_removed_are_a_warning(tmp_path, monkeypatch, caplog):
    def busy(path):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(saver, "clear_folder", busy)
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
