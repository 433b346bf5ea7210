"""Recipes of InternLM2 by exact arithmetic, and phases with a rate and a batch of their own."""

import json

import pytest
import torch

from puyu.cli.main import main
from puyu.configure import build, load_yaml
from puyu.errors import CheckpointError
from puyu.model.heads import CausalLM
from puyu.train import pretrain
from puyu.train.pretrain import PretrainConfig, model_config
from tests.conftest import ROOT
from tests.train import toys

PARAMETERS = {"internlm2_1.8b": 1_889_110_016, "internlm2_7b": 7_737_708_544, "internlm2_20b": 19_861_149_696}


def recipe(name):
    return build(PretrainConfig, load_yaml(ROOT / "recipes" / f"{name}.yaml"), where=name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipes_have_the_published_numbers(name):
    config = recipe(name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in CausalLM(model_config(config)).parameters())
    assert count == PARAMETERS[name]
    tokens = [phase.steps * config.batch_of(phase) for phase in config.phases]
    assert 2.0e12 <= sum(tokens) <= 2.6e12
    assert sum(tokens[:1]) / sum(tokens) == pytest.approx(0.9, abs=0.01) and tokens[2] == pytest.approx(
        24.40e9, rel=1e-3
    )
    assert [phase.rope_theta for phase in config.phases] == [50_000, 1_000_000, 1_000_000]
    for phase in config.phases:
        assert config.batch_of(phase) % phase.seq_len == 0
    # one schedule over the first two phases: warm-up of 1 %, a tenth of 3e-4 at its end; then a new one
    steps = config.phases[0].steps + config.phases[1].steps
    warmup = round(0.01 * steps)
    assert config.rate(0) == pytest.approx(3e-4 / warmup) and config.rate(warmup) == pytest.approx(3e-4)
    assert config.rate(steps - 1) == pytest.approx(3e-5) and config.rate(steps) < 1e-6
    assert config.rate(steps + config.phases[2].steps - 1) == pytest.approx(3e-6)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_dry_run_explains_the_numbers(name, capsys):
    path = ROOT / "recipes" / f"{name}.yaml"
    assert main(["pretrain", str(path), "--dry-run", "--gpus", "1", "--device", "h200"]) == 0
    with pytest.raises(SystemExit):  # options of `puyu plan` have no use here
        main(["pretrain", str(path), "--dry-run", "--json"])
    text, config = capsys.readouterr().out, recipe(name)
    first, second, third = config.phases
    assert f"parameters      {PARAMETERS[name]:,} = " in text
    rest = PARAMETERS[name] - 2 * 92544 * config.model.hidden_size
    assert f"non-embedding   {rest:,} = " in text
    assert (
        f"tokens          {first.steps * config.batch_tokens:,} = {first.steps:,} steps x {config.batch_tokens:,}"
        in text
    )
    steps = first.steps + second.steps
    assert f"from step 1: {round(steps * 0.01):,} steps up to 0.0003, cosine" in text
    assert f"from step {steps + 1:,}: {round(third.steps * 0.01):,} steps up to 3e-05" in text
    assert f"3e-05 at step {steps:,}" in text and f"3e-06 at step {steps + third.steps:,}" in text
    shape = config.model
    matrices = rest - (2 * shape.num_layers + 1) * shape.hidden_size + 92544 * shape.hidden_size
    flops = 6 * matrices + 12 * shape.num_layers * shape.num_heads * 128 * 4096
    work = f"FLOPs           {flops * first.steps * config.batch_tokens:.4g} = tokens x {flops / 1e9:.4g} G"
    assert work in text and "missing         data/corpus" in text
    if name != "internlm2_1.8b":
        assert "does not fit" in text
        return
    work = [float(line.split()[1]) for line in text.splitlines() if line.startswith("FLOPs")]
    days = [float(line.split()[4]) for line in text.splitlines() if line.startswith("on 1 x")]
    assert all(0.25 < flops / (day * 86400 * 989e12) < 0.7 for flops, day in zip(work, days, strict=True))


def test_a_dry_run_with_data_says_how_often_sources_are_seen(tmp_path, capsys):
    toys.tokenizer(tmp_path / "tokenizer")
    toys.corpus(tmp_path / "data")
    given = [
        "model.hidden_size=64",
        "batch_tokens=512",
        f"data={tmp_path / 'data'}",
        f"tokenizer={tmp_path / 'tokenizer'}",
    ]
    given += ["phases=[{steps: 100, seq_len: 128, weights: {web: 3, code: 1}}]"]
    path = tmp_path / "my.yaml"
    path.write_text("data: x\ntokenizer: y\n")
    assert main(["pretrain", str(path), "--dry-run", *(word for pair in given for word in ("--set", pair))]) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("source")}
    tokens, times = (float(lines["web"].split()[i].replace(",", "")) for i in (3, 6))
    assert times * tokens == pytest.approx(0.75 * 100 * 512, rel=0.02) and set(lines) == {"web", "code"}


def test_the_row_for_104_billion():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in CausalLM(model_config(recipe("internlm_104b"))).parameters())
    assert count == pytest.approx(104e9, rel=0.02)


def test_a_phase_with_its_own_rate_and_batch_goes_on_exactly(tmp_path):
    toys.tokenizer(tmp_path / "tokenizer")
    toys.corpus(tmp_path / "data")
    phases = [
        {"steps": 3, "seq_len": 64},
        {"steps": 2, "seq_len": 64},
        {"steps": 4, "seq_len": 32, "lr": 5e-4, "batch_tokens": 64},
    ]
    values = {"data": tmp_path / "data", "tokenizer": tmp_path / "tokenizer", "model": toys.SHAPE | {"vocab_size": 300}}
    values |= {"phases": phases, "batch_tokens": 128, "dtype": "float64", "device": "cpu", "checkpoint_every": 2}
    config = build(PretrainConfig, values | {"optim": {"lr": 1e-2, "warmup": 1}})
    numbers = pretrain.run(config, out=tmp_path / "whole")
    assert numbers["tokens"] == 5 * 128 + 4 * 64

    with pytest.raises(toys.Interrupted):
        pretrain.run(config, out=tmp_path / "broken", on_step=toys.interrupt_at(7))
    pretrain.run(config, out=tmp_path / "broken")
    assert toys.losses(tmp_path / "broken") == toys.losses(tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step_tokens"] for row in rows] == [128] * 5 + [64] * 4
    assert rows[0]["lr"] == 1e-2 and rows[4]["lr"] == pytest.approx(1e-3)
    assert rows[5]["lr"] == 5e-4 and rows[8]["lr"] == pytest.approx(5e-5)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    toys.tokenizer(tmp_path / "tokenizer")
    toys.corpus(tmp_path / "data")
    values = {"data": tmp_path / "data", "tokenizer": tmp_path / "tokenizer", "model": toys.SHAPE | {"vocab_size": 200}}
    with pytest.raises(CheckpointError, match="the model has 200"):
        pretrain.run(build(PretrainConfig, values | {"device": "cpu"}), out=tmp_path / "out")
