"""The loop against a naive twin, and what happens when it is interrupted."""

import json
import os
import signal

import pytest
import torch
from torch.nn import functional as F

from puyu.errors import CheckpointError, TrainingError
from puyu.model.attention import PackedPlan
from puyu.train import state
from puyu.train.health import HealthConfig
from puyu.train.objectives import LossOutput, lm_loss
from puyu.train.optim import OptimConfig
from puyu.train.schedule import lr_at
from puyu.train.trainer import Trainer, TrainerConfig
from tests.train import toys

OPTIM = OptimConfig(lr=0.01, warmup=2, clip=0.5)


def trainer(out, *, model=None, source=None, objective=lm_loss, **config):
    config = TrainerConfig(**({"steps": 9, "optim": OPTIM, "checkpoint_every": 3, "checkpoint_wait": 60} | config))
    return Trainer(model or toys.model(), objective, source or toys.source(), config, out=out)


def naive_losses(steps):
    """Full logits, mean loss, torch's clipping and plain AdamW."""
    model, source = toys.model(), toys.source()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    result = []
    for step in range(steps):
        batch = source.next_batch()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps=steps, peak=0.01, kind="cosine", warmup=2)
        logits = model(batch.tokens_T, batch.positions_T, PackedPlan.build(batch.starts_S, batch.num_tokens))
        loss = F.cross_entropy(logits, batch.targets_T, reduction="none") @ batch.weights_T.double()
        loss = loss / batch.weights_T.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        result.append(loss.item())
    return result


def test_losses_equal_a_naive_loop(tmp_path):
    numbers = trainer(tmp_path).fit()
    assert toys.losses(tmp_path) == pytest.approx(naive_losses(9), abs=1e-6)
    assert numbers["steps"] == 9 and numbers["loss_last"] < numbers["loss_first"]


def test_accumulation_changes_nothing(tmp_path):
    class Halves:
        """Each batch of another source as two: one document, then the others."""

        def __init__(self):
            self.inner, self.rest = toys.source(), None

        def next_batch(self, *, rank=0, world=1):
            if self.rest is None:
                before = self.inner.state()
                first = self.inner.next_batch(rank=0, world=2)
                self.inner.load(before)
                self.rest = self.inner.next_batch(rank=1, world=2)
                return first
            rest, self.rest = self.rest, None
            return rest

        def state(self):
            return self.inner.state()

    trainer(tmp_path / "one").fit()
    trainer(tmp_path / "two", source=Halves(), accumulate=2).fit()
    assert toys.losses(tmp_path / "two") == pytest.approx(toys.losses(tmp_path / "one"), abs=1e-12)


def test_metrics_have_one_row_per_step(tmp_path):
    trainer(tmp_path).fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds"} <= set(rows[0])
    assert rows[-1]["tokens"] == sum(row["step_tokens"] for row in rows)
    assert rows[0]["lr"] == pytest.approx(0.005) and rows[-1]["lr"] == pytest.approx(0.001)


def test_resume_is_bitwise_the_same_run(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.fit()
    broken = trainer(tmp_path / "broken")
    broken.on_step = toys.interrupt_at(5)
    with pytest.raises(toys.Interrupted):
        broken.fit()
    again = trainer(tmp_path / "broken", model=toys.model(seed=99), source=toys.source())
    again.fit()
    assert toys.losses(tmp_path / "broken") == toys.losses(tmp_path / "whole")
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_states_are_kept_and_a_torn_one_is_passed_over(tmp_path, caplog):
    whole = trainer(tmp_path / "whole")
    whole.fit()
    broken = trainer(tmp_path / "broken")
    broken.on_step = toys.interrupt_at(8)
    with pytest.raises(toys.Interrupted):
        broken.fit()
    folder = tmp_path / "broken" / state.FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000006"]
    weights = folder / "step-00000006" / "part-00000.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (folder / "step-00000009.tmp-1").mkdir()
    assert trainer(tmp_path / "broken").resume() == 3
    assert "step-00000006 is torn (part-00000.safetensors does not match its checksum)" in caplog.text
    trainer(tmp_path / "broken").fit()
    assert toys.losses(tmp_path / "broken") == toys.losses(tmp_path / "whole")
    assert not list(folder.glob("*.tmp-*"))


@pytest.mark.parametrize("name", ["state.json", "part-00000.json", "part-00000.safetensors"])
@pytest.mark.parametrize("keep", [0, 10])
def test_every_truncated_part_makes_a_state_torn(tmp_path, name, keep):
    run = trainer(tmp_path, steps=3)
    run.fit()
    part = tmp_path / state.FOLDER / "step-00000003" / name
    part.write_bytes(part.read_bytes()[:keep])
    again = trainer(tmp_path, model=toys.model(seed=9), steps=3)
    assert again.resume() == 0
    for a, b in zip(again.model.parameters(), toys.model(seed=9).parameters(), strict=True):
        assert torch.equal(a, b)  # nothing of a torn state has touched them


def test_a_state_of_another_run_is_refused(tmp_path):
    trainer(tmp_path, steps=3, identity="a").fit()
    with pytest.raises(CheckpointError, match="another config"):
        trainer(tmp_path, steps=3, identity="b").resume()


def test_sigterm_saves_and_exits_with_143(tmp_path):
    trainer(tmp_path / "whole").fit()
    stopped = trainer(tmp_path / "stopped", checkpoint_every=0)
    stopped.on_step = lambda done, _: os.kill(os.getpid(), signal.SIGTERM) if done == 4 else None
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        stopped.fit()
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    # The step in progress when the signal arrived was finished and saved.
    assert [path.name for path in (tmp_path / "stopped" / state.FOLDER).iterdir()] == ["step-00000005"]
    trainer(tmp_path / "stopped").fit()
    assert toys.losses(tmp_path / "stopped") == toys.losses(tmp_path / "whole")


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_update(tmp_path, part):
    calls = []

    def objective(model, batch):
        output = lm_loss(model, batch)
        calls.append(1)
        if len(calls) < 5:
            return output
        if part == "loss":
            return LossOutput(output.loss_sum * float("nan"), output.weight_sum, {})
        poison = model.trunk.layers[1].mlp.down.weight
        return LossOutput(output.loss_sum + (poison - poison).sqrt().sum(), output.weight_sum, {})

    run = trainer(tmp_path, objective=objective, health=HealthConfig(patience=0))
    saved = []
    run.on_step = lambda done, _: saved.append([p.clone() for p in run.model.parameters()])
    with pytest.raises(TrainingError, match=r"step 5: .*the update was not made(.|\n)*remedy") as caught:
        run.fit()
    assert ("loss is nan" if part == "loss" else "gradient of trunk.layers.1.mlp.down.weight") in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(saved[-1], run.model.parameters(), strict=True))
    assert state.saved(tmp_path)[0].path.name == "step-00000003"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.8682, 0.55, 0.2318, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1]),
    ],
)
def test_schedules(kind, expected):
    rates = [lr_at(step, steps=7, peak=1.0, kind=kind, warmup=2, decay=0.4) for step in range(7)]
    assert rates == pytest.approx(expected, abs=1e-4)
