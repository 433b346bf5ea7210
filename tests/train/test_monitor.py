"""Evaluation in the loop leaves no trace in the run; traces, W&B, and what they refuse."""

import gzip
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from puyu.chain.sample import go_on
from puyu.configure import build
from puyu.data.packing import pack_documents
from puyu.errors import ConfigError, DependencyError
from puyu.files import read_jsonl
from puyu.log import MetricsWriter, Progress
from puyu.model.attention import PackedPlan
from puyu.model.checkpoint import load_model
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train import pretrain, sft
from puyu.train.evaluate import undisturbed
from puyu.train.monitor import Tracer
from puyu.train.objectives import lm_loss
from puyu.train.optim import OptimConfig
from puyu.train.trainer import Trainer, TrainerConfig
from puyu.train.tune import TuneConfig, Tuning
from tests.train import toys
from tests.train.test_meter import rows

CPU = torch.device("cpu")
FAST = {"batch_tokens": 128, "dtype": "float64", "device": "cpu", "checkpoint_every": 2}
WATCHED = {"evaluate_every": 2, "samples": ["the", "书生"], "sample_tokens": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Inputs, and a run of pretraining with everything on."""
    root = tmp_path_factory.mktemp("world")
    toys.tokenizer(root / "tokenizer")
    toys.corpus(root / "data")
    toys.chats(root / "chats.jsonl")
    numbers = pretrain.run(config(root, **WATCHED), out=root / "watched", go_on=go_on)
    return root, numbers


def config(root, **more):
    base = {"data": str(root / "data"), "tokenizer": str(root / "tokenizer"), "model": toys.SHAPE, "heldout": 0.1}
    return build(pretrain.PretrainConfig, {**base, **FAST, "phases": [{"steps": 6, "seq_len": 64}], **more})


def test_evaluation_changes_nothing(world, tmp_path):
    root, _ = world
    pretrain.run(config(root), out=tmp_path)
    assert toys.losses(tmp_path) == toys.losses(root / "watched")
    plain, watched = (load_model(folder).state_dict() for folder in (tmp_path, root / "watched"))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_heldout_numbers_stand_in_the_row_of_their_step(world):
    root, numbers = world
    found = rows(root / "watched")
    assert [row["step"] for row in found if "val_loss" in row] == [2, 4, 6]
    assert all(row["time/evaluate"] > 0 for row in found if "val_loss" in row)
    last, heldout = found[-1], numbers["heldout"]
    for language, row in heldout.items():
        assert last[f"val_loss/{language}"] == row["loss"]
        assert last[f"val_bits_per_byte/{language}"] == row["bits_per_byte"]
    weights = [row["tokens"] - row["documents"] for row in heldout.values()]
    assert last["val_loss"] == pytest.approx(np.average([row["loss"] for row in heldout.values()], weights=weights))
    assert found[1]["val_loss"] > last["val_loss"]


def test_samples_are_the_engine_s_greedy_continuations(world):
    root, _ = world
    texts = [json.loads(line) for line in (root / "watched" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [(row["step"], row["prompt"]) for row in texts] == [(s, p) for s in (2, 4, 6) for p in ("the", "书生")]
    model, tokenizer = load_model(root / "watched", dtype=torch.float64), Tokenizer.load(root / "watched")
    ids = [tokenizer.bos_id, *tokenizer.encode("the")]
    for _ in range(5):
        batch = pack_documents([(ids, None)])
        plan = PackedPlan.build(batch.starts_S, batch.num_tokens)
        ids.append(int(model(batch.tokens_T, batch.positions_T, plan)[-1, : tokenizer.vocab_size].argmax()))
    answer = ids[-5:]
    if tokenizer.eos_id in answer:
        answer = answer[: answer.index(tokenizer.eos_id)]
    assert texts[-2]["text"] == tokenizer.decode(answer)


def test_a_run_that_is_resumed_has_each_sample_once(world, tmp_path):
    with pytest.raises(toys.Interrupted):
        pretrain.run(config(world[0], **WATCHED), out=tmp_path, on_step=toys.interrupt_at(5), go_on=go_on)
    pretrain.run(config(world[0], **WATCHED), out=tmp_path, go_on=go_on)
    texts = [(folder / "samples.jsonl").read_text() for folder in (tmp_path, world[0] / "watched")]
    assert texts[0] == texts[1] and texts[0]


def test_what_a_callback_disturbs_is_put_back(tmp_path):
    seen = []

    def disturb(step, trainer):
        torch.rand(3)
        trainer.model.eval()
        seen.append(step)
        return {"extra": 1.5}

    def noisy(model, batch):
        """A loss that shows where the random stream and the mode are."""
        output = lm_loss(model, batch)
        noise = torch.rand(()) if model.training else torch.zeros(())
        return output._replace(loss_sum=output.loss_sum * (1 + noise))

    for name, callbacks in (("plain", []), ("watched", [disturb])):
        settings = TrainerConfig(steps=6, evaluate_every=2)
        trainer = Trainer(toys.model(), noisy, toys.source(), settings, out=tmp_path / name)
        trainer.evaluations = callbacks
        trainer.fit()
    before = torch.get_rng_state()
    with undisturbed(trainer.model.train(), CPU):
        disturb(0, trainer)
    assert torch.equal(torch.get_rng_state(), before) and trainer.model.training and seen.pop() == 0
    assert seen == [2, 4, 6] and [row.get("extra") for row in rows(tmp_path / "watched")] == [None, 1.5] * 3
    assert toys.losses(tmp_path / "plain") == toys.losses(tmp_path / "watched")


def test_what_is_held_out_is_measured_without_dropout(tmp_path):
    model = toys.model(hidden_size=64, intermediate_size=128, dtype=torch.float32)
    Tuning.of(model, TuneConfig(method="lora", dropout=0.9), seed=0, base=None)
    for name, weight in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    rate = {"lr": 0.0, "weight_decay": 0.0}
    settings = TrainerConfig(steps=1, evaluate_every=1, optim=OptimConfig(**rate))
    trainer = Trainer(model.train(), lm_loss, toys.source(), settings, out=tmp_path)
    held = [toys.source(seed=1).next_batch()]
    trainer.evaluations = [lambda step, trainer: {"held": trainer.evaluate(held)["loss"]}]
    trainer.fit()
    assert model.training
    model.eval()
    assert rows(tmp_path)[-1]["held"] == trainer.evaluate(held)["loss"]


def test_an_evaluation_that_draws_training_data_is_a_mistake(tmp_path):
    trainer = Trainer(toys.model(), lm_loss, toys.source(), TrainerConfig(steps=2, evaluate_every=1), out=tmp_path)
    trainer.evaluations = [lambda step, trainer: trainer.evaluate([trainer.source.next_batch(rank=0, world=1)])]
    with pytest.raises(AssertionError, match="moved the data cursor"):
        trainer.fit()


def test_samples_need_a_caller_that_makes_text(world, tmp_path):
    with pytest.raises(ConfigError, match="samples"):
        pretrain.run(config(world[0], **WATCHED), out=tmp_path)


def test_validation_of_sft_is_the_mean_over_learned_tokens(world, tmp_path):
    root, _ = world
    values = {"base": str(root / "watched"), "data": [{"path": str(root / "chats.jsonl")}], "steps": 4, **FAST}
    more = {**WATCHED, "validation": str(root / "chats.jsonl"), "optim": {"lr": 0.0}}
    settings = build(sft.SFTConfig, values | more)
    sft.run(settings, out=tmp_path, go_on=go_on)
    model, tokenizer = load_model(root / "watched", dtype=torch.float64), Tokenizer.load(root / "watched")
    docs = sft.read_docs([sft.ChatData(path=root / "chats.jsonl")], tokenizer, seed=0).train
    with torch.no_grad():
        outputs = [lm_loss(model, pack_documents([doc])) for doc in docs]
    naive = sum(float(o.loss_sum) for o in outputs) / sum(float(o.weight_sum) for o in outputs)
    found = [row["val_loss"] for row in rows(tmp_path) if "val_loss" in row]
    assert found == pytest.approx([naive, naive], rel=1e-6)  # the rate is 0
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 6  # the first before any step
    settings = build(sft.SFTConfig, values | more | {"evaluate_every": 0})
    numbers = sft.run(settings, out=tmp_path / "end", go_on=go_on)
    found = [row["val_loss"] for row in rows(tmp_path / "end") if "val_loss" in row]
    assert found == [numbers["val_loss"]] == pytest.approx([naive], rel=1e-6)
    assert {row["step"] for row in read_jsonl(tmp_path / "end" / "samples.jsonl")} == {0, 4}


@pytest.mark.parametrize("terminal", [False, True])
def test_the_last_line_of_progress_stands_there_once(terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    bar = Progress("sft", 2, stream=stream)
    for _ in range(2):
        bar.printed = -100.0  # its ten seconds have passed
        bar.update()
    bar.close()
    lines = stream.getvalue().replace("\r", "\n").splitlines()
    assert sum("2/2" in line for line in lines) == 1 + terminal  # a terminal shows it in place
    assert sum("1/2" in line for line in lines) == 1


def test_a_trace_of_two_steps(tmp_path):
    settings = TrainerConfig(steps=4, profile={"step": 2, "steps": 2})
    Trainer(toys.model(), lm_loss, toys.source(), settings, out=tmp_path).fit()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps-2-3-rank0.json.gz"
    with gzip.open(path) as stream:
        names = [event.get("name") for event in json.load(stream)["traceEvents"]]
    assert sum(name == "Optimizer.step#AdamW.step" for name in names) == 2
    settings = TrainerConfig(steps=4, profile={"step": 4, "steps": 9})
    Trainer(toys.model(), lm_loss, toys.source(), settings, out=tmp_path / "short").fit()
    assert [path.name for path in (tmp_path / "short" / "profile").iterdir()] == ["steps-4-4-rank0.json.gz"]


def test_a_trace_ends_where_the_run_goes_back_and_is_not_made_again(tmp_path):
    tracer = Tracer(TrainerConfig(steps=9, profile={"step": 2, "steps": 5}), tmp_path, device=CPU, rank=0)
    for step in (1, 2, 3):
        tracer.begin(step)
        tracer.end(step, last=step == 3)
    for step in range(1, 10):
        tracer.begin(step)
        assert tracer._profiler is None
        tracer.end(step)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps-2-3-rank0.json.gz"]


def test_a_memory_snapshot_needs_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match=r"memory_snapshot needs a GPU, this run is on cpu(.|\n)*memory_gib"):
        Trainer(toys.model(), lm_loss, toys.source(), TrainerConfig(steps=2, memory_snapshot=1), out=tmp_path)


def test_wandb_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DependencyError, match=r"wandb: mine needs Weights & Biases(.|\n)*pip install wandb"):
        MetricsWriter(tmp_path / "metrics.jsonl", wandb="mine")


def test_wandb_gets_every_row_offline(tmp_path, monkeypatch):
    calls = []

    def start(**values):
        calls.append(values)
        return SimpleNamespace(
            log=calls.append,
            finish=lambda: calls.append("end"),
            define_metric=lambda name, **more: calls.append((name, more)),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=start))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for first in (3, 1):  # goes back
        writer = MetricsWriter(tmp_path / "run" / "metrics.jsonl", from_step=first, wandb="mine")
        writer.write(first, {"loss": 2.5, "note": "text"})
        writer.close()
    begun, axis, every, row, end, again, _, _, back, _ = calls
    assert (begun["project"], begun["mode"], begun["name"]) == ("mine", "offline", "run") and begun == again
    assert (axis, every) == (("step", {}), ("*", {"step_metric": "step"})) and end == "end"
    assert row == back | {"step": 3} == {"step": 3, "loss": 2.5, "note": "text"}
