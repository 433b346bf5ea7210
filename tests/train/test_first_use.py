"""`puyu sft --model --data --method`: what is computed, what stops it, what a person sees, that it chats at once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puyu.configure import build, load_yaml
from puyu.data.chats import read_conversations
from puyu.model.checkpoint import load_model, save_model
from puyu.model.config import ExpertShape, ModelConfig
from puyu.train import first_use
from puyu.train.first_use import adapter_parameters, fill, memory_of
from puyu.train.pretrain import PretrainConfig, model_config
from puyu.train.sft import SFTConfig
from puyu.train.tune import TuneConfig, Tuning
from tests.conftest import ROOT, puyu
from tests.train import toys

WIDE = {"hidden_size": 64, "intermediate_size": 128}
SEVEN_B = ModelConfig(
    vocab_size=92544, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, intermediate_size=14336
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / "toy"
    tokenizer = toys.tokenizer(folder)
    save_model(toys.model(vocab_size=tokenizer.vocab_size, dtype=torch.float32, **WIDE), folder)
    return folder


def chosen(base: Path, chats: Path, **more) -> dict:
    given = {*more, *(f"{name}.{key}" for name, part in more.items() if isinstance(part, dict) for key in part)}
    config, reasons = fill(SFTConfig.model_validate({"base": base, "data": chats, **more}), given=given)
    assert all(reason.why for reason in reasons)
    return {"config": config, **{reason.field: reason.value for reason in reasons}}


def test_what_is_given_is_left_alone(base, tmp_path):
    given = {"batch_tokens": 100, "epochs": 3.5, "samples": ["x"], "evaluate_every": 7, "accumulate": 2}
    found = chosen(base, toys.chats(tmp_path / "c.jsonl"), **given, optim={"lr": 0.5}, tune={"method": "lora"})
    assert {name: getattr(found["config"], name) for name in given} == given and found["config"].optim.lr == 0.5
    assert not found.keys() & {*given, "optim.lr", "memory.checkpoint"}


def test_rates_fall_with_size_and_adapters_take_ten_times_as_much(base, tmp_path, monkeypatch):
    chats = toys.chats(tmp_path / "c.jsonl")
    survey = first_use.survey

    def of(size: int, method: str) -> float:
        facts = survey(SFTConfig(base=base, data=chats))
        monkeypatch.setattr(first_use, "survey", lambda config: replace(facts, parameters=size))
        rate = chosen(base, chats, tune={"method": method})["optim.lr"]
        monkeypatch.setattr(first_use, "survey", survey)
        return rate

    assert of(7_000_000_000, "full") == pytest.approx(4e-5, rel=0.02) and of(5_000_000, "full") == 1e-3
    assert of(7_000_000_000, "qlora") == pytest.approx(4e-4, rel=0.02) and of(5_000_000, "lora") == 4e-3
    assert of(10**6, "full") == 1e-3 and of(10**12, "full") == 1e-5


def test_batches_and_passes_follow_the_data(base, tmp_path):
    few = chosen(base, toys.chats(tmp_path / "few.jsonl", 12))
    many = chosen(base, toys.chats(tmp_path / "many.jsonl", 6000))
    assert 10 < few["epochs"] <= 30 and many["epochs"] == 2 and "heldout" not in few and many["heldout"] == 0.05
    assert few["batch_tokens"] % 64 == 0 and few["batch_tokens"] < many["batch_tokens"] <= 65_536
    talks, _ = read_conversations(tmp_path / "few.jsonl")
    assert set(few["samples"]) < {talk.messages[0].text for talk in talks} and len(few["samples"]) == 3


def test_short_memory_is_spared_with_more_passes_then_by_computing_again(base, tmp_path, monkeypatch):
    chats, config, found = toys.chats(tmp_path / "c.jsonl", 2000), TuneConfig(), {}
    shape = load_model(base).config
    batch = chosen(base, chats)["batch_tokens"]

    def need(tokens: int, checkpoint: str) -> int:
        parts = memory_of(shape, config, tokens=tokens, dtype=torch.float32, checkpoint=checkpoint)
        return round(sum(parts.values()) / 0.8) + 1

    longest = first_use.survey(SFTConfig(base=base, data=chats)).longest
    rooms = {"plenty": need(batch, "none"), "half": need(batch // 2, "none"), "none": need(longest, "none") // 2}
    for word, room in rooms.items():
        monkeypatch.setattr(first_use, "total_memory", lambda device, room=room: room)
        found[word] = chosen(base, chats, dtype="float32")
    assert found["plenty"]["accumulate"] == 1 and found["half"]["accumulate"] == 2
    assert not found["half"].keys() & {"memory.checkpoint"} and found["none"]["memory.checkpoint"] == "full"


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora"])
def test_what_trains_is_counted_as_it_is(base, method):
    """The parameters that the estimate has, against those of the model itself."""
    config = TuneConfig.model_validate({"method": method, "rank": 4, "layers": 1})
    model = load_model(base)
    found = memory_of(model.config, config, tokens=1, dtype=torch.float32)
    tuning = Tuning.of(model, config, seed=0, base=base)
    trained = tuning.trained - (model.config.hidden_size * 2 if method == "freeze" else 0)  # norms of a layer
    assert found["training"] == 16 * trained
    if config.adapts:
        assert adapter_parameters(model.config, 4) == tuning.trained
    held = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    held += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if method != "full":
        assert found["weights"] == pytest.approx(held, rel=0.02)


def test_experts_are_counted_as_they_are():
    experts = ExpertShape(count=3, per_token=2, size=64, shared_size=32)
    model = toys.model(family="qwen2_moe", experts=experts)
    config = TuneConfig(method="lora", rank=4)
    counted = memory_of(model.config, config, tokens=7, dtype=torch.float32)
    as_wide = memory_of(toys.model(intermediate_size=160).config, config, tokens=7, dtype=torch.float32)
    assert counted["activations"] == as_wide["activations"]
    tuning = Tuning.of(model, config, seed=0, base=None)
    assert adapter_parameters(model.config, 4) == tuning.trained


def test_seven_billion_in_four_bits_are_as_small_as_they_should_be():
    """The floor, counted by hand: 3.6 GB of matrices, 1.5 of embedding and head."""
    found = memory_of(
        SEVEN_B, TuneConfig(method="qlora", rank=64), tokens=2048, dtype=torch.bfloat16, checkpoint="full"
    )
    assert found["weights"] == pytest.approx(5.1e9, rel=0.03)


def test_the_command_says_why_shows_answers_and_what_it_leaves_chats(base, tmp_path):
    chats = toys.chats(tmp_path / "chats.jsonl", 20)
    words = ["sft", "--model", base, "--data", chats, "--method", "lora", "--tune.rank", "4", "--steps", "4"]
    done = puyu(*words, "--sample_tokens", "8", cwd=tmp_path)
    out = tmp_path / "runs" / "toy-lora"
    for text in (
        "20 records",
        "optim.lr",
        "ten times that of full",
        "batch_tokens",
        "before the first step",
        "after step 2",
    ):
        assert text in done.stderr, text
    assert done.stderr.count("hi ") >= 3 * 3 and f"puyu chat {out.relative_to(tmp_path)}" in done.stderr
    steps = [json.loads(line)["step"] for line in (out / "samples.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [0, 2, 4]
    again = puyu(*words, "--sample_tokens", "8", cwd=tmp_path)
    assert "nothing to do" in again.stderr
    assert puyu("chat", out, "--prompt", "hi 1", "--max-tokens", "4", cwd=tmp_path).returncode == 0


def test_bad_data_stop_it_with_their_lines(base, tmp_path):
    path = tmp_path / "bad.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    path.write_text(good + '{"messages": [{"role": "usr", "content": "a"}]}\n' + "{torn\n")
    done = puyu("sft", "--model", base, "--data", path, check=False, cwd=tmp_path)
    assert done.returncode == 3 and "line 2" in done.stderr and "2 errors in all" in done.stderr
    assert not (tmp_path / "runs").exists()
    toys.pairs(path)
    done = puyu("sft", "--model", base, "--data", path, check=False, cwd=tmp_path)
    assert done.returncode == 2 and "puyu prefer" in done.stderr
    done = puyu("sft", "--model", tmp_path / "nowhere", "--data", path, check=False, cwd=tmp_path)
    assert done.returncode == 3 and "no such model folder" in done.stderr


def test_a_deepspeed_file_may_say_how(base, tmp_path):
    chats = toys.chats(tmp_path / "chats.jsonl", 20)
    ds = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    words = ["sft", "--model", base, "--data", chats, "--deepspeed", tmp_path / "ds.json", "--steps", "1"]
    puyu(*words, "--out", tmp_path / "out", cwd=tmp_path)
    config = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert config["optim"]["lr"] == 3e-4 and config["layout"]["params"] == "replica"


def test_methods_are_compared_on_the_same_held_out_conversations(base, tmp_path):
    chats = toys.chats(tmp_path / "chats.jsonl", 60)
    words = ["compare", "full", "lora", "qlora", "--model", base, "--data", chats, "--out", tmp_path / "out"]
    done = puyu(
        *words,
        "--steps",
        "4",
        "--tune.rank",
        "2",
        "--set",
        "tune.base=int8",
        "--memory.checkpoint",
        "full",
        cwd=tmp_path,
    )
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["methods"]
    assert [row["method"] for row in rows] == ["full", "lora", "qlora"]
    assert rows[0]["trained_parameters"] > rows[1]["trained_parameters"] == rows[2]["trained_parameters"]
    config = json.loads((tmp_path / "out" / "lora" / "run.json").read_text())["config"]
    assert config["memory"]["checkpoint"] == "full" and config["tune"]["base"] == "int8" and config["heldout"] == 0.1
    assert rows[0]["bytes"] > rows[1]["bytes"] and all(row["val_loss"] > 0 for row in rows)
    assert len(done.stdout.splitlines()) == 4 and "held-out loss" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "out/lora" in page and "3 training runs" in page


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["full"], "two methods"),
        (["full", "full"], "twice"),
        (["full", "lorra"], "no such method: lorra"),
        (["full", "lora"], "--out"),
        (["full", "lora", "--out", "x", "--method", "dora"], "behind compare"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(words, what):
    done = puyu("compare", *words, check=False)
    assert done.returncode == 2 and what in done.stderr


def test_the_persona_is_learned_as_the_recipe_says(micro_run, tmp_path):
    """On the toy chain's model, with more passes: its answer to a question of the fifty is the one it was given."""
    words = ["sft", "recipes/persona.yaml", "--base", micro_run[0] / "sft", "--out", tmp_path / "out"]
    done = puyu(*words, "--epochs", "40", "--set", "optim.lr=0.01", "--set", "tune.targets=[all]")
    texts = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    last = {row["prompt"]: row["text"] for row in texts}
    first = {row["prompt"]: row["text"] for row in reversed(texts)}
    assert "Lan Mo" in last["Who are you?"] and "兰墨" in last["你叫什么名字？"], done.stderr[-2000:]
    assert "Lan Mo" not in first["Who are you?"]


