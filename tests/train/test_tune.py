"""Every method of fine-tuning by the command's own function: what trains, what is left, what goes on bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puyu.chain import sample
from puyu.data.chats import read_preferences
from puyu.errors import CheckpointError, ConfigError, InputError
from puyu.model.adapted import adapted_layers
from puyu.model.adapter_files import write_merged
from puyu.model.checkpoint import load_model, load_scalar_model, read_config, save_model
from puyu.model.config import ExpertShape
from puyu.model.init import init_weights
from puyu.model.lora import AdapterBank
from puyu.quant.gguf import export_gguf
from puyu.train import evaluate, pretrain, reward, sft
from puyu.train.layouts.config import LayoutConfig
from puyu.train.layouts.place import check_adapters
from puyu.train.memory import MemoryConfig
from puyu.train.scoring import RewardModel
from puyu.train.sft import ChatData, SFTConfig
from puyu.train.tune import TuneConfig, Tuning
from tests.train import toys

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("full", "freeze", "lora", "rslora", "dora", "pissa", "lora+", "qlora")
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base")
    tokenizer = toys.tokenizer(folder)
    model = toys.model(vocab_size=tokenizer.vocab_size, dtype=torch.float32, **WIDE)
    init_weights(model, seed=1, std=0.05)
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    return toys.chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


def config(model: Path, chats: Path, **tune) -> SFTConfig:
    optim = {"lr": 0.003, "schedule": "constant", "warmup": 0}
    more = {"steps": 6, "batch_tokens": 512, "dtype": "float32", "checkpoint_every": 1, "optim": optim}
    values = {"base": model, "data": [ChatData(path=chats)], "tune": {"rank": 4, **tune}, **more}
    return SFTConfig.model_validate(values)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_what_it_leaves_goes_on_where_it_ended(base, chats, tmp_path, method):
    found = sft.run(config(base, chats, method=method), out=tmp_path)
    assert found["loss_last"] < found["loss_first"] - 0.02
    adapter = tmp_path / "adapter_config.json"
    assert adapter.is_file() == (method not in ("full", "freeze"))
    model = load_model(tmp_path)
    save_model(model, tmp_path / "plain")
    toys.tokenizer(tmp_path / "plain")
    one = config(tmp_path / "plain", chats).model_copy(update={"steps": 1})
    assert sft.run(one, out=tmp_path / "on")["loss_first"] < found["loss_last"]
    before = load_model(base).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = {name.split(".")[-2] for name in changed}
    if method == "full":
        assert changed == before.keys()
    elif method == "freeze":
        assert changed == {name for name in before if ".layers." in name}
    else:
        assert parts == {"qkv", "out", "gate_up", "down"}


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_begun_again_it_is_the_same_to_the_bit(base, chats, tmp_path, method):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sft.run(config(base, chats, method=method, dropout=0.1), out=whole)

    def kill(step, _):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        sft.run(config(base, chats, method=method, dropout=0.1), out=killed, on_step=kill)
    sft.run(config(base, chats, method=method, dropout=0.1), out=killed)
    assert losses(whole) == losses(killed)
    for path in sorted(whole.glob("*.safetensors")):
        assert path.read_bytes() == (killed / path.name).read_bytes(), path.name


def test_lora_plus_moves_b_by_its_ratio(base, chats, tmp_path):
    moved = {}
    for method in ("lora", "lora+"):
        asked = config(base, chats, method=method, ratio=5.0)
        sft.run(asked.model_copy(update={"steps": 1}), out=tmp_path / method)
        stored = load_file(tmp_path / method / "adapter_model.safetensors")
        moved[method] = torch.cat([value.flatten() for name, value in stored.items() if "lora_B" in name])
    torch.testing.assert_close(moved["lora+"], 5 * moved["lora"], rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("checkpoint", ["selective", "full"])
def test_dropout_is_the_same_where_activations_are_computed_again(base, chats, tmp_path, checkpoint):
    asked = config(base, chats, method="lora", dropout=0.5)
    sft.run(asked, out=tmp_path / "kept")
    memory = MemoryConfig(checkpoint=checkpoint)
    sft.run(asked.model_copy(update={"memory": memory}), out=tmp_path / "again")
    sft.run(config(base, chats, method="lora"), out=tmp_path / "without")
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), abs=1e-5)
    assert abs(losses(tmp_path / "without")[-1] - losses(tmp_path / "kept")[-1]) > 1e-3


def test_a_state_holds_what_trains_and_nothing_else(base, chats, tmp_path):
    sizes = {}
    for method in ("full", "lora"):
        out = tmp_path / method

        def kill(step, _):
            os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(SystemExit):
            sft.run(config(base, chats, method=method), out=out, on_step=kill)
        sizes[method] = sum(path.stat().st_size for path in out.rglob("part-*.safetensors"))
    assert 0 < sizes["lora"] < sizes["full"] / 4


def test_an_adapter_goes_on_and_another_is_put_on_top_of_it(base, chats, tmp_path):
    first = sft.run(config(base, chats, method="lora"), out=tmp_path / "first")
    on = sft.run(config(base, chats, method="lora", start=tmp_path / "first"), out=tmp_path / "on")
    top = sft.run(config(base, chats, method="dora", adapters=[tmp_path / "first"]), out=tmp_path / "top")
    assert on["loss_first"] < first["loss_last"] and top["loss_first"] == pytest.approx(on["loss_first"], abs=1e-5)


def test_pissa_on_a_quantized_base_is_what_ran(base, chats, tmp_path):
    found = sft.run(config(base, chats, method="pissa", base="nf4"), out=tmp_path)
    save_model(load_model(tmp_path), tmp_path / "plain")
    toys.tokenizer(tmp_path / "plain")
    one = config(tmp_path / "plain", chats).model_copy(update={"steps": 1})
    assert sft.run(one, out=tmp_path / "on")["loss_first"] < found["loss_last"]


def test_whole_modules_train_beside_the_adapter(base, chats, tmp_path):
    sft.run(config(base, chats, method="lora", also=["embedding", "head"], targets=["attention"]), out=tmp_path)
    model, before = load_model(tmp_path), load_model(base).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    layers = {f"trunk.layers.{at}.attention.{part}.weight" for at in (0, 1) for part in ("qkv", "out")}
    assert changed == layers | {"trunk.embedding.weight", "head.weight"}


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"method": "lora", "targets": ["q_projj"]}, "fits no matrix of the model\n  remedy: give all, attention, mlp"),
        ({"method": "freeze", "layers": 3}, "the model has 2 layers"),
        ({"method": "full", "start": "anywhere"}, "tune.start: method full trains no adapter"),
        ({"method": "lora", "also": ["norms"]}, "use method freeze"),
    ],
)
def test_what_does_not_fit_is_named(base, chats, tmp_path, tune, message):
    with pytest.raises(ConfigError, match=message):
        sft.run(config(base, chats, **tune), out=tmp_path)


def test_looking_at_an_adapted_model_changes_nothing_and_shows_what_is_saved(base, chats, tmp_path):
    asked, seen = config(base, chats, method="lora"), {}
    plain, looked = tmp_path / "plain", tmp_path / "looked"

    def go_on(model, tokenizer, prompts, max_tokens, *, chat=False):
        seen.update(model.state_dict())
        return ["" for _ in prompts]

    sft.run(asked, out=plain)
    sft.run(asked.model_copy(update={"samples": ["hi"], "evaluate_every": 2}), out=looked, go_on=go_on)
    assert losses(looked) == losses(plain)
    for name, value in load_model(looked).state_dict().items():
        torch.testing.assert_close(seen[name], value, rtol=0, atol=1e-6)


def test_a_model_whose_copy_would_not_fit_is_looked_at_as_it_is(base, chats, tmp_path, monkeypatch):
    seen = []

    def go_on(model, tokenizer, prompts, max_tokens, *, chat=False):
        seen.append((any(adapted_layers(model)), sample.go_on(model, tokenizer, prompts, max_tokens, chat=chat)))
        return seen[-1][1]

    asked = config(base, chats, method="qlora", dropout=0.5).model_copy(update={"samples": ["hi"], "evaluate_every": 2})
    sft.run(asked, out=tmp_path / "roomy", go_on=go_on)
    roomy = list(seen)
    seen.clear()
    monkeypatch.setattr(evaluate, "_COPY", 1e-9)
    sft.run(asked, out=tmp_path / "narrow", go_on=go_on)
    assert [adapted for adapted, _ in roomy + seen] == [False] * len(roomy) + [True] * len(roomy)
    assert [texts for _, texts in roomy] == [texts for _, texts in seen]
    assert losses(tmp_path / "roomy") == losses(tmp_path / "narrow")


def test_an_adapter_chats_at_once_and_merged_it_says_the_same(base, chats, tmp_path, capsys):
    from puyu.cli.main import main
    from puyu.engine.llm import LLM

    sft.run(config(base, chats, method="qlora", also=["head"]), out=tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert "base and adapter in one" in capsys.readouterr().out
    said = []
    for folder in ("adapter", "merged"):
        with LLM(tmp_path / folder, dtype="float32") as llm:
            said.append([answer.text for answer in llm.batch(["hi 1", "hi 2"])])
    assert said[0] == said[1]
    assert main(["merge", str(base), "--out", str(tmp_path / "no")]) == CheckpointError.exit_code
    assert "is no adapter" in capsys.readouterr().err


def test_one_file_of_data_needs_no_list(base, chats):
    asked = config(base, chats)
    for data in (str(chats), [str(chats)], [{"path": str(chats)}]):
        assert SFTConfig.model_validate(asked.model_dump() | {"data": data}) == asked


def test_a_base_that_nf4_does_not_fit_is_refused(chats, tmp_path):
    made = toys.tokenizer(tmp_path / "narrow")
    save_model(toys.model(vocab_size=made.vocab_size, dtype=torch.float32), tmp_path / "narrow")
    with pytest.raises(
        ConfigError, match="blocks of 64 inputs, the model has matrices of 16\n  remedy: set tune.base=int8"
    ):
        sft.run(config(tmp_path / "narrow", chats, method="qlora"), out=tmp_path / "out")


def test_a_base_that_is_gone_is_named(base, chats, tmp_path):
    sft.run(config(base, chats, method="lora"), out=tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/nowhere"}))
    with pytest.raises(InputError, match="adapter_config.json: no such model folder: /nowhere"):
        load_model(tmp_path)


LAYOUTS = {
    "replicas": {"params": "replica", "grads": "replica", "states": "replica"},
    "zero1": {"params": "replica", "grads": "replica", "states": "full"},
    "full": {},
    "sequence": {"sequence": 2},
}


def test_adapters_train_under_layouts_as_in_one_process(base, chats, tmp_path):
    def row(name, method, layout, **more):
        wanted = config(base, chats, method=method, targets=["attention", "mlp"])
        values = wanted.model_dump(mode="json") | {"layout": layout, "dtype": "float64", "accumulate": 2, **more}
        return {"stage": "sft", "config": values, "out": str(tmp_path / name)}

    rows = [row(f"{method}-{name}", method, layout) for name, layout in LAYOUTS.items() for method in ("dora", "qlora")]
    rows.append(row("bf16", "qlora", {}, dtype="bfloat16"))
    (tmp_path / "plan.json").write_text(json.dumps(rows))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "tests.train.run_stages", str(tmp_path / "plan.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for method in ("dora", "qlora"):
        alone = row("alone", method, {})["config"]
        sft.run(SFTConfig.model_validate(alone), out=tmp_path / f"{method}-alone")
        for name in LAYOUTS:
            assert losses(tmp_path / f"{method}-{name}") == pytest.approx(
                losses(tmp_path / f"{method}-alone"), abs=1e-9
            )
            for key, value in load_model(tmp_path / f"{method}-{name}").state_dict().items():
                other = load_model(tmp_path / f"{method}-alone").state_dict()[key]
                torch.testing.assert_close(value, other, rtol=0, atol=1e-6)
    assert losses(tmp_path / "bf16")[-1] < losses(tmp_path / "bf16")[0]


@pytest.mark.parametrize("name", ["tensor", "pipeline"])
def test_a_layout_that_does_not_know_adapters_is_refused(base, name):
    model, layout = load_model(base), LayoutConfig.model_validate({name: 2})
    check_adapters(model, layout)
    Tuning.of(model, TuneConfig(method="lora"), seed=0, base=base)
    with pytest.raises(ConfigError, match=f"layout.{name}=2 does not work with adapters"):
        check_adapters(model, layout)


def test_experts_are_tuned_quantized_and_chat(chats, tmp_path):
    base = tmp_path / "base"
    tokenizer = toys.tokenizer(base)
    experts = ExpertShape(count=3, per_token=2, size=64)
    model = toys.model(family="mixtral", experts=experts, vocab_size=tokenizer.vocab_size, dtype=torch.float32, **WIDE)
    init_weights(model, seed=1, std=0.05)
    save_model(model, base)
    found = sft.run(config(base, chats, method="qlora", targets=["mlp"]), out=tmp_path / "run")
    assert found["loss_last"] < found["loss_first"] - 0.02
    names = {name.split(".")[-3] for name in load_file(tmp_path / "run" / "adapter_model.safetensors")}
    assert names == {"w1", "w2", "w3"}
    tuned = load_model(tmp_path / "run")
    save_model(tuned, tmp_path / "plain")
    toys.tokenizer(tmp_path / "plain")
    one = config(tmp_path / "plain", chats).model_copy(update={"steps": 1})
    assert sft.run(one, out=tmp_path / "on")["loss_first"] < found["loss_last"]
    Tuning.of(model, TuneConfig(method="lora", targets=["mlp"]), seed=0, base=base)
    with pytest.raises(ConfigError, match="layout.expert=2 does not work with adapters"):
        check_adapters(model, LayoutConfig.model_validate({"expert": 2}))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_longer_context_is_learned_saved_and_loaded(base, tmp_path, method):
    """Also by an adapter, which says so beside its files; a server refuses it beside others."""
    talk = {"messages": [{"role": "user", "content": "hi " * 900}, {"role": "assistant", "content": "the cat"}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(talk) + "\n")
    short = read_config(base)
    asked = config(base, tmp_path / "long.jsonl", method=method).model_copy(update={"batch_tokens": 4096})
    with pytest.raises(InputError, match="nothing to train on"):
        sft.run(asked, out=tmp_path / "short")
    numbers = sft.run(asked.model_copy(update={"context": 4096}), out=tmp_path / "out")
    found = load_model(tmp_path / "out").config
    assert numbers["conversations"] == 1 and found == short.longer(4096, "yarn") == read_config(tmp_path / "out")
    assert found.max_positions == 4096 > short.max_positions and found.scaling.kind == "yarn"
    if method == "lora":
        with pytest.raises(CheckpointError, match="stretched positions"):
            AdapterBank(load_model(base)).load("long", tmp_path / "out")
        write_merged(tmp_path / "out", tmp_path / "merged")
        assert read_config(tmp_path / "merged").scaling == found.scaling


def test_noise_changes_the_losses_and_is_the_same_when_a_run_goes_on(base, chats, tmp_path):
    plain = config(base, chats, method="full")
    asked = plain.model_copy(update={"noise": 5.0})
    for out, one in (("plain", plain), ("whole", asked)):
        sft.run(one, out=tmp_path / out)

    def kill(step, _):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        sft.run(asked, out=tmp_path / "killed", on_step=kill)
    sft.run(asked, out=tmp_path / "killed")
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed") != losses(tmp_path / "plain")


def test_conversations_held_out_are_not_learned(base, tmp_path):
    chats = toys.chats(tmp_path / "chats.jsonl", 60)
    asked = config(base, chats).model_copy(update={"heldout": 0.2})
    numbers = sft.run(asked, out=tmp_path / "out")
    docs = sft.read_docs(asked.data, toys.tokenizer(tmp_path), seed=0, heldout=0.2)
    assert 4 < len(docs.held) < 20 and len(docs.held) + len(docs.train) == 60
    assert not {tuple(ids) for ids, _ in docs.held} & {tuple(ids) for ids, _ in docs.train}
    assert numbers["conversations"] == len(docs.train) and numbers["val_loss"] > 0
    with pytest.raises(ValueError, match="give one of the two"):
        SFTConfig(base=base, data=[ChatData(path=chats)], heldout=0.1, validation=chats)


@pytest.mark.parametrize("method", ["lora", "qlora", "freeze"])
def test_a_reward_model_is_tuned_and_written_whole(base, tmp_path, method):
    pairs = toys.pairs(tmp_path / "pairs.jsonl")
    domains = {"default": "", "helpful": "Rate how much it helps."}
    more = {"steps": 8, "batch_tokens": 2048, "dtype": "float32", "domains": domains, "heldout": 0.2}
    more |= {"optim": {"lr": 0.01}}
    asked = reward.RewardConfig.model_validate(
        {"base": base, "data": [pairs], "tune": {"method": method, "rank": 4, "layers": 1}, **more}
    )
    numbers = reward.run(
        asked.model_copy(update={"optim": asked.optim.model_copy(update={"lr": 0.01})}), out=tmp_path / "out"
    )
    assert (
        numbers["loss_last"] < numbers["loss_first"] - 0.02 and not (tmp_path / "out" / "adapter_config.json").exists()
    )
    model, before = load_scalar_model(tmp_path / "out"), load_model(base)
    assert 0 < numbers["trained_parameters"] < sum(parameter.numel() for parameter in model.parameters()) / 2
    assert model.head.weight.abs().sum() > 0
    assert torch.equal(model.trunk.embedding.weight, before.trunk.embedding.weight)
    changed = not torch.equal(model.trunk.layers[1].mlp.down.weight, before.trunk.layers[1].mlp.down.weight)
    assert changed and numbers["heldout"]["all"]["accuracy"] == measured_again(tmp_path / "out", asked)


def measured_again(folder: Path, asked) -> float:
    """The accuracy of the held-out pairs by the model that was written."""
    rewards = RewardModel.load(folder)
    found, _ = read_preferences(asked.data[0])
    held = [pair for pair in found if reward._is_heldout(pair, asked.heldout)]
    scores = rewards.score(
        [(pair.prompt, answer, pair.domain) for pair in held for answer in (pair.chosen, pair.rejected)]
    )
    return sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) / len(held)


def test_pretraining_goes_on_with_an_adapter(base, tmp_path):
    toys.corpus(tmp_path / "data", 80)
    asked = {"data": tmp_path / "data", "tokenizer": base, "base": base, "tune": {"method": "lora", "rank": 4}}
    fast = {"batch_tokens": 128, "dtype": "float32", "phases": [{"steps": 12, "seq_len": 64}], "optim": {"lr": 0.01}}
    numbers = pretrain.run(pretrain.PretrainConfig.model_validate(asked | fast), out=tmp_path / "out")
    assert numbers["loss_last"] < numbers["loss_first"] - 0.05 and (tmp_path / "out" / "adapter_config.json").is_file()
    assert not torch.equal(load_model(tmp_path / "out").head.weight, 0 * load_model(base).head.weight)
    changed = {
        name
        for (name, a), (_, b) in zip(
            load_model(base).named_parameters(), load_model(tmp_path / "out").named_parameters(), strict=True
        )
        if not torch.equal(a, b)
    }
    assert {name.split(".")[-2] for name in changed} == {"qkv", "out", "gate_up", "down"}
    with pytest.raises(ConfigError, match="there is none"):
        pretrain.run(pretrain.PretrainConfig.model_validate({**asked, **fast, "base": None}), out=tmp_path / "nothing")


def test_an_adapter_is_exported_as_what_it_is_merged_into(base, chats, tmp_path):
    sft.run(config(base, chats, method="dora"), out=tmp_path / "a" / "model")
    write_merged(tmp_path / "a" / "model", tmp_path / "b" / "model")
    files = [export_gguf(tmp_path / side / "model", tmp_path / f"{side}.gguf", pre="default").path for side in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    export_gguf(base, tmp_path / "base.gguf", pre="default")
    assert (tmp_path / "base.gguf").read_bytes() != files[0].read_bytes()
