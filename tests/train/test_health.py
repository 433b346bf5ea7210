"""Runs that fall ill: what is found, what is done about it, and that the rest is the run without the bad batches."""

import errno
import math
import os
import signal

import pytest
import torch

from puyu.errors import CheckpointError, RetryError, TrainingError
from puyu.files import disk_errors, read_jsonl
from puyu.log import MetricsWriter
from puyu.train import saver, state
from puyu.train.health import HealthConfig
from puyu.train.health.heartbeat import PATIENT
from puyu.train.objectives import LossOutput, lm_loss
from tests.train import toys
from tests.train.test_trainer import trainer

LONG = {"steps": 60, "checkpoint_every": 10}


def ill(out, faults, **config):
    """A trainer whose loss is multiplied by faults[step]; a callable is given the model, once, before that step."""
    box = []

    def objective(model, rows):
        output, fault = lm_loss(model, rows), faults.get(box[0].done + 1, 1.0)
        if callable(fault):
            with torch.no_grad():
                faults.pop(box[0].done + 1)(model)
            return lm_loss(model, rows)
        return LossOutput(output.loss_sum * fault, output.weight_sum, output.metrics)

    box.append(trainer(out, objective=objective, **config))
    return box[0]


def without(out, skip, **config):
    """The same run, told beforehand which batches to leave out."""
    run = trainer(out, **config)
    run.watch.skip |= set(skip)
    run.fit()
    return run


def rows(out):
    return list(read_jsonl(out / "metrics.jsonl"))


def losses(out):
    return {row["step"]: row["loss"] for row in rows(out) if "loss" in row}


def events(out):
    return [(row["event"], row["step"]) for row in read_jsonl(out / state.FOLDER / "health.jsonl")]


def same(one, two):
    assert losses(one.out) == losses(two.out)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_left_out(tmp_path, fault):
    run = ill(tmp_path / "ill", {5: fault})
    numbers = run.fit()
    same(run, without(tmp_path / "without", {5}))
    row = rows(run.out)[4]
    assert row["step"] == 5 and "loss" not in row and row["step_tokens"] == 0 and row["skipped_tokens"] > 0
    assert "first in the gradient of trunk." in row["skipped"]
    assert numbers["skipped"] == 1 and numbers["steps"] == 9
    assert numbers["tokens"] == sum(row["step_tokens"] for row in rows(run.out))
    assert events(run.out) == [("bad step", 5)]


def test_a_spike_is_left_out_and_nothing_else(tmp_path):
    run = ill(tmp_path / "ill", {40: 10.0}, **LONG)
    run.fit()
    assert events(run.out) == [("bad step", 40)] and "is a spike" in rows(run.out)[39]["skipped"]
    same(run, without(tmp_path / "without", {40}, **LONG))


def damage(model):
    """What a flipped bit or a broken update does: one matrix is no longer what was learned."""
    model.head.weight.mul_(-30.0)


def test_damaged_weights_go_back_to_a_state_before_and_the_replay_is_exact(tmp_path):
    run = ill(tmp_path / "ill", {42: damage}, **LONG)
    run.fit()
    assert events(run.out) == [("bad step", 42), ("bad step", 43), ("bad step", 44), ("roll back", 30)]
    assert run.watch.skip == {39, 40, 41, 42, 43, 44}
    assert [row["step"] for row in rows(run.out)] == list(range(1, 61))
    same(run, without(tmp_path / "without", run.watch.skip, **LONG))


def test_a_restore_may_take_as_long_as_a_save(tmp_path):
    run, seen = ill(tmp_path, {6: math.nan, 7: math.nan, 8: math.nan}, steps=24), []
    restore = run.saver.restore

    def watched(**options):
        if options:
            seen.append(run.meter.on_span.__self__.beat())
        return restore(**options)

    run.saver.restore = watched
    run.fit()
    assert {(beat.step, beat.span, beat.span in PATIENT) for beat in seen} == {(8, "roll back", True)}


def test_going_back_to_a_younger_state_than_was_asked_for_skips_only_what_is_behind_it(tmp_path):
    run = ill(tmp_path / "ill", {42: damage}, **LONG | {"checkpoint_every": 1, "checkpoint_wait": 30.0})
    run.fit()
    assert events(run.out)[-1] == ("roll back", 41) and run.watch.skip == {42, 43, 44}
    same(run, without(tmp_path / "without", run.watch.skip, **LONG))


def test_killed_after_a_roll_back_it_goes_on_with_the_same_batches_left_out(tmp_path):
    whole = ill(tmp_path / "whole", {42: damage}, **LONG)
    whole.fit()
    broken = ill(tmp_path / "broken", {42: damage}, **LONG)
    broken.on_step = toys.interrupt_at(53)
    with pytest.raises(toys.Interrupted):
        broken.fit()
    saved = state.State(state.saved(broken.out)[0]).progress.extra["health"]
    assert saved["skip"] == [39, 40, 41, 42, 43, 44]
    again = ill(broken.out, {}, model=toys.model(seed=9), **LONG)
    again.fit()
    same(again, whole)


def test_a_run_that_stays_ill_stops_with_its_good_state(tmp_path):
    run = ill(tmp_path, dict.fromkeys(range(42, 61), math.nan), **LONG)
    with pytest.raises(TrainingError, match=r"step \d+: loss is nan.* another try would end like this\n  remedy:"):
        run.fit()
    assert [event for event, _ in events(tmp_path)].count("roll back") == 2
    run.resume()
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


