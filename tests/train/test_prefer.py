"""Preference training: log-probabilities against whole logits, packed against alone, resumed against whole."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from puyu.errors import InputError
from puyu.model.checkpoint import load_model, save_model
from puyu.model.packed import PackedPlan
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train import objectives, prefer
from puyu.train.objectives import chunked_logprobs
from puyu.train.prefer import PreferConfig, document_logprobs, last_turn, pack_answers, preference_loss, read_answers
from puyu.train.preference_losses import FREE_OF_REFERENCE, PreferenceNumbers
from tests.train import toys

ROOT = Path(__file__).resolve().parents[2]
SINGLE = ("kto", "apo_zero_unpaired")
KINDS = ("sigmoid", "hinge", "ipo", "robust", "sppo_hard", "nca_pair", "apo_zero", "apo_down", "simpo", "orpo")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base")
    made = toys.tokenizer(folder)
    save_model(toys.model(vocab_size=made.vocab_size, dtype=torch.float32), folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return toys.pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def config(base: Path, pairs: Path, **more) -> PreferConfig:
    optim = {"lr": 0.003, "schedule": "constant", "warmup": 0}
    values = {"base": base, "data": [pairs], "steps": 6, "batch_tokens": 4096, "dtype": "float64", "optim": optim}
    return PreferConfig.model_validate(values | {"checkpoint_every": 1} | more)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("frozen", [False, True])
def test_chunked_logprobs_are_those_of_whole_logits(monkeypatch, frozen):
    monkeypatch.setattr(objectives, "CPU_CHUNK_BYTES", 128 * 8 * 50)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, dtype=torch.float64, requires_grad=not frozen)
    targets, scale = torch.randint(50, (300,), generator=generator), torch.linspace(-1, 2, 300, dtype=torch.float64)
    found = chunked_logprobs(hidden, weight, targets)
    right = torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    learned = [hidden] if frozen else [hidden, weight]
    for one, two in zip(
        torch.autograd.grad((found * scale).sum(), learned),
        torch.autograd.grad((right * scale).sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_only_the_last_turn_counts():
    assert last_turn([0, 1, 1, 0, 0, 1, 1, 0]).tolist() == [False] * 5 + [True] * 2 + [False]
    assert last_turn([1, 1]).all() and not last_turn([0, 0]).any() and last_turn([]).size == 0


def test_an_answers_logprob_is_that_of_its_own_tokens(base, pairs):
    model, tokenizer = load_model(base, dtype=torch.float64), Tokenizer.load(base)
    found, _ = read_answers([pairs], tokenizer)
    model.requires_grad_(False)
    sums, lengths = document_logprobs(model, pack_answers(found[:3]))
    for at, (ids, loss) in enumerate(pair.docs[place] for place in range(2) for pair in found[:3]):
        tokens = torch.tensor(ids)
        logits = model(tokens, torch.arange(len(ids)), PackedPlan.build([0], len(ids)))
        each = torch.log_softmax(logits[:-1], -1).gather(-1, tokens[1:, None]).squeeze(-1)
        own = torch.from_numpy(np.asarray(loss)[1:])
        assert float(sums[at]) == pytest.approx(float(each[own].sum()), abs=1e-10)
        assert int(lengths[at]) == int(own.sum()) and tokenizer.decode(tokens[1:][own].tolist()).startswith(
            ("cat", "mat")[at // 3]
        )


@pytest.mark.parametrize("kind", (*KINDS, "apo_zero_unpaired"))
def test_packed_is_padded_is_one_by_one(base, pairs, kind):
    tokenizer, form = Tokenizer.load(base), PreferenceNumbers(imitation=0.1)
    found = read_answers([pairs], tokenizer, kind=kind)[0][:7]
    found = prefer.with_reference(load_model(base, dtype=torch.float64), found, batch_tokens=4096)
    results = []
    for size in (7, 1):
        model, loss, weight = load_model(base, dtype=torch.float64), 0.0, 0.0
        with torch.no_grad():
            for parameter in model.parameters():  # away from the reference
                parameter.mul_(1.1)
        for start in range(0, 7, size):
            output = preference_loss(kind, form)(model, pack_answers(found[start : start + size]))
            output.loss_sum.backward()
            loss, weight = loss + float(output.loss_sum.detach()), weight + float(output.weight_sum)
        results.append((loss / weight, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-10)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_training_sets_the_answers_apart(base, pairs, tmp_path, kind):
    asked = config(base, pairs, loss=kind, beta=2.0 if kind == "simpo" else 0.1, validation=pairs)
    numbers = prefer.run(asked, out=tmp_path)
    found = rows(tmp_path)
    assert found[0]["margin"] == pytest.approx(0.0, abs=1e-6) or kind in FREE_OF_REFERENCE
    assert found[-1]["loss"] < found[0]["loss"] and numbers["validation"]["accuracy"] > 0.9
    assert found[-1]["margin"] > found[0]["margin"] + 0.1


def test_kto_is_that_of_whole_logits_and_answers_to_other_prompts(base, pairs):
    """Losses and gradients against answers taken one by one, and the drift of those to other prompts."""
    tokenizer, form = Tokenizer.load(base), PreferenceNumbers(beta=0.2, wanted=1.5)
    found = read_answers([pairs], tokenizer, kind="kto")[0]
    assert len(found) == 48 and [one.good for one in found[:4]] == [True, False, True, False]
    for one in found:
        (own, _), (other, _) = one.docs
        texts = [tokenizer.decode(list(ids)) for ids in (own, other)]
        assert texts[0].partition("assistant")[0] == texts[1].partition("assistant")[0]
    some = prefer.with_reference(load_model(base, dtype=torch.float64), found[:6], batch_tokens=100)
    model = load_model(base, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.8)
    output = preference_loss("kto", form)(model, pack_answers(some))
    output.loss_sum.backward()
    packed = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()

    def logprob(doc):
        ids, loss = torch.tensor(doc[0]), torch.from_numpy(np.asarray(doc[1])[1:])
        logits = model(ids, torch.arange(len(ids)), PackedPlan.build([0], len(ids)))
        return torch.log_softmax(logits[:-1], -1).gather(-1, ids[1:, None]).squeeze(-1)[loss].sum()

    ratios = [logprob(one.docs[0]) - one.reference[0] for one in some]
    others = [float(logprob(one.docs[1]).detach()) - one.reference[1] for one in some]
    drift = max(0.0, sum(others) / len(others))
    signs = [(1.5, 1.0) if one.good else (1.0, -1.0) for one in some]
    alone = sum(w * torch.sigmoid(-0.2 * s * (r - drift)) for r, (w, s) in zip(ratios, signs, strict=True))
    alone.backward()
    assert float(output.metrics["drift"]) / 6 == pytest.approx(drift, abs=1e-9) and drift > 0
    assert float(output.loss_sum.detach()) == pytest.approx(float(alone.detach()), abs=1e-9)
    torch.testing.assert_close(packed, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", SINGLE)
def test_judged_answers_go_where_they_are_wanted(base, tmp_path, kind):
    path = tmp_path / "judged.jsonl"
    rows_ = [{"prompt": f"hi {i}", "completion": ("cat", "mat")[i % 2], "label": i % 2 == 0} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    numbers = prefer.run(config(base, path, loss=kind, validation=path, steps=8), out=tmp_path / "out")
    found = rows(tmp_path / "out")
    assert numbers["answers"] == 30 and numbers["validation"]["accuracy"] > 0.9
    assert found[-1]["ratio/wanted"] > 0 > found[-1]["ratio/unwanted"] and found[-1]["loss"] < found[0]["loss"]


def test_the_reference_stays_when_a_run_goes_on(base, pairs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    asked = config(base, pairs, tune={"method": "lora", "rank": 2}, accumulate=2)
    prefer.run(asked, out=whole)

    def kill(step, _):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        prefer.run(asked, out=killed, on_step=kill)
    prefer.run(asked, out=killed)
    assert [row["loss"] for row in rows(whole)] == [row["loss"] for row in rows(killed)]
    name = "adapter_model.safetensors"
    assert (whole / name).read_bytes() == (killed / name).read_bytes()


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_two_processes_learn_what_one_does(base, pairs, tmp_path, kind):
    asked = config(base, pairs, batch_tokens=300, validation=pairs, loss=kind)
    plan = [{"stage": "prefer", "config": asked.model_dump(mode="json"), "out": str(tmp_path / "two")}]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "tests.train.run_stages", str(tmp_path / "plan.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    prefer.run(asked, out=tmp_path / "one")
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        names = ("loss", "margin", "chosen") if kind == "sigmoid" else ("loss", "drift", "ratio/wanted")
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-9)


def test_pairs_that_are_too_long_are_counted(base, pairs, tmp_path):
    lengths = [pair.lengths[0] for pair in read_answers([pairs], Tokenizer.load(base))[0]]
    numbers = prefer.run(config(base, pairs, max_tokens=max(lengths) - 1, steps=1), out=tmp_path)
    assert numbers["dropped"]["too_long"] > 0 and numbers["pairs"] + numbers["dropped"]["too_long"] == 24


def test_a_file_without_pairs_is_named(base, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match=r"empty.jsonl"):
        prefer.run(config(base, tmp_path / "empty.jsonl"), out=tmp_path / "out")