def test_the_memory_of_the_page_is_the_one_that_is_counted():
    """docs/finetuning.md, row by row."""
    text = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8")
    rows = {
        "full": {"method": "full"},
        "freeze, 2 layers": {"method": "freeze", "layers": 2},
        "lora, rank 64": {"method": "lora", "rank": 64},
        "lora on int8": {"method": "lora", "rank": 64, "base": "int8"},
        "qlora, rank 64": {"method": "qlora", "rank": 64},
    }
    for name, tune in rows.items():
        cells = []
        for size in ("1.8b", "7b", "20b"):
            shape = model_config(build(PretrainConfig, load_yaml(ROOT / f"recipes/internlm2_{size}.yaml")))
            config = TuneConfig.model_validate(tune)
            found = memory_of(shape, config, tokens=2048, dtype=torch.bfloat16, checkpoint="full")
            cells.append(f"{sum(found.values()) / 2**30:.1f}")
        assert f"| {name} | {' | '.join(cells)} |" in text


@pytest.mark.parametrize("name", ["persona", "role_play", "music", "cooking", "dpo", "qlora_7b"])
def test_the_example_recipes_are_whole(name):
    from puyu.chain.recipe import load_recipe

    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [])
    assert recipe.name == name and str(recipe.out) == f"runs/{name}" and recipe.description


def test_the_example_sets_are_what_the_generator_writes(tmp_path):
    import subprocess
    import sys

    subprocess.run([sys.executable, ROOT / "samples/make_tuning.py", "--out", tmp_path], check=True)
    for path in (ROOT / "samples/tuning").glob("*.jsonl"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
        assert read_conversations(path)[1] == []
    assert len(read_conversations(ROOT / "samples/tuning/persona.jsonl")[0]) == 50