def test_without_a_state_to_go_back_to_it_says_so(tmp_path):
    run = ill(tmp_path, dict.fromkeys(range(4, 10), math.nan), checkpoint_every=0)
    with pytest.raises(TrainingError, match="step 6: loss is nan.*no state was saved before it"):
        run.fit()


def test_a_run_that_skipped_a_quarter_is_no_success(tmp_path):
    with pytest.raises(TrainingError, match="3 of 9 steps were skipped"):
        ill(tmp_path, {2: math.nan, 5: math.nan, 8: math.nan}).fit()


def test_no_state_is_saved_while_steps_are_bad(tmp_path):
    run = ill(tmp_path, {6: math.nan})
    run.fit()
    assert [folder.path.name for folder in state.saved(tmp_path)] == ["step-00000009", "step-00000003"]


def test_levels_are_learned_anew_in_each_phase_and_kept_on_resume(tmp_path):
    run = trainer(tmp_path)
    run.before_step = lambda step: step // 5
    run.fit()
    saved = state.State(state.saved(tmp_path)[0]).progress.extra["health"]
    assert saved["phase"] == 1 and len(saved["loss"][0]) == 4
    again = trainer(tmp_path)
    again.resume()
    again.watch.enter(1)
    assert again.watch.state() == saved


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_both_signals_save_and_stop(tmp_path, number):
    run = trainer(tmp_path, checkpoint_every=0)
    run.on_step = lambda done, _: os.kill(os.getpid(), number) if done == 2 else None
    with pytest.raises(SystemExit) as caught:
        run.fit()
    assert caught.value.code == 143 and state.saved(tmp_path)[0].path.name == "step-00000003"


def test_a_setting_of_the_watch_does_not_change_a_healthy_run(tmp_path):
    one, two = (
        trainer(tmp_path / str(i), health=HealthConfig(spike=s, patience=p))
        for i, (s, p) in enumerate([(5, 1), (0, 0)])
    )
    one.fit()
    two.fit()
    same(one, two)


class Disk:
    """A disk that is full for some writes of parts (counted from 1), or of rows."""

    def __init__(self, monkeypatch, *, parts=(), rows=()):
        self.parts, self.rows, self.count = parts, rows, {"parts": 0, "rows": 0}
        put, write = saver.put, MetricsWriter.write

        def put_or_fail(path, blocks):
            if path.suffix == ".safetensors":
                self.fail_at("parts", parts)
            put(path, blocks)

        def write_or_fail(writer, step, values):
            with disk_errors(writer.path):
                self.fail_at("rows", rows)
            write(writer, step, values)

        monkeypatch.setattr(saver, "put", put_or_fail)
        monkeypatch.setattr(MetricsWriter, "write", write_or_fail)

    def fail_at(self, what, full):
        self.count[what] += 1
        if self.count[what] in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


DENSE = {"steps": 12, "checkpoint_every": 3, "checkpoint_wait": 30.0}


def test_a_full_disk_makes_room_and_the_save_is_tried_again(tmp_path, monkeypatch):
    Disk(monkeypatch, parts=[3])
    run = trainer(tmp_path / "full", **DENSE)
    run.before_step = lambda _: run.saver._hot.idle(None)
    run.fit()
    (row,) = read_jsonl(run.out / state.FOLDER / "health.jsonl")
    assert row["event"] == "disk full" and "disk full while writing" in row["text"]
    assert row["text"].endswith("older states were removed; it is tried again")
    assert [shelf.path.name for shelf in state.saved(run.out)] == ["step-00000012", "step-00000010"]
    same(run, without(tmp_path / "clean", set(), **DENSE))


def test_training_goes_on_without_saving_and_a_last_state_that_fails_is_no_success(tmp_path, monkeypatch):
    Disk(monkeypatch, parts=range(2, 100))
    run = trainer(tmp_path, **DENSE)
    run.before_step = lambda _: run.saver._hot.idle(None)
    with pytest.raises(RetryError, match="step 12: the state could not be saved") as caught:
        run.fit()
    assert caught.value.exit_code == 75
    assert len(losses(tmp_path)) == 12 and [p.path.name for p in state.saved(tmp_path)] == ["step-00000003"]
    assert any(
        "training goes on without" in row["text"] for row in read_jsonl(tmp_path / state.FOLDER / "health.jsonl")
    )
    monkeypatch.undo()
    again = trainer(tmp_path, model=toys.model(seed=9), **DENSE)
    again.fit()
    same(again, without(tmp_path / "clean", set(), **DENSE))


def test_another_failure_to_save_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "put", lambda path, blocks: os.close(-1))
    with pytest.raises(CheckpointError, match="could not be written"):
        trainer(tmp_path, **DENSE).fit()


def test_rows_wait_for_room_and_none_is_lost(tmp_path, monkeypatch):
    Disk(monkeypatch, rows=[4, 5, 6])
    run = trainer(tmp_path / "full")
    run.fit()
    assert [row["step"] for row in rows(run.out)] == list(range(1, 10))
    assert events(run.out) == [("disk full", 4)]
    same(run, without(tmp_path / "clean", set()))


def test_rows_that_cannot_be_written_at_all_are_no_success(tmp_path, monkeypatch):
    Disk(monkeypatch, rows=range(4, 100))
    with pytest.raises(RetryError, match=r"6 rows of metrics\.jsonl could not be written"):
        trainer(tmp_path).fit()
